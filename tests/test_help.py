"""What commands say of themselves, and of being called wrongly: whole words, 80 columns, one line."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lowmem_icl.cli.app import app
from lowmem_icl.options import FLAGS, Group, form_of

GROUP: Any = typer.main.get_command(app)
MASKS = [("masks", name) for name in GROUP.commands["masks"].commands]
COMMANDS = [(), *((name,) for name in GROUP.commands), *MASKS]
EXAMPLE = re.compile(r"^ +(lowmem-icl .*)$", re.MULTILINE)


def invoke(*arguments: object, columns: int = 80) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def command_at(path: tuple[str, ...]) -> Any:
    command = GROUP
    for name in path:
        command = command.commands[name]
    return command


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_in_whole_words(path: tuple[str, ...]) -> None:
    result = invoke(*path, "-h")
    assert result.exit_code == 0
    assert result.stdout == invoke(*path, "--help").stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    # Nothing is cut, and no placeholder is Python's own.
    assert not re.search(r"…|<\w|\bNone\b|list\[", result.stdout)
    # The same words, wherever lines end.
    wide = invoke(*path, "-h", columns=200).stdout
    assert result.stdout.split() == wide.split()
    for param in command_at(path).params:
        if param.param_type_name == "argument" or not param.is_flag:
            assert param.metavar, f"{param.name} has no placeholder"


def examples() -> Iterator[tuple[tuple[str, ...], str]]:
    for path in COMMANDS:
        for example in EXAMPLE.findall(invoke(*path, "-h").stdout):
            yield path, example


def test_examples_stand_whole_and_are_ones_that_the_commands_take() -> None:
    found = list(examples())
    assert len(found) >= 8
    for path, example in found:
        words = example.split()[1:]
        command, depth = GROUP, 0
        while getattr(command, "commands", None):
            command, depth = command.commands[words[depth]], depth + 1
        command.make_context(words[depth - 1], words[depth:])
        assert example in str(command_at(path).help)


def test_the_help_starts_where_people_start_and_groups_the_options() -> None:
    assert invoke("-h").stdout.startswith("Start here:  lowmem-icl run\n")
    text = invoke("run", "-h").stdout
    positions = [text.index(f"\n{group}\n") for group in Group]
    assert positions == sorted(positions)
    empty = invoke()
    assert (empty.exit_code, empty.stdout) == (2, invoke("-h").stdout)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rnu", "no such command 'rnu'; did you mean 'run'?"),
        ("masks shwo", "masks: no such command 'shwo'; did you mean 'show'?"),
        ("run --limti 3", "run: there is no option --limti; did you mean '--limit'?"),
        ("run --zzz", "run: there is no option --zzz; `lowmem-icl run --help` lists"),
        ("run --memory", "--memory: expected a value after it"),
        ("run more", "run: got unexpected extra argument"),
        ("run --limit 3 more", "run: got unexpected extra argument"),
        ("run --model_args pretrained=x", "run: there is no option --model-args; give what lm-eval has as"),
        ("run --batch_size 8", "run: there is no option --batch-size; --memory decides"),
        ("run --num_fewshot", "--shots: expected a value after it"),
        ("run --num_fewshot 0 x", "--shots: expected a comma-separated list"),
        ("run --limit 1.0", "--limit: expected a whole number of at least 1, or a fraction such as 0.1"),
        ("evaluate", "evaluate: expected --mask PATH (Mask file"),
        ("status", "status: expected FOLDER (Run folder)"),
        ("masks combine a b --out c --operation unoin", "--operation: expected one of union"),
        ("prompts recall --count 0", "--count: expected a whole number of at least 1, got '0'"),
        ("prompts recall --labels shufled", "got 'shufled'; did you mean 'shuffled'?"),
        ("tasks --data-dir /none", "--data-dir /none does not exist"),
        ("prompts recal", "TASK: unknown task 'recal'; did you mean 'recall'?"),
        (
            "prompts foo",
            "TASK: unknown task 'foo'; the nearest are boolq, openbookqa; `lowmem-icl",
        ),
        ("prompts zz", "TASK: unknown task 'zz'; `lowmem-icl tasks` lists all, and lm-eval:NAME or a path"),
        ("prompts none.jsonl", "TASK: none.jsonl does not exist; give a task's name"),
        ("prompts category --shots 1000", "--shots 1000: task category has 128 rows to draw"),
        ("prompts recall --model dmoe", "did you mean 'demo'?"),
    ],
)
def test_what_is_called_wrongly_is_one_line_that_says_what_to_do(words: str, told: str) -> None:
    result = invoke(*words.split())
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) <= 2
    assert result.stderr.splitlines()[-1].startswith("lowmem-icl: ")
    assert told in result.stderr


def test_underscores_do_for_dashes_in_flags_but_not_in_values() -> None:
    assert "'a_b'" in invoke("run", "--data_dir", "x", "--curve_limit", "a_b").stderr
    assert "--curve-limit: expected" in invoke("run", "--curve_limit=a_b").stderr


def options_of(*words: str) -> dict[str, Any]:
    command = GROUP.commands[words[0]]
    return dict(command.make_context(words[0], [*words[1:]], parent=ROOT).params)


ROOT = GROUP.make_context("lowmem-icl", ["run"], resilient_parsing=True)


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        ("run --num_fewshot 4 --output_path x", "run --shots 4 --out x"),
        ("run --num-fewshot=4 --output-path=x", "run --shots=4 --out=x"),
        ("run --tasks a b", "run --tasks a,b"),
        ("run --tasks a,b c --limit 3", "run --tasks a,b,c --limit 3"),
        (
            "run --limit 3 --tasks a b --num_fewshot 0 4 --quiet",
            "run --limit 3 --tasks a,b --shots 0,4 --quiet",
        ),
        ("run --experiments evaluate prune --no_bos", "run --experiments evaluate,prune --no-bos"),
        ("plan --tasks a, b --label_drops", "plan --tasks a,,b --label-drops"),
        ("evaluate --mask m --tasks a b --mask n", "evaluate --mask m --tasks a,b --mask n"),
        ("prompts --num_fewshot 4 recall", "prompts --shots 4 recall"),
        ("measure --output_path x", "measure --out x"),
    ],
)
def test_lm_evals_spellings_are_the_same_options(words: str, plain: str) -> None:
    assert options_of(*words.split()) == options_of(*plain.split())


def test_help_says_other_spellings_once() -> None:
    for name in ("run", "plan", "evaluate", "prompts"):
        told = " ".join(invoke(name, "-h").stdout.split())
        assert told.count("num_fewshot") == told.count("num-fewshot") + 1 == 1
        assert "--num_fewshot for --shots" in told
    assert "num_fewshot" not in invoke("status", "-h").stdout
    assert "a list" not in invoke("prompts", "-h").stdout.partition("Also taken")[2]


def completed(words: str, count: int) -> list[str]:
    environment = {
        "_LOWMEM_ICL_COMPLETE": "complete_bash",
        "COMP_WORDS": f"lowmem-icl {words}",
        "COMP_CWORD": str(count),
    }
    code = (
        "import sys\nfrom lowmem_icl.cli.app import app\n"
        "try: app(prog_name='lowmem-icl')\n"
        "finally: assert not {'torch', 'transformers', 'lm_eval', 'polars'} & set(sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stderr == ""
    return told.stdout.split()


def test_shells_complete_commands_flags_and_names() -> None:
    assert completed("ev", 1) == ["evaluate"]
    assert completed("run --weights ", 3) == list(form_of("weights").choices)
    assert completed("run --tasks recall,rep", 3) == ["recall,repeat"]
    assert set(completed("run --", 2)) >= {f"--{name.replace('_', '-')}" for name in FLAGS}
