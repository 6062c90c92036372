"""Copies layers to a CUDA device while it computes: from pinned memory, on a stream of their own."""

import torch
from torch import Tensor


class CopyStream:
    """A second stream of a device, and two buffers on it that layers are copied to in turn.

    Everything about order is events: a copy waits until the arithmetic is done with what it overwrites, the
    arithmetic waits for the copy, and a host buffer is read into again only when it has been copied.
    """

    def __init__(self, device: torch.device, largest_bytes: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(largest_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied: dict[int, torch.cuda.Event] = {}

    def pin(self, host: Tensor) -> None:
        """Lock a host buffer's pages, so that copies are asynchronous; if refused, they are slower."""
        torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)

    def buffer(self, slot: int) -> Tensor:
        """Return the device buffer of a slot, bytes."""
        return self._buffers[slot]

    def now(self) -> torch.cuda.Event:
        """Mark what the device has been asked to compute so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait_for_host(self, slot: int) -> None:
        """Wait until the host buffer of a slot has been copied and may be overwritten."""
        if slot in self._copied:
            self._copied[slot].synchronize()

    def copy(self, slot: int, host: Tensor, target: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        """Start copying a host buffer once `free` has come; return the event of its end."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            target.copy_(host, non_blocking=True)
            self._copied[slot] = self._stream.record_event()
        return self._copied[slot]

    def wait_for_copy(self, copied: torch.cuda.Event) -> None:
        """Let the arithmetic wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)
