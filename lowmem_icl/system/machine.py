"""Which device of the machine is used, how much of it is free, and what this process takes.

PyTorch is imported where it is asked, not before: whoever only reads a finished run does without.
"""

import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lowmem_icl.errors import InputError

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")


def resolved_device(name: str) -> "torch.device":
    """Return the device of that name, `auto` being CUDA if there is one; raise InputError if it is absent."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no CUDA device here; give --device cpu")
    return torch.device(name)


def device_allowance(device: "torch.device", asked: int | None, free_share: float) -> int | None:
    """Return how many bytes of a CUDA device may be used, None for the CPU.

    Raises InputError where the CPU's are asked for.
    """
    import torch

    if device.type == "cpu":
        if asked is not None:
            raise InputError(
                "--device-memory: the run is on the CPU; leave the option out or give --device cuda"
            )
        return None
    return asked or int(torch.cuda.mem_get_info(device)[0] * free_share)


def describe_machine() -> dict[str, str | int | None]:
    """Return what is to be known of the machine that a figure was made on, as plain values."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
