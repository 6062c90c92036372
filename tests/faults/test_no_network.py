"""Nothing leaves the machine without a hub id or a task that needs it: all goes on without sockets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_checkpoint
from demo_scores import DEMO

CUT_OFF = """
import socket, sys

def cut_off(*arguments, **named):
    print("NETWORK", arguments[1:], file=sys.stderr)
    raise OSError("the network is cut off")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, cut_off)
socket.create_connection = socket.getaddrinfo = cut_off
"""
SCRIPT = f"""{CUT_OFF}
from commands import HASTE, UNDRAWN, invoke
exec(HASTE); exec(UNDRAWN)
import ast, glob
for arguments in ast.literal_eval(sys.argv[1]):
    done = invoke(*(glob.glob(each)[0] if "*" in each else each for each in arguments))
    print(arguments[0], done.exit_code)
    if done.exit_code:
        print(done.output, file=sys.stderr)
"""
SMALL = ("--tasks", "recall", "--shots", "0", "--limit", "4", "--train-limit", "4")


def cut_off(commands: list[tuple[str, ...]]) -> str:
    """Run commands in a process without a network; return its stderr, all of them having ended well."""
    hub = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hub}
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, repr([tuple(map(str, each)) for each in commands])],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert codes == ["0"] * len(commands), done.stdout + done.stderr
    return done.stderr


def test_no_command_connects_to_anything(tmp_path: Path, stores: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", vocab_size=528)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    out, given = tmp_path / "run", ("--store-dir", stores)
    mask, combined = out / "masks" / "greedy*.json", tmp_path / "mask.json"
    commands: list[tuple[object, ...]] = [
        ("tasks",),
        ("prompts", "recall", "--shots", "0"),
        ("plan", *SMALL, *given),
        ("run", *SMALL, *given, "--experiments", "evaluate,importance,prune", "--out", out, "--quiet"),
        ("status", out),
        ("report", out),
        ("masks", "list", out),
        ("masks", "combine", mask, mask, "--out", combined),
        ("masks", "show", combined),
        ("masks", "compare", mask, combined),
        ("evaluate", "--mask", mask, *SMALL[:-2], *given, "--out", tmp_path / "judged", "--quiet"),
        ("convert", folder, tmp_path / "store", "--weights", "float32"),
        ("convert", tmp_path / "store", "--verify"),
    ]
    assert "NETWORK" not in cut_off([tuple(map(str, each)) for each in commands])


@pytest.mark.slow
def test_the_network_is_what_a_hub_id_asks_for() -> None:
    """So that the test above would notice."""
    with pytest.raises(AssertionError, match="NETWORK"):
        cut_off([("plan", "--model", "facebook/opt-125m")])
