"""The only loops over layers: sweeps under many masks, and passes for gradients, means and heads.

Loop order is layers outside, rows inside, variants of a row in micro-batches innermost: a layer is read once
for all that is alive at it. Axis letters: T tokens, D width, H heads, L layers, N owners.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.fills import DonatedValues, donors_of
from lowmem_icl.engine.head_scores import HeadQuestions, HeadReader, HeadScores, PassCheckpoint
from lowmem_icl.engine.lost import (
    mark_gradients,
    mark_heads,
    mark_means,
    report_gradients,
    report_heads,
    report_means,
    report_sweep,
)
from lowmem_icl.engine.micro_batches import row_batches
from lowmem_icl.engine.row_masks import embedded, plain_segments
from lowmem_icl.engine.schedule import (
    FLOAT_BYTES,
    Block,
    BlockRow,
    EarlierWork,
    Job,
    PlannedBlock,
    SweepLimits,
    head_blocks,
    row_blocks,
    schedule,
)
from lowmem_icl.engine.setup import PassSetup
from lowmem_icl.engine.traced import trace_wave
from lowmem_icl.engine.unit_gradients import (
    GradientJob,
    LayerCuts,
    UnitGradients,
    add_by_owner,
    answer_gradients,
    one_layer_back,
)
from lowmem_icl.engine.unit_means import BlockSums, MeanSums
from lowmem_icl.engine.wave import Wave
from lowmem_icl.errors import DoesNotFit
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.rows import PackedRows, Row

__all__ = ["GradientJob", "PassSetup", "score_heads", "sweep", "unit_gradients", "unit_means"]


def sweep(
    setup: PassSetup, jobs: Sequence[Job], scores: Sequence[Scores] | None = None, *, keep_clean: bool = False
) -> list[Scores]:
    """Score every job's options under every one of its masks, sharing each read of the weights.

    The result does not depend on the limits, nor on which jobs and masks are swept together, nor on what the
    cache holds from earlier sweeps of equal rows; with `keep_clean` later ones find there what these variants
    branched from. `scores`: what an earlier call left; what is scored is not scored again. They are filled in
    place and returned. Rows and masks under which a value on the way is not finite score NaN, and
    `setup.lost` names one for every job. Raises DoesNotFit where one row exceeds the memory.
    """
    skeleton = setup.model.skeleton
    results = [Scores.empty(len(job.masks), job.packed.option_count) for job in jobs]
    if scores is not None:
        results = list(scores)
    earlier = EarlierWork(lambda job, row: results[job].missing(row), setup.cache.has)
    for block in schedule(
        jobs, skeleton.width, skeleton.layers, setup.limits, earlier, keep_clean=keep_clean
    ):
        with setup.cache.holding([member.row for member in block.rows], keep=keep_clean):
            lost = _run_waves(setup, jobs, results, block)
        # Who keeps what is not finite would start from there.
        setup.cache.forget(lost)
    report_sweep(setup, jobs, results)
    return results


def _run_waves(
    setup: PassSetup, jobs: Sequence[Job], results: Sequence[Scores], block: PlannedBlock
) -> list[Row]:
    """Run the waves of a block one after the other; return the rows that are not finite in the clean run."""
    lost: list[Row] = []
    setup.model.watch.overflowed()
    for plan in block.waves:
        wave = Wave(setup, jobs, results, block.rows, plan)
        for number, layer in setup.model.layers(range(plan.first_layer, setup.model.skeleton.layers)):
            wave.step(number, layer)
        wave.finish()
        if setup.model.watch.overflowed():
            lost += trace_wave(setup, jobs, results, block.rows, plan)
        setup.after_step()
    return lost


def unit_gradients(setup: PassSetup, jobs: Sequence[GradientJob], results: Sequence[UnitGradients]) -> None:
    """Fill in the gradients of all jobs from two reads of the weights: forward with a cache, then backward.

    No gradient of a weight is ever made: going back, one layer is run again from its cached input. Rows whose
    owners are finished are left out. `setup.lost` names jobs that met what is not finite. Raises DoesNotFit
    where one row's residuals at all layers exceed the cache.
    """
    width, layers = setup.model.skeleton.width, setup.model.skeleton.layers
    members = [
        BlockRow(index, row)
        for index, job in enumerate(jobs)
        for row in job.rows
        if not results[index].finished[row.owners].all()
    ]
    fills = [job.fills for job in jobs]
    together = [sum(map(len, (member.row, *donors_of(fills[member.job], member.row)))) for member in members]
    _check_cache(max(together, default=0), width, layers, setup.limits)
    cuts = LayerCuts(setup.model, jobs)
    for rows in row_blocks(members, width, layers, setup.limits, keeps_clean=True, fills=fills):
        block = tuple(member for member in rows if not member.is_donor)
        donors = [member.row for member in rows if member.is_donor]
        with setup.cache.holding([member.row for member in rows]):
            residuals = _forward(setup, jobs, block, donors, cuts)
            gradients = answer_gradients(setup.model, jobs, block, residuals, results)
            mark_gradients(setup, jobs, block, results)
            del residuals
            _backward(setup, jobs, block, donors, cuts, (gradients, results))
        for member in block:
            results[member.job].finished[member.row.owners] = True
        setup.after_step()
    report_gradients(setup, jobs, results)


def _check_cache(longest: int, width: int, layers: int, limits: SweepLimits) -> None:
    """Raise DoesNotFit where the cache does not hold the longest row, with its donors, at every layer."""
    row_bytes = max(1, longest * width * FLOAT_BYTES)
    if limits.cache_bytes // row_bytes + limits.disk_bytes // row_bytes < layers:
        raise DoesNotFit(
            f"the activations of a row of {longest} tokens take {row_bytes * layers} bytes, "
            f"{limits.cache_bytes + limits.disk_bytes} of memory and disk are left; "
            "give more --memory or free the disk"
        )


def _forward(
    setup: PassSetup, jobs: Sequence[GradientJob], block: Block, donors: Sequence[Row], cuts: LayerCuts
) -> list[Tensor]:
    """Take a block's rows, and their donors, through all layers, keeping their inputs; return the last
    residuals of the rows, [T, D].
    """
    model, rows = setup.model, [member.row for member in block]
    batches = list(row_batches(rows, setup.limits.micro_batch_tokens))
    with torch.no_grad():
        residuals = [embedded(model, row) for row in rows]
        donating = {row: embedded(model, row) for row in donors}
        for number, layer in model.layers(range(model.skeleton.layers)):
            for member, residual in zip(block, residuals, strict=True):
                setup.cache.keep(member.row, number, residual, jobs[member.job].residual_mask)
            for row, residual in donating.items():
                setup.cache.keep(row, number, residual)
            donating = _donate(setup, layer, donating, cuts.donated)
            for batch in batches:
                for part, cut in cuts.groups(number, block, batch):
                    entering = torch.cat([residuals[index] for index in part])
                    leaving = layer.run(entering, plain_segments(model, [rows[i] for i in part]), cut)
                    for index, residual in zip(
                        part, leaving.split([len(rows[i]) for i in part]), strict=True
                    ):
                        residuals[index] = residual
                    tokens = len(entering)
                    setup.account(SweepCost(tokens, tokens, 0 if cut.without_ffn else tokens))
    return residuals


def _donate(
    setup: PassSetup, layer: DecoderLayer, entering: Mapping[Row, Tensor], donated: DonatedValues
) -> dict[Row, Tensor]:
    """Take donors through a layer, where what their units give is kept; return their residuals, [T, D]."""
    donated.clear()
    rows = list(entering)
    leaving: dict[Row, Tensor] = {}
    for batch in row_batches(rows, setup.limits.micro_batch_tokens):
        here = [rows[index] for index in batch]
        flat = torch.cat([entering[row] for row in here])
        with torch.no_grad():
            run = layer.run_captured(flat, plain_segments(setup.model, here))
        donated.keep(here, run)
        leaving.update(zip(here, run.output.split([len(row) for row in here]), strict=True))
        setup.account(SweepCost(len(flat), len(flat), len(flat)))
    return leaving


def _backward(
    setup: PassSetup,
    jobs: Sequence[GradientJob],
    block: Block,
    donors: Sequence[Row],
    cuts: LayerCuts,
    found: tuple[list[Tensor], Sequence[UnitGradients]],
) -> None:
    """Take the gradients [T, D] of a block's rows back through all layers, adding up its units' terms in the
    results.
    """
    gradients, results = found
    model, rows = setup.model, [member.row for member in block]
    batches = list(row_batches(rows, setup.limits.micro_batch_tokens))
    for number, layer in model.layers(range(model.skeleton.layers - 1, -1, -1)):
        entering_donors = {row: setup.cache.get(row, number, model.device) for row in donors}
        _donate(setup, layer, entering_donors, cuts.donated)
        for batch in batches:
            for part, cut in cuts.groups(number, block, batch):
                here = [block[index] for index in part]
                entering = torch.cat(
                    [setup.cache.get(m.row, number, model.device, jobs[m.job].residual_mask) for m in here]
                )
                leaving = torch.cat([gradients[index] for index in part])
                before, terms = one_layer_back(
                    model, layer, [member.row for member in here], cut, entering, leaving
                )
                add_by_owner(results, here, number, terms)
                for index, gradient in zip(part, before.split([len(m.row) for m in here]), strict=True):
                    gradients[index] = gradient
                setup.account(SweepCost(backward_tokens=len(before)))


def unit_means(
    setup: PassSetup, packed: Sequence[PackedRows], results: Sequence[MeanSums], *, ends_only: bool = False
) -> None:
    """Add the rows of tasks to their sums, from one read of the weights per block of rows that fits.

    Rows that are in the sums already are left out; rows must have no stem. `ends_only`: of a row its last
    token alone is added. Of a row only its residual is held. `setup.lost` names tasks that met what is not
    finite. Raises DoesNotFit where one row exceeds the memory.
    """
    model = setup.model
    number_of = {
        row: (job, number) for job, of_job in enumerate(packed) for number, row in enumerate(of_job.rows)
    }
    left = [
        BlockRow(job, row) for row, (job, number) in number_of.items() if not results[job].finished[number]
    ]
    for block in head_blocks(left, model.skeleton.width, model.skeleton.layers, setup.limits):
        sums, rows = BlockSums(results, ends_only=ends_only), [member.row for member in block]
        residuals = [embedded(model, row) for row in rows]
        batches = list(row_batches(rows, setup.limits.micro_batch_tokens))
        with torch.no_grad():
            for number, layer in model.layers(range(model.skeleton.layers)):
                for batch in batches:
                    here = [block[index] for index in batch]
                    entering = torch.cat([residuals[index] for index in batch])
                    segments = plain_segments(model, [member.row for member in here])
                    run = layer.run_captured(entering, segments)
                    sums.add(number, here, run)
                    lengths = [len(member.row) for member in here]
                    for index, part in zip(batch, run.output.split(lengths), strict=True):
                        residuals[index] = part
                    tokens = len(entering)
                    setup.account(SweepCost(tokens, tokens, tokens))
        sums.finish([number_of[row] for row in rows], block)
        mark_means(setup, block, results)
        setup.after_step()
    report_means(setup, packed, results)


def _begin_anew(checkpoint: PassCheckpoint) -> None:
    """Take up nothing: the pass starts at its first layer."""


def score_heads(
    setup: PassSetup,
    questions: HeadQuestions,
    results: HeadScores,
    *,
    begin: Callable[[PassCheckpoint], None] = _begin_anew,
) -> None:
    """Fill in the scores of all heads from one read of the weights, or as many as there are blocks of rows
    that fit.

    The rows continue as in the clean run. Rows that are finished are left out. `setup.lost` names a sequence
    that met what is not finite. `begin` is given the checkpoint of every block before it starts, and may put
    into its arrays what an earlier run left; on the CPU they always are what there is when `after_step` is
    called.
    """
    model = setup.model
    left = [BlockRow(index, row) for index, row in enumerate(questions.rows) if not results.finished[index]]
    reader = HeadReader(model, questions, results)
    for block in head_blocks(left, model.skeleton.width, model.skeleton.layers, setup.limits):
        checkpoint = PassCheckpoint.of(block, model.skeleton.width)
        begin(checkpoint)
        residuals = torch.from_numpy(checkpoint.residuals).to(model.device)
        parts = residuals.split([len(member.row) for member in block])
        first = int(checkpoint.next_layer[0])
        if first == 0:
            for member, part in zip(block, parts, strict=True):
                part.copy_(embedded(model, member.row))
        for number, layer in model.layers(range(first, model.skeleton.layers)):
            with torch.no_grad():
                reader.enter(number, layer)
                _look_at_heads(setup, reader, block, parts)
            checkpoint.next_layer[0] = number + 1
            setup.after_step()
        mark_heads(setup, block, questions, results)
        results.finished[checkpoint.row_indices] = True
    report_heads(setup, questions, results)


def _look_at_heads(setup: PassSetup, reader: HeadReader, block: Block, residuals: Sequence[Tensor]) -> None:
    """Score the heads of the reader's layer on a block's rows [T, D], and take the rows through it."""
    model, rows = setup.model, [member.row for member in block]
    for batch in row_batches(rows, setup.limits.micro_batch_tokens):
        here = [block[index] for index in batch]
        entering = torch.cat([residuals[index] for index in batch])
        segments = plain_segments(model, [rows[index] for index in batch])
        attention = reader.layer.attend(entering, segments, with_queries=True)
        reader.read(here, attention)
        setup.account(SweepCost(attention_tokens=len(entering)))
        continuing = [index for index in batch if reader.questions.continues(block[index].job)]
        if reader.number + 1 == model.skeleton.layers or not continuing:
            continue
        leaving = reader.layer.finish(entering, attention.z)
        setup.account(SweepCost(projection_tokens=len(entering), ffn_tokens=len(entering)))
        for index, part in zip(batch, leaving.split([len(member.row) for member in here]), strict=True):
            if index in continuing:
                residuals[index].copy_(part)
