"""The nested search against its description, and what it costs."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import invoke
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowmem_icl.experiments.prune.exact import greedy_search
from lowmem_icl.experiments.prune.nested import Effort, KnownCosts, nested_search
from lowmem_icl.experiments.prune.search import (
    Answer,
    Asked,
    EstimateRequest,
    Pruned,
    Request,
    SearchPlan,
    in_lockstep,
)
from lowmem_icl.experiments.prune.settings import effort_of, search_plan
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.options import RunOptions
from lowmem_icl.session.prepare import prepare

LAYERS, HEADS = 4, 3
PLAN = SearchPlan(LAYERS, HEADS)
ALONE = Effort(groups=LAYERS, alone=True, estimates=0, head_masks=1000, ffn_masks=1000)
ESTIMATED = Effort(groups=2, alone=False, estimates=1, head_masks=1000, ffn_masks=1000)
NOTHING = KnownCosts()

Values = NDArray[np.float64]


class Model:
    """An objective of five documents in which units cost alone and, by `pairs`, together."""

    def __init__(self, seed: int, *, pairs: float = 0.0, least: float = -np.inf) -> None:
        rng = np.random.default_rng(seed)
        units = LAYERS * (HEADS + 1)
        self.alone = np.maximum(rng.normal(0.002, 0.01, (units, 5)), least)
        self._pairs = rng.normal(0, pairs, (units, units, 5))
        self.asked: list[Asked] = []

    def value(self, mask: Mask) -> Values:
        removed = [PLAN.index(unit) for unit in mask.units()]
        together = self._pairs[np.ix_(removed, removed)].sum((0, 1))
        return np.asarray(0.8 - self.alone[removed].sum(0) - together)

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        if isinstance(asked, EstimateRequest):
            return (self.alone.copy(),)
        return (np.stack([self.value(mask) for mask in asked.masks]),)


def searched(model: Model, effort: Effort, tolerance: float = 0.02, known: KnownCosts = NOTHING) -> Pruned:
    def score(step: int, asked: Mapping[str, Asked]) -> dict[str, Answer]:
        return {name: model.answer(request) for name, request in asked.items()}

    return in_lockstep({"one": nested_search(PLAN, tolerance, effort, known)}, score)["one"]


def one_after_the_other(model: Model, groups: int, tolerance: float) -> Mask:
    """The description where no unit helps by going: in order of cost each goes that is allowed to."""
    units = LAYERS * (HEADS + 1)
    mask, visited = Mask(), 0

    def lost(tried: Mask) -> float:
        return float((model.value(Mask()) - model.value(tried)).mean())

    for together in PLAN.visits(groups):
        visited += len(together)
        for unit in sorted(together, key=lambda unit: model.alone[PLAN.index(unit)].mean()):
            if lost(mask | unit.as_mask()) <= tolerance * visited / units:
                mask |= unit.as_mask()
    return mask


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), tolerance=st.sampled_from([0.001, 0.01, 0.05, 0.3]))
@pytest.mark.parametrize("effort", [ALONE, ESTIMATED])
def test_the_search_equals_its_description(effort: Effort, seed: int, tolerance: float) -> None:
    model = Model(seed, least=0.0)
    found = searched(model, effort, tolerance)
    assert found.mask == one_after_the_other(model, effort.groups, tolerance)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tolerance=st.sampled_from([0.001, 0.01, 0.05, 0.3]),
    masks=st.integers(1, 12),
    groups=st.integers(1, LAYERS),
    alone=st.booleans(),
)
def test_the_tolerance_is_kept_with_few_masks(
    seed: int, tolerance: float, masks: int, groups: int, alone: bool
) -> None:
    model = Model(seed, pairs=0.004)
    found = searched(model, Effort(groups, alone, 0, masks, masks), tolerance)
    lost = float((model.value(Mask()) - model.value(found.mask)).mean())
    assert found.lost == pytest.approx(lost)
    assert lost <= tolerance + 1e-12
    assert [unit for unit, _ in found.steps] == list(dict.fromkeys(unit for unit, _ in found.steps))
    assert {unit for unit, _ in found.steps} == set(found.mask.units())
    checked = [asked for asked in model.asked if isinstance(asked, Request) and asked.half == "check"]
    assert sum(len(asked.masks) for asked in checked) <= 1 + 2 * groups * masks
    for asked in checked:
        sizes = [len(mask) for mask in asked.masks]
        assert sizes == sorted(set(sizes)), "masks of a sweep are nested"


def test_masks_hold_units_of_visited_layers_alone() -> None:
    model = Model(1)
    searched(model, ALONE)
    lowest = [
        min(layer for layer, _ in mask.heads)
        for asked in model.asked
        if isinstance(asked, Request)
        for mask in asked.masks
        if mask.heads and not mask.ffns
    ]
    assert lowest == sorted(lowest, reverse=True)


def test_estimates_are_made_again_under_the_mask_so_far() -> None:
    model = Model(3)
    found = searched(model, ESTIMATED)
    masks = [asked.mask for asked in model.asked if isinstance(asked, EstimateRequest)]
    assert masks[0] == Mask()
    assert len(masks) == 2
    assert masks[1]
    assert masks[1].heads == found.mask.heads, "two groups of heads, two of FFNs, estimates in between"
    known = KnownCosts((model.alone,))
    model = Model(3)
    assert searched(model, ESTIMATED, known=known) == found
    assert len([asked for asked in model.asked if isinstance(asked, EstimateRequest)]) == 1


def test_exact_costs_stand_before_estimates() -> None:
    """One head looks cheapest by estimates, and is known to cost more than is allowed."""
    model = Model(5, least=0.0)
    model.alone[:] = 0.0001
    model.alone[PLAN.index(Unit("head", 3, 1))] = 0.5
    estimates = model.alone.copy()
    estimates[PLAN.index(Unit("head", 3, 1))] = -1.0
    effort = Effort(groups=1, alone=False, estimates=0, head_masks=1, ffn_masks=1)
    misled = searched(model, effort, 0.4, KnownCosts((estimates,)))
    assert not misled.mask.heads, "every beginning has the head that costs most"
    exact = {PLAN.index(Unit("head", 3, 1)): 0.5}
    effort = Effort(groups=1, alone=False, estimates=0, head_masks=12, ffn_masks=1)
    found = searched(model, effort, 0.4, KnownCosts((estimates,), (exact,)))
    assert found.mask.heads == {(layer, head) for layer in range(4) for head in range(3)} - {(3, 1)}


def test_searches_side_by_side_equal_searches_alone_and_share_estimates() -> None:
    models = {f"search-{seed}": Model(seed, pairs=0.004) for seed in range(3)}
    kinds: list[set[str]] = []

    def score(step: int, asked: Mapping[str, Asked]) -> dict[str, Answer]:
        kinds.append({type(request).__name__ for request in asked.values()})
        return {name: models[name].answer(request) for name, request in asked.items()}

    together = in_lockstep({name: nested_search(PLAN, 0.02, ESTIMATED, NOTHING) for name in models}, score)
    assert kinds.count({"EstimateRequest"}) == 2, "those of all searches are one pass"
    assert all(len(kind) == 1 for kind in kinds)
    for name, model in models.items():
        assert searched(model, ESTIMATED) == together[name]


def test_it_removes_about_as_much_as_the_exact_search() -> None:
    sizes = {"nested": 0, "exact": 0}
    for seed in range(40):
        model = Model(seed, pairs=0.002)
        effort = Effort.within(PLAN, LAYERS * (HEADS + 1), 2)
        assert effort.alone

        def score(step: int, asked: Mapping[str, Any], model: Model = model) -> dict[str, Answer]:
            return {name: model.answer(request) for name, request in asked.items()}

        sizes["nested"] += len(searched(model, effort).mask)
        sizes["exact"] += len(in_lockstep({"one": greedy_search(PLAN, 0.02)}, score)["one"].mask)
    assert sizes["nested"] >= 0.95 * sizes["exact"]


def depths(effort: Effort, plan: SearchPlan) -> float:
    """Layers that a search runs, of one half of the documents each."""
    total, seen = 0.0, set()
    visits = plan.visits(effort.groups)
    for together in visits:
        first = 0 if plan.direction == "up" else min(unit.layer for unit in together)
        alone = len(together) if effort.alone and len(together) > 1 else 0
        total += (plan.layers - first) * (effort.masks(together) + alone)
        if first not in seen and plan.direction == "down":
            # Up to there the clean run of both halves, shared with the search of all tasks.
            total += first
            seen.add(first)
    return total + 3 * plan.layers * effort.estimates


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(2, 96),
    heads=st.integers(1, 96),
    share=st.floats(0.01, 1.0),
    searches=st.sampled_from([1, 2]),
    direction=st.sampled_from(["down", "up"]),
    order=st.sampled_from(["heads-first", "joint"]),
)
def test_it_runs_at_most_twice_as_many_layers_as_the_ablations(
    layers: int, heads: int, share: float, searches: int, direction: str, order: str
) -> None:
    plan = SearchPlan(layers, heads, direction, order)  # type: ignore[arg-type]
    n_exact = max(12 * searches, int(share * layers * (heads + 1)))
    effort = Effort.within(plan, n_exact, searches)
    # Both halves, each unit on average half way up.
    ablations = 2 * n_exact * (layers + 1) / 2
    assert searches * depths(effort, plan) <= 2 * ablations + 2 * layers


SMALL = (
    "--tasks", "recall,knowledge", "--shots", "0,4", "--limit", 16, "--train-limit", 8, "--certify-limit", 0,
    "--curves", "", "--experiments", "prune", "--search", "nested",
    "--screen", "attribution", "--exact", 10,
)  # fmt: skip


def masks_of(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "masks").glob("*.json")}


def test_a_search_that_was_stopped_ends_the_same(stores: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ("run", *SMALL, "--store-dir", stores, "--quiet", "--out")
    assert invoke(*command, whole).exit_code == 0
    steps = sorted((whole / "parts").glob("prune-0*"))
    assert any("0.head_signed" in np.load(step) for step in steps), "nothing was known before"
    shutil.copytree(whole, stopped)
    for step in sorted((stopped / "parts").glob("prune-*"))[len(steps) // 2 :]:
        step.unlink()
    assert invoke(*command, stopped).exit_code == 0
    assert masks_of(stopped) == masks_of(whole)
    assert len(masks_of(whole)) == 2 * 6


def test_which_search_it_is_where_none_is_asked_for(stores: Path) -> None:
    def effort(**options: Any) -> Effort | None:
        asked = {"store_dir": stores, "limit": 4, "tasks": ("recall", "knowledge"), "shots": (0,)} | options
        prepared = prepare(RunOptions.model_validate(asked))
        return effort_of(prepared, search_plan(prepared))

    assert effort() is None, "exact: the demo's layers have few heads"
    assert effort(search="nested") == Effort(groups=4, alone=True, estimates=0, head_masks=8, ffn_masks=1)
    screened = effort(screen="attribution", exact=10)
    assert screened is not None
    assert not screened.alone
    assert effort(screen="attribution", exact=10, search="exact") is None
