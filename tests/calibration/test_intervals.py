"""Rates at which the tool's intervals hold a known truth, over simulated documents.

`python tests/calibration/test_intervals.py [--long]` prints the table of docs/numbers.md.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from cells import Cell, Values, cell, check, markdown

from lowmem_icl.statistics.bands import LEAST_DRAWS, prediction_band
from lowmem_icl.statistics.intervals import (
    CHANGE,
    CHANGE_OF_CHANGES,
    MEAN,
    PROPORTION,
    SHARE,
    Intervals,
    Kind,
    mean_intervals,
    mean_of_intervals,
)
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.schema import RESULTS
from lowmem_icl.tasks.loading import TaskRows
from lowmem_icl.tasks.scoring import task_metrics

SETS = 8
TASK_DOCUMENTS = (16, 32, 64, 256)


@dataclass(frozen=True)
class Form:
    """How large the grid is: samples of a cell, and whether it has the further cells."""

    samples: int
    further: bool


SHORT = Form(4_000, further=False)
LONG = Form(40_000, further=True)


def alone(n_documents: int) -> list[str]:
    """Every document its own cluster."""
    return [str(number) for number in range(n_documents)]


def sets_of(size: int) -> list[str]:
    """As many documents of each set, set by set."""
    return [str(number) for number in range(SETS) for _ in range(size)]


def measured(name: str, values: Values, clusters: Sequence[str], kind: Kind, truth: float) -> Cell:
    """The cell of samples [S, N] of documents whose true mean is `truth`."""
    found = mean_intervals(values, clusters, kind)
    given = np.isfinite(found.low)
    assert (found.low[given] >= kind.lowest).all(), name
    assert (found.high[given] <= kind.highest).all(), name
    return cell(name, found.low, found.high, truth)


def correct(rng: np.random.Generator, p: float, shape: tuple[int, ...]) -> Values:
    """Answers, right with probability p."""
    return (rng.random(shape) < p).astype(float)


def correct_in_sets(rng: np.random.Generator, p: float, correlation: float, shape: tuple[int, int]) -> Values:
    """Answers [S, SETS · size], right with a probability that is each set's own (beta-binomial)."""
    samples, size = shape
    own = np.full((samples, SETS), p)
    if correlation > 0:
        weight = (1 - correlation) / correlation
        own = rng.beta(p * weight, (1 - p) * weight, (samples, SETS))
    return (rng.random((samples, SETS * size)) < np.repeat(own, size, axis=1)).astype(float)


def normal_in_sets(rng: np.random.Generator, correlation: float, shape: tuple[int, int]) -> Values:
    """Values [S, SETS · size] of variance 1 with this correlation within sets."""
    samples, size = shape
    common = np.repeat(rng.normal(size=(samples, SETS)), size, axis=1)
    own = rng.normal(size=(samples, SETS * size))
    return np.asarray(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)


def accuracies(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """Accuracy by proportion of right answers, as 0 and 1 and as a share between them."""
    proportions = (0.25, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 1.0) if form.further else (0.25, 0.5, 0.9, 0.98, 1)
    counts = (8, 16, 24, 32, 64, 128, 512) if form.further else (16, 32, 64, 128, 512)
    for p in proportions:
        for n in counts:
            values = correct(rng, p, (form.samples, n))
            yield measured(f"accuracy {p}, n {n}", values, alone(n), PROPORTION, p)
            if n >= 16:
                yield measured(f"share of 0 or 1, {p}, n {n}", values, alone(n), SHARE, p)


def probabilities(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """Probabilities of gold: spread, mostly high, at either end."""
    for a, b in ((2, 2), (8, 0.3), (0.2, 0.2)):
        for n in (16, 32, 128):
            values = rng.beta(a, b, (form.samples, n))
            yield measured(f"gold_prob, beta({a}, {b}), n {n}", values, alone(n), SHARE, a / (a + b))


def accuracy_drops(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """Paired drops of accuracy, and their difference with and without demonstrations."""
    for worse, better in ((0.06, 0.02), (0.3, 0.1), (0.02, 0.0)):
        shares = [worse, better, 1 - worse - better]
        for n in (16, 32, 128):
            values = rng.choice([1.0, -1.0, 0.0], (form.samples, n), p=shares)
            name = f"accuracy drop, {worse:.0%} worse, {better:.0%} better, n {n}"
            yield measured(name, values, alone(n), CHANGE, worse - better)
    for n in (16, 32, 128):
        pair = [rng.choice([1.0, -1.0, 0.0], (form.samples, n), p=[0.06, 0.02, 0.92]) for _ in range(2)]
        difference = pair[0] - pair[1]
        yield measured(f"difference of accuracy drops, n {n}", difference, alone(n), CHANGE_OF_CHANGES, 0)


Draw = Callable[[np.random.Generator, tuple[int, int]], Values]
MEAN_DROPS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0),
    "t3": (lambda rng, shape: rng.standard_t(3, size=shape), 0),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), np.exp(0.5)),
    "85 % zeros": (lambda rng, shape: correct(rng, 0.15, shape) * rng.exponential(size=shape), 0.15),
}
FURTHER_DROPS: dict[str, tuple[Draw, float]] = {
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1),
    "95 % zeros": (lambda rng, shape: correct(rng, 0.05, shape) * rng.exponential(size=shape), 0.05),
    "uniform": (lambda rng, shape: rng.random(shape), 0.5),
    "two values": (lambda rng, shape: correct(rng, 0.3, shape), 0.3),
}


def mean_drops(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """Drops of log-probability, from 16 documents on, and of the few that are done when time is over."""
    drops = MEAN_DROPS | FURTHER_DROPS if form.further else MEAN_DROPS
    for name, (draw, truth) in drops.items():
        for n in (16, 32, 64, 128, 512) if form.further else (16, 32, 128):
            values = draw(rng, (form.samples, n))
            yield measured(f"mean drop, {name}, n {n}", values, alone(n), MEAN, truth)
    for n in (2, 4):
        values = rng.normal(size=(form.samples, n))
        yield measured(f"unfinished, normal, n {n}", values, alone(n), MEAN, 0)


def shared_sets(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """Documents that share one of 8 sets of demonstrations and agree within it."""
    for size in (4, 16, 64):
        shape, clusters = (form.samples, size), sets_of(size)
        for correlation in (0, 0.2, 0.6):
            where = f"8 sets of {size}, correlation {correlation}"
            normal = normal_in_sets(rng, correlation, shape)
            yield measured(f"{where}: mean, normal", normal, clusters, MEAN, 0)
            for p in (0.5, 0.7, 0.9, 0.95, 0.98) if form.further else (0.7, 0.9, 0.95, 0.98):
                values = correct_in_sets(rng, p, correlation, shape)
                yield measured(f"{where}: accuracy {p}", values, clusters, PROPORTION, p)
            pair = [correct_in_sets(rng, p, correlation, shape) for p in (0.98, 0.94)]
            yield measured(f"{where}: accuracy drop", pair[0] - pair[1], clusters, CHANGE, 0.04)


def of_tasks(values: Sequence[Values], kind: Kind) -> Intervals:
    """Intervals of one task after the other, [S, T], from documents [S, N] of each task."""
    by_task = [mean_intervals(task, alone(task.shape[1]), kind) for task in values]
    return Intervals(*(np.stack(columns, axis=1) for columns in zip(*by_task, strict=True)))


def aggregates(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """Means over four tasks of unequal numbers of documents and unequal variance."""
    samples = form.samples
    for name, spreads in (("few vary most", (8, 4, 2, 1)), ("many vary most", (1, 2, 4, 8))):
        values = [
            spread * rng.normal(size=(samples, n))
            for spread, n in zip(spreads, TASK_DOCUMENTS, strict=True)
        ]  # fmt: skip
        found = mean_of_intervals(of_tasks(values, MEAN))
        yield cell(f"mean of 4 tasks, normal, {name}", found.low, found.high, 0)
    skewed = [rng.lognormal(size=(samples, n)) for n in TASK_DOCUMENTS]
    found = mean_of_intervals(of_tasks(skewed, MEAN))
    yield cell("mean of 4 tasks, lognormal", found.low, found.high, np.exp(0.5))
    for proportions in ((0.25, 0.5, 0.9, 0.98), (0.98, 0.9, 0.5, 0.25), (0.98,) * 4):
        answers = [correct(rng, p, (samples, n)) for p, n in zip(proportions, TASK_DOCUMENTS, strict=True)]
        low, high = through_tables(of_tasks(answers, PROPORTION))
        name = ", ".join(map(str, proportions))
        yield cell(f"mean of 4 tasks, accuracy {name}", low, high, float(np.mean(proportions)))


def through_tables(members: Intervals) -> tuple[Values, Values]:
    """The bounds of means over tasks as the table of results has them, from intervals [S, T]."""
    samples, n_tasks = members.value.shape
    frames = []
    for task in range(n_tasks):
        columns = {name: column[:, task] for name, column in members._asdict().items()}
        frame = pl.DataFrame(columns).with_columns(
            task=pl.lit(f"task{task}"), layer=pl.Series(range(samples)), exact=pl.lit(value=True)
        )
        absent = [pl.lit(None).alias(name) for name in RESULTS if name not in frame.columns]
        frame = frame.with_columns(*absent)
        frames.append(frame.select(pl.col(name).cast(kind) for name, kind in RESULTS.items()))
    means = over_tasks(pl.concat(frames)).sort("layer")
    assert len(means) == samples
    low, high = (means[name].fill_null(np.nan).to_numpy() for name in ("low", "high"))
    return low, high


def f_scores(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """F1, no mean over documents, from lm-eval's pairs of gold and answer."""
    samples = form.samples // 8
    for n in (32, 128) if form.further else (32,):
        for share, right in ((0.4, 0.8), (0.5, 0.95)):
            bounds = np.array([f1_bounds(rng, n, share, right) for _ in range(samples)])
            truth = 2 * share * right / (2 * share * right + (1 - right))
            yield cell(f"F1, {right:.0%} right, n {n}", bounds[:, 0], bounds[:, 1], truth)


def f1_bounds(rng: np.random.Generator, n: int, share: float, right: float) -> tuple[float, float]:
    """The interval of F1 of n questions, of which this share has the answer yes, each right or not alone."""
    gold = rng.random(n) < share
    chosen = np.where(rng.random(n) < right, gold, ~gold)
    member = SimpleNamespace(
        process_results=lambda row, pairs: {"f1": row}, aggregation=lambda: {"f1": f1_of}
    )
    documents = [SimpleNamespace(gold=(True,), member=0, row=pair) for pair in zip(gold, chosen, strict=True)]
    task = cast(TaskRows, SimpleNamespace(documents=documents, members=[member], clusters=alone(n)))
    (metric,) = task_metrics(task, np.zeros(n), np.zeros(n, bool))
    return metric.low, metric.high


def f1_of(pairs: list[Any]) -> float:
    """F1 of pairs of gold and answer."""
    table = np.bincount([2 * gold + chosen for gold, chosen in pairs], minlength=4)
    return float(2 * table[3] / max(2 * table[3] + table[1] + table[2], 1))


def random_bands(form: Form, rng: np.random.Generator) -> Iterator[Cell]:
    """The band of 10 random masks, and of as few as have one, which is to hold the next one."""
    for count in (10, LEAST_DRAWS):
        shape = (form.samples, count + 1)
        draws = {
            "normal": rng.normal(size=shape),
            "accuracies near 0.25": rng.binomial(64, 0.25, shape) / 64,
            "accuracies near 1": rng.binomial(64, 0.98, shape) / 64,
            "skewed": rng.exponential(size=shape),
            "of few kinds": 0.3 + 0.5 * correct(rng, 0.3, shape),
        }
        for name, values in draws.items():
            low, high = np.array([prediction_band(row[:count]) for row in values]).T
            yield cell(f"band of {count} random masks, {name}", low, high, values[:, count])


Grid = Callable[[Form, np.random.Generator], Iterator[Cell]]
GRIDS: tuple[Grid, ...] = (
    accuracies, probabilities, accuracy_drops, mean_drops, shared_sets, aggregates, f_scores, random_bands
)  # fmt: skip


def cells_of(grid: Grid, form: Form) -> list[Cell]:
    """The cells of a grid, the same at every call."""
    return list(grid(form, np.random.default_rng([15, GRIDS.index(grid)])))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.__name__)
def test_intervals_hold_their_rate(grid: Grid) -> None:
    check(cells_of(grid, SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.__name__)
def test_intervals_hold_their_rate_over_the_whole_grid(grid: Grid) -> None:
    check(cells_of(grid, LONG))


if __name__ == "__main__":
    chosen = LONG if "--long" in sys.argv else SHORT
    sys.stdout.write(markdown(one for grid in GRIDS for one in cells_of(grid, chosen)) + "\n")
