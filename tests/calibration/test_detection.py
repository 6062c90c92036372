"""Rates at which intervals over layers hold what other layers of the same kind give on average.

`python tests/calibration/test_detection.py [--long]` prints the table of docs/numbers.md.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
from cells import Cell, Values, cell, check, markdown
from scipy import stats

from lowmem_icl.experiments.induction.measure import HEAD_SCORE, important_heads_records
from lowmem_icl.masks.rankings import RankingKey

MANY_LAYERS = 100_000


@dataclass(frozen=True)
class Form:
    """How large the grid is: samples of a cell, shapes of models, shares of induction heads."""

    samples: int
    shapes: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]


SHORT = Form(150, ((12, 4),), (0.2,))
LONG = Form(1_000, (*product((4, 8, 12, 30), (4, 12)), (24, 16)), (0.06, 0.2))
SOURCES = ((0.0, 0.0), (0.0, 0.3), (0.0, 0.8), (0.7, 0.5), (0.9, 0.8))
"""Correlation of the layer effects of both scores, and which share of each score's variance these are."""


def scores_of(
    rng: np.random.Generator, shape: tuple[int, ...], source: tuple[float, float]
) -> tuple[Values, Values]:
    """Importance and normal prefix-matching scores [..., L, H]: layer effects and noise of heads."""
    correlation, of_layers = source
    common, own = rng.normal(size=(2, *shape[:-1], 1))
    effects = (common, correlation * common + np.sqrt(1 - correlation**2) * own)
    noise = rng.normal(size=(2, *shape))
    one, other = (
        np.sqrt(of_layers) * effect + np.sqrt(1 - of_layers) * heads
        for effect, heads in zip(effects, noise, strict=True)
    )
    return np.asarray(one), np.asarray(other)


def with_share(scores: Values, share: float) -> Values:
    """Normal scores as prefix-matching scores of which this share reaches HEAD_SCORE."""
    return np.asarray(HEAD_SCORE * np.exp(scores - stats.norm.ppf(1 - share)))


def measures(importance: Values, prefix_matching: Values) -> dict[str, tuple[float, float, float]]:
    """Value and bounds by metric, of the records that the tool writes."""
    ranked = {RankingKey("a", 1, "gradient"): importance}
    records: list[Any] = list(important_heads_records(prefix_matching, ranked))
    return {record["metric"]: (record["value"], record["low"], record["high"]) for record in records}


def true_values(rng: np.random.Generator, source: tuple[float, float], share: float) -> dict[str, float]:
    """What very many layers of one head give; a head's layer says nothing of its scores' joint law."""
    importance, latent = (scores.ravel() for scores in scores_of(rng, (MANY_LAYERS, 1), source))
    members = with_share(latent, share) >= HEAD_SCORE
    area = stats.mannwhitneyu(importance[members], importance[~members]).statistic
    top = importance >= np.quantile(importance, 1 - members.mean())
    return {
        "induction_spearman": float(stats.spearmanr(importance, latent).statistic),
        "induction_auc": float(area / members.sum() / (~members).sum()),
        "induction_precision": float(members[top].mean()),
    }


def layers_grid(form: Form, rng: np.random.Generator, source: tuple[float, float]) -> Iterator[Cell]:
    """Agreement of importance with prefix matching where both go with layers."""
    for share, (layers, heads) in product(form.shares, form.shapes):
        truth = true_values(rng, source, share)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in truth}
        for _ in range(form.samples):
            importance, latent = scores_of(rng, (layers, heads), source)
            by_metric = measures(importance, with_share(latent, share))
            for name, rows in found.items():
                rows.append(by_metric.get(name, (np.nan, np.nan, np.nan)))
        where = f"{layers} layers of {heads}, {share:.0%} induction heads, layer effects {source[1]}"
        for name, rows in found.items():
            if name != "induction_spearman" or share == form.shares[0]:
                bounds = np.array(rows)
                assert not (np.abs(bounds[:, 1:]) > 1).any()
                yield cell(
                    f"{name}: {where}, correlated {source[0]}", bounds[:, 1], bounds[:, 2], truth[name]
                )


def cells_of(source: tuple[float, float], form: Form) -> list[Cell]:
    """The cells of a source, the same at every call."""
    return list(layers_grid(form, np.random.default_rng([6, SOURCES.index(source)]), source))


@pytest.mark.parametrize("source", SOURCES)
def test_intervals_over_layers_hold_their_rate(source: tuple[float, float]) -> None:
    check(cells_of(source, SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_intervals_over_layers_hold_their_rate_over_the_whole_grid(source: tuple[float, float]) -> None:
    check(cells_of(source, LONG))


if __name__ == "__main__":
    chosen = LONG if "--long" in sys.argv else SHORT
    sys.stdout.write(markdown(one for source in SOURCES for one in cells_of(source, chosen)) + "\n")
