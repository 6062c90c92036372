"""Documents that belong together: numbers of their clusters, and sums over these.

Axis letters: N documents, G clusters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cluster_numbers(clusters: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each document's cluster [N], from 0 on in order of appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def cluster_sums(values: NDArray[Any], clusters: Sequence[str]) -> NDArray[Any]:
    """Return the sums over the documents of every cluster, [..., G] from [..., N], in order of appearance."""
    member = cluster_numbers(clusters)
    order = np.argsort(member, kind="stable")
    starts = np.flatnonzero(np.diff(member[order], prepend=-1))
    return np.asarray(np.add.reduceat(values[..., order], starts, axis=-1))
