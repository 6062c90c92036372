"""Rates at which intervals of agreement hold what as many other documents give on average.

`python tests/calibration/test_agreement.py [--long]` prints the table of docs/numbers.md.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from cells import Cell, Values, cell, check, markdown

from lowmem_icl.experiments.overlap.measure import overlap_records
from lowmem_icl.masks.rankings import RankingKey
from lowmem_icl.statistics.resampling import DocumentRanking, DocumentScores

KEYS = (RankingKey("a", 1, "gradient"), RankingKey("b", 1, "gradient"))
TOPS = (10, 30, 50)
SHARED_BY_SETS = 0.3
"""Correlation of the noise of documents within a set."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Form:
    """How large the grid is: samples of a cell, numbers of heads, clusters of documents by their size."""

    samples: int
    heads: tuple[int, ...]
    clusters: tuple[tuple[int, int], ...]


SHORT = Form(80, (32,), ((32, 1), (8, 4)))
LONG = Form(400, (32, 132, 576), ((4, 1), (8, 1), (16, 1), (32, 1), (8, 4), (8, 16)))
RELATIONS = ("unrelated", "related", "the same", "few matter", "heavy tails")
NOISES = (0.5, 3)


def true_scores(rng: np.random.Generator, heads: int, relation: str) -> tuple[Values, Values]:
    """Both tasks' true scores."""
    one, other = rng.normal(size=(2, heads))
    if relation == "related":
        return one, 0.7 * one + 0.7 * other
    if relation == "the same":
        return one, one
    if relation == "few matter":
        few = np.where(np.arange(heads) < heads // 8, 3.0, 0.0)
        return few, few
    if relation == "heavy tails":
        return np.exp(1.5 * one), np.exp(1.5 * (0.8 * one + 0.6 * other))
    return one, other


def documents(
    rng: np.random.Generator, task: str, true: Values, clusters: tuple[int, int], noise: float
) -> DocumentRanking:
    """Documents in clusters, each a noisy look at the true scores."""
    count, size = clusters
    share = SHARED_BY_SETS if size > 1 else 0.0
    common = np.repeat(rng.normal(size=(count, len(true))), size, axis=0)
    own = rng.normal(size=(count * size, len(true)))
    values = true + noise * (np.sqrt(share) * common + np.sqrt(1 - share) * own)
    names = [str(number // size) for number in range(count * size)]
    return DocumentRanking((DocumentScores.of_mean(task, values, names),))


def samples_of(
    rng: np.random.Generator, form: Form, heads: int, clusters: tuple[int, int], noise: float, relation: str
) -> dict[str, Values]:
    """Values and bounds by measure, [S, 3] each, of the records that the tool writes."""
    truths = true_scores(rng, heads, relation)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(form.samples):
        both = {
            key: documents(rng, key.task, true, clusters, noise)
            for key, true in zip(KEYS, truths, strict=True)
        }
        ranked = {key: made.members[0].values.mean(0)[None] for key, made in both.items()}
        for record in overlap_records(ranked, both):
            if "low" in record and record.get("percent") in (None, *TOPS):
                name = f"{record['metric']} {record.get('percent', '')}".strip()
                found.setdefault(name, []).append((record["value"], record["low"], record["high"]))
    return {name: np.array(rows) for name, rows in found.items()}


def agreements(form: Form, rng: np.random.Generator, relation: str) -> Iterator[Cell]:
    """Rank correlations and shared tops of two tasks whose heads matter alike, or do not."""
    for heads, clusters, noise in product(form.heads, form.clusters, NOISES):
        of_each = "" if clusters[1] == 1 else f" in sets of {clusters[1]}"
        where = f"{relation}, {heads} heads, {clusters[0]} × documents{of_each}, noise {noise}"
        found = samples_of(rng, form, heads, clusters, noise, relation)
        assert len(found) == 2 + len(TOPS)
        for name, rows in found.items():
            assert (np.abs(rows[:, 1:]) <= 1).all()
            yield cell(f"{name}: {where}", rows[:, 1] - ROUNDING, rows[:, 2] + ROUNDING, rows[:, 0].mean())


def cells_of(relation: str, form: Form) -> list[Cell]:
    """The cells of a relation, the same at every call."""
    return list(agreements(form, np.random.default_rng([4, RELATIONS.index(relation)]), relation))


@pytest.mark.parametrize(
    "relation", [*RELATIONS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in RELATIONS[2:])]
)
def test_intervals_of_agreement_hold_their_rate(relation: str) -> None:
    check(cells_of(relation, SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("relation", RELATIONS)
def test_intervals_of_agreement_hold_their_rate_over_the_whole_grid(relation: str) -> None:
    check(cells_of(relation, LONG))


if __name__ == "__main__":
    chosen = LONG if "--long" in sys.argv else SHORT
    sys.stdout.write(markdown(one for name in RELATIONS for one in cells_of(name, chosen)) + "\n")
