"""Stars hold their rate: of those given at most one in twenty is wrong, whatever the drops are like.

Run as a program it prints the rate and what is found: python tests/calibration/test_stars.py
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from lowmem_icl.report.numbers import SIGNIFICANT_Q
from lowmem_icl.statistics.significance import SignCounts, q_values, sign_counts

UNITS = 1056
MEDIAN, MEAN = 1.0, float(np.exp(0.5))
"""Of the standard lognormal distribution."""
SHARE_OF_ZEROS = 0.85
EFFECT = 1.5
SEVERAL_ERRORS = 3
SHORT, LONG = 20, 1000

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]


@dataclass(frozen=True)
class Drops:
    """What drops are drawn from, and the direction (1: hurt) of most of them where a unit does nothing."""

    draw: Draw
    direction: int = 0


DROPS = {
    "normal": Drops(lambda rng, shape: rng.normal(size=shape)),
    "t3": Drops(lambda rng, shape: rng.standard_t(3, shape)),
    "lognormal minus median": Drops(lambda rng, shape: rng.lognormal(size=shape) - MEDIAN),
    # Their mean is 0, but most of them are negative: a star for "helped" is right.
    "lognormal minus mean": Drops(lambda rng, shape: rng.lognormal(size=shape) - MEAN, -1),
    "mostly zero": Drops(lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) > SHARE_OF_ZEROS)),
    "mostly zero, skewed": Drops(
        lambda rng, shape: (rng.lognormal(size=shape) - MEDIAN) * (rng.random(shape) > SHARE_OF_ZEROS)
    ),
}


def wrong_share(drops: Drops, documents: int, effects: float, rng: np.random.Generator) -> float:
    """Return which share of the stars of one table of units is wrong; 0 where there are none.

    A unit with an effect has its drops raised, wherever they are not 0.
    """
    values = drops.draw(rng, (UNITS, documents))
    raised = np.arange(UNITS) < effects * UNITS
    values = np.where((values != 0) & raised[:, None], values + EFFECT, values)
    direction = np.where(raised, 1, drops.direction)
    counts = sign_counts(values, [str(document) for document in range(documents)])
    stars = q_values(counts) <= SIGNIFICANT_Q
    wrong = stars & (np.sign(counts.hurt - counts.helped) != direction)
    return float(wrong.sum() / max(1, stars.sum()))


def rate_of_wrong_stars(name: str, documents: int, effects: float, tables: int) -> tuple[float, float]:
    """Return the share of wrong stars, mean over tables, and its standard error."""
    rng = np.random.default_rng([documents, int(100 * effects), *name.encode()])
    shares = [wrong_share(DROPS[name], documents, effects, rng) for _ in range(tables)]
    return float(np.mean(shares)), float(np.std(shares) / np.sqrt(tables))


def found_share(hurt_share: float, documents: int, tables: int) -> float:
    """Return how many units get a star that hurt such a share of documents, one of ten among all units."""
    rng = np.random.default_rng([documents, int(100 * hurt_share)])
    true = np.arange(UNITS) < UNITS // 10
    found = []
    for _ in range(tables):
        hurt = rng.binomial(documents, np.where(true, hurt_share, 0.5))
        stars = q_values(SignCounts(hurt, documents - hurt)) <= SIGNIFICANT_Q
        found.append(stars[true].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("tables", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("effects", [0, 0.1])
@pytest.mark.parametrize("documents", [16, 32])
@pytest.mark.parametrize("name", DROPS)
def test_at_most_one_star_of_twenty_is_wrong(name: str, documents: int, effects: float, tables: int) -> None:
    rate, error = rate_of_wrong_stars(name, documents, effects, tables)
    assert rate <= SIGNIFICANT_Q + SEVERAL_ERRORS * error


def test_units_that_hurt_nearly_all_documents_are_found() -> None:
    assert found_share(0.95, 32, SHORT) > 0.9
    assert found_share(1.0, 16, SHORT) == 1


def table_of_rates() -> str:
    """Return shares of wrong stars, and of units that are found, as lines of text."""
    lines = ["wrong stars (drops; documents; units with an effect)"]
    for name in DROPS:
        for documents in (16, 32):
            for effects in (0, 0.1):
                rate, error = rate_of_wrong_stars(name, documents, effects, LONG)
                lines.append(f"{name:24} {documents:3} {effects:4} {rate:.3f} ± {error:.3f}")
    lines.append("found (share of documents hurt; at 16, 32, 64 documents)")
    for hurt in (0.7, 0.8, 0.9, 0.95, 1.0):
        found = "  ".join(f"{found_share(hurt, documents, LONG):.2f}" for documents in (16, 32, 64))
        lines.append(f"{hurt:4.0%} {found}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table_of_rates() + "\n")
