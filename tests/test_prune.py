"""The greedy pruner against its description, one evaluation at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_icl.experiments.prune.exact import greedy_search
from lowmem_icl.experiments.prune.greedy import mean_loss
from lowmem_icl.experiments.prune.search import Request, SearchPlan, in_lockstep
from lowmem_icl.masks.mask import Mask

LAYERS, HEADS = 3, 3


def objective(seed: int) -> Callable[[Mask], np.ndarray]:
    """An objective of five documents in which units cost alone and in pairs, so that order matters."""
    rng = np.random.default_rng(seed)
    units = LAYERS * (HEADS + 1)
    alone, pairs = rng.normal(0.002, 0.01, (units, 5)), rng.normal(0, 0.004, (units, units, 5))

    def value(mask: Mask) -> Any:
        removed = [layer * HEADS + head for layer, head in sorted(mask.heads)]
        removed += [LAYERS * HEADS + layer for layer in sorted(mask.ffns)]
        return 0.8 - alone[removed].sum(0) - pairs[np.ix_(removed, removed)].sum((0, 1))

    return value


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tolerance=st.sampled_from([0.001, 0.01, 0.05, 0.3]),
    direction=st.sampled_from(["down", "up"]),
    order=st.sampled_from(["heads-first", "joint"]),
)
def test_the_search_equals_its_description(seed: int, tolerance: float, direction: str, order: str) -> None:
    choose, check = objective(seed), objective(seed + 1)

    def answer(request: Request) -> tuple[np.ndarray, ...]:
        measured = choose if request.half == "choose" else check
        return (np.stack([measured(mask) for mask in request.masks]),)

    def score(step: int, asked: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
        return {name: answer(request) for name, request in asked.items()}

    plan = SearchPlan(LAYERS, HEADS, direction, order, head_parameters=4, ffn_parameters=24)  # type: ignore[arg-type]
    found = in_lockstep({"one": greedy_search(plan, tolerance)}, score)["one"]

    def lost(measured: Callable[[Mask], np.ndarray]) -> Callable[[Mask], float]:
        return lambda mask: float(measured(Mask()).mean() - measured(mask).mean())

    joint = order == "joint"
    weights = (4, 24) if joint else (1, 1)
    asked = oracles.GreedyQuestion(LAYERS, HEADS, tolerance, direction == "up", joint, weights)
    assert found.mask == oracles.greedy_layerwise(asked, lost(choose), lost(check))
    assert found.lost == pytest.approx(lost(check)(found.mask))
    assert found.lost <= tolerance + 1e-12
    removed = [unit for unit, _ in found.steps]
    assert sorted(map(str, removed)) == sorted(map(str, found.mask.units()))


def test_candidates_never_touch_a_layer_below_the_one_visited() -> None:
    first_layers: list[int] = []

    def score(step: int, asked: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
        for request in asked.values():
            first_layers.extend(min(mask.heads)[0] for mask in request.masks if mask.heads and not mask.ffns)
        return {name: (np.zeros((len(request.masks), 4)),) for name, request in asked.items()}

    found = in_lockstep({"all": greedy_search(SearchPlan(LAYERS, HEADS), 0.01)}, score)["all"]
    assert first_layers == sorted(first_layers, reverse=True)
    assert len(found.mask) == LAYERS * (HEADS + 1), "what costs nothing all goes"


def test_searches_side_by_side_equal_searches_alone() -> None:
    objectives = {f"search-{seed}": objective(seed) for seed in range(3)}

    def score(step: int, asked: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
        return {
            name: (np.stack([objectives[name](mask) for mask in request.masks]),)
            for name, request in asked.items()
        }

    together = in_lockstep(
        {name: greedy_search(SearchPlan(LAYERS, HEADS), 0.02) for name in objectives}, score
    )
    for name in objectives:
        assert (
            in_lockstep({name: greedy_search(SearchPlan(LAYERS, HEADS), 0.02)}, score)[name] == together[name]
        )


def test_tasks_of_a_search_weigh_the_same() -> None:
    def score(step: int, asked: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
        return {
            name: tuple(
                np.stack([np.full(size, 0.5 - cost * len(mask)) for mask in request.masks])
                for size, cost in ((100, 0.0), (2, 0.02))
            )
            for name, request in asked.items()
        }

    found = in_lockstep({"two": greedy_search(SearchPlan(1, 4), 0.0501)}, score)["two"]
    # Each unit costs 0.02 on the small task, so 0.01 in the mean; 5 units share a tolerance of just above
    # 0.05.
    assert len(found.mask) == 5
    assert found.lost == pytest.approx(0.05)


def test_documents_of_a_cluster_count_once_in_the_error_of_a_loss() -> None:
    losses = np.array([0.1, 0.3, 0.0, 0.2, 0.4, 0.2])
    clusters = ["a", "a", "b", "b", "c", "c"]
    doubled = np.repeat(losses, 2)
    alone, stderr = mean_loss((losses,), [clusters])
    assert alone == pytest.approx(losses.mean())
    # Clusters of one size: as if each were one document, its mean.
    means = losses.reshape(3, 2).mean(1)
    assert stderr == pytest.approx(means.std(ddof=1) / np.sqrt(3))
    assert mean_loss((doubled,), [[name for name in clusters for _ in range(2)]])[1] == pytest.approx(stderr)
    # Groups weigh the same; one with a single cluster has no error and is left out of it.
    both = mean_loss((losses, losses + 0.2), [clusters, clusters])
    assert both == pytest.approx((losses.mean() + 0.1, stderr / np.sqrt(2)))
    assert np.isnan(mean_loss((losses,), [["a"] * 6])[1])
