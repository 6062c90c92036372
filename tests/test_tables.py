"""Tables, rankings and statistics against polars, scipy and hand-computed values."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lowmem_icl.errors import InputError
from lowmem_icl.experiments.overlap.measure import overlap_records
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.masks.rankings import (
    RankingKey,
    highest_heads,
    lowest_ffns,
    lowest_heads,
    mean_of_ranks,
    mean_of_scores,
    random_mask,
)
from lowmem_icl.session.parts import Draft, Parts
from lowmem_icl.session.sealed import write_sealed
from lowmem_icl.statistics.agreement import spearman, top_overlap
from lowmem_icl.statistics.intervals import MEAN, mean_interval
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.blocks import Block, frame, unit_blocks
from lowmem_icl.tables.schema import RESULTS, TABLES, read_table, write_table

CONTRACT = (
    "experiment, procedure, task, shots, split, protocol, demonstrations, labels, ablation, model, weights, "
    "method, mask, mask_task, mask_shots, kind, layer, head, heads_removed, ffns_removed, percent, count, "
    "other_task, other_shots, other_method, metric, value, stderr, low, high, chance, exact, documents, seed"
)


def test_the_columns_are_those_of_the_contract() -> None:
    assert ", ".join(RESULTS) == CONTRACT
    assert RESULTS["value"] == pl.Float64()
    assert TABLES["effects"]["value"] == pl.Float32()
    assert list(TABLES["answers"]) == [
        "task", "shots", "split", "mask", "document", "option", "tokens", "logprob", "gold", "context_tokens",
        "truncated",
    ]  # fmt: skip


def test_a_table_comes_back_with_its_types_and_foreign_files_are_refused(tmp_path: Path) -> None:
    table = frame("results", [{"task": "piqa", "value": 0.5, "shots": 1}], {"model": "demo"})
    write_table(table, "results", tmp_path / "results.parquet")
    assert read_table(tmp_path / "results.parquet", "results").equals(table)
    assert table["head"].null_count() == 1
    assert table["model"].to_list() == ["demo"]
    with pytest.raises(InputError, match="expected the effects table"):
        read_table(tmp_path / "results.parquet", "effects")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(InputError, match="expected the results table"):
        read_table(tmp_path / "foreign.parquet", "results")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "broken.parquet", "results")


def test_a_large_table_is_written_and_read_without_copies_of_it(tmp_path: Path) -> None:
    values = pl.Series("value", np.random.default_rng(0).random(300_000), dtype=pl.Float32())
    table = pl.concat([pl.DataFrame(schema=TABLES["effects"]), values.to_frame()], how="diagonal")
    path = tmp_path / "effects.parquet"
    peaks = []
    for work in (lambda: write_table(table, "effects", path), lambda: read_table(path, "effects")):
        tracemalloc.start()
        try:
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert path.stat().st_size > 1_000_000
    assert max(peaks) < 1.6 * path.stat().st_size
    assert read_table(path, "effects").equals(table)


def test_a_table_of_another_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Of the first schema, which had `k`; one that says this schema and has other columns is refused, too."""
    old = pl.DataFrame({"experiment": ["prune"], "k": [10], "value": [0.5]})
    for version, message in {
        "1": "this version reads tables of schema version 2, this table has 1; run the same command with "
        "another --out, or read it with the version that wrote it",
        "2": "expected the results table of schema version 2",
    }.items():
        path = tmp_path / f"schema-{version}.parquet"
        stated = json.dumps({"table": "results", "schema_version": version})
        old.write_parquet(path, metadata={"lowmem_icl": stated})
        with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
            read_table(path, "results")
    # A table of another version that is also another table.
    with pytest.raises(InputError, match="expected the effects table of schema version 2"):
        read_table(tmp_path / "schema-1.parquet", "effects")


def test_whole_columns_make_the_same_table_as_records() -> None:
    block = {
        "experiment": "ablate",
        "document": np.array([3, 1]),
        "layer": [0, None],
        "value": np.array([0.5, 1.5]),
    }
    table = frame("effects", [block, block])
    record = {"experiment": "ablate", "document": 1, "layer": None, "value": 1.5}
    assert table[1].equals(frame("effects", [record]))
    assert len(table) == 4
    mixed = frame("effects", [record, block, record])
    assert mixed["document"].to_list() == [1, 3, 1, 1], "in their order"
    assert mixed[0].equals(mixed[2])
    assert frame("effects", []).schema == pl.Schema(TABLES["effects"])


def test_a_stamp_gives_what_a_block_leaves_out_and_no_more() -> None:
    stamp = {"seed": 42, "task": "piqa"}
    records: list[Block] = [{"value": 1.0}, {"value": 2.0, "seed": 7}, {"value": 3.0, "seed": None}]
    columns = {"value": np.array([4.0, 5.0]), "seed": np.array([8, 9])}
    table = frame("results", [*records, columns], stamp)
    assert table["seed"].to_list() == [42, 7, None, 8, 9]
    assert set(table["task"]) == {"piqa"}


def test_a_column_that_no_table_has_is_our_own_defect() -> None:
    for block in ({"k": 3, "value": 1.0}, {"k": np.array([3]), "value": np.array([1.0])}):
        with pytest.raises(AssertionError, match=r"unknown columns \{'k'\}"):
            frame("results", [block])


def test_a_unit_has_its_kind_layer_and_head() -> None:
    units = [Unit("head", 1, 3), Unit("ffn", 0), Unit("head", 2, 0)]
    blocks = unit_blocks(units, {"value": np.array([0.1, 0.2, 0.3])}, task="piqa", metric="acc_drop")
    table = frame("results", blocks)
    columns = ["kind", "layer", "head", "heads_removed", "ffns_removed", "value"]
    assert table.select(columns).rows() == [
        ("head", 1, 3, 1, 0, 0.1),
        ("head", 2, 0, 1, 0, 0.3),
        ("ffn", 0, None, 0, 1, 0.2),
    ]
    assert set(table["ablation"]) == {"zero"}
    assert unit_blocks([], {"value": np.array([])}) == []


def test_no_flipped_bit_of_a_table_goes_unseen(tmp_path: Path) -> None:
    columns = {"task": ["recall", None] * 30, "metric": ["acc"] * 60, "value": np.linspace(0, 1, 60)}
    table = frame("results", [columns])
    path = tmp_path / "results.parquet"
    write_table(table, "results", path)
    assert read_table(path, "results").equals(table)
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            read = read_table(path, "results")
        except InputError:
            continue
        # What says where the digest is was hit, and nothing else.
        assert read.equals(table)
    for cut in range(0, len(whole), 50):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="cannot be read as a results table"):
            read_table(path, "results")


def test_parts_are_made_once_and_broken_ones_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "run")
    made = parts.get_or_make("one", lambda draft: {"a": np.arange(3), "empty": np.empty((2, 0))})
    again = parts.get_or_make("one", lambda draft: pytest.fail("made twice"))
    assert np.array_equal(made["a"], again["a"])
    assert again["empty"].shape == (2, 0)
    assert (parts.made, parts.reused, parts.notes) == (1, 1, [])
    (tmp_path / "two.npz").write_bytes(b"no")
    assert parts.get_or_make("two", lambda draft: {"a": np.ones(1)})["a"] == 1
    assert "two.npz of the folder's parts was damaged" in parts.notes[0]
    assert (tmp_path / "two.npz.bad").read_bytes() == b"no"
    with pytest.raises(ValueError, match="pickled"):
        parts.get_or_make("three", lambda draft: {"a": np.array([{}], dtype=object)})
    assert not (tmp_path / "three.npz").exists()


def test_a_part_that_would_unpack_is_not_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "one.npz", a=np.zeros(10**6))
    with pytest.raises(InputError, match="its arrays are compressed"):
        Parts(tmp_path).read("one")


def test_a_part_in_anothers_place_is_made_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "run")
    for name in ("one", "two"):
        parts.get_or_make(name, lambda draft: {"a": np.arange(3)})
    (tmp_path / "one.npz").replace(tmp_path / "two.npz")
    assert parts.get_or_make("two", lambda draft: {"a": np.arange(4)})["a"].tolist() == [0, 1, 2, 3]
    assert Parts(tmp_path, "other run").get_or_make("two", lambda draft: {"a": np.ones(1)})["a"] == 1


@given(st.data())
def test_no_flipped_bit_of_a_part_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flips"
    parts = Parts(folder, "run")
    values = np.linspace(0, 1, 50)
    parts.get_or_make("one", lambda draft: {"a": values, "b": np.arange(4) > 1})
    path = folder / "one.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        read = parts.read("one")
    except InputError:
        pass
    else:
        # Of some bits of the archive nothing depends.
        assert np.array_equal(read["a"], values)
        assert np.array_equal(read["b"], np.arange(4) > 1)
    path.write_bytes(whole)


def test_a_part_that_is_stopped_leaves_what_it_had_and_goes_on_from_there(tmp_path: Path) -> None:
    parts, seen = Parts(tmp_path), []

    def make(draft: Draft) -> dict[str, np.ndarray]:
        values = np.full(4, np.nan)
        draft.resume(lambda: {"a": values})
        for index in np.flatnonzero(np.isnan(values)):
            seen.append(int(index))
            values[index] = index
            if len(seen) in (2, 3):
                raise KeyboardInterrupt
        return {"a": values}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            parts.get_or_make("one", make)
        assert not parts.has("one")
    assert parts.get_or_make("one", make)["a"].tolist() == [0, 1, 2, 3]
    assert seen == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"], "the draft goes when the part is whole"


def test_a_draft_of_other_shapes_is_not_used(tmp_path: Path) -> None:
    write_sealed(tmp_path / "one.draft.npz", {"a": np.ones(3)}, " one")
    values = np.zeros(2)

    def make(draft: Draft) -> dict[str, np.ndarray]:
        draft.resume(lambda: {"a": values})
        return {"a": values}

    assert Parts(tmp_path).get_or_make("one", make)["a"].tolist() == [0, 0]


scores = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 6, (3, 4)).astype(float)
)


@given(scores=scores, count=st.integers(0, 12))
def test_lowest_and_highest_share_the_heads_between_them(scores: np.ndarray, count: int) -> None:
    low, high = lowest_heads(scores, count), highest_heads(scores, 12 - count)
    assert len(low | high) == 12
    assert low & high == Mask()
    if low.heads and high.heads:
        assert max(scores[head] for head in low.heads) <= min(scores[head] for head in high.heads)


def test_ties_go_to_the_lower_unit() -> None:
    assert lowest_heads(np.zeros((2, 2)), 3).heads == {(0, 0), (0, 1), (1, 0)}
    assert lowest_ffns(np.array([1.0, 0.0, 0.0]), 1).ffns == {1}


def test_aggregates_by_hand() -> None:
    one, other = np.array([[1.0, 2.0, 3.0]]), np.array([[30.0, 10.0, 20.0]])
    np.testing.assert_allclose(mean_of_ranks([one, other]), [[0.5, 0.25, 0.75]])
    np.testing.assert_allclose(mean_of_scores([one, other]), [[15.5, 6, 11.5]])


def test_random_masks_have_their_size_and_their_seed() -> None:
    mask = random_mask(4, 8, 10, 2, seed=1)
    assert (len(mask.heads), len(mask.ffns)) == (10, 2)
    assert mask == random_mask(4, 8, 10, 2, seed=1) != random_mask(4, 8, 10, 2, seed=2)


@given(scores, scores)
def test_spearman_is_scipys(one: np.ndarray, other: np.ndarray) -> None:
    if np.ptp(one) and np.ptp(other):
        assert spearman(one.ravel(), other.ravel()) == pytest.approx(
            stats.spearmanr(one.ravel(), other.ravel())[0]
        )
    assert np.isnan(spearman(np.zeros(5), np.arange(5.0)))


def test_top_overlap_by_hand_and_under_chance() -> None:
    assert top_overlap(np.array([4.0, 3, 2, 1]), np.array([4.0, 1, 3, 2]), 0.5) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    drawn = [top_overlap(rng.normal(size=100), rng.normal(size=100), 0.3) for _ in range(300)]
    assert np.mean([overlap.value for overlap in drawn]) == pytest.approx(drawn[0].chance, abs=0.02)


def test_intervals_cover_the_mean() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        values = rng.normal(1, 2, 60)
        interval = mean_interval(values, [str(n) for n in range(60)], MEAN)
        inside += interval.low <= 1 <= interval.high
        assert interval.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(60), rel=1e-9)
    assert inside / 200 >= 0.93


def test_documents_of_a_passage_are_drawn_together() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    clusters = np.repeat([str(n) for n in range(20)], 10).tolist()
    alone = mean_interval(values, [str(n) for n in range(200)], MEAN)
    together = mean_interval(values, clusters, MEAN)
    assert together.stderr == pytest.approx(alone.stderr * np.sqrt(10), rel=0.2)
    assert np.isnan(mean_interval(values, ["one"] * 200, MEAN).stderr)


def test_the_mean_over_tasks_counts_em_as_accuracy_and_needs_all_tasks() -> None:
    def record(task: str, metric: str, value: float) -> dict[str, object]:
        return {
            "task": task,
            "metric": metric,
            "value": value,
            "stderr": 0.1,
            "chance": 0.2,
            "documents": 5,
            "shots": 0,
            "exact": True,
        }

    records = [record("a", "acc", 0.4), record("b", "em", 0.8), record("b", "f1", 0.9)]
    (mean,) = over_tasks(frame("results", records)).to_dicts()
    assert (mean["task"], mean["metric"], mean["documents"]) == ("aggregate", "acc", 10)
    assert mean["value"] == pytest.approx(0.6)
    assert mean["stderr"] == pytest.approx(np.sqrt(0.02) / 2)


@settings(max_examples=20, deadline=None)
@given(scores, scores, scores)
def test_overlap_compares_what_differs_in_one_thing(
    one: np.ndarray, two: np.ndarray, three: np.ndarray
) -> None:
    keys = [RankingKey("a", 0, "gradient"), RankingKey("b", 0, "gradient"), RankingKey("b", 1, "gradient")]
    rows = list(overlap_records(dict(zip(keys, (one, two, three), strict=True))))
    compared = {
        (row["task"], row["shots"], row["other_task"], row["other_shots"])
        for row in rows
        if row["metric"] == "top_overlap"
    }
    assert compared == {("a", 0, "b", 0), ("b", 0, "b", 1)}
