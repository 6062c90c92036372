"""What is put in removed units' place, against plain hooks on Hugging Face's own model of three families."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_store
from family_models import CASES, HEADS, LAYERS, FamilyCase
from hypothesis import given, settings
from test_engine import (
    CPU,
    PLENTY,
    Sweep,
    ablation_masks,
    cache_of,
    packed_task,
    sweeps,
    swept,
)
from torch import Tensor

from lowmem_icl.engine.cost import SweepCost, sweep_cost
from lowmem_icl.engine.fills import Donor, Fill, Fills, RowValues
from lowmem_icl.engine.passes import GradientJob, PassSetup, sweep, unit_gradients, unit_means
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.engine.unit_means import MeanSums, means_cost
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans, mean_of_tables
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.rows import Row, stem_of, with_stems
from lowmem_icl.tasks.packing import OptionTokens, PackedTask

# Norms before what is written (OPT, Llama), and after it as well (Gemma).
NAMES = ("opt", "llama", "gemma3_text")
EVERYTHING = Mask(
    frozenset((layer, head) for layer in range(LAYERS) for head in range(0, HEADS, 2)), frozenset([0, 2])
)


@dataclass(frozen=True)
class Made:
    """A family's small model, as a store and as Hugging Face's own."""

    case: FamilyCase
    store: Store
    model: Any

    def random_means(self, seed: int) -> UnitMeans:
        skeleton, rng = self.store.skeleton, np.random.default_rng(seed)
        shapes = (LAYERS, skeleton.attention_width), (LAYERS, skeleton.width)
        return UnitMeans(*(rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes))


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("fills")
    case.save(folder / "checkpoint")
    store = make_store(folder / "checkpoint", folder / "float32", "float32")
    return Made(case, store, case.reloaded(folder / "checkpoint"))


@contextmanager
def replaced(made: Made, mask: Mask, heads: Any, ffns: Any) -> Iterator[None]:
    """Put values in place of removed units: by layer, of z before the output projection, [Z] or [T, Z], and
    of what the FFN writes into the residual, [D] or [T, D].
    """
    handles = []
    for number in range(LAYERS):

        def cut(module: Any, arguments: tuple[Tensor, ...], number: int = number) -> tuple[Tensor]:
            z = arguments[0].clone()
            width = z.shape[-1] // HEADS
            given = torch.as_tensor(heads[number])
            for layer, head in mask.heads:
                if layer == number:
                    mine = slice(head * width, (head + 1) * width)
                    z[..., mine] = given[..., mine]
            return (z,)

        def write(module: Any, arguments: Any, output: Tensor, number: int = number) -> Tensor:
            return torch.as_tensor(ffns[number]).expand(output.shape).clone()

        output = made.case.module(made.model, number, made.case.output)
        handles.append(output.register_forward_pre_hook(cut))
        if number in mask.ffns:
            written = made.case.module(made.model, number, made.case.written_ffn or made.case.ffn)
            handles.append(written.register_forward_hook(write))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logprob(model: Any, option: OptionTokens) -> Tensor:
    """Summed log-probability of an option, by one run of the whole model on it alone."""
    path, continuation = list(option.path), list(option.continuation)
    logprobs = model(torch.tensor([path])).logits[0].float().log_softmax(-1).double()
    first = len(path) - len(continuation)
    return torch.stack([logprobs[first + index, token] for index, token in enumerate(continuation)]).sum()


def hooked(made: Made, options: Sequence[OptionTokens], mask: Mask, means: UnitMeans) -> np.ndarray:
    with torch.no_grad(), replaced(made, mask, means.heads, means.ffns):
        return np.array([float(logprob(made.model, option)) for option in options])


@pytest.mark.parametrize("shared", [0, 40], ids=["own prompts", "shared demonstrations"])
def test_means_in_units_place_equal_one_hooked_run_a_unit(made: Made, shared: int) -> None:
    task = packed_task(2, shared=shared)
    fills = {"mean:a": made.random_means(1), "mean:b": made.random_means(2)}
    units = ablation_masks(LAYERS, HEADS)[1:]
    masks = [mask.filled("mean:a") for mask in (*units, EVERYTHING)] + [EVERYTHING.filled("mean:b")]
    (scores,) = swept(made.store, [Job(task.packed, (Mask(), *masks, EVERYTHING), fills)])
    for mask, values in zip(masks, scores.logprobs[1:-1], strict=True):
        assert mask.fill is not None
        expected = hooked(made, task.options, mask, fills[mask.fill])
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    (zero,) = swept(made.store, [Job(task.packed, (Mask(), EVERYTHING))])
    np.testing.assert_allclose(scores.logprobs[[0, -1]], zero.logprobs, rtol=1e-6, atol=1e-5)


def captured(made: Made, option: OptionTokens) -> tuple[list[Tensor], list[Tensor]]:
    """What every head and FFN gives at all tokens of an option's path, by layer: z [T, Z] and [T, D]."""
    heads: list[Tensor] = []
    ffns: list[Tensor] = []
    handles = []
    for number in range(LAYERS):
        output = made.case.module(made.model, number, made.case.output)
        handles.append(output.register_forward_pre_hook(lambda module, given: heads.append(given[0][0])))
        written = made.case.module(made.model, number, made.case.written_ffn or made.case.ffn)

        def keep(module: Any, given: Any, output: Tensor) -> None:
            ffns.append(output.view(-1, output.shape[-1]))

        handles.append(written.register_forward_hook(keep))
    with torch.no_grad():
        made.model(torch.tensor([list(option.path)]))
    for handle in handles:
        handle.remove()
    return heads, ffns


def sums_of(store: Store, tasks: Sequence[PackedTask], limits: SweepLimits = PLENTY) -> list[MeanSums]:
    skeleton = store.skeleton
    sums = [
        MeanSums.empty(len(task.packed.rows), skeleton.layers, skeleton.attention_width, skeleton.width)
        for task in tasks
    ]
    with StreamedModel(store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
        unit_means(PassSetup(model, limits, cache), [task.packed for task in tasks], sums)
    return sums


def gold_options(task: PackedTask) -> list[OptionTokens]:
    flags = [gold for document in task.task.documents for gold in document.gold]
    return [option for option, gold in zip(task.options, flags, strict=True) if gold]


def test_means_are_over_all_tokens_of_the_documents(made: Made) -> None:
    task = packed_task(4, gold_only=True)
    (sums,) = sums_of(made.store, [task])
    runs = [captured(made, option) for option in gold_options(task)]
    means = sums.means()
    for layer in range(LAYERS):
        for kind, found in enumerate((means.heads, means.ffns)):
            expected = torch.cat([run[kind][layer] for run in runs]).double().mean(0)
            np.testing.assert_allclose(found[layer], expected.numpy(), atol=1e-5)


def test_int8_means_do_not_depend_on_memory_or_company(int8_store: Store) -> None:
    tasks = [packed_task(seed, gold_only=True) for seed in (4, 5)]
    together = sums_of(int8_store, tasks)
    narrow = replace(SweepLimits.of(60_000), micro_batch_tokens=64)
    for task, sums, tight in zip(tasks, together, sums_of(int8_store, tasks, narrow), strict=True):
        (alone,) = sums_of(int8_store, [task])
        for other in (tight, alone):
            np.testing.assert_array_equal(sums.heads, other.heads)
            np.testing.assert_array_equal(sums.ffns, other.ffns)
        assert sums.means().digest == tight.means().digest


def test_means_take_what_is_planned_and_go_on_where_they_were(float_store: Store) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    task, limits = packed_task(4, gold_only=True), SweepLimits.of(30_000)
    (whole,) = sums_of(float_store, [task], limits)
    sums = MeanSums.empty(len(task.packed.rows), 3, 32, 32)
    done: list[SweepCost] = []
    stops = 0
    with StreamedModel(float_store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
        while not sums.finished.all():
            setup = PassSetup(model, limits, cache, done.append, stop)
            with pytest.raises(Stopped):
                unit_means(setup, [task.packed], [sums])
            stops += 1
    assert stops > 1
    np.testing.assert_array_equal(sums.heads, whole.heads)
    assert sum(done, SweepCost()) == replace(means_cost([task.packed], (3, 32), limits), layers_read=0)


@pytest.mark.parametrize("mask", [Mask(), EVERYTHING])
def test_estimates_equal_autograd(made: Made, mask: Mask) -> None:
    """⟨z − mean, ∂logp/∂z⟩ of every unit, in the whole model and in one that means stand in already."""
    task, means = packed_task(4, gold_only=True), made.random_means(3)
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    result = UnitGradients.empty(len(task.task.documents), task.packed.option_count, LAYERS, HEADS)
    with StreamedModel(made.store, device=CPU, resident_bytes=0) as model, cache_of(PLENTY) as cache:
        job = GradientJob(task.packed.rows, lambda logprobs: chosen, mask.filled("mean:a"), {"mean:a": means})
        unit_gradients(PassSetup(model, PLENTY, cache), [job], [result])
    for owner, option in enumerate(gold_options(task)):
        heads, ffns = estimates(made, option, mask, means)
        for found, expected in ((result.head_signed[owner], heads), (result.ffn_signed[owner], ffns)):
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def estimates(
    made: Made, option: OptionTokens, mask: Mask, means: UnitMeans
) -> tuple[np.ndarray, np.ndarray]:
    """The estimated drops [L, H] and [L], from the whole graph; 0 where a unit is removed already."""
    kept: dict[tuple[str, int], Tensor] = {}
    handles = []
    for number in range(LAYERS):

        def keep(module: Any, given: tuple[Tensor, ...], number: int = number) -> None:
            given[0].retain_grad()
            kept["head", number] = given[0]

        def keep_ffn(module: Any, given: Any, output: Tensor, number: int = number) -> None:
            output.retain_grad()
            kept["ffn", number] = output

        output = made.case.module(made.model, number, made.case.output)
        handles.append(output.register_forward_pre_hook(keep))
        written = made.case.module(made.model, number, made.case.written_ffn or made.case.ffn)
        handles.append(written.register_forward_hook(keep_ffn))
    with replaced(made, mask, means.heads, means.ffns):
        logprob(made.model, option).backward()
    for handle in handles:
        handle.remove()

    def by_token(kind: str, number: int, fill: np.ndarray) -> Tensor:
        values = kept[kind, number]
        gradient = torch.zeros_like(values) if values.grad is None else values.grad
        return ((values - torch.as_tensor(fill)) * gradient).detach().view(-1, values.shape[-1])

    heads = [
        by_token("head", number, means.heads[number]).unflatten(-1, (HEADS, -1)).sum((0, 2))
        for number in range(LAYERS)
    ]
    ffns = [by_token("ffn", number, means.ffns[number]).sum() for number in range(LAYERS)]
    return torch.stack(heads).numpy(), torch.stack(ffns).numpy()


def donor_row(seed: int, tokens: int = 7) -> Row:
    return stem_of(np.random.default_rng(seed).integers(3, 90, tokens).tolist())


def row_values(task: PackedTask, seed: int) -> RowValues:
    """A donor of a few tokens for every row and stem, at random places."""
    rng, rows = np.random.default_rng(seed), with_stems(task.packed.rows)
    return RowValues(
        {
            row: Donor(donor_row(seed + number), rng.integers(0, 7, len(row)))
            for number, row in enumerate(rows)
        }
    )


def tokens_of(task: PackedTask, number: int) -> tuple[Row, list[int]]:
    """The row of an option and where in it the tokens of its path stand, its stem's left aside."""
    row = next(row for row in task.packed.rows if number in row.options)
    last = int(row.read_at[row.options == number].max())
    return row, [index for index in range(last + 1) if row.ends[index] > last]


def donated(made: Made, values: RowValues, row: Row) -> tuple[list[Tensor], list[Tensor]]:
    """What a row's donor gives at the row's tokens, by layer: [T, Z] and [T, D]."""
    donor = values.donors[row]
    option = OptionTokens(tuple(donor.row.tokens.tolist()), (1,), 0, False)
    heads, ffns = captured(made, option)
    return [z[donor.source] for z in heads], [ffn[donor.source] for ffn in ffns]


@pytest.mark.parametrize("shared", [0, 40], ids=["own prompts", "shared demonstrations"])
def test_other_rows_values_equal_one_hooked_run_a_unit(made: Made, shared: int) -> None:
    task = packed_task(2, shared=shared)
    values = row_values(task, 1)
    masks = [mask.filled("mean:rows") for mask in (*ablation_masks(LAYERS, HEADS)[1:], EVERYTHING)]
    fills: Fills = {"mean:rows": values, "mean:a": made.random_means(1)}
    (scores,) = swept(made.store, [Job(task.packed, (Mask(), *masks, EVERYTHING.filled("mean:a")), fills)])
    given = {row: donated(made, values, row) for row in with_stems(task.packed.rows)}
    for number, option in enumerate(task.options):
        row, indices = tokens_of(task, number)
        at_path = []
        for kind in (0, 1):
            before = [] if row.stem is None else [given[row.stem][kind]]
            own = [layer[indices] for layer in given[row][kind]]
            at_path.append([torch.cat([*(stem[at] for stem in before), of]) for at, of in enumerate(own)])
        for mask, found in zip(masks, scores.logprobs[1:-1, number], strict=True):
            with torch.no_grad(), replaced(made, mask, *at_path):
                expected = float(logprob(made.model, option))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_given_its_own_values_is_as_it_was(int8_store: Store) -> None:
    task = packed_task(1)
    own = RowValues({row: Donor(row, np.arange(len(row))) for row in task.packed.rows})
    masks = [
        mask.filled("mean:own")
        for mask in (*ablation_masks(3, 4)[1:], Mask(frozenset([(0, 1)]), frozenset([1])))
    ]
    (scores,) = swept(int8_store, [Job(task.packed, (Mask(), *masks), {"mean:own": own})])
    for values in scores.logprobs[1:]:
        np.testing.assert_array_equal(values, scores.logprobs[0])


def filled(drawn: Sweep) -> list[Mask]:
    """The masks of a sweep, every fifth with zeros, others with one of two tables or of two donors."""
    names = (None, "mean:a", "mean:rows", "mean:b", "mean:others")
    return [mask.filled(names[index % 5]) for index, mask in enumerate(drawn.masks)]


@settings(max_examples=25, deadline=None)
@given(drawn=sweeps)
def test_int8_results_are_bitwise_the_same_for_any_memory_and_company(
    int8_store: Store, tmp_path_factory: pytest.TempPathFactory, drawn: Sweep
) -> None:
    spill, rng, masks = tmp_path_factory.getbasetemp() / "spill", np.random.default_rng(0), filled(drawn)
    tables: dict[str, Fill] = {
        name: UnitMeans(*(rng.normal(0, 0.5, (3, 32)).astype(np.float32) for _ in range(2)))
        for name in ("mean:a", "mean:b")
    }
    jobs = []
    for seed in drawn.seeds:
        task = packed_task(seed, shared=drawn.shared)
        rows: dict[str, Fill] = {
            "mean:rows": row_values(task, seed),
            "mean:others": row_values(task, 50 + seed),
        }
        jobs.append(Job(task.packed, tuple(masks), tables | rows))
    # Donors take room of their own.
    limits = replace(drawn, total_bytes=drawn.total_bytes + 30_000).limits
    tight = swept(int8_store, jobs, limits, drawn.resident_bytes, spill)
    for job, scores in zip(jobs, tight, strict=True):
        for index, mask in enumerate(masks):
            (alone,) = swept(int8_store, [Job(job.packed, (mask,), job.fills)])
            np.testing.assert_array_equal(scores.logprobs[index], alone.logprobs[0])
    assert not list(spill.glob("*")), "spilled residuals are removed"


@pytest.mark.parametrize("shared", [0, 40])
def test_work_and_reads_with_donors_are_as_planned(float_store: Store, shared: int) -> None:
    masks = (*ablation_masks(3, 4), Mask(frozenset([(1, 2)]), frozenset([1, 2])))
    jobs = []
    for seed in (1, 2):
        task = packed_task(seed, shared=shared)
        own = masks[: 9 if seed == 1 else None]
        jobs.append(
            Job(
                task.packed,
                tuple(mask.filled("mean:rows") for mask in own),
                {"mean:rows": row_values(task, seed)},
            )
        )
    for limits in (
        PLENTY,
        SweepLimits.of(200_000, 1 << 20),
        SweepLimits.of(400_000),
        SweepLimits(1 << 30, 1 << 20, wave_tokens=1500),
    ):
        done: list[SweepCost] = []
        with StreamedModel(float_store, device=CPU, resident_bytes=0) as model, cache_of(limits) as cache:
            sweep(PassSetup(model, limits, cache, done.append), jobs)
            reads = model.read_bytes / float_store.layer_bytes
        planned = sweep_cost(jobs, 32, 3, limits)
        assert reads == planned.layers_read
        assert sum(done, SweepCost()) + SweepCost(layers_read=reads) == planned


def test_the_mean_over_tables_counts_each_the_same(made: Made) -> None:
    left, right = made.random_means(1), made.random_means(2)
    both = mean_of_tables([left, right])
    np.testing.assert_allclose(both.heads, (left.heads + right.heads) / 2, atol=1e-7)
    assert both.digest != left.digest
