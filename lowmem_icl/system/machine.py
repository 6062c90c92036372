"""Which device of the machine is used, how much of it is free, and what this process takes.

Everything that torch is asked about a CUDA device outside the copying of layers stands here, in functions of
a few lines. PyTorch is imported where it is asked, not before: whoever only reads a finished run does
without.
"""

import functools
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lowmem_icl.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
# Of an allowance that turned out too large, and of what is left of a device: the share to try next.
_NEXT_SHARE = 0.8
_EXHAUSTED = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def device_type(name: str) -> str:
    """Return `cpu` or `cuda`, by the device's name, `auto` being CUDA if there is one.

    Raises InputError where the device is absent. Nothing is started on the device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind != "cuda":
        return kind
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise InputError(f"--device {name}: torch sees no CUDA device here; give --device cpu")
    if index and int(index) >= count:
        known = "one CUDA device" if count == 1 else f"{count} CUDA devices"
        last = "" if count == 1 else f" to cuda:{count - 1}"
        raise InputError(
            f"--device {name}: torch sees {known} here, cuda:0{last}; give one of them, or cuda for the one "
            "with the most free memory"
        )
    return kind


def resolved_device(name: str) -> "torch.device":
    """Return the device of that name; `auto` and `cuda` are the CUDA device with the most free memory.

    Raises InputError where it is absent.
    """
    import torch

    kind = device_type(name)
    if kind != "cuda":
        return torch.device(kind)
    _, _, index = name.partition(":")
    return torch.device(kind, int(index) if index else _freest_device())


@functools.cache
def _freest_device() -> int:
    """Return the index of the CUDA device with the most free memory, the first of equals.

    Asked once: everything of a process is on one device, though what is free changes.
    """
    import torch

    count = torch.cuda.device_count()
    return 0 if count == 1 else max(range(count), key=_free_of_index)


def _free_of_index(index: int) -> int:
    import torch

    try:
        return int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:
        # Too full to be asked.
        return 0


def free_device_bytes(device: "torch.device") -> int:
    """Return how much of a CUDA device this process could use: what is free, and what it keeps unused."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def device_allowance(device: "torch.device", asked: int | None, free_share: float) -> int | None:
    """Return how many bytes of a CUDA device may be used, None for the CPU.

    Raises InputError where the CPU's are asked for, DoesNotFit where more is asked for than is free.
    """
    import torch

    if device.type == "cpu":
        if asked is not None:
            raise InputError(
                "--device-memory: the run is on the CPU; leave the option out or give --device cuda"
            )
        return None
    free = free_device_bytes(device)
    if asked is None:
        return int(free * free_share)
    if asked > free:
        total = torch.cuda.mem_get_info(device)[1]
        raise DoesNotFit(
            f"--device-memory {asked / 1e9:.3g}GB: {device} has {total / 1e9:.3g} GB, {free / 1e9:.3g} GB of "
            f"them free; give at most --device-memory {free // 10**6}MB, or end what else is on the device"
        )
    return asked


@contextmanager
def device_in_use(device: "torch.device", asked: int | None) -> Iterator[None]:
    """Compute on a device, kept to --device-memory where it was `asked` for; its exhaustion is refused.

    The bound is that of torch's allocator; beside it stands the device's own context, a few hundred MB. At
    the end what is unused goes back, and torch's settings are what they were.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    share = 1.0 if asked is None else min(1.0, asked / torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        with whole_sums_in_order(), refusing_device_exhaustion(device, asked):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


@contextmanager
def whole_sums_in_order() -> Iterator[None]:
    """Let CUDA devices add float32 whole, and always in one order.

    NVIDIA's containers switch products to TF32, which has 10 bits of mantissa. Some sums come in any order
    unless torch is told otherwise, cuBLAS' by a variable that it reads when it starts; only the strict form
    of torch's setting reaches the attention's way back.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filled: Any = torch.utils.deterministic
    precision, fills = torch.get_float32_matmul_precision(), filled.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    # What is allocated here is written before it is read.
    filled.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        filled.fill_uninitialized_memory = fills


@contextmanager
def refusing_device_exhaustion(device: "torch.device", asked: int | None) -> Iterator[None]:
    """Turn a device's running out of memory into DoesNotFit, which says what to give; asked: --device-memory.

    A plan keeps to what it is given; this is for what it cannot know: other programs on the device, memory
    in pieces, libraries.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_exhaustion(error):
            raise
        raise DoesNotFit(_exhaustion(device, asked)) from error


def _is_exhaustion(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _EXHAUSTED)


def _exhaustion(device: "torch.device", asked: int | None) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    smaller = int(_NEXT_SHARE * min(free + ours, asked or total))
    given = "" if asked is None else f" {asked / 1e9:.3g}GB"
    return (
        f"--device-memory{given}: {device} ran out of memory; {ours / 1e9:.3g} GB were held here, "
        f"{free / 1e9:.3g} of its {total / 1e9:.3g} GB are free; give --device-memory {smaller // 10**6}MB, "
        "or end what else is on the device; finished parts are kept, and the same command continues from "
        "there"
    )


def wait_for(device: "torch.device") -> None:
    """Return when a CUDA device has computed all that it was asked; at once for the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: "torch.device") -> dict[str, str | int | None]:
    """Return what is to be known of the machine that a figure was made on, as plain values.

    `cuda`: the name of the device that computed, None where that was the CPU.
    """
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "cuda": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def peak_resident_bytes() -> int:
    """Return the most memory this process has held at once.

    Linux's own count per program is taken where there is one: `getrusage` also counts the parent's.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
