"""A CUDA device for machines without one: tensors that say they are there and are held on the CPU.

It is as strict as a card about what lies where: tensors of both sides never meet in an operator, and what is
on the device must be fetched before it is looked at. Copies on a stream of their own happen as late as events
allow, so that a missing event shows in the numbers. It says nothing of a card's own arithmetic.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
# Operators that take tensors of both sides: copies, and indices from the CPU.
_BOTH_SIDES = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}


class OnCard(Tensor):
    """A tensor that says it is on the card; `held` has its values.

    To torch's own code it is one of the CPU's, which may so be built without CUDA.
    """

    held: Tensor

    @staticmethod
    def __new__(cls: type["OnCard"], held: Tensor, requires_grad: bool | None = None) -> "OnCard":
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )

    def __init__(self, held: Tensor, requires_grad: bool | None = None) -> None:
        self.held = held.held if isinstance(held, OnCard) else held
        # accelerate fills a parameter again by its class.
        self._is_param = requires_grad is not None

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert a tensor on the card to numpy; it must be fetched first")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def cpu(self, *_: object) -> Tensor:
        return self.held.detach().clone()

    def to(self, *arguments: Any, **named: Any) -> Any:
        places = [each for each in (*arguments, named.get("device")) if isinstance(each, (str, torch.device))]
        others = [each for each in arguments if not isinstance(each, (str, torch.device))]
        named.pop("device", None)
        if places and torch.device(places[0]).type == "cpu":
            return self.cpu().to(*others, **{key: value for key, value in named.items() if key != "copy"})
        return super().to(*others, **named) if others or "dtype" in named else self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        return _computed(function, arguments, named or {})


class _Card(TorchDispatchMode):
    """Sees what makes tensors on the card out of none that is there."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return _computed(function, arguments, named or {})


class Stream:
    """Work that is done when an event asks for it, and in order."""

    def __init__(self, *_: object) -> None:
        self._waiting: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self.waited_for: list[Event] = []

    def wait_event(self, event: "Event") -> None:
        self.waited_for.append(event)
        event.synchronize()

    def record_event(self) -> "Event":
        return Event(self, len(self._waiting))

    def add(self, work: Callable[[], object]) -> None:
        self._waiting.append(work)

    def do(self, until: int) -> None:
        with self._lock:
            for number in range(until):
                work, self._waiting[number] = self._waiting[number], _nothing
                work()

    def synchronize(self) -> None:
        self.do(len(self._waiting))


class Event:
    """A place in a stream's work."""

    def __init__(self, stream: Stream, place: int) -> None:
        self._stream, self._place = stream, place

    def synchronize(self) -> None:
        self._stream.do(self._place)


class Card:
    """What the simulated card was asked for; `pinned`: addresses of host memory that is locked."""

    def __init__(self, devices: int) -> None:
        self.free = [20 * 10**9] * devices
        self.total = 24 * 10**9
        self.pinned: dict[int, int] = {}
        self.unpinned = 0
        self.emptied = 0
        self.share: float | None = None
        self.refuses_to_pin = False
        self.operators: set[str] = set()

    def memory(self, device: int | torch.device) -> tuple[int, int]:
        return self.free[device if isinstance(device, int) else device.index], self.total

    def register(self, address: int, size: int, flags: int) -> int:
        assert flags == 1, "portable: of any device"
        assert address not in self.pinned, "locked twice"
        if self.refuses_to_pin:
            return 2
        self.pinned[address] = size
        return 0

    def unregister(self, address: int) -> int:
        del self.pinned[address]
        self.unpinned += 1
        return 0

    def empty(self) -> None:
        self.emptied += 1


def _nothing() -> None:
    pass


_thread = threading.local()
_card: Card | None = None


@contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    before = getattr(_thread, "stream", None)
    _thread.stream = stream
    try:
        yield
    finally:
        _thread.stream = before


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnCard) else value


def _computed(function: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
    tensors = [each for each in tree_flatten((arguments, named))[0] if isinstance(each, Tensor)]
    there = any(isinstance(each, OnCard) for each in tensors)
    if there and _card is not None:
        _card.operators.add(function._schema.name)
    if there and function._schema.name not in _BOTH_SIDES:
        strangers = [each for each in tensors if not isinstance(each, OnCard) and each.dim()]
        if strangers:
            raise RuntimeError(f"{function}: expected all tensors on the same device, found the CPU's too")
    device = named.get("device")
    if device is not None:
        there = torch.device(device).type == "cuda"
        named = named | ({"device": torch.device("cpu")} if there else {})
    values, named_values = tree_map(
        lambda each: each.held if isinstance(each, OnCard) else each, (arguments, named)
    )
    stream = getattr(_thread, "stream", None)
    if stream is not None and function._schema.name == "aten::copy_":
        stream.add(lambda: function(*values, **named_values))
        return arguments[0]
    out = function(*values, **named_values)
    if not there:
        return out
    if function._schema.name == "aten::_to_copy" and any(out is each for each in values):
        out = out.clone()
    wrapped = tree_map(lambda each: OnCard(each) if isinstance(each, Tensor) else each, out)
    return return_and_correct_aliasing(function, tuple(arguments), named, wrapped)


_made_on_the_cpu = torch.tensor


def _tensor(*arguments: Any, device: Any = None, **named: Any) -> Tensor:
    """Make a tensor as torch does, which no mode sees, and put it where it belongs."""
    made = _made_on_the_cpu(*arguments, **named)
    return made if device is None else made.to(device)


@contextmanager
def simulated_card(devices: int = 1) -> Iterator[Card]:
    """Give this process so many CUDA devices, of which the first can compute."""
    global _card
    card, main = Card(devices), Stream()
    cudart = SimpleNamespace(cudaHostRegister=card.register, cudaHostUnregister=card.unregister)
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "_lazy_init": _nothing,
        "mem_get_info": card.memory,
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "set_device": lambda device: None,
        "set_per_process_memory_fraction": lambda share, device: setattr(card, "share", share),
        "get_device_name": lambda device: "simulated",
        "synchronize": lambda device=None: None,
        "empty_cache": card.empty,
        "Stream": Stream,
        "Event": Event,
        "stream": _on_stream,
        "current_stream": lambda device=None: main,
        "device": lambda device: nullcontext(),
        "cudart": lambda: cudart,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "tensor", _tensor)
        with _Card():  # type: ignore[no-untyped-call]
            _card = card
            try:
                yield card
            finally:
                _card = None
