"""How much work is in parts, in what people count: documents, tokens, ablations; what is held meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lowmem_icl.engine.schedule import DONOR_WEIGHT, FLOAT_BYTES, SweepLimits
from lowmem_icl.engine.wave_counts import block_sizes
from lowmem_icl.session.fills import MeansPart
from lowmem_icl.session.jobs import outlined_jobs
from lowmem_icl.session.patch_parts import PatchEstimatesPart, PatchPart, PromptMeansPart
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import GradientsPart, Part, SweepPart


@dataclass(frozen=True)
class Amount:
    """How many documents are scored, their tokens, and how many times one is without a unit or mask."""

    documents: float = 0
    tokens: float = 0
    ablations: float = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.documents + other.documents, self.tokens + other.tokens, self.ablations + other.ablations
        )


def amount_of(part: Part, prepared: Prepared) -> Amount:
    """Return how much is in a part, as often as it is expected."""
    if isinstance(part, SweepPart):
        documents = sum(len(job.task.documents[job.documents]) for job in part.jobs)
        tokens = sum(prepared.outline(job.task, job.documents).token_count for job in part.jobs)
        return Amount(documents * part.times, tokens * part.times, part.ablations * part.times)
    if isinstance(part, GradientsPart | MeansPart):
        documents = sum(len(task.documents) for task in part.tasks)
        tokens = sum(prepared.outline(task, gold_only=True).token_count for task in part.tasks)
        times = part.times if isinstance(part, GradientsPart) else 1
        return Amount(documents * times, tokens * times)
    if isinstance(part, PatchPart):
        return Amount(len(part.jobs), part.tokens, part.ablations)
    if isinstance(part, PromptMeansPart):
        prompts = [row for group in part.packed(prepared) for row in group.rows]
        return Amount(len(prompts), sum(map(len, prompts)))
    if isinstance(part, PatchEstimatesPart):
        return Amount(len(part.rows), sum(map(len, part.rows)))
    return Amount(len(part.questions.rows), sum(map(len, part.questions.rows)))


NOTHING = Amount()


@dataclass(frozen=True)
class Held:
    """What the sweeps and patches of a run are expected to hold at most, in bytes: of rows alive together,
    and of the clean run, in memory and on disk.
    """

    alive_bytes: int = 0
    cache_bytes: int = 0
    spill_bytes: int = 0


NOTHING_HELD = Held()


def held_by(parts: Iterable[Part], prepared: Prepared, limits: SweepLimits) -> Held:
    """Return what the sweeps and patches among some parts are expected to hold at most.

    Of the clean run nothing is kept where one wave takes all variants of a block, unless a later sweep starts
    from it; else it is counted at the input of every layer, a little too much.
    """
    alive = kept = 0
    for part in parts:
        if isinstance(part, SweepPart):
            of_alive, of_kept = _held_by_sweep(part, prepared, limits)
            alive, kept = max(alive, of_alive), max(kept, of_kept)
        elif isinstance(part, PatchPart):
            alive = max(alive, part.held_bytes(prepared, limits))
    in_memory = min(kept, limits.cache_bytes)
    return Held(min(alive, limits.alive_bytes), in_memory, min(kept - in_memory, limits.disk_bytes))


def _held_by_sweep(part: SweepPart, prepared: Prepared, limits: SweepLimits) -> tuple[int, int]:
    skeleton = prepared.skeleton
    jobs = outlined_jobs(prepared, part.jobs)
    variants = np.array([sum(map(bool, job.masks)) for job in jobs])
    keeps = bool(variants.any())
    blocks = block_sizes(jobs, skeleton.width, skeleton.layers, limits, keeps_clean=keeps)
    tokens = blocks.tokens.sum(1)
    if not len(tokens):
        return 0, 0
    together = tokens + DONOR_WEIGHT * blocks.donors + (variants[blocks.jobs] * blocks.tokens).sum(1)
    bytes_each = skeleton.width * FLOAT_BYTES
    waves_are_long = limits.wave_tokens is not None and together * skeleton.layers > limits.wave_tokens
    is_cut = (together * bytes_each > limits.alive_bytes) | waves_are_long
    clean = tokens + blocks.donors
    kept = int((clean * (is_cut | part.keep_clean)).max()) if keeps else 0
    if part.keep_clean:
        kept = int(clean.sum())
    return int(together.max()) * bytes_each, kept * skeleton.layers * bytes_each
