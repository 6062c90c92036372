"""How the memory given to a run is dealt out between weights, rows and caches, so that it is kept."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil

from lowmem_icl.engine.head_scores import reading_bytes
from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS
from lowmem_icl.engine.schedule import CACHE_SHARE, FLOAT_BYTES, SweepLimits
from lowmem_icl.engine.wave import KEPT_MASK_ELEMENTS
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.induction.stage import copying_form
from lowmem_icl.model.reading import PAGE_BYTES
from lowmem_icl.model.store import NON_LAYER, Store
from lowmem_icl.model.streamed import READ_ROWS, VOCABULARY_BLOCK
from lowmem_icl.options import RunOptions
from lowmem_icl.system.files import free_bytes

FREE_SHARE = 0.8
RESIDENT_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
SPILL_SHARE = 0.5
WORKING_SHARE = 0.4


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is dealt out, in bytes.

    `device_bytes` is None where all lies in the machine's memory. Else `allowance_bytes` of that hold the layers being
    read and the clean cache, and all the rest is on the device. `spill_bytes` of disk take what the cache cannot hold.
    `micro_batch_tokens` go through a layer together, so that intermediate tensors keep to `working_bytes`.
    """

    allowance_bytes: int
    device_bytes: int | None
    outside_bytes: int
    streaming_bytes: int
    working_bytes: int
    resident_bytes: int
    alive_bytes: int
    cache_bytes: int
    spill_bytes: int
    micro_batch_tokens: int

    def limits(self, wave_tokens: int | None = None) -> SweepLimits:
        """Return what a sweep may use."""
        return SweepLimits(
            self.alive_bytes, self.cache_bytes, self.spill_bytes, self.micro_batch_tokens, wave_tokens
        )


def plan_memory(
    options: RunOptions,
    store: Store,
    longest_tokens: int,
    device_bytes: int | None = None,
    layers_read: Callable[[MemoryPlan], float] = lambda plan: 0.0,
) -> MemoryPlan:
    """Deal out --memory and, where `device_bytes` are given, those; raise DoesNotFit with the smallest that would do.

    longest_tokens: of the longest row with its stem. Of several ways to share between layers that stay and rows that are
    alive together, the one is taken that reads least by `layers_read`.
    """
    skeleton = store.skeleton
    allowance = options.memory or int(psutil.virtual_memory().available * FREE_SHARE)
    outside = store.manifest.files[NON_LAYER].size_bytes
    row_bytes = longest_tokens * skeleton.width * FLOAT_BYTES
    # Forms that compute in float32 hold the layer in use once more, converted.
    converted = {"int8": 0, "bfloat16": 2, "float32": 1}[store.manifest.weights]
    read_ahead = 2 * (store.layer_bytes + PAGE_BYTES)
    in_use = store.layer_bytes * (converted if device_bytes is None else 1 + converted)
    spill = int(free_bytes(options.run_folder) * SPILL_SHARE)
    if row_bytes * skeleton.layers > spill:
        needed = (row_bytes * skeleton.layers - spill) / SPILL_SHARE
        raise DoesNotFit(
            f"--out {options.run_folder}: {spill / 1e9:.3g} GB of its disk may be used, and the activations of the "
            f"longest row alone take {row_bytes * skeleton.layers / 1e9:.3g} GB; free {needed / 1e9:.3g} GB there or "
            "choose another disk"
        )
    on_device = device_bytes is not None
    flag, total = ("--device-memory", device_bytes) if device_bytes is not None else ("--memory", allowance)
    least = 2 * row_bytes if on_device else int(2 * row_bytes / (1 - CACHE_SHARE)) + PAGE_BYTES
    fixed = {"embeddings": outside, "layers in use": in_use + (0 if on_device else read_ahead)}
    smallest = max(1, min(longest_tokens, MICRO_BATCH_TOKENS))
    room = _rest(
        flag, total, fixed | {"working space": working_bytes(options, store, longest_tokens, smallest)}, least
    )
    together = MICRO_BATCH_TOKENS
    while together > smallest and working_bytes(options, store, longest_tokens, together) > (
        room * WORKING_SHARE
    ):
        together = max(smallest, together // 2)
    working = working_bytes(options, store, longest_tokens, together)
    rest = _rest(flag, total, fixed | {"working space": working}, least)
    cache_on_device = _rest("--memory", allowance, {"two layers being read": read_ahead}, PAGE_BYTES)

    def sharing(resident: int) -> MemoryPlan:
        split = SweepLimits.of(rest - resident)
        return MemoryPlan(
            allowance_bytes=allowance,
            device_bytes=device_bytes,
            outside_bytes=outside,
            streaming_bytes=read_ahead + in_use,
            working_bytes=working,
            resident_bytes=resident,
            alive_bytes=rest - resident if on_device else split.alive_bytes,
            cache_bytes=cache_on_device if on_device else split.cache_bytes,
            spill_bytes=spill,
            micro_batch_tokens=together,
        )

    whole = store.layer_bytes * skeleton.layers
    if whole <= rest // 2:
        return sharing(whole)
    most = min(whole, rest - least)
    shares = [sharing(min(most, int(rest * share))) for share in RESIDENT_SHARES]
    return min(shares, key=lambda plan: (layers_read(plan), plan.resident_bytes))


def _rest(flag: str, allowance: int, fixed: dict[str, int], least: int) -> int:
    """Return what an allowance leaves for rows; raise DoesNotFit where that is less than one row needs."""
    needed = sum(fixed.values()) + least
    if needed > allowance:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in fixed.items())
        raise DoesNotFit(
            f"{flag} {allowance / 1e9:.3g}GB: {parts} and one row {least / 1e9:.3g} GB do not fit; "
            f"the smallest that does is {flag} {-(-needed // 10**6)}MB"
        )
    return allowance - sum(fixed.values())


def working_bytes(options: RunOptions, store: Store, longest_tokens: int, together: int) -> int:
    """Return what intermediate tensors take at the widest moment, `together` tokens going through a layer at once."""
    skeleton = store.skeleton
    ffn_width = max(shape[0] for shape in skeleton.layer_parameters().values())
    tokens = max(together, longest_tokens)
    # Of the FFN: int32 products, their float32 form and the int8 input. Of the rest: queries, keys, values (filled up
    # and not), z, residuals before and after, clean z of a group, keys and values of stems.
    working = tokens * (9 * ffn_width + 72 * skeleton.width)
    # Attention masks: of the longest row, and those that are kept.
    working += 2 * longest_tokens**2 * FLOAT_BYTES + KEPT_MASK_ELEMENTS * FLOAT_BYTES
    if "importance" in options.experiments:
        # The graph of a layer and the gradients at everything in it.
        working += tokens * (16 * ffn_width + 64 * skeleton.width)
    if "induction" in options.experiments:
        # A layer's output projection and the vocabulary's products stay while it runs; its heads are read before the FFN.
        working += 3 * skeleton.width**2 * FLOAT_BYTES
        heads = tokens * 64 * skeleton.width + 2 * longest_tokens**2 * FLOAT_BYTES
        working = max(working, heads + reading_bytes(skeleton, longest_tokens, copying_form(options)))
    # The unembedding comes after the layers, in the same space.
    reading = (2 * READ_ROWS + skeleton.width) * VOCABULARY_BLOCK * FLOAT_BYTES
    waiting = 3 * (READ_ROWS + tokens) * skeleton.width * FLOAT_BYTES
    return max(working, reading + waiting)
