"""Copies layers to a CUDA device while it computes: from pinned memory, on a stream of their own.

This file and `system/machine.py` are all that calls torch.cuda; what the rest needs to know is a tensor's
device.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

logger = logging.getLogger("lowmem_icl")

# Tensors begin on such multiples on the device, as if each were allocated there: cuBLASLt's integer kernels
# are chosen for that.
DEVICE_ALIGNMENT = 256
_PORTABLE = 1


def device_offsets(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return where tensors of these sizes lie in a device buffer, and how large that must be, in bytes."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
    return offsets, end


class CopyStream:
    """A second stream of a device, and two buffers on it that layers are copied to in turn.

    Everything about order is events: a copy waits until the arithmetic is done with what it overwrites, the
    arithmetic waits for the copy, and a host buffer is read into again only when it has been copied.
    """

    def __init__(self, device: torch.device, largest_bytes: int) -> None:
        self._device, self._largest_bytes = device, largest_bytes
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor] = []
        self._copied: dict[int, torch.cuda.Event] = {}
        self._pinned: list[Tensor] = []

    def pin(self, host: Tensor) -> None:
        """Lock a host buffer's pages, so that copies are asynchronous; if refused, they are slower."""
        with torch.cuda.device(self._device):
            refused = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, _PORTABLE))
        if not refused:
            self._pinned.append(host)
            return
        logger.warning("CUDA does not pin %d bytes (error %d): copies are slower", host.nbytes, refused)
        # CUDA reports the refusal once more, with the next kernel: with this one.
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def close(self) -> None:
        """Wait for all copies, and unlock the host buffers: their memory must not go before."""
        self._stream.synchronize()
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())
        self._copied.clear()
        self._buffers.clear()

    def buffer(self, slot: int) -> Tensor:
        """Return the device buffer of a slot, bytes; both are made when the first is asked for."""
        if not self._buffers:
            self._buffers = [
                torch.empty(self._largest_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)
            ]
        return self._buffers[slot]

    def now(self) -> torch.cuda.Event:
        """Mark what the device has been asked to compute so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait_for_host(self, slot: int) -> None:
        """Wait until the host buffer of a slot has been copied and may be overwritten."""
        if slot in self._copied:
            self._copied[slot].synchronize()

    def copy(
        self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]], free: torch.cuda.Event
    ) -> torch.cuda.Event:
        """Start copying parts of a host buffer to their places once `free` has come; return its end."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            for host, target in pairs:
                target.copy_(host, non_blocking=True)
            self._copied[slot] = self._stream.record_event()
        return self._copied[slot]

    def wait_for_copy(self, copied: torch.cuda.Event) -> None:
        """Let the arithmetic wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)
