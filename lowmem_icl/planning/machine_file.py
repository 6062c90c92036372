"""A machine's rates in a file, so that a plan can be made for it elsewhere, and with another model.

What is kept does not depend on a model's size: products (a multiplication and an addition) per second in each
part of a layer, in the vocabulary and on the way back, bytes per second from disk. Attention over a row's own
tokens, norms and activations are counted with the products of their part, so a model of another width is
planned a little off: narrow ones too fast, wide ones too slow.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowmem_icl import __version__
from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.errors import InputError
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store, Weights
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.measure import Rates, measure
from lowmem_icl.planning.memory import FREE_SHARE
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.system.machine import describe_machine, device_allowance, device_in_use, resolved_device
from lowmem_icl.system.memory import free_memory

FORMAT: Literal["lowmem-icl-machine/1"] = "lowmem-icl-machine/1"
MEASURED_ROW = 128
LARGEST_FILE_BYTES = 1 << 20

# Wide bounds, beyond which seconds would overflow.
Rate = Annotated[float, Field(ge=1, le=1e24, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0, le=1 << 60)]


class MachineFile(BaseModel):
    """What was measured of a machine; seconds, bytes, and products per second.

    `memory_bytes`, `device_memory_bytes`: what a run there may use, the latter None without a GPU; `weights`:
    the form of weights that the products were of; `model`: what they were measured with.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    format: Literal["lowmem-icl-machine/1"]
    version: str
    model: str
    weights: Weights
    machine: dict[str, str | int | None]
    memory_bytes: Bytes
    device_memory_bytes: Bytes | None
    call_seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    attention_products_per_second: Rate
    projection_products_per_second: Rate
    ffn_products_per_second: Rate
    backward_products_per_second: Rate
    vocabulary_products_per_second: Rate
    disk_bytes_per_second: Rate

    def rates_for(self, store: Store) -> Rates:
        """Return the machine's rates with a model; raise InputError where its weights have another form."""
        weights, skeleton = store.manifest.weights, store.skeleton
        if weights != self.weights:
            raise InputError(
                f"--machine: weights: expected rates of {weights}, which is planned, got {self.weights}; "
                f"measure that machine with --weights {weights}"
            )
        attention, projection, ffn = skeleton.weights_by_part
        return Rates(
            call_seconds=self.call_seconds,
            attention_seconds=attention / self.attention_products_per_second,
            projection_seconds=projection / self.projection_products_per_second,
            ffn_seconds=ffn / self.ffn_products_per_second,
            backward_seconds=sum(skeleton.weights_by_part) / self.backward_products_per_second,
            answer_seconds=_vocabulary_products(skeleton) / self.vocabulary_products_per_second,
            disk_bytes_per_second=self.disk_bytes_per_second,
        )


def _vocabulary_products(skeleton: Skeleton) -> int:
    return skeleton.vocabulary * skeleton.embedding_width


def measured_machine(store: Store, options: RunOptions) -> MachineFile:
    """Measure this machine with a model, whose weights need not be there."""
    device = resolved_device(options.device)
    on_device = device_allowance(device, options.device_memory, FREE_SHARE)
    memory = options.memory or int(free_memory() * FREE_SHARE)
    limits = SweepLimits(alive_bytes=on_device or memory, micro_batch_tokens=MICRO_BATCH_TOKENS)
    with device_in_use(device, options.device_memory):
        rates = measure(store, MEASURED_ROW, limits, device, backward=True)
    attention, projection, ffn = store.skeleton.weights_by_part
    # A part that is too quick to be timed counts as one that takes a nanosecond.
    seconds = [
        max(1e-9, value) for value in (rates.attention_seconds, rates.projection_seconds, rates.ffn_seconds)
    ]
    return MachineFile(
        format=FORMAT,
        version=__version__,
        # A store that is only planned does not know what it is made of.
        model=store.manifest.source.id if store.is_written else options.model,
        weights=store.manifest.weights,
        machine=describe_machine(device),
        memory_bytes=memory,
        device_memory_bytes=on_device,
        call_seconds=rates.call_seconds,
        attention_products_per_second=attention / seconds[0],
        projection_products_per_second=projection / seconds[1],
        ffn_products_per_second=ffn / seconds[2],
        backward_products_per_second=(attention + projection + ffn) / rates.backward_seconds,
        vocabulary_products_per_second=_vocabulary_products(store.skeleton) / rates.answer_seconds,
        disk_bytes_per_second=rates.disk_bytes_per_second,
    )


def write_machine(path: Path, machine: MachineFile) -> None:
    """Write a machine's file, whole or not at all; raise InputError where that is not possible."""
    try:
        write_text_atomic(path, json.dumps(machine.model_dump(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); give another file") from error


def read_machine(path: Path) -> MachineFile:
    """Read and check a machine's file; raise InputError naming the file and the field that is wrong."""
    hint = "make one with `lowmem-icl measure --out FILE`"
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise InputError(
                f"--machine {path}: expected at most {LARGEST_FILE_BYTES >> 20} MB, got "
                f"{path.stat().st_size} bytes; {hint}"
            )
        return MachineFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"--machine {path}: cannot be read ({error.strerror}); {hint}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "content"
        raise InputError(
            f"--machine {path}: {name}: {first['msg']}, got {str(first['input'])[:60]!r}; {hint}"
        ) from error
