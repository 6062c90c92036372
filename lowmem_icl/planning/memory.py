"""How the memory given to a run is dealt out between weights, rows and caches, so that it is kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowmem_icl.engine.head_scores import kept_bytes, reading_bytes
from lowmem_icl.engine.micro_batches import MICRO_BATCH_TOKENS
from lowmem_icl.engine.patch_jobs import TokenBytes
from lowmem_icl.engine.row_masks import KEPT_MASK_ELEMENTS
from lowmem_icl.engine.schedule import CACHE_SHARE, DONOR_WEIGHT, FLOAT_BYTES, SweepLimits
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.experiments.induction.stage import copying_form
from lowmem_icl.model.int8 import BACKWARD_INPUTS, BACKWARD_OUTPUTS, FIXED_ROWS
from lowmem_icl.model.layer import finish_tokens
from lowmem_icl.model.nf4 import product_bytes
from lowmem_icl.model.reading import PAGE_BYTES
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import NON_LAYER
from lowmem_icl.model.tables import VOCABULARY_BLOCK
from lowmem_icl.model.vocabulary import READ_ROWS
from lowmem_icl.session.donors import is_resampled
from lowmem_icl.session.identity import run_folder
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.system.files import free_bytes
from lowmem_icl.system.memory import free_memory

FREE_SHARE = 0.8
RESIDENT_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
SPILL_SHARE = 0.5
WORKING_SHARE = 0.4
# cuBLAS' workspace, and what torch's allocator rounds up.
DEVICE_LIBRARIES = 64 << 20
# Forms that compute in float32 hold the layer in use once more, converted; NF4 its blocks' maxima only.
CONVERTED_COPIES = {"int8": 0, "nf4": 1 / 8, "bfloat16": 2, "float32": 1}


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is dealt out, in bytes.

    `device_bytes` is None where all lies in the machine's memory. Else `allowance_bytes` of that hold the
    layers being read and the clean cache, and all the rest is on the device. `spill_bytes` of disk take what
    the cache cannot hold. `micro_batch_tokens` go through a layer together, so that intermediate tensors keep
    to `working_bytes`. `tables_in_memory`: whether the vocabulary's tables are held; where not, the head's
    `head_bytes` are read again for every READ_ROWS answers.
    """

    allowance_bytes: int
    device_bytes: int | None
    non_layer_bytes: int
    head_bytes: int
    tables_in_memory: bool
    streaming_bytes: int
    working_bytes: int
    resident_bytes: int
    alive_bytes: int
    cache_bytes: int
    spill_bytes: int
    micro_batch_tokens: int

    def head_read_bytes(self, answers: float) -> float:
        """Return how much of the head is read from disk for so many answers."""
        return 0.0 if self.tables_in_memory else answers / READ_ROWS * self.head_bytes

    def limits(self, wave_tokens: int | None = None) -> SweepLimits:
        """Return what a sweep may use."""
        return SweepLimits(
            self.alive_bytes, self.cache_bytes, self.spill_bytes, self.micro_batch_tokens, wave_tokens
        )


def plan_memory(
    prepared: Prepared,
    longest_tokens: int,
    device_bytes: int | None = None,
    layers_read: Callable[[MemoryPlan], float] = lambda plan: 0.0,
) -> MemoryPlan:
    """Deal out --memory and, where `device_bytes` are given, those; raise DoesNotFit with the smallest that
    would do.

    longest_tokens: of the longest row with its stem. Of several ways to share between layers that stay and
    rows that are alive together, the one is taken that reads least by `layers_read`.
    """
    store = prepared.store
    needs = _Needs(prepared, longest_tokens, device_bytes)
    spill = needs.spill_bytes()
    together = needs.micro_batch_tokens()
    working = needs.working_bytes(together)
    rest = needs.rest(working)
    cache_on_device = needs.host_cache_bytes()

    def sharing(resident: int) -> MemoryPlan:
        split = SweepLimits.of(rest - resident)
        return MemoryPlan(
            allowance_bytes=needs.allowance,
            device_bytes=device_bytes,
            non_layer_bytes=needs.non_layer,
            head_bytes=needs.head,
            tables_in_memory=needs.tables_in_memory,
            streaming_bytes=needs.read_ahead + needs.in_use,
            working_bytes=working,
            resident_bytes=resident,
            alive_bytes=rest - resident if needs.on_device else split.alive_bytes,
            cache_bytes=cache_on_device if needs.on_device else split.cache_bytes,
            spill_bytes=spill,
            micro_batch_tokens=together,
        )

    whole = store.layer_bytes * store.skeleton.layers
    if whole <= rest // 2 and needs.least <= rest - whole and needs.lacks_on_disk(sharing(whole)) <= 0:
        return sharing(whole)
    most = min(whole, rest - needs.least)
    shares = needs.fitting([sharing(min(most, int(rest * share))) for share in RESIDENT_SHARES])
    return min(shares, key=lambda plan: (layers_read(plan), plan.resident_bytes))


class _Needs:
    """What a run cannot do without, in bytes: of the device where there is one, else of the machine's memory.

    allowance: what --memory gives; non_layer: what is held of the weights outside the layers; head: the table
    that is read for answers; read_ahead: two layers being read; in_use: the layer in use; least: what
    `least_of` takes, one row or one patch.
    """

    def __init__(self, prepared: Prepared, longest_tokens: int, device_bytes: int | None) -> None:
        store = prepared.store
        self._prepared, self._longest_tokens, self._device_bytes = prepared, longest_tokens, device_bytes
        self.on_device = device_bytes is not None
        self.allowance = prepared.options.memory or int(free_memory() * FREE_SHARE)
        self.read_ahead = 2 * (store.layer_bytes + PAGE_BYTES)
        converted = CONVERTED_COPIES[store.manifest.weights]
        self.in_use = math.ceil(store.layer_bytes * converted)
        if self.on_device:
            # Two layers are in turn copied and used there.
            self.in_use += 2 * store.layer_bytes + DEVICE_LIBRARIES
        # Where another document gives its values, it may be as long.
        times = 1 + DONOR_WEIGHT if is_resampled(prepared) else 1
        self._row_bytes = longest_tokens * times * store.skeleton.width * FLOAT_BYTES
        alive = max(2 * self._row_bytes, self._patched_bytes())
        self.least = alive if self.on_device else int(alive / (1 - CACHE_SHARE)) + PAGE_BYTES
        self.least_of = "what one patch holds" if prepared.options.patches else "one row"
        self._place_tables()

    def _patched_bytes(self) -> int:
        """Return what the longest prompt takes where it is patched, with one change to it."""
        options, sizes = self._prepared.options, TokenBytes.of(self._prepared.skeleton)
        # What patch puts in is of another prompt, which may be as long; heads are found by means alone.
        prompts = 2 if "patch" in options.experiments else 1
        return self._longest_tokens * (prompts * sizes.clean + sizes.changed) if options.patches else 0

    def _place_tables(self) -> None:
        """Hold the vocabulary's tables where they leave as much again for everything else that varies."""
        store, skeleton = self._prepared.store, self._prepared.skeleton
        sizes = {name: math.prod(shape) for name, shape in skeleton.non_layer_parameters().items()}
        whole = store.manifest.files[NON_LAYER].size_bytes
        element = whole / sum(sizes.values())
        names = {skeleton.embedding_name, skeleton.unembedding_name}
        tables = round(element * sum(sizes[name] for name in names))
        self.head = round(element * sizes[skeleton.unembedding_name])
        # Of a table on disk a block is in memory, as it is stored and in float32.
        block = VOCABULARY_BLOCK * skeleton.embedding_width * 2 * FLOAT_BYTES
        self.non_layer = min(whole, whole - tables + block)
        together = self._smallest_batch
        given = self._device_bytes if self._device_bytes is not None else self.allowance
        varying = given - whole - self._fixed_bytes(self.working_bytes(together))
        self.tables_in_memory = block >= tables or varying >= max(tables, self.least)
        if self.tables_in_memory:
            self.non_layer = whole

    @property
    def _smallest_batch(self) -> int:
        return max(1, min(self._longest_tokens, MICRO_BATCH_TOKENS))

    def _fixed_bytes(self, working: int) -> int:
        """Return what is needed besides the weights outside the layers and the rows."""
        return self.in_use + (0 if self.on_device else self.read_ahead) + working

    def spill_bytes(self) -> int:
        """Return how much of the run folder's disk may be used for what the cache cannot hold."""
        return int(free_bytes(run_folder(self._prepared.options)) * SPILL_SHARE)

    def lacks_on_disk(self, plan: MemoryPlan) -> int:
        """Return how many bytes of disk are missing for one row at the input of every layer, as far as the
        cache does not hold it; not more than 0 where none are.
        """
        # Neither holds part of a layer's.
        on_disk = max(0, self._prepared.skeleton.layers - plan.cache_bytes // max(1, self._row_bytes))
        return on_disk * self._row_bytes - plan.spill_bytes

    def fitting(self, plans: Sequence[MemoryPlan]) -> list[MemoryPlan]:
        """Return the plans whose cache and disk hold one row at the input of every layer; raise DoesNotFit
        where none does.
        """
        lacks = [self.lacks_on_disk(plan) for plan in plans]
        if min(lacks) > 0:
            raise DoesNotFit(
                f"--out {run_folder(self._prepared.options)}: of the activations of the longest row "
                f"{(min(lacks) + plans[0].spill_bytes) / 1e6:.3g} MB do not fit into memory, and "
                f"{plans[0].spill_bytes / 1e6:.3g} MB of its disk may be used; free "
                f"{min(lacks) / SPILL_SHARE / 1e6:.3g} MB there, choose another disk or give more --memory"
            )
        return [plan for plan, lack in zip(plans, lacks, strict=True) if lack <= 0]

    def micro_batch_tokens(self) -> int:
        """Return how many tokens go through a layer together: as many as leave room for rows."""
        smallest = self._smallest_batch
        room = self.rest(self.working_bytes(smallest))
        together = MICRO_BATCH_TOKENS
        while together > smallest and self.working_bytes(together) > room * WORKING_SHARE:
            together = max(smallest, together // 2)
        return together

    def working_bytes(self, together: int) -> int:
        """Return what intermediate tensors take with so many tokens in a layer at once."""
        return working_bytes(self._prepared, self._longest_tokens, together)

    def rest(self, working: int) -> int:
        """Return what is left for rows and layers that stay; raise DoesNotFit where that is less than one row
        needs.
        """
        fixed = {
            "embeddings": self.non_layer,
            "layers in use": self.in_use + (0 if self.on_device else self.read_ahead),
            "working space": working,
        }
        if self._device_bytes is not None:
            return _rest("--device-memory", self._device_bytes, fixed, self.least, self.least_of)
        return _rest("--memory", self.allowance, fixed, self.least, self.least_of)

    def host_cache_bytes(self) -> int:
        """Return what the machine's memory has for the clean cache where rows are on a device."""
        return _rest("--memory", self.allowance, {"two layers being read": self.read_ahead}, PAGE_BYTES)


def _rest(flag: str, allowance: int, fixed: dict[str, int], least: int, least_of: str = "one row") -> int:
    """Return what an allowance leaves for rows; raise DoesNotFit where that is less than `least_of` needs."""
    needed = sum(fixed.values()) + least
    if needed > allowance:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in fixed.items())
        raise DoesNotFit(
            f"{flag} {allowance / 1e9:.3g}GB: {parts} and {least_of} {least / 1e9:.3g} GB do not fit; "
            f"the smallest that does is {flag} {-(-needed // 10**6)}MB"
        )
    return allowance - sum(fixed.values())


def working_bytes(prepared: Prepared, longest_tokens: int, together: int) -> int:
    """Return what intermediate tensors take at the widest moment, `together` tokens going through a layer at
    once.
    """
    options, skeleton = prepared.options, prepared.skeleton
    tokens = max(together, longest_tokens)
    working = forward_bytes(skeleton, tokens, longest_tokens)
    if options.takes_gradients:
        working = backward_bytes(skeleton, tokens, longest_tokens)
    if prepared.store.manifest.weights == "nf4":
        working += product_bytes(max(inputs for _, inputs in skeleton.linear_shapes.values()))
    if "induction" in options.experiments:
        # What stays while the pass runs; a layer's heads are read before its FFN.
        working += kept_bytes(skeleton, copying_form(options))
        width = max(skeleton.width, skeleton.attention_width)
        heads = tokens * 64 * width + 2 * longest_tokens**2 * FLOAT_BYTES
        working = max(working, heads + reading_bytes(skeleton, longest_tokens, copying_form(options)))
    # The unembedding comes after the layers, in the same space.
    reading = (2 * READ_ROWS + skeleton.width) * VOCABULARY_BLOCK * FLOAT_BYTES
    waiting = 3 * (READ_ROWS + tokens) * skeleton.width * FLOAT_BYTES
    return max(working, reading + waiting)


def forward_bytes(skeleton: Skeleton, tokens: int, longest_tokens: int) -> int:
    """Return what a micro-batch of so many tokens takes on its way through a layer."""
    # Queries, keys and values may be wider than the residual, and a gated FFN has two inner outputs.
    width, ffn_width = max(skeleton.width, skeleton.attention_width), skeleton.ffn_width
    # Of the FFN: int32 products, their float32 form, the int8 input, and what an activation is made of. Of
    # the rest: queries, keys, values (filled up and not), z, residuals before and after, clean z of a group,
    # keys and values of stems.
    working = 16 * min(tokens, finish_tokens(ffn_width)) * ffn_width + 52 * tokens * width
    # Attention masks: of the longest row, and those that are kept.
    working += 2 * longest_tokens**2 * FLOAT_BYTES + KEPT_MASK_ELEMENTS * FLOAT_BYTES
    return working + _attention_bytes(skeleton, tokens, longest_tokens)


def backward_bytes(skeleton: Skeleton, tokens: int, longest_tokens: int) -> int:
    """Return what a micro-batch of so many tokens takes on its way back through a layer, which is run again.

    Of a weight in int8 there is a block in float32, whatever its size.
    """
    width, ffn_width = max(skeleton.width, skeleton.attention_width), skeleton.ffn_width
    # The graph of the layer and the gradients at what is in it; measured, a family takes at most nine tenths.
    graph = tokens * (24 * ffn_width + 88 * width) + 2 * _attention_bytes(skeleton, tokens, longest_tokens)
    masks = 2 * longest_tokens**2 * FLOAT_BYTES + KEPT_MASK_ELEMENTS * FLOAT_BYTES
    # A weight's block, what it is multiplied by, and the rows that fill up a product.
    block = BACKWARD_OUTPUTS * (BACKWARD_INPUTS + tokens + FIXED_ROWS) + FIXED_ROWS * max(width, ffn_width)
    return graph + masks + block * FLOAT_BYTES


def _attention_bytes(skeleton: Skeleton, tokens: int, longest_tokens: int) -> int:
    return skeleton.attention_products * skeleton.heads * tokens * longest_tokens * FLOAT_BYTES
