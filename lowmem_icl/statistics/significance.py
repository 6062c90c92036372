"""Which of many units hurt more documents than they help, at a false discovery rate over all of them.

Axis letters: U units, N documents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from lowmem_icl.statistics.clusters import cluster_sums
from lowmem_icl.statistics.intervals import Values

Counts = NDArray[np.int64]

LARGEST_ROUNDING = 1e-4
"""Nats by which scores may differ from the reference's: a drop of no more counts as none."""


class SignCounts(NamedTuple):
    """How many clusters of documents lose without each unit, [U], and how many gain."""

    hurt: Counts
    helped: Counts


def sign_counts(values: Values, clusters: Sequence[str]) -> SignCounts:
    """Return how many clusters lose without each unit and how many gain, from drops [U, N].

    A cluster (documents that share a passage, a prompt or demonstrations) counts once: as hurt where more of
    its documents lose than gain, as helped where more gain, and else as neither.
    """
    net = cluster_sums(np.sign(values), clusters)
    return SignCounts((net > 0).sum(1), (net < 0).sum(1))


def differing_signs(values: Values, clusters: Sequence[str]) -> SignCounts:
    """Return how many clusters lose without each unit and how many gain, from drops [U, N]; what rounding may
    make counts as neither.
    """
    return sign_counts(np.where(np.abs(values) > LARGEST_ROUNDING, values, 0.0), clusters)


def q_values(counts: SignCounts) -> Values:
    """Return Benjamini and Hochberg's adjusted p-values [U] of "as many documents are hurt as helped".

    The p-values are those of the exact two-sided sign test, so they hold for drops of any distribution: a
    test of the mean gives most of its stars for nothing where drops are skewed. Units that change no document
    have 1.
    """
    either = counts.hurt + counts.helped
    tail = scipy.stats.binom.cdf(np.minimum(counts.hurt, counts.helped), either, 0.5)
    return np.asarray(scipy.stats.false_discovery_control(np.minimum(1, 2 * tail)))
