"""The patch stage: every unit's value from one prompt of a pair in the other, and function-vector scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.experiments.ablate.measure import ablated_units
from lowmem_icl.experiments.patch import added, function_vectors, measure
from lowmem_icl.experiments.patch.estimates import estimate_blocks, estimates_of, estimates_part
from lowmem_icl.experiments.patch.prompts import (
    Pairs,
    VectorPrompts,
    pair_jobs,
    prompts_of,
    vector_jobs,
)
from lowmem_icl.masks.mask import Unit, all_heads
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.session.part_jobs import Source
from lowmem_icl.session.patch_parts import PatchPart, PromptMeansPart
from lowmem_icl.session.patch_work import patch_estimates, patched, written_vectors
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult, stamp
from lowmem_icl.session.work import Part, Work
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.unit_table import GOLD_Q_VALUE

Setting = tuple[str, int | None]

NO_ZERO_SHOT = "patch: function vectors are added to prompts without demonstrations; add 0 to --shots for it"


@dataclass(frozen=True, kw_only=True)
class PatchResult(StageResult):
    """What the stage finds; by task and shot count, `vectors` [H, N] of all heads and prompts: what each
    head's mean adds to the probability of the target's first token; `end_means`: the means themselves.
    """

    vectors: Mapping[Setting, NDArray[np.float64]] = field(default_factory=dict)
    end_means: Mapping[Setting, UnitMeans] = field(default_factory=dict)


def parts(prepared: Prepared) -> list[Part]:
    """Return the passes that patch pairs, take means and put them into corrupted prompts."""
    found = prompts_of(prepared)
    asked: list[Part] = []
    if found.pairs:
        asked += [pairs_part(prepared, found.pairs), estimates_part(found.pairs)]
    asked += function_vector_parts(prepared, found.vectors)
    if found.vectors and (found_zero := added.zero_shot(prepared, found.vectors)):
        asked.append(added_part(prepared, found_zero, {}))
    return asked


def function_vector_parts(prepared: Prepared, vectors: Sequence[VectorPrompts]) -> list[Part]:
    """Return the passes that take means and put them into corrupted prompts; whichever stage comes first
    makes them.
    """
    if not vectors:
        return []
    return [means_part(vectors), vectors_part(prepared, vectors, [None] * len(vectors))]


def pairs_part(prepared: Prepared, every: Sequence[Pairs]) -> PatchPart:
    """Return the pass that patches all pairs, in both directions and everywhere asked for."""
    units = units_of(prepared)
    placed = [(pairs.at(at), at) for pairs in every for at in prepared.options.at]
    jobs = [job for pairs, at in placed for job in pair_jobs(pairs.pairs, units, at)]
    # Two jobs a pair.
    sources = [source for pairs, _ in placed for source in pairs.sources for _ in range(2)]
    return PatchPart("patch", "patch", tuple(jobs), sources=tuple(sources))


def means_part(vectors: Sequence[VectorPrompts]) -> PromptMeansPart:
    """Return the pass that takes the means at the last tokens of clean prompts."""
    return PromptMeansPart(
        "patch-means",
        "means at last tokens",
        tuple(prompts.clean for prompts in vectors),
        sources=tuple(prompts.sources(prompts.clean) for prompts in vectors),
    )


def vectors_part(
    prepared: Prepared, vectors: Sequence[VectorPrompts], means: Sequence[UnitMeans | None]
) -> PatchPart:
    """Return the pass that puts heads' means into corrupted prompts; before there are means, None."""
    heads = [unit.as_mask() for unit in heads_of(prepared)]
    jobs = [
        job
        for prompts, of_task in zip(vectors, means, strict=True)
        for job in vector_jobs(prompts, of_task, heads)
    ]
    sources = [source for prompts in vectors for source in prompts.sources(prompts.corrupted)]
    return PatchPart("patch-vectors", "function vectors", tuple(jobs), sources=tuple(sources))


def added_part(
    prepared: Prepared, found: Sequence[added.ZeroShot], vectors: Mapping[str, added.Vectors]
) -> PatchPart:
    """Return the pass that adds vectors to prompts without demonstrations; before there are vectors, none."""
    jobs = added.jobs_of(found, prepared.skeleton.layers, vectors)
    sources = [
        Source(of_task.vectors.setting, f"document {prompt.document} without demonstrations")
        for of_task in found
        for prompt in of_task.prompts
    ]
    return PatchPart(
        "patch-added", "function vectors added", tuple(jobs), reads_before=1, sources=tuple(sources)
    )


def units_of(prepared: Prepared) -> list[Unit]:
    """Return all units of the model, heads first."""
    return ablated_units(prepared.skeleton.layers, prepared.skeleton.heads)


def heads_of(prepared: Prepared) -> list[Unit]:
    """Return all heads of the model."""
    return all_heads(prepared.skeleton.layers, prepared.skeleton.heads)


def run(work: Work) -> Iterator[PatchResult]:
    """Patch all pairs, then score heads by their means; yields after each."""
    prepared = work.prepared
    found = prompts_of(prepared)
    stamped = stamp(prepared, "patch") | {"ablation": None}
    results, effects = blocks.frame("results", []), blocks.frame("effects", [])
    if found.pairs:
        results, effects = _pair_tables(work, found.pairs, stamped)
        yield PatchResult(results=results, effects=effects, warnings=found.notes)
    if not found.vectors:
        return
    by_task, means = head_effects(work, found.vectors)
    rows: list[blocks.Block] = []
    heads = heads_of(prepared)
    vectors: dict[Setting, NDArray[np.float64]] = {}
    for prompts, of_task in zip(found.vectors, by_task, strict=True):
        rows += function_vectors.score_blocks(prompts, heads, of_task)
        vectors[prompts.task, prompts.shots] = of_task[0]
    scored = blocks.frame("results", rows, stamped)
    settings = [(prompts.task, prompts.shots) for prompts in found.vectors]
    whole = PatchResult(
        results=pl.concat([results, with_means(scored)]),
        effects=effects,
        warnings=found.notes,
        vectors=vectors,
        end_means=dict(zip(settings, means, strict=True)),
    )
    yield whole
    if found_zero := added.zero_shot(prepared, found.vectors):
        gained = blocks.frame("results", _added_records(work, found_zero, whole), stamped)
        yield replace(whole, results=pl.concat([whole.results, gained]))
    elif any(prompts.shots for prompts in found.vectors):
        yield replace(whole, warnings=(*whole.warnings, NO_ZERO_SHOT))


def _added_records(
    work: Work, found: Sequence[added.ZeroShot], result: PatchResult
) -> Iterator[dict[str, Any]]:
    """Make every task's function vector of the heads that score best over all tasks, and add it."""
    prepared, heads = work.prepared, heads_of(work.prepared)
    # Prompts that were given are of no task.
    by_task = [values.mean(1) for (_, shots), values in result.vectors.items() if shots is not None]
    top = added.top_heads(np.mean(by_task, 0), heads)
    settings = [(of_task.vectors.task, of_task.vectors.shots) for of_task in found]
    own = written_vectors(work, "patch-written", [(result.end_means[of], top) for of in settings])
    vectors = added.named_vectors(found, own, prepared.options.seed)
    scores = iter(patched(work, added_part(prepared, found, vectors)))
    yield from added.records(found, prepared.skeleton.layers, len(top), scores)


def head_effects(
    work: Work, vectors: Sequence[VectorPrompts]
) -> tuple[list[tuple[function_vectors.Values, function_vectors.Values]], Sequence[UnitMeans]]:
    """Return what every head's mean changes in corrupted prompts, as `function_vectors.head_effects` has it,
    and the means, by task.
    """
    means = [sums.means() for sums in work.means(means_part(vectors))]
    scores = iter(patched(work, vectors_part(work.prepared, vectors, means)))
    return [function_vectors.head_effects([next(scores) for _ in of.corrupted]) for of in vectors], means


def with_means(results: pl.DataFrame) -> pl.DataFrame:
    """Return results with their means over tasks: prompts that were given are of no task, and a mean of
    q-values says nothing.
    """
    is_of_task = pl.col("shots").is_not_null() & ~pl.col("metric").str.ends_with(GOLD_Q_VALUE)
    return pl.concat([results, over_tasks(results.filter(is_of_task))])


def _pair_tables(
    work: Work, every: Sequence[Pairs], stamped: blocks.Block
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Patch all pairs, and estimate the same; return results and effects by pair."""
    prepared = work.prepared
    units, scores = units_of(prepared), iter(patched(work, pairs_part(prepared, every)))
    estimates = estimates_of(every, patch_estimates(work, estimates_part(every)))
    rows, per_pair = list[blocks.Block](), list[blocks.Block]()
    for whole, estimated in zip(every, estimates, strict=True):
        for at in prepared.options.at:
            pairs = whole.at(at)
            found = [next(scores).logprobs for _ in range(2 * len(pairs.pairs))]
            if not found:
                continue
            effects = measure.PairEffects.of(pairs.pairs, found[::2], found[1::2])
            exact = {name: effects.changes(name)["gold_logprob"] for name in measure.DIRECTIONS}
            same = [pair in pairs.pairs for pair in whole.pairs]
            of_these = {name: values[:, same] for name, values in estimated.at(at).items()}
            rows += measure.prompt_records(pairs, effects, at)
            rows += measure.effect_blocks(pairs, units, effects, at)
            rows += estimate_blocks(pairs, units, at, of_these, exact)
            if at == prepared.options.at[0]:
                for name in measure.DIRECTIONS:
                    per_pair += measure.per_pair_blocks(pairs, units, effects, name)
    return with_means(blocks.frame("results", rows, stamped)), blocks.frame("effects", per_pair)
