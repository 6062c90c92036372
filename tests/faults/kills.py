"""Kill a command at random moments, as a power cut does, and see that it goes on to what it would have been.

    PYTHONPATH=tests:tests/faults python tests/faults/kills.py --command run --kills 100 --stores DIR

Libraries are imported once; every try is a fork of this process, which itself does nothing else. Prints a
JSON object: how many kills met the command at work, how many commands were finished after them, how many
seconds one takes alone, and what went wrong.
"""

import hashlib
import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from commands import invoke
from disturbed_commands import CASES, leftovers

# All that the commands need, so that a fork is at work at once.
import lowmem_icl.cli.plan
import lowmem_icl.cli.running
import lowmem_icl.cli.tables  # noqa: F401
from lowmem_icl import runner
from lowmem_icl.planning import measure

MOST_IN_A_ROW = 5
LONGEST_SECONDS = 120.0
MOST_SAID = 60_000
LONG = 2_000


def forked(work: Callable[[], object], kill_after: float | None = None) -> str | None:
    """Return what some work says in a process of its own; None where that was killed before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, _said(work).encode()[:MOST_SAID])
        os._exit(0)
    os.close(writing)
    patience = LONGEST_SECONDS if kill_after is None else kill_after
    ready, _, _ = select.select([reading], [], [], patience)
    said = os.read(reading, MOST_SAID).decode() if ready else None
    if said is None:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return said


def _said(work: Callable[[], object]) -> str:
    try:
        return str(work())
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def begin(name: str, folder: Path) -> int:
    return invoke(*CASES[name].arguments(folder)).exit_code


def finish(name: str, folder: Path) -> str:
    """Run a command to its end; return what it left, by its digest where that is long, or what was wrong."""
    result = invoke(*CASES[name].arguments(folder))
    if result.exit_code != 0:
        return f"exit code {result.exit_code}: {result.output[-2000:]} {result.exception!r}"
    if partial_files := leftovers(folder):
        return f"left over: {partial_files}"
    left_there = repr(CASES[name].left(folder))
    return left_there if len(left_there) < LONG else hashlib.sha256(left_there.encode()).hexdigest()


def killed_often(name: str, folder: Path, moments: list[float]) -> int:
    """Kill a command at these moments, as long as it is not over by itself; return how many met it."""
    for met, moment in enumerate(moments):
        code = forked(partial(begin, name, folder), moment)
        if code is not None:
            assert code == "0", f"exit code {code}"
            return met
    return len(moments)


def main(
    command: Annotated[str, typer.Option()],
    stores: Annotated[Path, typer.Option()],
    kills: Annotated[int, typer.Option()] = 100,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Kill a command so many times, in chains of a few on one folder, each of which is then finished."""
    measure.LAYER_SECONDS = measure.OTHER_SECONDS = 0.02
    runner._write_page = runner._write_page_alone
    rng = random.Random(f"{command} {seed}")
    met, finished, wrong = 0, 0, list[str]()
    with tempfile.TemporaryDirectory(prefix="lowmem-icl-kills-") as top:

        def folder_of(name: str) -> Path:
            folder = Path(top) / name
            folder.mkdir()
            assert forked(lambda: CASES[command].given(folder, stores)) == "None"
            return folder

        first = folder_of("whole")
        begun = time.monotonic()
        whole = forked(partial(finish, command, first))
        seconds = time.monotonic() - begun
        assert whole is not None
        assert not whole.startswith(("exit code", "left over")), whole
        while met < kills and not wrong:
            folder = folder_of("disturbed")
            moments = [rng.random() * seconds for _ in range(rng.randint(1, MOST_IN_A_ROW))]
            met += killed_often(command, folder, moments)
            said = forked(partial(finish, command, folder))
            finished += 1
            if said != whole:
                wrong.append(f"after kills at {moments}: {said or 'not over in time'}")
            shutil.rmtree(folder)
    print(json.dumps({"kills": met, "finished": finished, "seconds": round(seconds, 2), "wrong": wrong}))


if __name__ == "__main__":
    typer.run(main)
