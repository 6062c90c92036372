"""Figures for papers: legible at every size, each number where it belongs."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from synthetic_run import PAPER_TASKS, SyntheticRun

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.figures import files
from lowmem_icl.report.figures.layout import Asked
from lowmem_icl.report.figures.names import moved_apart, short_names, text_width
from lowmem_icl.report.figures.registry import FIGURES
from lowmem_icl.report.figures.scales import SymLog
from lowmem_icl.report.figures.style import figure_style, text_colour
from lowmem_icl.session.record import run_record
from lowmem_icl.tables.schema import RESULTS, read_table

Run = tuple[pl.DataFrame, dict[str, Any]]
WIDTHS = (3.25, 6.75)
HOSTILE = "<script>alert('[v2]')</script> & $x$ of a very long name that goes on"
LARGEST_SVG_BYTES = 1_000_000
DRAWN_ALIKE = ("importance-heads", "ablate-in-context", "ablate-labels", "prune-ffns", "function-vectors")
"""Figures that the functions of others draw."""
TALLEST_INCHES = 9.0
NOTHING_FOR_ONE_SETTING = ("ablate-in-context", "ablate-labels", "agreement-heads")
"""Figures that compare shot counts or tasks."""


def completed(results: pl.DataFrame) -> pl.DataFrame:
    """Return results with what the synthetic run lacks: label effects, the grid, all curves, patches."""
    effects = results.filter(pl.col("metric") == "icl_effect").with_columns(metric=pl.lit("label_effect"))
    is_curve = (pl.col("procedure") == "curve-heads") & (pl.col("method") == "gradient")
    curves = results.filter(is_curve & (pl.col("metric") == "acc"))
    columns = {
        "rescored": {}, "icl_effect": {}, "gradient-highest": {}, "gradient-lowest": {},
        "gradient": {"other_task": pl.lit(AGGREGATE)},
    }  # fmt: skip
    more = [curves.with_columns(method=pl.lit(name), **added) for name, added in columns.items()]
    grid = [
        curves.filter(pl.col("task").is_in((AGGREGATE, "recall"))).with_columns(
            procedure=pl.lit("curve-combined"), ffns_removed=pl.lit(4 * step, pl.Int32)
        )
        for step in range(6)
    ]
    return pl.concat([results, effects, *more, *grid, *patched(results)])


def patched(results: pl.DataFrame) -> list[pl.DataFrame]:
    """Return drops as if they were effects of patches."""
    drops = results.filter((pl.col("metric") == "gold_logprob_drop") & pl.col("layer").is_not_null())
    same = {"experiment": pl.lit("patch"), "procedure": pl.lit("last"), "labels": pl.lit("shuffled")}
    signs = {"restore_gold_logprob": 1, "break_gold_logprob": -1, "function_vector": 0.1}
    return [
        drops.filter((pl.col("kind") == "head") | (metric != "function_vector")).with_columns(
            **same, metric=pl.lit(metric), value=sign * pl.col("value")
        )
        for metric, sign in signs.items()
    ]


@pytest.fixture(scope="module")
def runs(opt66b_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """OPT-66B's size, one task at one shot count, the demo's size, and hostile names at many shot counts."""
    sizes = {
        "tiny": SyntheticRun(layers=4, heads=8, tasks=("recall",), shots=(0,)),
        "small": SyntheticRun(4, 8, ("recall", "category", "knowledge", "repeat"), (0, 4, 16)),
        "hostile": SyntheticRun(12, 12, (HOSTILE, HOSTILE + "!", "_x"), (0, 1, 2, 64)),
    }
    folders = {name: run.write(tmp_path_factory.mktemp(name)) for name, run in sizes.items()}
    return {name: read(folder) for name, folder in ({"full": opt66b_run} | folders).items()}


def read(folder: Path) -> Run:
    return completed(read_table(folder / "results.parquet", "results")), run_record(folder)


def drawn(run: Run, name: str, width: float = 6.75, task: str | None = None) -> Figure:
    figure = FIGURES[name].draw(*run, Asked(width, task))
    assert figure is not None, name
    return figure


def texts_of(figure: Figure) -> Iterator[Text]:
    """Yield the texts that are drawn: not those of ticks outside an axis."""
    shown: set[int] = set()
    of_ticks: set[int] = set()
    for axis in figure.findobj(Axis):
        assert isinstance(axis, Axis)
        drawn_ticks = axis._update_ticks()  # type: ignore[attr-defined]
        for ticks, found in ((drawn_ticks, shown), (axis.get_major_ticks(), of_ticks)):
            found |= {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_visible() and text.get_text().strip() and (id(text) in shown or id(text) not in of_ticks):
            yield text


def lines_of(text: Text) -> Iterator[tuple[str, list[float]]]:
    """Yield a text's lines with their boxes: left, bottom, right, top in pixels."""
    box, lines = text.get_window_extent(), text.get_text().split("\n")
    if len(lines) == 1 or text.get_horizontalalignment() != "left" or text.get_rotation():
        yield text.get_text(), list(box.extents)
        return
    assert text.figure is not None
    for number, line in enumerate(lines):
        right = box.x0 + text_width(line, float(text.get_fontsize())) * text.figure.dpi
        top = box.y1 - number * box.height / len(lines)
        yield line, [box.x0, top - box.height / len(lines), right, top]


def check_texts(figure: Figure) -> None:
    """Check that no two texts of a figure meet and that none leaves it."""
    figure.draw_without_rendering()
    boxes = [found for text in texts_of(figure) for found in lines_of(text)]
    corners = np.array([box for _, box in boxes])
    # Half a pixel of a hundredth of an inch may be shared.
    low, high = corners[:, :2] + 0.5, corners[:, 2:] - 0.5
    outside = (low < 0).any(1) | (high > figure.bbox.size).any(1)
    assert not [boxes[index] for index in np.nonzero(outside)[0]]
    meet = (low[:, None] < high[None]).all(-1) & (low[None] < high[:, None]).all(-1)
    assert not [(boxes[i], boxes[j]) for i, j in zip(*np.nonzero(np.triu(meet, 1)), strict=True)]


def drawings() -> Iterator[Any]:
    """Yield every figure of every run at every width, of all tasks and of one with a hostile name.

    For the long run: what is wide, where there is most room, but for the tiny run and hostile names; of the
    largest run what the functions of others draw.
    """
    for run, name, width in itertools.product(("full", "tiny", "small", "hostile"), FIGURES, WIDTHS):
        tasks = (None, HOSTILE) if run == "hostile" else (None,)
        for task in tasks:
            wide = width == max(WIDTHS)
            is_slow = wide and (run in ("full", "small") or task is not None)
            is_slow |= run == "full" and name in DRAWN_ALIKE
            marks = [pytest.mark.slow] if is_slow else []
            shown = f"{run}-{name}-{width}" + "-one" * (task is not None)
            yield pytest.param(run, name, width, task, marks=marks, id=shown)


@pytest.mark.parametrize(("run", "name", "width", "task"), tuple(drawings()))
def test_no_two_texts_meet_and_none_leaves_the_figure(
    runs: dict[str, Run], run: str, name: str, width: float, task: str | None
) -> None:
    with figure_style():
        figure = FIGURES[name].draw(*runs[run], Asked(width, task))
        if figure is None:
            assert task is not None or (run == "tiny" and name in NOTHING_FOR_ONE_SETTING)
        else:
            check_texts(figure)
            assert figure.get_size_inches()[0] == width
            assert figure.get_size_inches()[1] <= TALLEST_INCHES


@pytest.mark.parametrize("name", ["importance-heads", "ablate-heads", "ablate-estimates", "prune-heads"])
def test_files_of_the_largest_run_stay_small(runs: dict[str, Run], name: str) -> None:
    with figure_style():
        content = files.encoded(drawn(runs["full"], name), "svg", "caption")
    assert len(content) <= LARGEST_SVG_BYTES


def test_maps_of_a_figure_share_one_scale_and_hold_the_drops(runs: dict[str, Run]) -> None:
    results, _ = runs["full"]
    with figure_style():
        figure = drawn(runs["full"], "ablate-heads")
    images = [image for axis in figure.axes for image in axis.images]
    assert len(images) == (len(PAPER_TASKS) + 1) * 3
    assert len({id(image.norm) for image in images}) == 1
    drops = results.filter((pl.col("metric") == "gold_logprob_drop") & (pl.col("kind") == "head"))
    largest = float(np.abs(drops["value"].to_numpy()).max())
    assert (images[0].norm.vmin, images[0].norm.vmax) == (-largest, largest)
    first = drops.filter((pl.col("task") == PAPER_TASKS[0]) & (pl.col("shots") == 0))
    for row in first.sample(5, seed=0).iter_rows(named=True):
        assert np.asarray(images[0].get_array())[row["layer"], row["head"]] == row["value"]


def test_curves_show_what_was_removed_once_with_their_knee() -> None:
    record = {"model": {"layers": 4, "heads": 8}}
    same = {"experiment": "prune", "procedure": "curve-ffns", "task": "recall", "shots": 4, "kind": "ffn",
            "method": "ablation", "metric": "acc"}  # fmt: skip
    removed = {0: 0, 10: 0, 50: 2, 60: 2, 70: 3}
    results = pl.DataFrame(
        [
            *(same | {"percent": percent, "ffns_removed": count, "value": 1 - count / 10}
              for percent, count in removed.items()),
            same | {"metric": "knee", "percent": 60, "ffns_removed": 2, "value": 60.0},
        ],
        schema=RESULTS,
    )  # fmt: skip
    with figure_style():
        figure = drawn((results, record), "prune-ffns")
    curve, knee = figure.axes[0].lines
    assert np.asarray(curve.get_xydata()).tolist() == [[0, 1], [50, 0.8], [75, 0.7]]
    assert np.asarray(knee.get_xydata()).tolist() == [[50, 0.8]]


def test_shots_stand_at_their_true_scale(runs: dict[str, Run]) -> None:
    with figure_style():
        figure = drawn(runs["hostile"], "accuracy", task=HOSTILE)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1, 2, 64]  # type: ignore[union-attr]


def test_dots_of_shot_counts_stand_side_by_side(runs: dict[str, Run]) -> None:
    with figure_style():
        figure = drawn(runs["small"], "ablate-ffns", 3.25)
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    places = np.array([line.get_xdata() for line in lines], dtype=np.float64)
    # By three shot counts, 0 to 3 being the layers.
    assert np.abs(places - np.arange(4)).max() < 0.5
    assert np.diff(places, axis=0).min() > 0.1


def test_no_band_is_too_narrow_to_be_told_from_the_line_at_0(runs: dict[str, Run]) -> None:
    results, record = runs["small"]
    flat = results.with_columns(
        pl.when(pl.col("method") == "random-median").then(0.0).otherwise(pl.col(name)).alias(name)
        for name in ("value", "low", "high")
    )
    with figure_style():
        figure = drawn((flat, record), "induction-removal", 3.25)
    bars = [(bar, axis) for axis in figure.axes for bar in axis.patches if isinstance(bar, Rectangle)]
    assert bars
    for bar, axis in bars:
        assert bar.get_width() > 0.02 * np.ptp(axis.get_xlim())
        assert bar.get_x() + bar.get_width() / 2 == pytest.approx(0)


def test_dots_at_the_edge_are_whole(runs: dict[str, Run]) -> None:
    with figure_style():
        figure = drawn(runs["small"], "ablate-estimates", 3.25)
    dots = [dots for axis in figure.axes for dots in axis.collections]
    assert dots
    assert not any(each.get_clip_on() for each in dots)


def test_a_tasks_name_stands_clear_of_the_scale_above(runs: dict[str, Run]) -> None:
    with figure_style():
        figure = drawn(runs["small"], "ablate-heads", 3.25, "recall")
        figure.draw_without_rendering()
        *maps, bar = figure.axes
        gap = bar.get_window_extent().y0 - maps[0].title.get_window_extent().y1
    assert gap > 0.05 * figure.dpi


def test_symmetric_log_ticks_lie_where_matplotlib_puts_them() -> None:
    scale = SymLog.of(np.array([-3.0, 8.0]))
    assert scale.ticks(6, 0.1) == [-1, -0.1, -0.01, 0, 0.01, 0.1, 1]
    norm = scale.norm()
    span = scale._place(scale.high) - scale._place(scale.low)
    for value in (-1.0, 0.0, 0.004, 0.5, 8.0):
        assert float(norm(value)) == pytest.approx((scale._place(value) - scale._place(scale.low)) / span)


def test_shortened_names_fit_and_differ() -> None:
    with figure_style():
        names = short_names(["a" * 60 + "x", "a" * 60 + "y", "b" + "a" * 59 + "x", "copa", AGGREGATE], 0.8)
        assert all(text_width(name) <= 0.8 for name in names.values())
    assert len(set(names.values())) == 5
    assert names["copa"] == "copa"


def test_labels_are_moved_apart_in_their_order() -> None:
    places = [0.5, 0.52, 0.1, 0.99, 0.51]
    moved = moved_apart(places, 0.1, 0, 1)
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert np.diff(sorted(moved)).min() >= 0.1 - 1e-6
    assert moved[2:4] == [0.1, 0.99]
    assert moved_apart([0.0] * 5, 0.5, 0, 1) == [0, 0.25, 0.5, 0.75, 1]


def test_texts_are_legible_on_every_colour_of_the_maps() -> None:
    def luminance(colour: Any) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for name in ("RdBu_r", "Blues", "cividis"):
        for colour in matplotlib.colormaps[name](np.linspace(0, 1, 64)).tolist():
            light = luminance((1, 1, 1) if text_colour(tuple(colour[:3])) == "white" else (0, 0, 0))
            low, high = sorted((light, luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_every_figure_is_told_of() -> None:
    text = (Path(__file__).parents[1] / "docs" / "figures.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == list(FIGURES)
    for kind in FIGURES.values():
        assert kind.caption.endswith(".")
        assert len(kind.caption) <= 260
