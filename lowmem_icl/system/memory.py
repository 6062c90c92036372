"""How much memory this process may hold: the machine's, within the limits that a container or a shell sets.

Control groups are read in both of Linux's versions, from the process's own up to the root; shells limit
address space (`ulimit -v`) and data (`ulimit -d`).
"""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowmem_icl.errors import DoesNotFit

LIBRARIES_ADDRESS_BYTES = 2_000_000_000
"""Of address space, most of which is never filled."""
_PROC = Path("/proc/self")
# What a control group's files are called: its limit, what is held, and what of that is the disk's cache,
# which gives way.
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_RAN_OUT = ("can't allocate memory", "cannot allocate memory", "failed to map segment", "bad_alloc")


@dataclass(frozen=True)
class Bound:
    """What limits memory, in bytes: what it is called, how much it lets be held, and how much of that is
    taken.
    """

    name: str
    limit: int
    taken: int

    @property
    def free(self) -> int:
        """What is left of it."""
        return max(0, self.limit - self.taken)


def free_memory() -> int:
    """Return how many bytes this process could take now."""
    return min(psutil.virtual_memory().available, *(bound.free for bound in memory_bounds()))


def check_memory_given(asked: int | None) -> None:
    """Raise DoesNotFit where --memory is more than this process will ever get, beside what it holds now.

    What other programs of the machine hold is not counted: they may end.
    """
    narrowest = min(memory_bounds(), key=lambda bound: bound.free)
    if asked is None or asked <= narrowest.free:
        return
    if not narrowest.free:
        raise DoesNotFit(f"{narrowest.name}: {narrowest.limit / 1e9:.3g} GB are used up; allow more")
    raise DoesNotFit(
        f"--memory {asked / 1e9:.3g}GB: {narrowest.name} has {narrowest.limit / 1e9:.3g} GB, of which "
        f"{narrowest.taken / 1e9:.2g} are taken; give at most --memory {narrowest.free // 10**6}MB"
    )


def check_room_for_libraries() -> None:
    """Raise DoesNotFit where an address space is too small for torch, which ends a process that lacks it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LIBRARIES_ADDRESS_BYTES:
        raise DoesNotFit(
            f"the address space (ulimit -v) has {limit / 1e9:.3g} GB; the libraries alone take up to "
            f"{LIBRARIES_ADDRESS_BYTES / 1e9:.3g}: allow more"
        )


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the system gave no more memory; a device's is another matter."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | ImportError) and any(sign in text for sign in _RAN_OUT)


def memory_bounds() -> list[Bound]:
    """Return all that limits this process's memory; at least the machine's own is there."""
    held = psutil.Process().memory_info()
    machine = Bound("this machine", psutil.virtual_memory().total, held.rss)
    shells = [
        ("the address space (ulimit -v)", resource.RLIMIT_AS, held.vms),
        ("the data (ulimit -d)", resource.RLIMIT_DATA, getattr(held, "data", 0)),
    ]
    limits = [(name, resource.getrlimit(kind)[0], taken) for name, kind, taken in shells]
    ours = [Bound(name, limit, taken) for name, limit, taken in limits if limit != resource.RLIM_INFINITY]
    groups = [bound for bound in group_bounds(_PROC) if bound.limit < machine.limit]
    return [machine, *ours, *groups]


def group_bounds(proc: Path) -> Iterator[Bound]:
    """Yield the limits of the control groups that a process is in; none where there are none.

    proc: the process's folder in /proc.
    """
    for mount, root, is_new in _memory_mounts(proc):
        limit_file, taken_file, cache_names = _VERSION_2 if is_new else _VERSION_1
        path = _own_group(proc, is_new).removeprefix(root.rstrip("/")).strip("/")
        group = mount / path
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            limit, taken = _number(folder / limit_file), _number(folder / taken_file)
            if limit is not None and taken is not None:
                cached = _of_cache(folder / "memory.stat", cache_names)
                yield Bound("this process's control group", limit, max(0, taken - cached))


def _memory_mounts(proc: Path) -> Iterator[tuple[Path, str, bool]]:
    """Yield where groups that count memory are mounted, which group is their root, and whether they are of
    version 2.
    """
    for line in _lines(proc / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) > 4 and len(kinds) > 2:
            is_new = kinds[0] == "cgroup2"
            if is_new or (kinds[0] == "cgroup" and "memory" in kinds[2].split(",")):
                yield Path(fields[4]), fields[3], is_new


def _own_group(proc: Path, is_new: bool) -> str:
    for line in _lines(proc / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if is_new else "memory" in controllers.split(","):
            return path
    return "/"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return what a file of one number says; None where there is none, or it says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _of_cache(path: Path, names: tuple[str, ...]) -> int:
    counts = dict(line.split(maxsplit=1) for line in _lines(path) if " " in line)
    return sum(int(counts.get(name, 0)) for name in names)
