"""Whatever a disk refuses, or wherever the process is killed: one line at most, nothing torn, and the same
command goes on to what it would have been.
"""

import functools
import gc
import logging
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from commands import invoke
from disturbed_commands import CASES, leftovers
from failing_disk import FailingDisk, Killed, failing, points

CODES = {"full": 3, "broken": 2, "unreadable": 2, "short": 0}
Undisturbed = Callable[[str, str], tuple[object, list[str]]]
# What takes a moment in every way, what takes longer in one.
SHORT = [
    *((name, how) for name in ("convert", "combine", "export torch") for how in ("full", "broken", "killed")),
    *(
        ("run", "killed"),
        ("evaluate", "full"),
        ("plan", "broken"),
        ("report", "unreadable"),
        ("run", "short"),
    ),
]


@pytest.fixture(scope="module")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """From a case, and how the disk is to fail, to what it leaves, and what it asks of such a disk."""

    @functools.cache
    def of(name: str, how: str) -> tuple[object, list[str]]:
        folder = tmp_path_factory.mktemp("undisturbed")
        CASES[name].given(folder, made)
        with failing(FailingDisk(folder, how=how)) as disk:
            result = invoke(*CASES[name].arguments(folder))
        assert result.exit_code == 0, result.output
        return CASES[name].left(folder), disk.asked

    return of


def disturb(name: str, how: str, number: int, folder: Path, made: Path) -> str:
    """Run a case on a disk that fails there, then once more on one that does not; return what it said."""
    case = CASES[name]
    folder.mkdir()
    case.given(folder, made)
    said: list[str] = []
    result = None
    with failing(FailingDisk(folder, number, how)) as disk, suppress(Killed):
        result = invoke(*case.arguments(folder))
    where = f"{how} at {number}: {disk.asked[number] if number < len(disk.asked) else None}"
    if result is None or how == "killed":
        # What it held, its log and locks among it, goes with the process.
        logger = logging.getLogger("lowmem_icl")
        for handler in [each for each in logger.handlers if isinstance(each, logging.FileHandler)]:
            logger.removeHandler(handler)
            with suppress(Killed):
                handler.close()
        gc.collect()
    else:
        said = [line for line in result.stderr.splitlines() if line.startswith("lowmem-icl: ")]
        assert result.exception is None or isinstance(result.exception, SystemExit), (where, result.exc_info)
        # Some it can do without: texts, rates, the log.
        assert result.exit_code in (0, CODES[how]), (where, result.output)
        assert len(said) == (result.exit_code != 0), (where, result.output)
        assert leftovers(folder) == [], where
        if result.exit_code == 0:
            return where
    again = invoke(*case.arguments(folder))
    assert again.exit_code == 0, (where, again.output, again.exception)
    return "".join(said) + where


def check(name: str, how: str, numbers: list[int], tmp_path: Path, made: Path, whole: object) -> None:
    for number in numbers:
        folder = tmp_path / f"{how}-{number}"
        where = disturb(name, how, number, folder, made)
        assert CASES[name].left(folder) == whole, where
        assert leftovers(folder) == [], where
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "how"), SHORT)
def test_some_failures(name: str, how: str, made: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    whole, asked = undisturbed(name, how)
    check(name, how, [random.Random(f"{name} {how}").choice(points(asked))], tmp_path, made, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "broken", "killed", "unreadable", "short"])
@pytest.mark.parametrize("name", CASES)
def test_every_failure(name: str, how: str, made: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    whole, asked = undisturbed(name, how)
    check(name, how, points(asked), tmp_path, made, whole)
