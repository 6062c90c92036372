"""The only loops over layers: sweeps forward under many masks, one pass back for gradients, one to look at heads.

Loop order is layers outside, rows inside, variants of a row in micro-batches innermost: a layer is read once
for all that is alive at it. Axis letters: T tokens, D width, H heads, L layers, N owners.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.head_scores import HeadQuestions, HeadReader, HeadScores, Journey
from lowmem_icl.engine.micro_batches import micro_batches
from lowmem_icl.engine.schedule import (
    FLOAT_BYTES,
    Block,
    BlockRow,
    Job,
    SweepLimits,
    block_tokens,
    has_variants,
    head_blocks,
    next_wave,
    row_blocks,
    variants_of,
)
from lowmem_icl.engine.unit_gradients import (
    Choose,
    UnitGradients,
    add_by_owner,
    answer_gradients,
    cut_of,
    embedded,
    forward_step,
    one_layer_back,
    plain_segments,
)
from lowmem_icl.engine.wave import Account, Wave
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row

AfterPiece = Callable[[], None]


def sweep(
    model: StreamedModel,
    jobs: Sequence[Job],
    *,
    limits: SweepLimits,
    cache: CleanCache,
    keep_clean: bool = False,
    scores: Sequence[Scores] | None = None,
    after_wave: AfterPiece = lambda: None,
    account: Account = lambda cost: None,
) -> list[Scores]:
    """Score every job's options under every one of its masks, sharing each read of the weights.

    The result does not depend on `limits`, nor on which jobs and masks are swept together, nor on what `cache` holds
    from earlier sweeps of the same rows; with `keep_clean` later ones find there what these variants branched from.
    `scores`: what an earlier call left unfinished; what is made is not made again. They are filled in place, and
    `after_wave` is called whenever a wave is whole. `account` is told what was done. Raises DoesNotFit where one row
    exceeds the memory.
    """
    results = (
        list(scores) if scores else [Scores.unmade(len(job.masks), job.packed.option_count) for job in jobs]
    )
    missing = {
        BlockRow(number, row): flags
        for number, (job, result) in enumerate(zip(jobs, results, strict=True))
        for row in job.packed.rows
        if (flags := result.missing(row)).any()
    }
    width, layers = model.skeleton.width, model.skeleton.layers
    # Rows that were stopped on their way go first and by themselves: others would repeat what they have.
    begun = [member for member, flags in missing.items() if not flags.all()]
    untouched = [member for member, flags in missing.items() if flags.all()]
    keeps_clean = has_variants(jobs)
    for block in [
        *row_blocks(begun, width, layers, limits, keeps_clean=keeps_clean),
        *row_blocks(untouched, width, layers, limits, keeps_clean=keeps_clean),
    ]:
        wanted: dict[int, NDArray[np.bool_]] = {}
        for member in block:
            if member in missing:
                flags = missing[member]
                wanted[member.job] = wanted.get(member.job, np.zeros_like(flags)) | flags
        for wave in _waves_of(model, jobs, block, wanted, limits, cache, keep_clean, results, account):
            for number, layer in model.layers(range(wave.first_layer, layers)):
                wave.step(number, layer)
            wave.finish()
            after_wave()
    return results


def _waves_of(
    model: StreamedModel,
    jobs: Sequence[Job],
    block: Block,
    wanted: dict[int, NDArray[np.bool_]],
    limits: SweepLimits,
    cache: CleanCache,
    keep_clean: bool,
    results: Sequence[Scores],
    account: Account,
) -> Iterator[Wave]:
    """Yield the waves of a block; the clean run goes with one that asks for it or lacks what it starts from."""
    tokens, rows = block_tokens(block), [member.row for member in block]
    layers = model.skeleton.layers
    left = variants_of(jobs, wanted)
    asked = any(
        mask.first_layer is None
        for job, flags in wanted.items()
        for mask, flag in zip(jobs[job].masks, flags, strict=True)
        if flag
    )
    while left or asked:
        needed = {variant.first_layer for variant in left}
        clean = asked or not all(cache.has(rows, layer) for layer in needed)
        count = next_wave(left, tokens, model.skeleton.width, layers, limits, clean=clean)
        clean_layers = layers if asked else max(needed) if clean else None
        taken, left = left[:count], left[count:]
        later = needed if keep_clean else {variant.first_layer for variant in left}
        yield Wave(
            model,
            jobs,
            block,
            taken,
            clean_layers=clean_layers,
            keep_at=frozenset(later),
            cache=cache,
            limits=limits,
            scores=results,
            account=account,
        )
        asked = False


def unit_gradients(
    model: StreamedModel,
    jobs: Sequence[Sequence[Row]],
    choose: Sequence[Choose],
    results: Sequence[UnitGradients],
    *,
    limits: SweepLimits,
    cache: CleanCache,
    masks: Sequence[Mask] | None = None,
    after_block: AfterPiece = lambda: None,
    account: Account = lambda cost: None,
) -> None:
    """Fill in the gradients of all jobs from two reads of the weights: forward with a cache, then backward.

    No gradient of a weight is ever made: going back, one layer is run again from its cached input. A row's tokens
    must each belong to one owner, an owner's tokens lie in one row, and rows have no stem. `choose[j]` maps option
    log-probabilities [O] to which options [O] to differentiate; it is asked once all rows of a block are scored.
    Rows whose owners are finished are left out; `after_block` is called when a block's are. With `masks`, one a job,
    the model runs without their heads, whose own terms are then 0; the cache must hold no other run of these rows.
    """
    removed = [Mask()] * len(jobs) if masks is None else masks
    width, layers = model.skeleton.width, model.skeleton.layers
    members = [
        BlockRow(number, row)
        for number, rows in enumerate(jobs)
        for row in rows
        if not results[number].finished[row.owners].all()
    ]
    longest = max((len(member.row) for member in members), default=0)
    if longest * layers * width * FLOAT_BYTES > limits.cache_bytes + limits.disk_bytes:
        raise DoesNotFit(
            f"the activations of a row of {longest} tokens take {longest * layers * width * FLOAT_BYTES} bytes, "
            f"{limits.cache_bytes + limits.disk_bytes} of memory and disk are left; give more --memory or free the disk"
        )
    for block in row_blocks(members, width, layers, limits, keeps_clean=True):
        batches = list(_batches_of(block, limits))
        with torch.no_grad():
            residuals = [embedded(model, member.row) for member in block]
            for number, layer in model.layers(range(layers)):
                for member, residual in zip(block, residuals, strict=True):
                    cache.keep(member.row, number, residual)
                for places in batches:
                    here = [block[place] for place in places]
                    cut = cut_of(removed, here, number, model)
                    forward_step(model, layer, here, residuals, places, cut)
                    tokens = sum(len(block[place].row) for place in places)
                    account(SweepCost(tokens, tokens, tokens))
        gradients = answer_gradients(model, block, residuals, results, choose)
        del residuals
        for number, layer in model.layers(range(layers - 1, -1, -1)):
            for places in batches:
                here = [block[place] for place in places]
                entering = torch.cat([cache.get(member.row, number, model.device) for member in here])
                leaving = torch.cat([gradients[place] for place in places])
                cut = cut_of(removed, here, number, model)
                before, terms = one_layer_back(model, layer, here, entering, leaving, cut)
                add_by_owner(results, here, number, terms)
                for place, part in zip(places, before.split([len(m.row) for m in here]), strict=True):
                    gradients[place] = part
                account(SweepCost(backward=len(before)))
        for member in block:
            results[member.job].finished[member.row.owners] = True
        after_block()


def score_heads(
    model: StreamedModel,
    questions: HeadQuestions,
    results: HeadScores,
    *,
    limits: SweepLimits,
    begin: Callable[[Journey], None] = lambda journey: None,
    after_layer: AfterPiece = lambda: None,
    account: Account = lambda cost: None,
) -> None:
    """Fill in the scores of all heads from one read of the weights, or as many as there are blocks of rows that fit.

    The rows go on as the clean run does. Rows that are finished are left out. `begin` is told of every block before it
    starts, and may put in the place of its arrays what an earlier run left; on the CPU they always are what there is when
    `after_layer` is called.
    """
    layers = model.skeleton.layers
    reader = HeadReader(model, questions, results)
    left = [BlockRow(place, row) for place, row in enumerate(questions.rows) if not results.finished[place]]
    for block in head_blocks(left, model.skeleton.width, layers, limits):
        journey = Journey.of(block, model.skeleton.width)
        begin(journey)
        residuals = torch.from_numpy(journey.residuals).to(model.device)
        parts = residuals.split([len(member.row) for member in block])
        first = int(journey.next_layer[0])
        if first == 0:
            for member, part in zip(block, parts, strict=True):
                part.copy_(embedded(model, member.row))
        for number, layer in model.layers(range(first, layers)):
            with torch.no_grad():
                reader.enter(number, layer)
                for places in _batches_of(block, limits):
                    here = [block[place] for place in places]
                    entering = torch.cat([parts[place] for place in places])
                    attended = layer.attend(entering, plain_segments(model, here), with_queries=True)
                    reader.read(number, here, attended)
                    account(SweepCost(attended=len(entering)))
                    going_on = [place for place in places if questions.goes_on(block[place].job)]
                    if number + 1 == layers or not going_on:
                        continue
                    leaving = layer.finish(entering, attended.z)
                    account(SweepCost(projected=len(entering), fed=len(entering)))
                    for place, part in zip(places, leaving.split([len(m.row) for m in here]), strict=True):
                        if place in going_on:
                            parts[place].copy_(part)
            journey.next_layer[0] = number + 1
            after_layer()
        results.finished[journey.places] = True


def _batches_of(block: Block, limits: SweepLimits) -> Iterator[list[int]]:
    """Yield the places of a block that go through a layer together."""
    one = np.zeros(1, dtype=np.int64)
    work = ((place, one) for place in range(len(block)))
    lengths = [len(member.row) for member in block]
    for pieces in micro_batches(work, lengths, limits.micro_batch_tokens):
        yield [piece.place for piece in pieces]
