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
from typer.testing import CliRunner, Result

from lowmem_icl.cli.app import app
from lowmem_icl.cli.errors import reports_errors, reports_errors_and_continues
from lowmem_icl.cli.evaluate import read_masks
from lowmem_icl.cli.status import show_status
from lowmem_icl.cli.terminal import Terminal, plain_console
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.masks.files import MaskFile, MaskModel, read_mask, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import FLAGS, Group, RunOptions

PACKAGE = Path(__file__).parents[1] / "lowmem_icl"
NAME = "[v2] a [/b] [bold] :smile: {x}"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def signature(command: str) -> inspect.Signature:
    """What typer makes a command's flags from."""
    callbacks = [registered.callback for registered in app.registered_commands]
    (callback,) = (each for each in callbacks if each is not None and each.__name__ == command)
    return inspect.signature(callback)


def flags(command: str) -> set[str]:
    return set(signature(command).parameters)


def test_commands_take_their_flags_from_the_options() -> None:
    assert flags("run") == set(FLAGS) | {"config", "quiet", "as_json"}
    assert flags("plan") - {"machine"} == flags("run"), "a machine is no option of a run"
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
            "lowmem-icl: --weights: expected one of int8, bfloat16, float32, got 'int4'"
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


def write_masks(folder: Path) -> tuple[Path, Path]:
    model = MaskModel(id=NAME, model_type="opt", layers=2, heads=3, digest="d")
    masks = {"left": Mask(frozenset({(0, 1), (1, 2)})), "right": Mask(frozenset({(0, 1)}), frozenset({1}))}
    for name, mask in masks.items():
        write_mask(folder / f"{name}.json", MaskFile(name, mask, model, {"method": NAME}))
    return folder / "left.json", folder / "right.json"


def test_mask_commands_print_names_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[v2] masks [b-c]"
    left, right = write_masks(folder)
    listed = invoke("masks", "list", folder)
    assert listed.stdout.count(NAME) == 3, listed.output
    assert invoke("masks", "show", left).stdout.count(NAME) == 2
    assert "[v2] masks [b-c]" in invoke("masks", "show", left).stdout
    (pair,) = json.loads(invoke("masks", "compare", left, right, "--json").stdout)
    assert pair == {
        "left": "left",
        "right": "right",
        "both": 1,
        "only_left": 1,
        "only_right": 1,
        "jaccard": 1 / 3,
    }
    assert "0.333" in invoke("masks", "compare", left, right).stdout


def test_evaluate_takes_the_masks_of_a_folder_and_of_a_run(tmp_path: Path) -> None:
    left, right = write_masks(tmp_path / "run" / "masks")
    (tmp_path / "run" / "run.json").write_text("{}")
    (left.parent / "schema.json").write_text("{}")
    for given in ([left.parent], [tmp_path / "run"], [left, right]):
        assert list(read_masks(given)) == ["left", "right"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no mask files in that folder"):
        read_masks([tmp_path / "empty"])


def test_masks_are_compared_and_listed_within_80_columns(tmp_path: Path) -> None:
    source = read_mask(PACKAGE.parent / "masks" / "demo" / "greedy-recall-16shot.json")
    names = [f"gradient-ffns-{level}-present_participle-0shot" for level in (10, 20)]
    paths = [tmp_path / f"{name}.json" for name in names]
    for path, name in zip(paths, names, strict=True):
        write_mask(path, replace(source, name=name))
    for arguments in (["compare", *paths], ["compare", tmp_path], ["list", tmp_path]):
        told = CliRunner().invoke(app, ["masks", *map(str, arguments)], env={"COLUMNS": "80"}).stdout
        assert max(map(len, told.splitlines())) <= 80
        assert "…" not in told
    assert all(name in invoke("masks", "compare", *paths).stdout for name in names)


def test_a_runs_masks_are_listed_whole_by_number_without_those_that_remove_nothing(tmp_path: Path) -> None:
    source = read_mask(PACKAGE.parent / "masks" / "demo" / "greedy-recall-16shot.json")
    names = [f"icl_effect-heads-90-recall-{shots}shot" for shots in (0, 4, 16)]
    for name in names:
        made = {"method": "icl_effect", "tasks": ["recall"], "shots": [int(name.split("-")[-1][:-4])]}
        write_mask(tmp_path / "masks" / f"{name}.json", replace(source, name=name, made=made))
    empty = replace(source, name="empty-recall-0shot", mask=Mask(), made={"method": "empty"})
    write_mask(tmp_path / "masks" / "empty-recall-0shot.json", empty)

    def told(*more: str, columns: int = 80) -> str:
        arguments = ["masks", "list", str(tmp_path), *more]
        return str(CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)}).stdout)

    for columns, headings in (
        (80, "name shots removed accuracy verdict"),
        (120, "name method task shots removed"),
    ):
        lines = told(columns=columns).splitlines()
        assert " ".join(lines[0].split()).startswith(headings)
        assert [line.split()[0] for line in lines if "icl_effect" in line] == names
        assert all("holds" in line for line in lines if "icl_effect" in line)
    assert lines[-1] == "1 mask that removes nothing is left out; --all lists it"
    assert "empty-recall-0shot" in told("--all")
    assert "left out" not in told("--all")
    narrow = told(columns=40).splitlines()
    assert "icl_effect-" in narrow[2].split()
    shown = invoke("masks", "show", tmp_path / "masks" / f"{names[0]}.json").stdout
    assert "tasks: recall\nshots: 0\nremoved: 28 of 32 heads, 3 of 4 FFNs\n" in shown
    assert "accuracy: 0.986 under the mask, 0.984 clean\nverdict: holds\n" in shown
    assert "None" not in (shown := invoke("masks", "show", write_masks(tmp_path / "more")[0]).stdout)
    assert "accuracy" not in shown


def test_of_many_pairs_those_most_alike_are_printed(tmp_path: Path) -> None:
    source = read_mask(PACKAGE.parent / "masks" / "demo" / "greedy-recall-16shot.json")
    for number in range(12):
        mask = Mask(frozenset((0, head) for head in range(8) if head != number % 8))
        write_mask(tmp_path / f"m{number}.json", replace(source, name=f"m{number}", mask=mask))
    told = invoke("masks", "compare", tmp_path).stdout
    assert told.endswith("the 50 pairs most alike of 66; --json prints all\n")
    assert told.index("1.000") < told.index("0.750")
    assert len(json.loads(invoke("masks", "compare", tmp_path, "--json").stdout)) == 66


def test_masks_are_looked_for_in_a_run_where_there_is_no_such_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "masks is not a folder here; give a run's folder" in invoke("masks", "list").stderr


def test_names_that_are_not_utf8_are_printed_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "masks \udcff"
    left, right = write_masks(folder)
    told = invoke("masks", "show", left)
    assert told.exit_code == 0, told.output
    assert "masks \\udcff" in told.stdout
    assert "masks \\udcff" in invoke("masks", "list", folder, "--json").stdout
    assert invoke("masks", "combine", left, right, "--out", folder / "both.json").exit_code == 0


def test_masks_are_combined_into_files_that_can_be_read(tmp_path: Path) -> None:
    left, right = write_masks(tmp_path)
    for operation, heads, ffns in (("union", 2, 1), ("intersection", 1, 0), ("difference", 1, 0)):
        out = tmp_path / f"{operation}.json"
        told = invoke("masks", "combine", left, right, "--out", out, "--operation", operation)
        assert told.exit_code == 0, told.output
        mask = read_mask(out).mask
        assert (len(mask.heads), len(mask.ffns)) == (heads, ffns)
    for name in ("my mask.json", "[v2].json", "plain"):
        refused = invoke("masks", "combine", left, right, "--out", tmp_path / name)
        assert refused.exit_code == 2
        assert "choose another name" in refused.stderr
        assert not (tmp_path / name).exists()


def test_mask_commands_report_errors_as_all_commands_do(tmp_path: Path) -> None:
    bad = tmp_path / "[b].json"
    bad.write_text("{}")
    left, right = write_masks(tmp_path / "masks")
    other = tmp_path / "other.json"
    other.write_text(left.read_text().replace('"layers": 2', '"layers": 3'))
    for arguments in (
        ["show", bad], ["list", tmp_path], ["list", tmp_path / "[none]"], ["export", tmp_path / "none.json"],
        ["compare", left], ["combine", left, other, "--out", tmp_path / "new.json"],
        ["combine", left, right, "--out", other],
    ):  # fmt: skip
        result = invoke("masks", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("lowmem-icl: ")
        assert len(result.stderr.splitlines()) == 1


def test_options_reach_a_command_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[RunOptions] = []

    def record(options: RunOptions, *_: Any, **__: Any) -> NoReturn:
        seen.append(options)
        raise DoesNotFit("enough seen")

    monkeypatch.setattr("lowmem_icl.run.run", record)
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
