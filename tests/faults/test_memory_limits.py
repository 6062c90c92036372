"""Memory that a container or a shell limits: seen, refused beforehand, and never exceeded."""

import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from commands import invoke

from lowmem_icl.cli.errors import NO_MORE_MEMORY
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.system import memory
from lowmem_icl.system.memory import Bound, check_memory_given, group_bounds, ran_out_of_memory

COMMAND = (sys.executable, "-c", "from lowmem_icl.cli.entry import main; main()")
SMALL = ("--tasks", "recall", "--shots", "4", "--limit", "8", "--train-limit", "4")
BESIDE = 700_000_000
"""What is allowed beside --memory."""


def run(*arguments: object, prepare: Callable[[], None], **named: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **named}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        preexec_fn=prepare,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def limited(kind: int, size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (size, size))


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n", encoding="ascii")


def test_groups_of_version_2_hold_from_the_process_up(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "groups"
    write(proc, cgroup="0::/user/job", mountinfo=f"30 23 0:26 / {mount} rw - cgroup2 cgroup2 rw")
    stat = "anon 5\ninactive_file 100\nactive_file 50"
    write(mount / "user" / "job", memory__max="max", memory__current=900, memory__stat=stat)
    write(mount / "user", memory__max=4000, memory__current=1000, memory__stat=stat)
    write(mount)
    assert [(bound.limit, bound.taken, bound.free) for bound in group_bounds(proc)] == [(4000, 850, 3150)]


@pytest.mark.parametrize(
    ("root", "own"), [("/", "/docker/1"), ("/docker/1", "/docker/1"), ("/docker", "/docker/1")]
)
def test_groups_of_version_1_are_found_in_and_outside_of_containers(
    tmp_path: Path, root: str, own: str
) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "memory"
    mounts = [
        f"36 31 0:33 / {tmp_path} rw - cgroup cgroup rw,cpu",
        f"35 31 0:32 {root} {mount} rw x - cgroup cgroup rw,memory",
    ]
    write(proc, cgroup=f"5:cpu:/other\n4:memory:{own}\n0::/", mountinfo="\n".join(mounts))
    group = mount / own.removeprefix(root).strip("/")
    write(
        group,
        memory__limit_in_bytes=700,
        memory__usage_in_bytes=300,
        memory__stat="cache 9\ntotal_inactive_file 30\ntotal_active_file 20",
    )
    assert [(bound.limit, bound.taken) for bound in group_bounds(proc)] == [(700, 250)]


def test_machines_without_groups_have_their_own_memory_alone(tmp_path: Path) -> None:
    assert not list(group_bounds(tmp_path))
    machine = memory.memory_bounds()[0]
    assert machine.limit == psutil.virtual_memory().total
    assert 0 < memory.free_memory() <= machine.limit


def test_what_can_never_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [Bound("this machine", 24 * 10**9, 10**9), Bound("the container", 2 * 10**9, 5 * 10**8)]
    monkeypatch.setattr(memory, "memory_bounds", lambda: bounds)
    check_memory_given(None)
    check_memory_given(1_500_000_000)
    with pytest.raises(
        DoesNotFit, match=r"the container has 2 GB, of which 0\.5 are taken; .* --memory 1500MB"
    ):
        check_memory_given(1_600_000_000)
    assert memory.free_memory() <= 1_500_000_000


def test_a_shells_limit_is_named_before_anything_starts(tmp_path: Path, stores: Path) -> None:
    out = tmp_path / "run"
    refused = run(
        "run", *SMALL, "--memory", "8GB", "--out", out, "--store-dir", stores,
        prepare=limited(resource.RLIMIT_AS, 6 * 10**9),
    )  # fmt: skip
    assert refused.returncode == 3, refused.stderr
    assert "--memory 8GB: the address space (ulimit -v) has 6 GB" in refused.stderr
    assert not out.exists()


@pytest.mark.parametrize("size", [600_000_000, 1_300_000_000])
def test_too_little_for_the_libraries_is_one_line(size: int) -> None:
    refused = run("plan", *SMALL, prepare=limited(resource.RLIMIT_AS, size), OMP_NUM_THREADS="1")
    assert refused.returncode == 3, refused.stderr
    assert "(ulimit -v) has" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_libraries_that_find_no_room_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(options: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("lowmem_icl.cli.terminal.Terminal.waiting", lambda self, doing: fails(doing))
    refused = invoke("plan", *SMALL, "--out", tmp_path / "run")
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (3, f"lowmem-icl: {NO_MORE_MEMORY}")


def test_torch_says_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 56, dtype=torch.uint8)
    assert ran_out_of_memory(raised.value)
    assert not ran_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this process's own group, where this user may make one."""
    for mount, root, is_new in memory._memory_mounts(Path("/proc/self")):
        own = memory._own_group(Path("/proc/self"), is_new).removeprefix(root.rstrip("/")).strip("/")
        folder = mount / own / f"lowmem-icl-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / ("memory.max" if is_new else "memory.limit_in_bytes")).is_file():
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("no control group that limits memory can be made here")


@pytest.mark.slow
@pytest.mark.parametrize("given", [60, 400])
def test_a_run_keeps_to_a_control_group(group: Path, tmp_path: Path, stores: Path, given: int) -> None:
    is_new = (group / "memory.max").is_file()
    limit = given * 10**6 + BESIDE
    (group / ("memory.max" if is_new else "memory.limit_in_bytes")).write_text(str(limit), encoding="ascii")
    experiments = ("--experiments", "evaluate,importance,ablate,induction")
    options = (*SMALL, *experiments, "--out", tmp_path / "run", "--store-dir", stores)

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    refused = run("run", *options, "--memory", "2GB", prepare=enter)
    assert refused.returncode == 3, refused.stderr
    assert "--memory 2GB: this process's control group has" in refused.stderr
    done = run("run", *options, "--memory", f"{given}MB", prepare=enter)
    assert done.returncode == 0, done.stderr
    peak = group / ("memory.peak" if is_new else "memory.max_usage_in_bytes")
    if peak.is_file():
        assert int(peak.read_text(encoding="ascii")) <= limit
    if not is_new:
        # How often the limit was met: not even the disk's cache had to give way.
        assert int((group / "memory.failcnt").read_text(encoding="ascii")) == 0
