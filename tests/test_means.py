"""Tables of means beside masks: what is wrong is refused, what is right makes a run's numbers again."""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import polars as pl
import pytest
from commands import invoke, run_small
from safetensors.numpy import save
from test_masks import MODEL

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MASK_SCHEMA, MaskFile, check_means, fill_of_table, read_mask, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans, means_file, read_means
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.random_sequences import random_sequences

UNITS = Mask(frozenset([(2, 3), (2, 1)]), frozenset([0]))


def table(seed: int = 0, layers: int = 4, attention_width: int = 16, width: int = 12) -> UnitMeans:
    rng = np.random.default_rng(seed)
    shapes = (layers, attention_width), (layers, width)
    return UnitMeans(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def a_file(means: UnitMeans, name: str = "some-mask") -> MaskFile:
    return MaskFile(name, UNITS.filled(fill_of_table(means)), MODEL, {"method": "greedy"}, means=means)


def test_a_mask_and_its_table_give_back_what_was_written(tmp_path: Path) -> None:
    means = table()
    for name in ("one", "two"):
        write_mask(tmp_path / f"{name}.json", a_file(means, name))
    assert len(list(tmp_path.glob("means-*"))) == 1, "masks share their table"
    found = read_mask(tmp_path / "one.json")
    assert found == a_file(means, "one")
    assert found.means is not None
    np.testing.assert_array_equal(found.means.heads, means.heads)
    np.testing.assert_array_equal(found.means.ffns, means.ffns)
    assert found.mask.ablation == "mean"
    assert Mask(found.mask.heads, found.mask.ffns) == UNITS
    jsonschema.validate(json.loads((tmp_path / "one.json").read_text()), MASK_SCHEMA)


def changed(means: UnitMeans, **arrays: Any) -> bytes:
    return bytes(save({"heads": means.heads, "ffns": means.ffns} | arrays))


def spoiled(means: UnitMeans) -> dict[str, tuple[bytes | None, str]]:
    endless = means.ffns.copy()
    endless[1, 2] = np.inf
    return {
        "missing": (None, "cannot be read"),
        "no table": (b"{}", "no safetensors file"),
        "pickle": (pickle.dumps({"heads": means.heads}), "no safetensors file"),
        "cut short": (changed(means)[:-8], "no safetensors file"),
        "another": (changed(table(1)), "its digest is"),
        "infinite": (changed(means, ffns=endless), "not all numbers are finite"),
        "double": (
            changed(means, heads=means.heads.astype(np.float64)),
            "expected heads and ffns of float32",
        ),
        "more": (changed(means, other=means.heads), "expected heads and ffns of float32"),
        "less": (bytes(save({"heads": means.heads})), "expected heads and ffns of float32"),
        "flat": (changed(means, heads=means.heads.ravel()), "expected a row per layer"),
        "fewer layers": (changed(means, heads=means.heads[:-1].copy()), "expected a row per layer"),
    }


@pytest.mark.parametrize("case", list(spoiled(table())))
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, case: str) -> None:
    means = table()
    content, message = spoiled(means)[case]
    write_mask(tmp_path / "mask.json", a_file(means))
    path = tmp_path / means_file(means.digest)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"means .*means-.*: .*{message}"):
        read_mask(tmp_path / "mask.json")


@pytest.mark.parametrize("sizes", [{"layers": 3}, {"attention_width": 15}])
def test_a_table_for_another_shape_is_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    write_mask(tmp_path / "mask.json", a_file(table(**sizes)))
    with pytest.raises(InputError, match="its means have"):
        read_mask(tmp_path / "mask.json")


def test_a_table_of_other_widths_than_the_model_is_refused() -> None:
    check_means(a_file(table()), 16, 12)
    for widths in ((32, 12), (16, 16)):
        with pytest.raises(InputError, match="numbers per layer, this model"):
            check_means(a_file(table()), *widths)


def test_one_table_is_read_once(tmp_path: Path) -> None:
    means = table(5)
    write_mask(tmp_path / "mask.json", a_file(means))
    path = tmp_path / means_file(means.digest)
    assert read_means(path, means.digest) is read_means(path, means.digest)


def test_masks_with_other_things_in_place_are_not_combined(tmp_path: Path) -> None:
    write_mask(tmp_path / "one.json", a_file(table(), "one"))
    write_mask(tmp_path / "two.json", a_file(table(1), "two"))
    result = invoke(
        "masks", "combine", tmp_path / "one.json", tmp_path / "two.json", "--out", tmp_path / "n.json"
    )
    assert result.exit_code == 2
    assert "put other things in place" in result.output
    result = invoke("masks", "combine", tmp_path / "one.json", "--out", tmp_path / "same.json")
    assert result.exit_code == 0, result.output
    assert read_mask(tmp_path / "same.json").mask == read_mask(tmp_path / "one.json").mask


def run_by_mean(out: Path, stores: Path, *more: object) -> Any:
    few = ("--tasks", "recall,knowledge", "--shots", "4", "--limit", "8", "--train-limit", "4")
    return run_small(out, stores, *few, "--curve-limit", "4", "--ablation", "mean", *more)


@pytest.fixture(scope="module")
def mean_run(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a run of all experiments that remove units, by mean ablation."""
    out = tmp_path_factory.mktemp("means") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        # Heads are scored on few sequences: scores are of no account here.
        patch.setattr("lowmem_icl.session.text_form.random_sequences", partial(random_sequences, count=5))
        result = run_by_mean(out, stores, "--experiments", "importance,ablate,prune,induction")
    assert result.exit_code == 0, result.output
    return out


def test_every_number_says_that_units_were_removed_by_their_mean(mean_run: Path) -> None:
    results = read_table(mean_run / "results.parquet", "results")
    removed = pl.col("heads_removed").fill_null(0) + pl.col("ffns_removed").fill_null(0) > 0
    assert set(results.filter(removed)["ablation"]) == {"mean"}
    assert set(results.filter(removed)["experiment"]) == {"ablate", "prune", "induction"}
    assert set(results.filter(~removed)["ablation"]) == {None}


def test_the_plan_counts_the_pass_once_and_a_run_makes_it_once(mean_run: Path) -> None:
    record = json.loads((mean_run / "run.json").read_text())
    assert (mean_run / "parts" / "means.npz").is_file()
    with_means, without = (
        json.loads(invoke("plan", "--tasks", "recall", "--shots", "4", "--json", *more).stdout)
        for more in (("--ablation", "mean"), ())
    )
    zero = {stage["experiment"]: stage["operations"] for stage in without["stages"]}
    more = {
        stage["experiment"]
        for stage in with_means["stages"]
        if stage["operations"] > zero[stage["experiment"]]
    }
    assert more == {"importance"}, "the first that needs it"
    assert record["options"]["ablation"] == "mean"


def test_masks_with_their_tables_make_the_same_numbers_again(
    mean_run: Path, stores: Path, tmp_path: Path
) -> None:
    names = (
        "greedy-recall-4shot",
        "greedy-aggregate-4shot",
        "induction-heads",
        "gradient-heads-50-recall-4shot",
    )
    files = [argument for name in names for argument in ("--mask", mean_run / "masks" / f"{name}.json")]
    options = ("--tasks", "recall,knowledge", "--shots", "4", "--limit", "8", "--store-dir", stores)
    result = invoke("evaluate", *files, *options, "--out", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    again = read_table(tmp_path / "again" / "results.parquet", "results")
    assert set(again.filter(pl.col("mask") != "clean")["ablation"]) == {"mean"}
    first = read_table(mean_run / "results.parquet", "results").filter(
        pl.col("procedure").is_in(["greedy", "removal"])
    )
    keys = ["task", "shots", "mask", "metric"]
    both = again.filter(pl.col("mask") != "clean").join(first.select(*keys, "value"), on=keys)
    assert set(both["mask"]) == set(names[:3])
    np.testing.assert_array_equal(both["value"], both["value_right"])
    assert read_mask(tmp_path / "again" / "masks" / f"{names[0]}.json").means is not None


def test_a_folder_belongs_to_one_ablation(mean_run: Path, stores: Path) -> None:
    result = run_by_mean(
        mean_run, stores, "--experiments", "importance,ablate,prune,induction", "--ablation", "zero"
    )
    assert result.exit_code == 2
    assert "--ablation: mean in the folder, the default asked for" in result.output
