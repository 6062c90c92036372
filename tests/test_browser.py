"""The page in a real browser, as readers use it: headless Chromium, driven by Playwright.

Skipped where no Chromium is installed; CHROMIUM names another than those that are looked for.
"""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from headless_browser import COUNT_NODES, chromium, opened_browser
from synthetic_run import SyntheticRun

from lowmem_icl.masks.files import read_mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.files import publish_run
from lowmem_icl.report.page.write import MOST_IMAGE_BYTES, write_report
from lowmem_icl.report.run_tables import read_run
from lowmem_icl.tables.schema import read_table, write_table

HEAVIEST_PAGE_BYTES = 5_000_000
MOST_NODES = 5_000
HOSTILE = "<script>window.hacked = 1</script> [v2] <img src=x onerror=window.hacked=2>"
PLACE_OF_CELL = """([x, y]) => {
  const map = [...Bokeh.index.roots][0].child_views[0], box = map.el.getBoundingClientRect();
  return [box.x + map.frame.x_scale.compute(x), box.y + map.frame.y_scale.compute(y)];
}"""


@dataclass
class Window:
    """A page in a window of the browser, with all that went wrong in it."""

    page: Any
    problems: list[str] = field(default_factory=list)

    def open(self, path: Path, address: str = "") -> "Window":
        """Load a page and wait until all of it is drawn."""
        self.page.goto(path.as_uri() + address)
        self.page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        return self

    def scrolled_to(self, selector: str) -> "Window":
        self.page.locator(selector).first.scroll_into_view_if_needed()
        return self

    def card(self) -> dict[tuple[str, int], str]:
        """Return the chosen unit's values by task and shots."""
        cells = self.page.eval_on_selector_all(
            "#unit [data-cell]", "es => es.map(e => [e.dataset.cell, e.textContent])"
        )
        split = [(name.rsplit("|", 1), text) for name, text in cells]
        return {(task, int(shots)): text for (task, shots), text in split}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if chromium() is None:
        pytest.skip("no Chromium; install Debian's chromium, or name one in CHROMIUM")
    with opened_browser() as opened:
        yield opened


@pytest.fixture
def windows(browser: Any) -> Iterator[Any]:
    """A maker of windows; at the end nothing may have gone wrong in any of them."""
    opened: list[tuple[Any, Window]] = []

    def window(width: int = 1280, **settings: Any) -> Window:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        made = Window(context.new_page())
        made.page.on("console", lambda message: made.problems.append(f"console: {message.text}"))
        made.page.on("pageerror", lambda error: made.problems.append(f"error: {error}"))
        made.page.on("request", lambda asked: None if asked.url.startswith(("file:", "blob:", "data:"))
                     else made.problems.append(f"request: {asked.url}"))  # fmt: skip
        made.page.on("dialog", lambda dialog: made.problems.append(f"dialog: {dialog.message}"))
        opened.append((context, made))
        return made

    yield window
    for context, made in opened:
        context.close()
        assert made.problems == []


@pytest.fixture(scope="session")
def demo_page(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of the demo, beside a copy of its folder."""
    folder = tmp_path_factory.mktemp("page") / "demo"
    shutil.copytree(small_run, folder)
    publish_run(folder)
    return folder / "report.html"


@pytest.fixture(scope="session")
def large_page(opt66b_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of OPT-66B's size: 64 layers of 72 heads, 14 tasks, 3 shot counts, and as heavy images as a page
    may have.
    """
    page = tmp_path_factory.mktemp("page") / "report.html"
    write_report([read_run(opt66b_run)], page, {"ablate-heads": bytes(MOST_IMAGE_BYTES)})
    return page


def test_a_page_of_full_size_is_light_and_complete(windows: Any, large_page: Path) -> None:
    assert large_page.stat().st_size <= HEAVIEST_PAGE_BYTES
    window = windows().open(large_page)
    assert window.page.evaluate(COUNT_NODES) <= MOST_NODES
    assert window.page.locator("#atlas button").count() == 45
    drawn = window.page.evaluate(
        "[...document.querySelectorAll('.plot')].filter(e => e.childElementCount === 0).map(e => e.id)"
    )
    assert drawn == [], "every plot is drawn"


def test_the_answer_is_there_before_any_script_has_run(windows: Any, demo_page: Path) -> None:
    window = windows(java_script_enabled=False)
    window.page.goto(demo_page.as_uri())
    assert window.page.locator("h1").inner_text().startswith("demo in int8")
    assert window.page.locator(".answer li").count() == 3
    assert window.page.locator("#accuracy table").count() == 1
    images = window.page.locator("figure img")
    assert images.count() >= 8
    assert all(images.nth(index).is_visible() for index in range(images.count()))


def close(text: str, value: float) -> bool:
    return math.isclose(float(text.rstrip("*")), value, rel_tol=0.06, abs_tol=2e-3)


def test_cells_equal_the_table(windows: Any, demo_page: Path) -> None:
    window = windows()
    results = read_table(demo_page.parent / "results.parquet", "results")
    compared = 0
    for name, layer, head in (("L0H0", 0, 0), ("L1H1", 1, 1), ("L3H7", 3, 7), ("L2F", 2, None)):
        window.open(demo_page, f"#metric=gold_logprob_drop&unit={name}")
        window.page.reload()
        window.page.wait_for_selector("html[data-ready]", state="attached")
        cells = window.card()
        unit = (pl.col("layer") == layer) & (pl.col("head").eq_missing(head))
        drops = results.filter(
            (pl.col("metric") == "gold_logprob_drop") & (pl.col("procedure") == "single") & unit
        )
        for row in drops.iter_rows(named=True):
            assert close(cells[row["task"], row["shots"]], row["value"]), (name, row)
            compared += 1
    assert compared >= 12


def test_hover_and_click_tell_of_a_unit_and_the_address_brings_it_back(windows: Any, demo_page: Path) -> None:
    window = windows().open(demo_page).scrolled_to("#map")
    x, y = window.page.evaluate(PLACE_OF_CELL, [1, 1])
    window.page.mouse.move(x - 3, y)
    window.page.mouse.move(x, y)
    tip = window.page.get_by_text("prefix matching").locator("visible=true").first
    tip.wait_for()
    window.page.mouse.click(x, y)
    assert window.page.locator("#unit h3").inner_text() == "L1H1"
    assert "unit=L1H1" in window.page.url
    again = windows().open(demo_page, "#" + window.page.url.split("#")[1])
    assert again.page.locator("#unit h3").inner_text() == "L1H1"
    again.page.locator("#plot-map").focus()
    again.page.keyboard.press("ArrowRight")
    assert again.page.locator("#unit h3").inner_text() == "L1H2"
    again.page.keyboard.press("ArrowUp")
    assert again.page.locator("#unit h3").inner_text() == "L2H2"


def test_units_are_found_by_name_and_others_refused(windows: Any, demo_page: Path) -> None:
    window = windows().open(demo_page)
    find = window.page.locator("input[name=unit]")
    find.fill("l2f")
    find.press("Enter")
    assert window.page.locator("#unit h3").inner_text() == "L2F"
    find.fill("L9H0")
    find.press("Enter")
    assert "no such unit" in window.page.locator("#unit-problem").inner_text()
    assert window.page.locator("#unit h3").inner_text() == "L2F"


def test_units_sort_and_the_download_holds_all(windows: Any, demo_page: Path) -> None:
    window = windows().open(demo_page, "#task=recall&shots=4&metric=gold_logprob_drop")
    results = read_table(demo_page.parent / "results.parquet", "results")
    drops = results.filter(
        (pl.col("metric") == "gold_logprob_drop")
        & (pl.col("procedure") == "single")
        & (pl.col("task") == "recall")
        & (pl.col("shots") == 4)
    ).sort("value", descending=True)

    def values() -> list[float]:
        return [float(text) for text in window.page.locator("#unit-rows td:nth-child(3)").all_inner_texts()]

    assert values() == sorted(values(), reverse=True)
    assert close(str(values()[0]), drops["value"][0])
    window.page.locator("[data-sort=value]").click()
    assert values() == sorted(values())
    assert window.page.locator("th[aria-sort=ascending]").count() == 1
    with window.page.expect_download() as download:
        window.page.locator("#unit-csv").click()
    table = pl.read_csv(download.value.path())
    assert len(table) == len(drops) == 36
    by_unit = dict(table.select("unit", "value").iter_rows())
    for row in drops.iter_rows(named=True):
        name = f"L{row['layer']}F" if row["head"] is None else f"L{row['layer']}H{row['head']}"
        assert math.isclose(by_unit[name], row["value"], rel_tol=2e-3, abs_tol=1e-6)


def test_the_bar_and_the_atlas_choose_what_is_shown(windows: Any, demo_page: Path) -> None:
    window = windows().open(demo_page)
    window.page.locator("select[name=task]").select_option("knowledge")
    window.page.locator("select[name=shots]").select_option("0")
    pressed = window.page.locator("#atlas button[aria-pressed=true]")
    assert pressed.get_attribute("aria-label") == "knowledge, 0 shots"
    colours = "() => Bokeh.documents[0].get_model_by_name('cells').data.colour.slice()"
    before = window.page.evaluate(colours)
    window.page.locator("#atlas button[aria-label='recall, 4 shots']").click()
    assert window.page.locator("select[name=task]").input_value() == "recall"
    assert window.page.evaluate(colours) != before
    window.page.locator("input[name=significant]").check()
    shown = [colour for colour in window.page.evaluate(colours) if colour == colour]
    rows = window.page.locator("#unit-rows tr").count()
    assert len(shown) == rows < len(before)


def test_a_downloaded_mask_is_the_run_s(windows: Any, demo_page: Path, tmp_path: Path) -> None:
    window = windows().open(demo_page)
    button = window.page.locator("#masks button[data-name]").first
    with window.page.expect_download() as download:
        button.click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    own = read_mask(demo_page.parent / "masks" / path.name)
    assert read_mask(path).mask == own.mask
    assert read_mask(path).model == own.model


@pytest.mark.parametrize("size", ["demo_page", "large_page"])
def test_on_a_telephone_only_tables_scroll(windows: Any, size: str, request: pytest.FixtureRequest) -> None:
    window = windows(width=390).open(request.getfixturevalue(size))
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 390
    small = window.page.evaluate("""() => [...document.querySelectorAll("p, td, th, button, label, li")]
        .filter(e => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 12)
        .map(e => e.textContent)""")
    assert small == []


def luminance(colour: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_it_is_dark_where_the_reader_wants_it(windows: Any, demo_page: Path) -> None:
    window = windows(color_scheme="dark").open(demo_page)
    style = "getComputedStyle(document.body)"
    ink = "Bokeh.documents[0].get_model_by_name('map').left.find(a => a.axis_label).major_label_text_color"
    assert luminance(window.page.evaluate(f"{style}.backgroundColor")) < 0.2
    assert luminance(window.page.evaluate(f"{style}.color")) > 0.8
    dark = window.page.evaluate(ink)
    window.page.locator("#theme").click()
    assert luminance(window.page.evaluate(f"{style}.backgroundColor")) > 0.9
    assert window.page.evaluate(ink) != dark


def test_paper_gets_all_tables_and_no_buttons(windows: Any, demo_page: Path) -> None:
    window = windows(color_scheme="dark").open(demo_page)
    assert window.page.locator("details").count() > 0
    assert window.page.pdf(format="A4").startswith(b"%PDF")
    assert window.page.evaluate("[...document.querySelectorAll('details')].every(e => e.open)")
    window.page.emulate_media(media="print")
    assert not window.page.locator("#bar").is_visible()


def test_names_do_nothing(windows: Any, tmp_path: Path) -> None:
    run = SyntheticRun(layers=2, heads=3, tasks=(HOSTILE, "copa"), shots=(0, 4), model=HOSTILE)
    folder = run.write(tmp_path / "run")
    write_report([read_run(folder)], folder / "report.html")
    window = windows().open(folder / "report.html")
    window.page.locator("select[name=task]").select_option(HOSTILE)
    window.scrolled_to("#map")
    for cell in ([0, 0], [1, 1], [4, 0]):
        window.page.mouse.move(*window.page.evaluate(PLACE_OF_CELL, cell))
    window.scrolled_to("#accuracy")
    box = window.page.locator("#plot-accuracy").bounding_box()
    for step in range(20):
        window.page.mouse.move(box["x"] + box["width"] * step / 20, box["y"] + box["height"] * 0.3)
    assert window.page.evaluate("window.hacked") is None
    assert window.page.locator("td", has_text=HOSTILE).count() > 0


def test_a_metric_that_is_0_everywhere_and_unknown_agreement_draw(windows: Any, tmp_path: Path) -> None:
    folder = SyntheticRun(layers=2, heads=3, tasks=("copa", "wic", "rte"), shots=(0, 4)).write(
        tmp_path / "run"
    )
    results = read_table(folder / "results.parquet", "results")
    is_unknown = (
        (pl.col("metric") == "spearman") & (pl.col("other_task") == "rte") & (pl.col("task") == "copa")
    )
    value = pl.when(pl.col("metric") == "gold_prob_drop").then(0.0).otherwise("value")
    write_table(results.filter(~is_unknown).with_columns(value=value), "results", folder / "results.parquet")
    write_report([read_run(folder)], folder / "report.html")
    window = windows().open(folder / "report.html")
    window.page.locator("select[name=metric]").select_option("gold_prob_drop")
    assert set(window.page.locator("#unit-rows td:nth-child(3)").all_inner_texts()) == {"0"}
    cells = window.page.evaluate("source('agreement-cells').data.value.length")
    assert cells == 3 + 2 * 2, "the diagonal, and the two pairs that are known"


def test_prompts_that_were_given_have_a_page_without_any_task(windows: Any, given_run: Path) -> None:
    window = windows().open(given_run / "report.html")
    assert window.page.locator("#atlas button").count() == 2
    assert window.page.locator("[name=shots] option").all_text_contents() == ["given prompts"]
    labels = window.page.locator("[name=metric] option").all_text_contents()
    assert labels[0] == "restored by the clean value"
    assert len(labels) == 4
    assert window.page.locator("#unit-rows tr").count() == 25
    window.page.locator("[name=task]").select_option("clean")
    assert "Nothing measured here" in window.page.locator("#nothing").inner_text()
    window.page.locator("[name=metric]").select_option("function_vector")
    assert window.page.locator("#nothing").inner_text() == ""
    assert "metric=function_vector" in window.page.url
    window.page.locator("#atlas button").first.click()
    records = read_table(given_run / "results.parquet", "results").filter(
        (pl.col("metric") == "break_gold_logprob") & (pl.col("kind") == "ffn") & pl.col("exact")
    )
    window.page.locator("[name=metric]").select_option("break_gold_logprob")
    for row in records.iter_rows(named=True):
        window.page.locator("[name=unit]").fill(f"L{row['layer']}F")
        window.page.keyboard.press("Enter")
        shown = window.page.locator("#unit [data-cell='pairs|null']").inner_text()
        assert close(shown, row["value"])
    heads = window.page.evaluate("source('patched-heads').data.x.length")
    assert heads == 32


def test_several_runs_are_compared(windows: Any, demo_page: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo_page.parent, other)
    write_report([read_run(demo_page.parent), read_run(other)], tmp_path / "both.html")
    window = windows().open(tmp_path / "both.html", f"#task={AGGREGATE}&metric=gold_logprob_drop.2")
    assert "less" in window.page.locator("select[name=metric] option:checked").inner_text()
    values = window.page.locator("#unit-rows td:nth-child(3)").all_inner_texts()
    assert set(values) == {"0"}, "a run differs from itself by nothing"
    narrow = windows(width=390).open(tmp_path / "both.html")
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390
