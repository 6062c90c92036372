"""The plan: memory dealt out and kept, refusals that name what would do, and nothing made before its time."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import invoke
from conftest import make_checkpoint, without_documents
from test_engine import PLENTY, packed_task, swept
from test_patching import Pair

from lowmem_icl.engine.patch_jobs import TokenBytes, patch_blocks
from lowmem_icl.engine.schedule import BlockRow, Job, SweepLimits, row_blocks
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.store import Store
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.memory import MemoryPlan, plan_memory
from lowmem_icl.planning.plan import Chunk, Plan, StagePlan, within_hours
from lowmem_icl.system.machine import device_allowance

DEMO = Path(__file__).parents[1] / "lowmem_icl" / "demo"
ROW = 128


def test_all_parts_together_are_the_allowance(int8_store: Store) -> None:
    options = RunOptions(memory=200_000_000)
    plan = plan_memory(without_documents(int8_store, options), ROW)
    parts = (
        plan.non_layer_bytes,
        plan.streaming_bytes,
        plan.working_bytes,
        plan.resident_bytes,
        plan.alive_bytes,
        plan.cache_bytes,
    )
    assert sum(parts) == pytest.approx(options.memory, rel=1e-6)
    assert plan.resident_bytes == int8_store.layer_bytes * 3, "a small model stays whole"


def test_the_memory_it_names_is_the_smallest_that_does(int8_store: Store) -> None:
    def planned_for(memory: int) -> MemoryPlan:
        return plan_memory(without_documents(int8_store, RunOptions(memory=memory)), ROW)

    with pytest.raises(DoesNotFit, match="--memory") as refused:
        planned_for(1_000_000)
    smallest = int(str(refused.value).rsplit(" ", 1)[1].removesuffix("MB")) * 10**6
    planned_for(smallest)
    with pytest.raises(DoesNotFit):
        planned_for(smallest - 10**6)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_smallest_memory_holds_two_prompts_and_a_change(int8_store: Store, on_device: bool) -> None:
    # All layers together take less than half of what is left, and yet cannot stay.
    store: Any = SimpleNamespace(
        layer_bytes=500_000, manifest=int8_store.manifest, skeleton=int8_store.skeleton
    )
    tokens = 2048

    def planned_for(size: int) -> MemoryPlan:
        options = RunOptions(experiments=("patch",), memory=10**9 if on_device else size)
        return plan_memory(without_documents(store, options), tokens, size if on_device else None)

    with pytest.raises(DoesNotFit, match="what one patch holds") as refused:
        planned_for(1_000_000)
    smallest = int(str(refused.value).rsplit(" ", 1)[1].removesuffix("MB")) * 10**6
    # Three tokens of the options come after the prompt.
    job = Pair.drawn(1, tokens - 3).job((Mask(),), "all")
    sizes, alive = TokenBytes.of(int8_store.skeleton), planned_for(smallest).alive_bytes
    assert len(list(patch_blocks([job], [np.arange(1)], sizes, alive))) == 1


def test_a_device_holds_all_but_the_cache_and_what_is_read(int8_store: Store) -> None:
    prepared = without_documents(int8_store, RunOptions(memory=50_000_000))
    plan = plan_memory(prepared, ROW, device_bytes=200_000_000)
    on_device = plan.non_layer_bytes + plan.working_bytes + plan.resident_bytes + plan.alive_bytes
    assert on_device < 200_000_000
    assert plan.cache_bytes < 50_000_000
    with pytest.raises(DoesNotFit, match="--device-memory"):
        plan_memory(prepared, ROW, device_bytes=1_000_000)


def test_a_disk_too_small_for_the_longest_row_is_named(
    int8_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_icl.planning.memory.free_bytes", lambda folder: 1000)
    prepared = without_documents(int8_store, RunOptions(out=tmp_path))
    assert plan_memory(prepared, ROW).spill_bytes == 500, "memory holds all of it"
    # With as little as ever does, the residuals of not all layers stay in memory.
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(without_documents(int8_store, RunOptions(out=tmp_path, memory=10**6)), 90 * ROW)
    smallest = int(str(refused.value).rpartition("--memory ")[2].removesuffix("MB")) * 10**6
    prepared = without_documents(int8_store, RunOptions(out=tmp_path, memory=smallest))
    with pytest.raises(DoesNotFit, match=f"--out {tmp_path}: .* choose another disk or give more --memory"):
        plan_memory(prepared, 90 * ROW)


def test_of_ways_to_share_memory_the_one_is_taken_that_reads_least(int8_store: Store) -> None:
    """Where not all layers can stay: as many as the sweeps say, of equals the fewest."""
    large: Any = SimpleNamespace(
        layer_bytes=10**9, manifest=int8_store.manifest, skeleton=int8_store.skeleton
    )
    prepared = without_documents(large, RunOptions(memory=4 * 10**9))
    fewest, most = (
        plan_memory(prepared, ROW, layers_read=layers_read)
        for layers_read in (lambda plan: 0.0, lambda plan: -float(plan.resident_bytes))
    )
    assert fewest.resident_bytes == 0
    assert most.resident_bytes > 10**9, "a layer at least"
    for plan in (fewest, most):
        shared = plan.resident_bytes + plan.alive_bytes + plan.cache_bytes
        rest = 4 * 10**9 - plan.non_layer_bytes - plan.streaming_bytes - plan.working_bytes
        assert shared == pytest.approx(rest, rel=1e-6)


def test_device_memory_without_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="--device-memory"):
        device_allowance(torch.device("cpu"), 10**9, 0.8)


def test_resident_layers_lie_on_the_device(int8_store: Store) -> None:
    """The meta device stands in for one that is not the CPU."""
    reader = LayerReader(int8_store.layer_paths, frozenset({0, 2}), torch.device("meta"))
    for _ in range(2):
        devices = {
            layer: {tensor.device.type for tensor in tensors.values()}
            for layer, tensors in reader.layers([0, 1, 2])
        }
        assert devices == {0: {"meta"}, 1: {"cpu"}, 2: {"meta"}}
    assert reader.read_bytes == sum(path.stat().st_size for path in int8_store.layer_paths) + (
        int8_store.layer_paths[1].stat().st_size
    )
    reader.close()


def test_little_disk_makes_smaller_blocks_and_the_same_results(int8_store: Store) -> None:
    jobs = [Job(packed_task(5).packed, (Mask(), Mask(ffns=frozenset([2]))))]
    little = SweepLimits(PLENTY.alive_bytes, disk_bytes=30_000)
    members = [BlockRow(0, row) for row in jobs[0].packed.rows]
    assert len(row_blocks(members, 32, 3, little, keeps_clean=True)) == len(members) > 1
    (ours,), (expected,) = swept(int8_store, jobs, little), swept(int8_store, jobs)
    assert (ours.logprobs == expected.logprobs).all()


def test_planning_converts_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", vocab_size=528)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    (tmp_path / "own.jsonl").write_text('{"context": "cat", "options": [" dog", " wug"], "gold": 1}\n' * 4)
    stores = tmp_path / "stores"
    arguments = ["--model", folder, "--store-dir", stores, "--tasks", tmp_path / "own.jsonl"]
    told = invoke("plan", "--shots", 0, "--json", *arguments)
    assert told.exit_code == 0, told.output
    plan = json.loads(told.stdout)
    # Only the texts, as tokens: a run finds them there.
    assert [path.name for path in stores.iterdir()] == ["texts"]
    assert plan["convert_bytes"] == (folder / "model.safetensors").stat().st_size
    assert {stage["experiment"] for stage in plan["stages"]} == {
        "evaluate",
        "importance",
        "ablate",
        "prune",
        "induction",
    }
    assert all(stage["seconds"] > 0 for stage in plan["stages"])
    assert plan["rates"]["disk_bytes_per_second"] > 0


def test_a_plan_counts_what_people_count_and_adds_up(tmp_path: Path) -> None:
    asked = ("--tasks", "recall,knowledge", "--shots", "0,4", "--limit", 16, "--train-limit", 8)
    arguments = ("plan", *asked, "--store-dir", tmp_path, "--certify-limit", 0)
    amounts = {
        stage["experiment"]: stage["amount"]
        for stage in json.loads(invoke(*arguments, "--json").stdout)["stages"]
    }
    settings, units = 4, 4 * 8 + 4
    assert amounts["ablate"]["documents"] == settings * 8
    assert amounts["ablate"]["ablations"] == settings * 8 * units
    # Right labels; shuffled and foreign ones where there are demonstrations.
    assert amounts["evaluate"]["documents"] == settings * 16 + 2 * 2 * 16
    assert amounts["evaluate"]["ablations"] == 0
    assert amounts["importance"]["tokens"] > 0
    table = invoke(*arguments).stdout.split("plan", 1)[1].split("ablation:")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    assert table.split()[:7] == [
        "experiment",
        *("documents", "tokens", "ablations", "operations", "read", "expected"),
    ]
    (total,) = [line for line in table.splitlines() if line.strip().startswith("all ")]
    assert total.split()[1].startswith("~"), "searches are rough"


HOUR = 3600.0


def planned(**hours: float) -> Plan:
    stages = tuple(
        StagePlan(
            name, operations=1, layers_read=1, read_bytes=1, seconds=HOUR * taken, rough=name == "prune"
        )
        for name, taken in hours.items()
    )
    return Plan(None, 0, 0, None, 1, stages)  # type: ignore[arg-type]


CHUNKS = {"ablate": [Chunk(0, 1, HOUR), Chunk(1, 2, HOUR), Chunk(2, 4, 2 * HOUR), Chunk(4, 8, 4 * HOUR)]}


def test_ablations_take_the_hours_that_the_others_leave() -> None:
    plan = planned(evaluate=1, importance=1, ablate=8, prune=1)
    cut = within_hours(plan, 8, CHUNKS)
    stages = {stage.experiment: stage for stage in cut.stages}
    assert stages["ablate"].documents == 4, "4 hours of chunks fit 8 - 2"
    assert stages["prune"].postponed, "its masks depend on all of them"
    whole = within_hours(plan, 12, CHUNKS)
    assert {stage.experiment: stage.documents for stage in whole.stages}["ablate"] is None


def test_a_long_search_waits_until_the_ablations_are_done() -> None:
    cut = within_hours(planned(evaluate=1, ablate=8, prune=10), 6, CHUNKS)
    assert [stage.postponed for stage in cut.stages] == [False, False, True]
    alone = within_hours(planned(prune=10), 6, {})
    assert not alone.stages[0].postponed, "then it goes on, night after night"
    assert alone.stages[0].seconds == 6 * HOUR, "what fits, not what it takes"


def test_hours_too_short_for_the_basis_name_what_would_do() -> None:
    with pytest.raises(DoesNotFit, match="give --hours 3 or more"):
        within_hours(planned(evaluate=2, importance=1, ablate=8), 2.5, CHUNKS)
