"""Standard errors that hold within clusters, and what is chosen by them, against numbers computed by hand."""

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowmem_icl.experiments.ablate.measure import Estimates, screened
from lowmem_icl.experiments.importance.measure import Importance, importance_blocks
from lowmem_icl.experiments.prune.greedy import rounded_up, tolerance_note
from lowmem_icl.statistics.intervals import MEAN, documents_for, mean_intervals
from lowmem_icl.tasks.packing import PackedTask

# Four documents in two clusters. Mean 2; the clusters' sums of deviations are -2 and 2, so that the
# standard error is sqrt(2 / 1 * (4 + 4)) / 4 = 1. Taken alone the documents would give
# sqrt((1 + 1 + 1 + 1) / 3 / 4) = 0.577.
VALUES = np.array([1.0, 1.0, 3.0, 3.0])
CLUSTERS = ["set 0", "set 0", "set 1", "set 1"]


def test_clustered_standard_errors_by_hand() -> None:
    found = mean_intervals(VALUES[None], CLUSTERS, MEAN)
    assert (found.value[0], found.stderr[0]) == (2, 1)
    # Student's quantile at one degree of freedom, tan(0.475 π).
    assert found.high[0] == pytest.approx(2 + math.tan(0.475 * math.pi))
    alone = mean_intervals(VALUES[None], ["a", "b", "c", "d"], MEAN)
    assert alone.stderr[0] == pytest.approx(math.sqrt(4 / 3 / 4))


def test_estimated_drops_have_clustered_standard_errors() -> None:
    estimates = Estimates.of_documents(np.stack([VALUES, -VALUES], axis=1), CLUSTERS)
    assert estimates.value.tolist() == [2, -2]
    assert estimates.stderr.tolist() == [1, 1]


def packed_task(clusters: list[str]) -> PackedTask:
    """As much of a packed task as the importance experiment's blocks are made from."""
    task = SimpleNamespace(
        task="recall", shots=4, split="train", documents=clusters, clusters=clusters, labels="right"
    )
    return cast(PackedTask, SimpleNamespace(task=task))


def test_attribution_is_written_with_clustered_standard_errors() -> None:
    scores = Importance(
        gradient_heads=np.zeros((1, 1)),
        gradient_ffns=np.zeros(1),
        attribution_heads=VALUES.reshape(4, 1, 1),
        attribution_ffns=10 * VALUES.reshape(4, 1),
        head_documents=cast(Any, None),
    )
    blocks = importance_blocks(packed_task(CLUSTERS), scores)
    heads, ffns = (block for block in blocks if block["metric"] == "attribution")
    for block, scale in ((heads, 1), (ffns, 10)):
        assert [float(block[name][0]) for name in ("value", "stderr")] == [2 * scale, scale]
        # Of two clusters: Student's quantile at one degree of freedom, tan(0.475 π).
        reach = scale * math.tan(0.475 * math.pi)
        assert [float(block[name][0]) for name in ("low", "high")] == pytest.approx(
            [2 * scale - reach, 2 * scale + reach]
        )


def test_the_screen_prefers_units_whose_clusters_disagree() -> None:
    # Unit 0: mean 2 with clustered stderr 1, so at most 4; unit 1: mean 3.5, the same in all documents.
    by_document = np.stack([VALUES, np.full(4, 3.5)], axis=1)
    exact, _ = screened(Estimates.of_documents(by_document, CLUSTERS), n_exact=1, seed=0)
    assert exact.tolist() == [0], "documents taken alone would give 2 + 2 * 0.577 < 3.5"


def test_a_single_cluster_is_screened_by_the_estimates_alone() -> None:
    by_document = np.array([[0.1, -0.9, 0.3, 0.2], [0.1, -0.7, 0.3, 0.2]])
    estimates = Estimates.of_documents(by_document, ["one", "one"])
    assert not np.isfinite(estimates.stderr).any()
    exact, _ = screened(estimates, n_exact=2, seed=0)
    assert exact.tolist() == [1, 2]


@given(stderr=st.floats(0.001, 0.2), count=st.integers(2, 64), distance=st.sampled_from([0.5, 0.1, 0.05]))
def test_so_many_documents_reach_so_far_and_one_fewer_does_not(
    stderr: float, count: int, distance: float
) -> None:
    found = documents_for(stderr, count, distance)

    def reach(documents: int) -> float:
        quantile = float(stats.t.ppf(0.975, documents - 1))
        return quantile * stderr * math.sqrt(count / documents)

    assert found >= 2
    assert reach(found) <= distance
    assert found == 2 or reach(found - 1) > distance


def test_the_warning_says_how_many_training_documents_would_see_the_tolerance() -> None:
    def check(mask: str, stderr: float, method: str = "greedy") -> dict[str, Any]:
        return {"mask": mask, "method": method, "stderr": stderr, "documents": 16}

    checks = [check("fine", 0.001), check("a", 0.04), check("b", 0.1), check("c", 0.02)]
    (warning,) = tolerance_note([*checks, check("gradient", 9.0, "gradient")], 0.01, training=32)
    # Normal quantiles: 16 · (1.96 · stderr / 0.01)² checking documents, and twice as many to train on.
    most, half = (2 * documents_for(stderr, 16, 0.01) for stderr in (0.1, 0.04))
    assert half == pytest.approx(32 * (1.96 * 4) ** 2, rel=0.01)
    assert f"for 3 of 4 masks; to see it takes about {rounded_up(half):,} for half of these and " in warning
    assert warning.endswith(
        f" and {rounded_up(most):,} training documents per task (--train-limit; most for b)"
    )
    (unknown,) = tolerance_note([check("a", math.nan)], 0.01, training=32)
    assert "for 1 of 1 masks; for 1 nobody can say, since their documents share one prompt" in unknown
    assert tolerance_note(checks[:1], 0.01, training=32) == []


def test_numbers_of_documents_are_rounded_up_to_two_digits() -> None:
    assert [rounded_up(number) for number in (9, 99.5, 100, 101, 1967, 123_456)] == [
        9, 100, 100, 110, 2_000, 130_000,
    ]  # fmt: skip
