"""Parts of work: what they cost is what they take, and when they are stopped they go on where they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine import CPU, LIMITS, ablation_masks, cache_of, ids, random_task

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.copying import DEFAULT_COPYING
from lowmem_icl.engine.cost import operations
from lowmem_icl.engine.head_scores import HeadQuestions
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.planning.amounts import held_by
from lowmem_icl.rows import PackedRows, stem_of
from lowmem_icl.session.chunks import scores_by_task, sweep_in_chunks
from lowmem_icl.session.fills import MeansPart
from lowmem_icl.session.jobs import MaskedDocuments
from lowmem_icl.session.parts import Parts
from lowmem_icl.session.work import GradientsPart, HeadScoresPart, OutOfTime, Part, SweepPart, Work
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.packing import PackedTask, pack

# Some rows are alive at once, not all: several blocks, several waves.
NARROW = SweepLimits(60_000, 30_000, 1 << 24, micro_batch_tokens=64)


@dataclass(frozen=True)
class Packing:
    """What parts ask of a prepared run: the model's shape, rows of a task's documents, and which give each
    other their values.
    """

    skeleton: Skeleton
    evaluate: tuple[TaskRows, ...] = ()
    train: tuple[TaskRows, ...] = ()
    importance: tuple[TaskRows, ...] = ()
    curves: tuple[TaskRows, ...] = ()
    label_controls: tuple[TaskRows, ...] = ()
    train_controls: tuple[TaskRows, ...] = ()
    sample_note: str = ""
    resampled: dict[Any, Any] = field(default_factory=dict)

    def pack(self, task: TaskRows, documents: slice = slice(None), *, gold_only: bool = False) -> PackedTask:
        chosen = replace(task, documents=task.documents[documents])
        return pack(chosen, ids, LIMITS, gold_only=gold_only)

    def outline(
        self, task: TaskRows, documents: slice = slice(None), *, gold_only: bool = False
    ) -> PackedRows:
        return self.pack(task, documents, gold_only=gold_only).packed


@dataclass
class Account:
    """Progress that adds up, by label, what was announced and what was done."""

    announced: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def progress(self, stage: str, label: str, total: int, ablations: int) -> Iterator[Callable[[int], None]]:
        self.announced[label] = total

        def advance(operations: int) -> None:
            self.done[label] = self.done.get(label, 0) + operations

        yield advance


@contextmanager
def work_of(
    store: Store,
    folder: Path,
    account: Account | None = None,
    limits: SweepLimits = NARROW,
    **changes: Any,
) -> Iterator[Work]:
    prepared: Any = Packing(store.skeleton, (*TASKS, SHORT))
    account = account or Account()
    with (
        StreamedModel(store, device=CPU, resident_bytes=0) as model,
        cache_of(limits, folder / "spill") as cache,
    ):
        yield Work(prepared, model, limits, cache, Parts(folder), account.progress, **changes)


TASKS = (random_task(1), random_task(2, 9, shared=40))
QUESTIONS = HeadQuestions(
    tuple(stem_of([2, *list(range(10, 10 + base)) * 4]) for base in (5, 7)),
    tuple(stem_of([2, *range(10, 10 + 4 * base)]) for base in (5, 7)),
    (5, 7),
    DEFAULT_COPYING,
)
SWEEP = SweepPart(
    "swept",
    "sweep",
    (
        MaskedDocuments(TASKS[0], slice(0, 3), ablation_masks(3, 4)),
        MaskedDocuments(TASKS[1], slice(1, None, 2), (Mask(frozenset([(1, 2)])), Mask(ffns=frozenset([2])))),
    ),
)
GRADIENTS = GradientsPart("differentiated", "gradients", TASKS, (Mask(), Mask(frozenset([(0, 1)]))))
HEADS = HeadScoresPart("scored", "heads", QUESTIONS)
MEANS = MeansPart("meant", "means", TASKS)
OTHERS = "resample:1"
SHORT = replace(random_task(2, 9, shared=30), task="short")
RESAMPLED = SweepPart(
    "resampled",
    "resampling",
    (
        MaskedDocuments(TASKS[0], slice(0, 3), tuple(mask.filled(OTHERS) for mask in ablation_masks(3, 4))),
        MaskedDocuments(
            SHORT,
            slice(1, None, 2),
            (
                Mask(),
                Mask(frozenset([(1, 2)]), fill=OTHERS),
                Mask(ffns=frozenset([2])),
                Mask(ffns=frozenset([0]), fill="resample:2"),
            ),
        ),
    ),
)
RESAMPLED_GRADIENTS = GradientsPart(
    "estimated", "estimates", (TASKS[0], SHORT), (Mask(fill=OTHERS), Mask(frozenset([(0, 1)]), fill=OTHERS))
)
PARTS = (SWEEP, GRADIENTS, HEADS, MEANS, RESAMPLED, RESAMPLED_GRADIENTS)


def arrays_of(work: Work, part: Part) -> dict[str, np.ndarray]:
    """Do a part and return all its arrays."""
    if isinstance(part, HeadScoresPart):
        return dict(work.head_scores(part).arrays())
    found: Any
    if isinstance(part, MeansPart):
        found = work.means(part)
    else:
        assert isinstance(part, SweepPart | GradientsPart)
        found = work.sweep(part) if isinstance(part, SweepPart) else work.gradients(part)
    return {
        f"{index}.{name}": array
        for index, result in enumerate(found)
        for name, array in result.arrays().items()
    }


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_takes_what_it_costs(int8_store: Store, tmp_path: Path, part: Part) -> None:
    account = Account()
    with work_of(int8_store, tmp_path, account) as work:
        cost = part.cost(work.prepared, NARROW, ())
        if not isinstance(part, SweepPart):
            # The vocabulary's share is not reported as progress.
            cost = replace(cost, answers=0)
        arrays_of(work, part)
        assert account.done == account.announced == {part.label: operations(cost, int8_store.skeleton)}
        assert work.model.read_bytes == pytest.approx(cost.layers_read * int8_store.layer_bytes, rel=0.01)


@pytest.mark.parametrize("alive", [60_000, 10_000_000])
def test_what_a_plan_expects_to_be_kept_is_no_less_than_what_is(
    int8_store: Store, tmp_path: Path, alive: int
) -> None:
    limits = replace(NARROW, alive_bytes=alive)
    with work_of(int8_store, tmp_path, limits=limits) as work:
        cache: Any = work.cache
        most = [0]
        keep = cache.keep

        def kept(*arguments: Any) -> None:
            keep(*arguments)
            most[0] = max(most[0], cache._held_bytes + cache._written_bytes)

        cache.keep = kept
        work.sweep(SWEEP)
        held = held_by([SWEEP], work.prepared, limits)
        expected = held.cache_bytes + held.spill_bytes
        assert most[0] <= expected <= 2 * most[0]
        assert (expected == 0) == (alive > NARROW.alive_bytes), "where one wave does nothing is kept"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_resident_layers_are_not_counted_as_read(int8_store: Store, part: Part) -> None:
    prepared: Any = Packing(int8_store.skeleton, (*TASKS, SHORT))
    nothing, some, everything = (part.cost(prepared, NARROW, resident) for resident in ((), {0}, {0, 1, 2}))
    assert everything.layers_read == 0 < some.layers_read < nothing.layers_read
    assert replace(some, layers_read=0) == replace(nothing, layers_read=0) == everything


def test_a_sweep_that_is_expected_several_times_costs_as_often(int8_store: Store) -> None:
    prepared: Any = Packing(int8_store.skeleton, (*TASKS, SHORT))
    once, often = (replace(SWEEP, times=times).cost(prepared, NARROW, ()) for times in (1, 3.5))
    assert often == once * 3.5
    branching = replace(SWEEP, jobs=SWEEP.jobs[1:])
    first, again = (replace(branching, cached=cached).cost(prepared, NARROW, ()) for cached in (False, True))
    assert again.attention_tokens < first.attention_tokens, "the clean run up to the masks is there already"
    assert again.answers == first.answers


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_stopped_by_the_clock_goes_on_and_ends_the_same(
    int8_store: Store, tmp_path: Path, part: Part
) -> None:
    with work_of(int8_store, tmp_path / "whole") as work:
        expected = arrays_of(work, part)
    ticks = count()
    whole, rest = Account(), Account()
    # Before anything it is time 0; each step takes one.
    # The pass over heads looks at the clock for its drafts, too.
    deadline = 4 if isinstance(part, HeadScoresPart) else 2
    stopped = work_of(int8_store, tmp_path, whole, deadline=deadline, clock=lambda: next(ticks))
    with stopped as work, pytest.raises(OutOfTime):
        arrays_of(work, part)
    assert (tmp_path / f"{part.name}.draft.npz").is_file()
    assert not work.parts.has(part.name)
    with work_of(int8_store, tmp_path, rest) as work:
        got = arrays_of(work, part)
        assert (work.parts.made, work.parts.reused) == (1, 0)
    assert got.keys() == expected.keys()
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert 0 < rest.done[part.label] < rest.announced[part.label], "what was done is not done again"
    assert [path.name for path in tmp_path.glob("*.npz")] == [f"{part.name}.npz"]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_whoever_shows_results_is_told_of_every_part(int8_store: Store, tmp_path: Path, part: Part) -> None:
    told: list[bool] = []
    with work_of(int8_store, tmp_path) as work:
        telling = replace(work, after_part=lambda: told.append(work.parts.has(part.name)))
        arrays_of(telling, part)
        assert told == [True]
        arrays_of(telling, part)
        assert told == [True, True], "also where it was there"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_is_finished_is_there_when_the_time_is_over(
    int8_store: Store, tmp_path: Path, part: Part
) -> None:
    with work_of(int8_store, tmp_path, deadline=0) as work, pytest.raises(OutOfTime):
        arrays_of(work, part)
    assert not list(tmp_path.glob("*.npz")), "nothing was begun"
    with work_of(int8_store, tmp_path) as work:
        expected = arrays_of(work, part)
    with work_of(int8_store, tmp_path, deadline=0) as work:
        got = arrays_of(work, part)
        assert work.model.read_bytes == 0
        assert (work.parts.made, work.parts.reused) == (0, 1)
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), size=st.integers(1, 5))
def test_chunks_of_all_tasks_hold_every_document_once(sizes: list[int], size: int) -> None:
    tasks = [random_task(seed, documents) for seed, documents in enumerate(sizes)]
    masks = [(Mask(), Mask(ffns=frozenset([index]))) for index in range(len(tasks))]
    parts = sweep_in_chunks("all", "label", tasks, masks, size)
    assert len({part.name for part in parts}) == len(parts)
    assert parts[-1].documents >= max(sizes)
    scores = []
    for part in parts:
        part_scores = []
        for job in part.jobs:
            index = next(number for number, task in enumerate(tasks) if task is job.task)
            assert job.masks == masks[index]
            documents = np.arange(sizes[index])[job.documents]
            assert len(documents), "no job without documents"
            values = np.tile(100.0 * index + documents, (2, 1))
            part_scores.append(Scores(values, values > 0, np.ones(values.shape, dtype=np.bool_)))
        scores.append(part_scores)
    for index, joined in enumerate(scores_by_task(tasks, parts, scores)):
        assert joined.logprobs.tolist() == [[100.0 * index + place for place in range(sizes[index])]] * 2
