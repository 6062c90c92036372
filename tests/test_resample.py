"""Other documents' values in removed units' place: which document's, exactly, and in whole runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import oracles
import polars as pl
import pytest
import torch
from commands import invoke, run_small
from family_models import HEADS, LAYERS
from hypothesis import given
from hypothesis import strategies as st
from test_engine import PLENTY, ablation_masks, random_task, swept
from test_fills import Made, captured, estimates, logprob, made, replaced
from test_masks import MODEL
from test_work import Packing, work_of

from lowmem_icl.engine.answers import Scores
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MASK_SCHEMA, RESAMPLING_RULE, MaskFile, read_mask, write_mask
from lowmem_icl.masks.mask import Mask, resampling
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.store import Store
from lowmem_icl.session.donors import resampled_outlines, resampled_rows
from lowmem_icl.session.jobs import MaskedDocuments, gathered, masked_rows
from lowmem_icl.session.work import GradientsPart
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.donors import donors_among
from lowmem_icl.tasks.packing import OptionTokens, PackedTask

__all__ = ["made"]  # A fixture.

OTHERS = resampling(3)
SEVERAL = Mask(
    frozenset((layer, head) for layer in range(LAYERS) for head in range(0, HEADS, 2)), frozenset([0, 2])
)


def task_of(seed: int, *, shared: int = 0) -> TaskRows:
    """Documents whose prompts are of different lengths, the last with options in prompts of two lengths and
    with two right ones.
    """
    task = random_task(seed, 4, shared=shared)
    options = (("5 6 7 8 9 10", "11 12"), ("5 6 7 8 9 10", "11 13 14"), ("5 6 7 8 20 21 22", "11 12"))
    last = replace(task.documents[-1], options=options, gold=(False, True, True))
    return replace(task, documents=(*task.documents[:-1], last))


def prepared_of(store: Store, *tasks: TaskRows) -> Any:
    return Packing(store.skeleton, tasks)


def scored(store: Store, task: TaskRows, documents: slice, masks: tuple[Mask, ...]) -> Scores:
    rows = masked_rows(prepared_of(store, task), MaskedDocuments(task, documents, masks), {})
    return gathered(rows, swept(store, [each.job for each in rows]))


Given = tuple[list[torch.Tensor], list[torch.Tensor]]


def given_to(made: Made, packed: PackedTask, owner: int, option: OptionTokens) -> Given:
    """What the document's donor gives at every token of an option, by layer, from a run of it alone."""
    donor = donors_among(packed.task, 3)[owner]
    first = packed.task.documents[donor].gold.index(True)
    path = packed.options[int(packed.first_option[donor]) + first]
    places = oracles.places_from_the_end(
        len(option.path), option.context_tokens, len(path.path), path.context_tokens
    )
    heads, ffns = captured(made, path)
    return [z[places] for z in heads], [ffn[places] for ffn in ffns]


def owned(packed: PackedTask) -> list[tuple[int, OptionTokens, bool]]:
    return [
        (owner, packed.options[int(first) + index], gold)
        for owner, (document, first) in enumerate(
            zip(packed.task.documents, packed.first_option, strict=True)
        )
        for index, gold in enumerate(document.gold)
    ]


@pytest.mark.parametrize("shared", [0, 20], ids=["own prompts", "shared demonstrations"])
def test_other_documents_values_equal_one_hooked_run_a_unit(made: Made, shared: int) -> None:
    task = task_of(2, shared=shared)
    packed = prepared_of(made.store, task).pack(task)
    units = ablation_masks(LAYERS, HEADS)[1:] if not shared else ()
    masks = tuple(mask.filled(OTHERS) for mask in (Mask(), *units, SEVERAL))
    found = scored(made.store, task, slice(None), masks).logprobs
    for number, (owner, option, _) in enumerate(owned(packed)):
        given = given_to(made, packed, owner, option)
        for mask, value in zip(masks, found[:, number], strict=True):
            with torch.no_grad(), replaced(made, mask, *given):
                expected = float(logprob(made.model, option))
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


class Tables:
    """What stands in units' place, in the form in which the oracle of estimates takes means."""

    def __init__(self, given: Given) -> None:
        self.heads, self.ffns = given


@pytest.mark.parametrize("mask", [Mask(), SEVERAL], ids=["whole", "pruned"])
def test_estimates_equal_autograd(made: Made, tmp_path: Path, mask: Mask) -> None:
    """⟨z − donor's, ∂logp/∂z⟩ of every unit, in the whole model and in one that donors' values stand in."""
    task = task_of(4)
    with work_of(made.store, tmp_path, limits=PLENTY) as work:
        object.__setattr__(work, "prepared", prepared_of(made.store, task))
        (result,) = work.gradients(GradientsPart("one", "one", (task,), (mask.filled(OTHERS),)))
        packed = work.prepared.pack(task)
    # Of two right options the one that scores best.
    best = {
        owner: max(
            (option for other, option, gold in owned(packed) if gold and other == owner),
            key=lambda option: under(made, packed, owner, option, mask),
        )
        for owner in range(len(task.documents))
    }
    for owner, option in best.items():
        tables: Any = Tables(given_to(made, packed, owner, option))
        heads, ffns = estimates(made, option, mask, tables)
        for got, expected in ((result.head_signed[owner], heads), (result.ffn_signed[owner], ffns)):
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(heads).max())


def under(made: Made, packed: PackedTask, owner: int, option: OptionTokens, mask: Mask) -> float:
    with torch.no_grad(), replaced(made, mask, *given_to(made, packed, owner, option)):
        return float(logprob(made.model, option))


def test_a_document_that_gets_its_own_values_is_as_it_was(int8_store: Store) -> None:
    alike = ((" ".join(map(str, range(5, 25))), "7 8 9"),)
    documents = tuple(
        Document(number, alike, (True,), str(number), (), str(number), 0, {}) for number in range(3)
    )
    task = TaskRows("alike", 0, "train", documents, "acc", ())
    masks = tuple(mask.filled(OTHERS) for mask in ablation_masks(3, 4))
    found = scored(int8_store, task, slice(None), masks).logprobs
    np.testing.assert_array_equal(found, np.broadcast_to(found[0, 0], found.shape))


def test_int8_scores_depend_on_neither_chunks_nor_company(int8_store: Store) -> None:
    task = task_of(2)
    masks = tuple(mask.filled(OTHERS) for mask in ablation_masks(3, 4))
    others = (Mask(), Mask(ffns=frozenset([1])), Mask(ffns=frozenset([1]), fill=resampling(4)))
    mixed = scored(int8_store, task, slice(None), (*others, *masks)).logprobs
    np.testing.assert_array_equal(mixed[3:], scored(int8_store, task, slice(None), masks).logprobs)
    for number, mask in enumerate(others):
        alone = scored(int8_store, task, slice(None), (mask,)).logprobs
        np.testing.assert_array_equal(mixed[number], alone[0])
    chunks = [scored(int8_store, task, slice(at, at + 2), masks).logprobs for at in (0, 2)]
    np.testing.assert_array_equal(mixed[3:], np.concatenate(chunks, axis=1))
    assert not np.allclose(mixed[1], mixed[2])


def some_clusters(sizes: list[int]) -> TaskRows:
    names = [str(name) for name, size in enumerate(sizes) for _ in range(size)]
    documents = tuple(
        Document(number, ((f"{number}", "1"),), (True,), name, (), "", 0, {})
        for number, name in enumerate(names)
    )
    return TaskRows("some", 0, "train", documents, "acc", ())


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), seed=st.integers(0, 9), mix=st.randoms())
def test_every_document_gives_once_and_not_to_its_own_cluster(sizes: list[int], seed: int, mix: Any) -> None:
    task = some_clusters(sizes)
    count = len(task.documents)
    if count < 2:
        with pytest.raises(InputError, match=r"--ablation resample: task some has 1 document"):
            donors_among(task, seed)
        return
    donors = donors_among(task, seed)
    assert sorted(donors) == list(range(count))
    assert all(number != donor for number, donor in enumerate(donors))
    if 2 * max(sizes) <= count:
        clusters = [document.cluster for document in task.documents]
        assert all(clusters[number] != clusters[donor] for number, donor in enumerate(donors))
    # In whatever order they stand.
    order = list(range(count))
    mix.shuffle(order)
    again = donors_among(replace(task, documents=tuple(task.documents[number] for number in order)), seed)
    assert {order[at]: order[donor] for at, donor in enumerate(again)} == dict(enumerate(donors))


def test_seeds_draw_other_donors() -> None:
    task = some_clusters([1] * 20)
    assert len({tuple(donors_among(task, seed)) for seed in range(5)}) == 5


def test_what_certifies_takes_from_the_training_documents(int8_store: Store) -> None:
    train = random_task(1, 6)
    certify = replace(train, documents=tuple(replace(d, index=d.index + 50) for d in train.documents))
    prepared = Packing(int8_store.skeleton, train=(train,))
    anyhow: Any = prepared
    rows = resampled_rows(anyhow, certify, slice(None), 3)
    again = resampled_rows(anyhow, certify, slice(2, 4), 3)
    every = [donor.row.tokens.tolist() for donor in rows.values.donors.values()]
    assert [donor.row.tokens.tolist() for donor in again.values.donors.values()] == every[2:4]
    gold = [list(option.path) for owner, option, is_gold in owned(prepared.pack(train)) if is_gold]
    assert all(tokens in gold for tokens in every)


@pytest.mark.parametrize("gold_only", [False, True])
def test_outlines_have_the_sizes_of_the_rows(int8_store: Store, gold_only: bool) -> None:
    task = task_of(2)
    prepared = prepared_of(int8_store, task)
    exact = resampled_rows(prepared, task, slice(1, None), 3, gold_only=gold_only)
    sizes = resampled_outlines(prepared, task, slice(1, None), 3, gold_only=gold_only)
    np.testing.assert_array_equal(exact.packed.sizes, sizes.packed.sizes)
    lengths = [[len(donor.row) for donor in rows.values.donors.values()] for rows in (exact, sizes)]
    assert lengths[0] == lengths[1]
    shared = [len({donor.row for donor in rows.values.donors.values()}) for rows in (exact, sizes)]
    assert shared[0] == shared[1] == 3


def a_file(mask: Mask) -> MaskFile:
    return MaskFile("some", mask, MODEL, {"method": "greedy"})


def test_a_mask_file_holds_the_seed_and_the_rule(tmp_path: Path) -> None:
    mask = Mask(frozenset([(2, 3)]), frozenset([0]), OTHERS)
    write_mask(tmp_path / "some.json", a_file(mask))
    content = json.loads((tmp_path / "some.json").read_text())
    assert content["ablation"] == "resample"
    assert content["resample"] == {"seed": 3, "rule": RESAMPLING_RULE}
    jsonschema.validate(content, MASK_SCHEMA)
    assert read_mask(tmp_path / "some.json") == a_file(mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": None}, "resample: expected seed and rule"),
        ({"ablation": "zero"}, "resample: expected seed and rule"),
        ({"ablation": "mean"}, "means: expected the digest|resample: expected"),
        ({"resample": {"seed": -1, "rule": RESAMPLING_RULE}}, r"resample\.seed"),
        ({"resample": {"seed": 3}}, r"resample\.rule"),
        ({"resample": {"seed": 3, "rule": "another token"}}, r"resample\.rule"),
    ],
)
def test_a_mask_file_with_another_rule_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_mask(tmp_path / "some.json", a_file(Mask(ffns=frozenset([0]), fill=OTHERS)))
    content = json.loads((tmp_path / "some.json").read_text()) | changes
    (tmp_path / "some.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_mask(tmp_path / "some.json")


EXPERIMENTS = ("--experiments", "importance,ablate,prune,induction")


def run_resampled(out: Path, stores: Path, *more: object) -> Any:
    few = ("--tasks", "recall,knowledge", "--shots", "4", "--limit", "8", "--train-limit", "4")
    return run_small(out, stores, *few, "--curve-limit", "4", "--ablation", "resample", *more)


@pytest.fixture(scope="module")
def resampled(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a run of all experiments that remove units, by other documents' values."""
    out = tmp_path_factory.mktemp("resampled") / "demo"
    result = run_resampled(out, stores, *EXPERIMENTS)
    assert result.exit_code == 0, result.output
    return out


def test_every_number_says_how_units_were_removed(resampled: Path) -> None:
    results = read_table(resampled / "results.parquet", "results")
    removed = pl.col("heads_removed").fill_null(0) + pl.col("ffns_removed").fill_null(0) > 0
    assert set(results.filter(removed)["ablation"]) == {"resample"}
    assert set(results.filter(removed)["experiment"]) == {"ablate", "prune", "induction"}
    assert set(results.filter(~removed)["ablation"]) == {None}
    assert not (resampled / "parts" / "means.npz").exists()


def test_masks_make_the_same_numbers_again(resampled: Path, stores: Path, tmp_path: Path) -> None:
    names = ("greedy-recall-4shot", "greedy-aggregate-4shot", "induction-heads")
    files = [argument for name in names for argument in ("--mask", resampled / "masks" / f"{name}.json")]
    options = ("--tasks", "recall,knowledge", "--shots", "4", "--limit", "8", "--store-dir", stores)
    result = invoke("evaluate", *files, *options, "--out", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    again = read_table(tmp_path / "again" / "results.parquet", "results").filter(pl.col("mask") != "clean")
    assert set(again["ablation"]) == {"resample"}
    first = read_table(resampled / "results.parquet", "results").filter(
        pl.col("procedure").is_in(["greedy", "removal"]) & ~pl.col("metric").str.ends_with("_drop")
    )
    keys = ["task", "shots", "mask", "metric"]
    both = again.join(first.select(*keys, "value"), on=keys)
    assert set(both["mask"]) == set(names)
    np.testing.assert_array_equal(both["value"], both["value_right"])


def test_the_plan_counts_donors() -> None:
    planned = {
        ablation: json.loads(
            invoke("plan", "--tasks", "recall", "--shots", "4", "--json", "--ablation", ablation).stdout
        )
        for ablation in ("zero", "resample")
    }
    zero, resample = (
        {stage["experiment"]: stage["operations"] for stage in plan["stages"]} for plan in planned.values()
    )
    assert all(resample[name] > zero[name] for name in ("importance", "ablate", "prune", "induction"))
    assert resample["evaluate"] == zero["evaluate"]


def test_a_single_document_is_refused_before_any_work(stores: Path, tmp_path: Path) -> None:
    result = run_resampled(tmp_path / "one", stores, "--experiments", "ablate", "--train-limit", "1")
    assert result.exit_code == 2
    assert "--ablation resample: task recall has 1 document of split" in result.output


def test_means_and_other_documents_do_not_meet(int8_store: Store) -> None:
    task, rng = task_of(2), np.random.default_rng(0)
    means = UnitMeans(*(rng.normal(size=(3, 32)).astype(np.float32) for _ in range(2)))
    masks = (Mask(), Mask(ffns=frozenset([1]), fill="mean:a"), Mask(ffns=frozenset([1]), fill=OTHERS))
    rows = masked_rows(
        prepared_of(int8_store, task), MaskedDocuments(task, slice(None), masks), {"mean:a": means}
    )
    assert [part.masks.tolist() for part in rows] == [[0, 1], [2]]
    found = gathered(rows, swept(int8_store, [part.job for part in rows])).logprobs
    assert len({tuple(values) for values in found.tolist()}) == 3
