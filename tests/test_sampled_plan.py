"""Plans that read a few documents of every task: near the plan that reads all, and kept for the next one."""

import json
import logging
from pathlib import Path

import pytest
from commands import invoke
from conftest import make_checkpoint
from test_readme_scripts import script

from lowmem_icl.options import RunOptions
from lowmem_icl.planning.costs import planned_work, row_lengths
from lowmem_icl.planning.measure import Rates
from lowmem_icl.planning.plan import make_plan
from lowmem_icl.session import prepare as preparing
from lowmem_icl.session.prepare import Prepared, prepare, prepare_plan

DEMO = Path(__file__).parents[1] / "lowmem_icl" / "demo"
RATES = Rates(0.1, 1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 1e9)
FREE_DISK = 1 << 40


@pytest.fixture(autouse=True)
def _always_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "MOST_EXACT", 0)
    monkeypatch.setattr("lowmem_icl.planning.plan.measure", lambda *_, **__: RATES)
    # What is free changes from one plan to the next where others write to the same disk.
    monkeypatch.setattr("lowmem_icl.planning.memory.free_bytes", lambda folder: FREE_DISK)


def options_of(checkpoint: Path, stores: Path, **changes: object) -> RunOptions:
    return RunOptions.model_validate(
        {"model": str(checkpoint), "store_dir": stores, "device": "cpu", "memory": "8GB"} | changes
    )


@pytest.fixture
def small_checkpoint(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "checkpoint", vocab_size=528, max_position_embeddings=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def operations_of(prepared: Prepared) -> dict[str, int]:
    return {stage.experiment: stage.operations for stage in make_plan(prepared).stages}


@pytest.mark.parametrize("demonstrations", ["per-document", pytest.param("shared", marks=pytest.mark.slow)])
def test_on_real_rows_operations_are_within_five_percent_of_the_exact_plan(
    demonstrations: str, shared_data: Path, opt_tokenizer: Path, tmp_path: Path
) -> None:
    sizes = script("plan_sizes")
    folder = sizes.weightless_checkpoint(tmp_path / "opt", sizes.CONFIGS["opt-125m"], opt_tokenizer)
    options = options_of(
        folder, tmp_path / "stores", data_dir=shared_data, tasks="boolq,copa,multirc,record,wic,winogrande",
        shots="0,2", limit=160, train_limit=24, certify_limit=0, demonstrations=demonstrations,
        demonstration_sets=4, labels="right,foreign",
    )  # fmt: skip
    sampled = prepare_plan(options)
    assert "are tokenised" in sampled.sample_note
    estimated, longest = operations_of(sampled), row_lengths(sampled, planned_work(sampled)).longest
    exact = prepare(options)
    assert estimated == pytest.approx(operations_of(exact), rel=0.05)
    assert longest == pytest.approx(row_lengths(exact, planned_work(exact)).longest, rel=0.02)
    assert prepare_plan(options).sample_note == "", "what is tokenised is counted"


def test_documents_that_give_their_values_are_estimated_too(small_checkpoint: Path, tmp_path: Path) -> None:
    few = {"tasks": "recall,knowledge", "shots": "4", "limit": 64, "train_limit": 16}
    options = options_of(small_checkpoint, tmp_path / "stores", **few, ablation="resample")
    sampled = prepare_plan(options)
    assert operations_of(sampled) == pytest.approx(operations_of(prepare(options)), rel=0.05)


def test_a_second_plan_finds_the_sizes_and_says_the_same(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(small_checkpoint, tmp_path / "stores", tasks="recall,knowledge", shots="0,2")
    first = prepare_plan(options)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "open_tasks", lambda options: pytest.fail("nothing is read again"))
        again = prepare_plan(options)
    assert make_plan(first) == make_plan(again)
    assert first.notes == again.notes


def test_damaged_sizes_are_made_again(
    small_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_of(small_checkpoint, tmp_path / "stores", tasks="recall", shots="0")
    first = prepare_plan(options)
    (kept,) = (tmp_path / "stores" / "texts").glob("sizes-*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert make_plan(prepare_plan(options)) == make_plan(first)
    assert "made again" in caplog.text


def test_the_longest_document_is_in_the_sample(small_checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {
            "context": f"{number} cat " + "dog " * 40 * (number in range(77, 87)),
            "options": [" a", " b"],
            "gold": 0,
        }
        for number in range(200)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = options_of(
        small_checkpoint, tmp_path / "stores", tasks=str(path), shots="0", experiments="evaluate"
    )
    sampled = prepare_plan(options)
    exact = prepare(options)
    lengths = [row_lengths(one, planned_work(one)).longest for one in (sampled, exact)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert lengths[1] > 80


def test_a_plan_says_what_would_save_most(small_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"context": f"{n} cat " + "dog " * 20, "options": [" a", " b"], "gold": 0} for n in range(60)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", small_checkpoint, "--store-dir", tmp_path / "stores", "--tasks", path,
             "--shots", "4", "--demonstration-sets", "2", "--experiments", "evaluate",
             "--labels", "right"]  # fmt: skip
    told = invoke("plan", "--json", "--quiet", *flags)
    assert told.exit_code == 0, told.output
    plan = json.loads(told.stdout)
    (shared,) = (one for one in plan["advice"] if one["options"] == "--demonstrations shared")
    other = json.loads(invoke("plan", "--json", "--quiet", *flags, "--demonstrations", "shared").stdout)
    before, after = (sum(stage["operations"] for stage in each["stages"]) for each in (plan, other))
    assert shared["operations"] == pytest.approx(1 - after / before, abs=0.01)
    assert "--demonstrations shared would save" in invoke("plan", *flags).output
