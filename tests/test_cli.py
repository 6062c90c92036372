"""The command line: where its flags come from, its help, its errors, and names that look like markup."""

import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
import typer
from commands import NAME, write_masks
from commands import invoke_wide as invoke

from lowmem_icl.cli.app import app
from lowmem_icl.cli.errors import reports_errors, reports_errors_and_continues
from lowmem_icl.cli.status import show_status
from lowmem_icl.cli.terminal import Terminal, plain_console
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.masks.files import read_mask, write_mask
from lowmem_icl.options import FLAGS, Group, RunOptions

PACKAGE = Path(__file__).parents[1] / "lowmem_icl"


def signature(command: str) -> inspect.Signature:
    """What typer makes a command's flags from."""
    callbacks = [registered.callback for registered in app.registered_commands]
    (callback,) = (each for each in callbacks if each is not None and each.__name__ == command)
    return inspect.signature(callback)


def flags(command: str) -> set[str]:
    return set(signature(command).parameters)


def test_commands_take_their_flags_from_the_options() -> None:
    assert flags("run") == set(FLAGS) | {"config", "fresh", "quiet", "as_json"}
    assert flags("plan") - {"machine"} == flags("run") - {"fresh"}, "a machine is no option of a run"
    assert set(FLAGS) - flags("evaluate") == {
        *("train_limit", "importance_limit", "labels", "hours", "masks_dir"),
        *(name for name, flag in FLAGS.items() if flag.group == Group.EXPERIMENTS and name != "seed"),
    }
    changes_prompts = {
        "revision",
        "bos",
        "protocol",
        "demonstrations",
        "demonstration_sets",
        "limit",
        "data_dir",
        "labels",
    }
    assert changes_prompts <= flags("prompts")
    assert {"revision", "weights", "store_dir"} <= flags("convert")


def test_no_flag_has_a_check_or_a_default_of_its_own() -> None:
    for command in ("run", "plan", "evaluate"):
        for name, parameter in signature(command).parameters.items():
            if name in FLAGS:
                assert parameter.default is None
                assert get_args(parameter.annotation)[0] in (str | None, bool | None), name


def test_plan_takes_what_run_takes(tmp_path: Path) -> None:
    arguments = [
        "--direction",
        "up",
        "--objective",
        "acc",
        "--tolerance",
        "0.2",
        "--out",
        tmp_path / "run",
        "--seed",
        7,
    ]
    small = [
        "--tasks",
        "recall",
        "--shots",
        0,
        "--limit",
        4,
        "--experiments",
        "evaluate",
        "--quiet",
        "--json",
    ]
    result = invoke("plan", *arguments, "--masks-dir", tmp_path, "--store-dir", tmp_path / "stores", *small)
    assert result.exit_code == 0, result.output
    assert [stage["experiment"] for stage in json.loads(result.stdout)["stages"]] == ["evaluate"]
    assert not (tmp_path / "run").exists()


def test_a_bad_option_is_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom lowmem_icl.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'transformers', 'lm_eval', 'polars'} & set(sys.modules)))"
    )
    for command in ("run", "plan", "evaluate --mask m.json", "prompts recall", "convert x"):
        arguments = [*command.split(), "--weights", "int4"]
        told = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert (told.returncode, told.stdout.strip()) == (2, "[]"), told.stderr
        assert told.stderr.startswith(
            "lowmem-icl: --weights: expected one of int8, nf4, bfloat16, float32, got 'int4'; "
            "did you mean 'nf4'?"
        )
        assert len(told.stderr.splitlines()) == 1


def test_errors_and_stops_are_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(raised: BaseException | None, wrap: Any = reports_errors) -> tuple[int, str]:
        def command() -> None:
            if raised is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise raised

        with pytest.raises(typer.Exit) as ended:
            wrap(command)()
        return ended.value.exit_code, capsys.readouterr().err

    before = signal.getsignal(signal.SIGTERM)
    assert ends(InputError("a\n[/b]")) == (2, "lowmem-icl: a [/b]\n")
    assert ends(DoesNotFit("too large")) == (3, "lowmem-icl: too large\n")
    assert ends(KeyboardInterrupt()) == (130, "lowmem-icl: stopped\n")
    code, told = ends(None, reports_errors_and_continues)
    assert code == 143
    assert "finished parts are kept" in told
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_are_never_markup_in_messages_and_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    terminal.say(NAME)
    terminal.out.print(NAME)
    assert capsys.readouterr() == (f"{NAME}\n", f"{NAME}\n")
    monkeypatch.setattr("lowmem_icl.cli.terminal.SECONDS_BETWEEN_LINES", 0.0)
    with terminal.progress(NAME, 0, "parts") as advance:
        advance(1)
    assert NAME in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with Terminal().progress(NAME, 2, "parts") as advance:
        advance(1)
    assert NAME in capsys.readouterr().err
    Terminal(quiet=True).say(NAME)
    assert capsys.readouterr().err == ""


def test_only_the_terminal_makes_consoles() -> None:
    makers = [path.name for path in PACKAGE.rglob("*.py") if "Console(" in path.read_text(encoding="utf-8")]
    assert makers == ["terminal.py"]


def test_names_are_never_markup_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    unit = {"shots": 0, "kind": "ffn", "layer": 1, "head": None, "value": 1.0, "q_value": None}
    state = {
        "folder": NAME,
        "state": "running",
        "started": "now",
        "parts": 1,
        "experiments": [NAME],
        "finished": {},
    }
    show_status(
        state
        | {
            "seconds_left": 1.0,
            "page": True,
            "best_units": [unit],
            "best_units_held_out": [],
            "warnings": [NAME],
        },
        plain_console(),
    )
    assert capsys.readouterr().out.count(NAME) == 4


def test_names_are_never_markup_in_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    from lowmem_icl.cli.prompts import show_prompts

    option = {
        "context": NAME,
        "continuation": NAME,
        "gold": True,
        "context_ids": [1],
        "continuation_ids": [2],
    }
    entry = {
        "task": NAME,
        "shots": 1,
        "split": "train",
        "document": 3,
        "options": [option | {"truncated": False}],
        "prompts": {"sentence": NAME, "notes": [NAME]},
    }
    show_prompts([entry], plain_console())
    assert capsys.readouterr().out.count(NAME) == 5


def test_prompts_show_the_first_documents_of_the_run_that_takes_the_same_options(tmp_path: Path) -> None:
    shared = [
        "--shots",
        "0,4",
        "--demonstrations",
        "shared",
        "--limit",
        12,
        "--store-dir",
        tmp_path,
        "--json",
    ]
    few, whole = (
        json.loads(invoke("prompts", "recall", "--count", count, *shared).stdout) for count in (3, 12)
    )
    assert [entry["shots"] for entry in few] == [0, 0, 0, 4, 4, 4]
    assert few == whole[:3] + whole[12:15]


def test_names_that_are_not_utf8_are_printed_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "masks \udcff"
    left, right = write_masks(folder)
    told = invoke("masks", "show", left)
    assert told.exit_code == 0, told.output
    assert "masks \\udcff" in told.stdout
    assert "masks \\udcff" in invoke("masks", "list", folder, "--json").stdout
    assert invoke("masks", "combine", left, right, "--out", folder / "both.json").exit_code == 0


def test_options_reach_a_command_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[RunOptions] = []

    def record(options: RunOptions, *_: Any, **__: Any) -> NoReturn:
        seen.append(options)
        raise DoesNotFit("enough seen")

    monkeypatch.setattr("lowmem_icl.runner.run", record)
    config = tmp_path / "paper.toml"
    config.write_text("limit = 8\nrescore = true\nbos = true\nseed = 5\n")
    left, right = write_masks(tmp_path / "masks")
    arguments = ["--mask", left, "--mask", right, "--config", config, "--no-bos"]
    result = invoke("evaluate", *arguments, "--json")
    assert result.exit_code == DoesNotFit.exit_code, result.output
    assert "enough seen" in invoke("evaluate", *arguments, "--out", tmp_path / "own", "--json").stderr
    default, named = seen
    assert default.out is not None
    assert default.out.name.startswith("evaluate-demo-")
    expected = RunOptions(experiments=("evaluate",), labels=("right",), limit=8, bos=False, seed=5)
    assert default.model_copy(update={"out": None}) == expected
    assert named == expected.model_copy(update={"out": tmp_path / "own"})
    twice = invoke("evaluate", "--mask", left, "--mask", left)
    assert twice.exit_code == 2
    assert "another mask is named 'left' too" in twice.stderr


def test_amounts_are_short() -> None:
    from lowmem_icl.cli.terminal import count, duration, rate_text, size

    assert [size(0), size(999), size(1e3), size(2.24e6)] == ["0 B", "999 B", "1 kB", "2.24 MB"]
    assert [count(950), count(38_900), count(1.24e12)] == ["950", "38.9 k", "1.24 T"]
    assert [duration(3), duration(600), duration(7200), duration(1e6)] == [
        "3.0 s",
        "10 min",
        "2.0 h",
        "12 days",
    ]
    assert rate_text(5e6, "bytes") == "5 MB/s"


def test_a_mask_named_like_the_clean_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    source = read_mask(PACKAGE.parent / "masks" / "demo" / "greedy-recall-16shot.json")
    write_mask(tmp_path / "m.json", replace(source, name="clean"))
    out = tmp_path / "out"
    result = invoke(
        "evaluate", "--mask", tmp_path / "m.json", "--tasks", "recall", "--limit", 2, "--out", out
    )
    assert result.exit_code == 2
    assert "'clean' is what the run without a mask is called" in result.stderr
    assert not out.exists()
