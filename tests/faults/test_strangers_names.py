"""Names and texts of others: none becomes a path outside its folder, markup, or a command to the terminal."""

import io
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from commands import invoke, write_masks
from rich.console import Console
from rich.table import Table
from rich.text import Text
from test_hostile_names import hostile_results
from test_report import by_task, record, run_of, table

from lowmem_icl.cli import terminal
from lowmem_icl.cli.echo import complain, echo
from lowmem_icl.cli.status import show_status
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, MaskModel, read_mask, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.report.figures.files import write_figures
from lowmem_icl.report.page.write import render, run_page
from lowmem_icl.report.run_tables import _mask_files
from lowmem_icl.system.visible import visible, visible_line

# Clears the screen, recolours, sets the title, moves the cursor; in C1 as well; turns directions.
CONTROLS = "a\x1b[2J\x1b[31mb\x1b]0;title\x07\rc\x9b31m\x85\x7f\x00\x08\u202ed\u2066e\u2028f"
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' & [/b] {{7*7}} {% raw %}"
HOSTILE = f"{MARKUP} {CONTROLS}"
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What rich itself writes to a terminal: colours and styles.
STYLES = re.compile("\x1b\\[[0-9;]*m")


def test_every_control_character_is_shown_as_its_code() -> None:
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x202E, 0x2028):
        expected = chr(code) if chr(code) in "\n\t" else f"\\u{code:04x}"
        assert visible(chr(code)) == expected
    assert visible("ä 数 😀 \\u001b") == "ä 数 😀 \\u001b"
    assert visible_line("a\r\nb\nc\rd") == "a b c\\u000dd"
    # What is JSON stays JSON, of the same content.
    assert json.loads(visible(json.dumps(HOSTILE, ensure_ascii=False))) == HOSTILE


@pytest.mark.parametrize("is_terminal", [True, False])
def test_our_consoles_send_no_commands_of_others(is_terminal: bool) -> None:
    console = terminal.plain_console()
    console.file, console._force_terminal = StringIO(), is_terminal
    cells = Table("name")
    cells.add_row(HOSTILE)
    cells.add_row(Text(HOSTILE, "bold"))
    for shown in (HOSTILE, Text(HOSTILE), cells, f"x\n{HOSTILE}"):
        console.print(shown)
        console.print(shown, soft_wrap=True)
    console.rule(HOSTILE)
    printed = console.file.getvalue()
    assert not COMMANDS.search(STYLES.sub("", printed))
    assert "\\u001b" in printed


def test_progress_and_messages_send_no_commands_of_others() -> None:
    shown = terminal.Terminal()
    shown.err = terminal.plain_console()
    shown.err.file, shown.err._force_terminal = StringIO(), False
    shown.say(HOSTILE)
    shown._last_line = -1e9
    with shown.progress(CONTROLS, 10, "layers") as advance:
        advance(3)
    printed = shown.err.file.getvalue()
    assert "30%" in printed
    assert not COMMANDS.search(printed)


def test_lines_and_errors_send_no_commands_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    complain(f"{HOSTILE}\nlowmem-icl: done")
    out, err = capsys.readouterr()
    assert not COMMANDS.search(out + err)
    assert err.count("\n") == 1


def test_all_that_the_command_line_prints_goes_through_these() -> None:
    folder = Path(terminal.__file__).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    direct = ("typer.echo(", "click.echo(", "typer.secho(", "sys.stdout.write", "sys.stderr.write")
    assert {name for name, text in texts.items() if any(call in text for call in direct)} <= {"echo.py"}
    made = [name for name, text in texts.items() if re.search(r"(?<!Plain)Console\((?!\))", text)]
    assert made in ([], ["terminal.py"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--model", CONTROLS.replace("\x00", "")),
        ("run", "--tasks", CONTROLS.replace("\x00", "")),
        ("plan", "--model", f"./{CONTROLS}".replace("\x00", "")),
        ("report", CONTROLS.replace("\x00", "")),
        ("masks", "show", CONTROLS.replace("\x00", "")),
        ("prompts", CONTROLS.replace("\x00", "")),
        ("run", f"--{CONTROLS}".replace("\x00", "")),
        (CONTROLS.replace("\x00", ""),),
    ],
)
def test_what_was_typed_comes_back_without_its_commands(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert not COMMANDS.search(done.output)


def hostile_masks(folder: Path) -> Path:
    model = MaskModel(id=HOSTILE, model_type="opt", layers=2, heads=3, digest="d", revision=HOSTILE)
    made = {"method": HOSTILE, "tasks": [HOSTILE], "shots": [1], "protocol": HOSTILE}
    for name in ("left", "right"):
        write_mask(folder / f"{name}.json", MaskFile(name, Mask(frozenset({(0, 1)})), model, made))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: ("masks", "list", folder),
        lambda folder: ("masks", "list", folder, "--json"),
        lambda folder: ("masks", "show", folder / "left.json"),
        lambda folder: ("masks", "compare", folder / "left.json", folder / "right.json"),
        lambda folder: ("masks", "compare", folder, "--json"),
        lambda folder: ("masks", "combine", *folder.glob("*t.json"), "--out", folder / "x.json"),
    ],
    ids=["list", "list json", "show", "compare", "compare json", "combine"],
)  # fmt: skip
def test_masks_of_others_are_shown_without_their_commands(
    tmp_path: Path, command: Callable[[Path], tuple[Any, ...]]
) -> None:
    done = invoke(*command(hostile_masks(tmp_path)))
    assert done.exit_code == 0, done.output
    assert not COMMANDS.search(done.output)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", CONTROLS, MARKUP, "a" * 300, ""])
def test_a_masks_name_is_no_path(tmp_path: Path, name: str) -> None:
    left, _ = write_masks(tmp_path)
    content = json.loads(left.read_text())
    left.write_text(json.dumps(content | {"name": name}))
    with pytest.raises(InputError, match="name"):
        read_mask(left)


def test_a_table_of_others_leads_to_no_file_outside_the_run(tmp_path: Path) -> None:
    """`report` reads the masks that a table names."""
    folder = tmp_path / "run"
    write_masks(folder / "masks")
    write_masks(tmp_path)
    outside = ["../left", "../../left", str(tmp_path / "left"), f"x/../../../{tmp_path.name}/left", "left\n"]
    assert (folder / "masks" / "../../left.json").resolve() == (tmp_path / "left.json").resolve()
    results = table(*({"mask": name, "task": "t"} for name in [*outside, "clean", "left"]))
    assert list(_mask_files(folder, results)) == ["left"]


def hostile_run() -> Any:
    clean = {"experiment": "evaluate", "metric": "acc", "mask": "clean", "documents": 9, "stderr": 0.1}
    results = table(
        *by_task({HOSTILE: 0.5, "b": 0.6}, **clean),
        *by_task({HOSTILE: 0.4}, **(clean | {"mask": HOSTILE, "heads_removed": 1, "ffns_removed": 0})),
    )
    model = record()["model"] | {"id": HOSTILE, "revision": HOSTILE, "layers": 2, "heads": 2}
    fields: dict[str, Any] = {
        "model": model, "warnings": [HOSTILE], "tasks": [{"task": HOSTILE}], "command": f"run {HOSTILE}"
    }  # fmt: skip
    return run_of(pl.concat([hostile_results(), results]), record(**fields))


def test_the_page_holds_no_markup_of_others() -> None:
    text = render(run_page(hostile_run()))
    # Our own scripts, and none of theirs; JSON in them cannot end them.
    assert len(re.findall(r"<script[\s>]", text)) == 4
    assert text.count("</script>") == 4
    assert "<img src=x" not in text
    for name in ("run-data", "plot-items"):
        (content,) = re.findall(rf'id="{name}">(.*?)</script>', text, re.DOTALL)
        assert "<" not in content
        json.loads(content)


def test_the_pages_own_code_makes_no_markup_of_texts() -> None:
    assets = Path(terminal.__file__).parents[1] / "report" / "page"
    for path in (assets / "assets").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for unsafe in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
        ):
            assert unsafe not in text, f"{path.name}: {unsafe}"
    for path in assets.rglob("*.py"):
        # Bokeh escapes what stands in a tooltip, but for this.
        assert "{safe}" not in path.read_text(encoding="utf-8"), path
    unescaped = [
        found
        for path in (assets / "templates").iterdir()
        for found in re.findall(r"\{\{ *([\w.]+) *\| *safe", path.read_text(encoding="utf-8"))
    ]
    assert sorted(unescaped) == ["page.data", "page.plot_items", "page.script", "page.style"]


def test_figures_hold_no_markup_of_others(tmp_path: Path) -> None:
    run = hostile_run()
    object.__setattr__(run, "folder", tmp_path)
    written = write_figures(run)
    assert written
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert path.parent == tmp_path / "figures"
        assert "<script" not in text
        assert "<img" not in text


def test_status_of_a_run_of_others_is_shown_line_by_line() -> None:
    state = {
        "folder": HOSTILE, "state": f"{CONTROLS}\nstate: finished", "started": CONTROLS, "parts": 1,
        "experiments": [CONTROLS], "finished": {}, "seconds_left": 2.0, "page": True, "warnings": [HOSTILE],
        "best_units": [], "best_units_held_out": [],
    }  # fmt: skip
    console = Console(file=StringIO(), width=200, force_terminal=False)
    show_status(state, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert not COMMANDS.search(printed)
    assert "\nstate: finished" not in printed


def test_documents_of_others_are_shown_without_their_commands(tmp_path: Path) -> None:
    rows = [{"context": f"{n} {HOSTILE}", "options": [f" {CONTROLS}", " b"], "gold": 0} for n in range(4)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more in ((), ("--json",)):
        done = invoke("prompts", path, "--shots", "0,1", *more)
        assert done.exit_code == 0, done.output
        assert not COMMANDS.search(done.output)
        assert "\\u001b" in done.output
