"""Claims about single units against scipy and simulation; in-context effects by hand."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats

from lowmem_icl.experiments.ablate.claims import (
    LISTED_COUNTS,
    ExactDrops,
    claim_blocks,
    listed_top_records,
    top_drop_records,
)
from lowmem_icl.experiments.ablate.differences import drop_differences, in_context_blocks, label_blocks
from lowmem_icl.masks.mask import Unit
from lowmem_icl.report.numbers import TOP_UNITS
from lowmem_icl.statistics.intervals import MEAN, mean_intervals
from lowmem_icl.statistics.selection import alternate_halves, top_mean
from lowmem_icl.statistics.significance import q_values, sign_counts
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.blocks import Block, frame
from lowmem_icl.tasks.loading import Document, TaskRows

UNITS = [Unit("head", 0, 0), Unit("head", 0, 1), Unit("ffn", 0)]


def alone(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def task_rows(
    task: str,
    shots: int,
    indices: list[int],
    units: list[str] | None = None,
    clusters: list[str] | None = None,
) -> TaskRows:
    """A task's documents at these indices of its split."""
    own: list[str] = [f"0:{index}" for index in indices]
    documents = tuple(
        Document(
            index,
            ((f"question {index}", " answer"),),
            (True,),
            cluster,
            (),
            unit,
            0,
            {},
        )
        for index, unit, cluster in zip(indices, units or own, clusters or own, strict=True)
    )
    return TaskRows(task, shots, "train", documents, "acc", ())


def drops_of(task: TaskRows, gold: np.ndarray, indices: list[int] | None = None) -> ExactDrops:
    """The drops of a task in which every document is scored alone."""
    at = np.arange(len(gold)) if indices is None else np.array(indices)
    return ExactDrops(task, at, gold, np.sign(gold), list(task.clusters))


def test_q_values_are_scipys() -> None:
    values = np.random.default_rng(0).normal(0.2, 1, (40, 12))
    values[:, 3] = 0
    counts = sign_counts(values, alone(12))
    tested = [
        stats.binomtest(int((row > 0).sum()), int((row != 0).sum()), alternative="two-sided").pvalue
        for row in values
    ]
    np.testing.assert_allclose(q_values(counts), stats.false_discovery_control(tested))
    nothing = sign_counts(np.zeros((2, 4)), alone(4))
    assert q_values(nothing).tolist() == [1, 1]


def test_a_cluster_counts_once_by_what_most_of_its_documents_do() -> None:
    values = np.array([[1.0, 2, -9, 1, -1, 0], [-1, 0, 0, 0, 0, 3], [1, 1, 1, -1, -1, -1]])
    counts = sign_counts(values, ["a", "a", "a", "b", "b", "c"])
    assert counts.hurt.tolist() == [1, 1, 1]
    assert counts.helped.tolist() == [0, 1, 2]


def test_documents_that_repeat_a_passage_add_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(5, 8))
    once, five_times = (
        (
            mean_intervals(np.repeat(values, times, axis=1), np.repeat(alone(8), times).tolist(), MEAN),
            sign_counts(np.repeat(values, times, axis=1), np.repeat(alone(8), times).tolist()),
        )
        for times in (1, 5)
    )
    np.testing.assert_allclose(once[0], five_times[0])
    np.testing.assert_array_equal(once[1], five_times[1])
    assert np.isnan(mean_intervals(values, ["one"] * 8, MEAN).stderr).all()
    assert q_values(sign_counts(values, ["one"] * 8)).tolist() == [1] * 5, "one cluster claims nothing"


def test_equal_drops_of_a_few_documents_are_no_certainty() -> None:
    # All four documents lose the same: 2 · 0.5⁴.
    assert q_values(sign_counts(np.full((1, 4), 0.5), alone(4))).tolist() == [0.125]


def test_what_scores_cannot_tell_apart_is_no_difference() -> None:
    rounding = drops_of(task_rows("a", 1, [0, 1, 2]), np.array([[1e-4, -1e-4, 2e-4]]))
    signs = rounding.signed()["gold_logprob_drop"].signs
    assert (signs.hurt.tolist(), signs.helped.tolist()) == ([1], [0])


def counted(blocks: list[Block], task: str) -> dict[str, list[float]]:
    """What is counted and claimed of a task's units, by metric."""
    found: dict[str, list[float]] = {}
    for block in blocks:
        if block["task"] == task:
            found.setdefault(block["metric"], []).extend(np.asarray(block["value"]).tolist())
    return found


def test_of_all_tasks_documents_are_added_up_over_those_that_have_the_unit() -> None:
    rows = [task_rows(task, 1, list(range(5))) for task in ("a", "b")]
    one, other = np.ones((2, 5)), np.array([[-1.0, 1, 1, 1, 0], [-1, -1, -1, -1, -1]])
    blocks = claim_blocks(UNITS, [drops_of(rows[0], one, [0, 2]), drops_of(rows[1], other, [0, 1])])
    of_all = counted(blocks, "aggregate")
    # L0H0 is in both tasks, L0H1 in the second, the FFN in the first.
    assert of_all["documents_hurt"] == [5 + 3, 0, 5]
    assert of_all["documents_helped"] == [1, 5, 0]
    expected = stats.false_discovery_control(
        [stats.binomtest(hurt, both).pvalue for hurt, both in ((8, 9), (0, 5), (5, 5))]
    )
    np.testing.assert_allclose(of_all["q_value"], expected)
    assert counted(blocks, "a")["documents_hurt"] == [5, 5]
    assert {block["documents"] for block in blocks if block["task"] == "aggregate"} == {10}


def test_the_best_units_are_no_better_than_others_where_all_are_the_same() -> None:
    rng = np.random.default_rng(0)
    naive, honest, covered = [], [], []
    for _ in range(100):
        values = rng.normal(0.1, 1, (200, 20))
        naive.append(np.sort(values.mean(1))[-3:].mean())
        found = top_mean([values], [alone(20)], 3)
        honest.append(found.value)
        covered.append(found.low <= 0.1 <= found.high)
    assert np.mean(naive) > 0.5, "what choosing and judging on the same documents says"
    assert np.mean(honest) == pytest.approx(0.1, abs=4 * float(np.std(honest)) / 10)
    assert np.mean(covered) >= 0.85


def test_units_that_do_matter_are_found_and_judged() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.5, (50, 20))
    values[[3, 7, 11]] += 2
    found = top_mean([values], [alone(20)], 3)
    assert found.value == pytest.approx(values[[3, 7, 11]].mean())


def test_halves_hold_whole_passages() -> None:
    assert alternate_halves(["a", "b", "a", "c", "b"]).tolist() == [True, False, True, True, False]


def test_top_drops_by_hand() -> None:
    gold = np.array([[4.0, 0, 4, 0], [1, 2, 1, 2], [9, 9, 9, 9]])
    rows = list(top_drop_records(UNITS, drops_of(task_rows("a", 1, [0, 1, 2, 3]), gold)))
    # Documents 0 and 2 choose head 0, by which 1 and 3 lose nothing; these choose head 1, by which 0 and 2
    # lose 1.
    assert [(row["procedure"], row["kind"], row["count"], row["value"]) for row in rows] == [
        ("top", "head", 1, 0.5),
        ("top", "ffn", 1, 9),
    ]
    assert not list(top_drop_records(UNITS, drops_of(task_rows("a", 1, [0]), gold[:, :1])))


def test_lists_of_the_costliest_are_judged_by_documents_that_did_not_pick_them() -> None:
    units = [Unit("head", 0, number) for number in range(3)] + [Unit("ffn", 0)]
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(4, 6)), rng.normal(size=(4, 8))
    drops = [
        drops_of(task_rows("a", 1, list(range(6))), one),
        drops_of(task_rows("b", 1, list(range(8))), other),
    ]
    rows = {(row["task"], row["count"]): row for row in listed_top_records(units, drops)}
    assert set(rows) == {("a", 3), ("b", 3), ("aggregate", 3)}, "there are no five"
    halves = []
    for picking, judging in ((0, 1), (1, 0)):
        picked = np.argsort(-(one[:, picking::2].mean(1) + other[:, picking::2].mean(1)))[:3]
        halves.append([values[picked][:, judging::2].mean() for values in (one, other)])
    aggregate = rows["aggregate", 3]
    assert aggregate["value"] == pytest.approx(np.mean(halves))
    assert (aggregate["documents"], aggregate.get("kind")) == (14, None)
    screened = [drops_of(task_rows("a", 1, list(range(6))), one[:2], [0, 1])]
    assert not list(listed_top_records(units, screened))


def test_no_more_is_promised_of_the_mean_over_tasks_where_all_units_are_the_same() -> None:
    rng = np.random.default_rng(0)
    honest = [
        top_mean([rng.normal(0.1, 1, (200, 16)) for _ in range(3)], [alone(16)] * 3, 5).value
        for _ in range(100)
    ]
    assert np.mean(honest) == pytest.approx(0.1, abs=4 * float(np.std(honest)) / 10)


def test_every_list_of_the_costliest_has_its_judgement() -> None:
    assert TOP_UNITS in LISTED_COUNTS


def test_in_context_effects_by_hand() -> None:
    shown = drops_of(task_rows("a", 4, [5, 2, 9]), np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]))
    without = drops_of(task_rows("a", 0, [9, 5, 7]), np.array([[0.5, 0, 100], [9, 0, 100]]), [0, 2])
    effect = drop_differences(shown, without)
    assert effect is not None
    # Units 0 and 2 and documents 5 and 9 are in both.
    assert effect.indices.tolist() == [0, 2]
    np.testing.assert_allclose(effect.gold, np.array([[1 - 0, 3 - 0.5], [7 - 0, 9 - 9]]))
    np.testing.assert_allclose(effect.accuracy, [[1, 0], [1, 0]])
    assert effect.clusters == ["0:5", "0:9"]
    heads, ffns, *_ = in_context_blocks(UNITS, [effect])
    assert (heads["metric"], heads["task"], heads["shots"], heads["other_shots"]) == ("icl_effect", "a", 4, 0)
    assert heads["procedure"] == ffns["procedure"] == "icl-effect"
    assert (heads["value"], ffns["value"]) == (pytest.approx([1.75]), pytest.approx([3.5]))
    assert heads["documents"] == 2
    assert drop_differences(shown, drops_of(task_rows("a", 0, [1]), np.zeros((3, 1)))) is None


def test_every_metric_has_q_values_of_its_own() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(0.5, 1, (3, 8)) for name in ("gold", "gold_prob", "margin")}
    accuracy = np.sign(rng.normal(size=(3, 4)).round())

    def of(task: str, **others: np.ndarray) -> ExactDrops:
        rows = task_rows(task, 1, list(range(8)))
        return ExactDrops(rows, np.arange(3), scores["gold"], accuracy, alone(4), others)

    both = {"gold_prob": scores["gold_prob"], "margin": scores["margin"]}
    blocks = claim_blocks(UNITS, [of("a", **both), of("b", **both)])
    found = counted(blocks, "a")
    for metric, values in {
        "q_value": scores["gold"], "gold_prob_drop_q_value": scores["gold_prob"],
        "margin_drop_q_value": scores["margin"], "acc_drop_q_value": accuracy,
    }.items():  # fmt: skip
        signs = sign_counts(values, alone(values.shape[1]))
        np.testing.assert_allclose(found[metric], q_values(signs))
        twice = q_values(type(signs)(2 * signs.hurt, 2 * signs.helped))
        np.testing.assert_allclose(counted(blocks, "aggregate")[metric], twice)
    assert set(found) == {
        "q_value", "gold_prob_drop_q_value", "margin_drop_q_value", "acc_drop_q_value", "documents_hurt",
        "documents_helped",
    }  # fmt: skip
    # A margin that one task lacks (its documents have one option) has none over all tasks.
    lacking = claim_blocks(UNITS, [of("a", **both), of("b", gold_prob=scores["gold_prob"])])
    assert "margin_drop_q_value" not in counted(lacking, "aggregate")
    assert "margin_drop_q_value" in counted(lacking, "a")


def test_label_effects_are_of_the_same_documents_and_say_what_they_are_compared_with() -> None:
    rows = task_rows("a", 4, [5, 2, 9])
    right = drops_of(rows, np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]))
    shuffled = drops_of(replace(rows, labels="shuffled"), np.array([[1.0, 0, 0], [4, 5, 6], [0, 0, 0]]))
    effect = drop_differences(right, shuffled)
    assert effect is not None
    blocks = label_blocks(UNITS, [effect])
    in_nats = [block for block in blocks if block["metric"] == "label_effect"]
    assert np.concatenate([block["value"] for block in in_nats]) == pytest.approx([5 / 3, 0, 8])
    assert {
        (block["procedure"], block["labels"], block["shots"], block["documents"]) for block in blocks
    } == {("label-effect", "shuffled", 4, 3)}
    assert {block["metric"] for block in blocks} == {
        "label_effect", "label_effect_acc", "label_effect_q_value", "label_effect_acc_q_value",
    }  # fmt: skip
    # Two, none and three documents lose more with right labels: 2 · 0.5², 1 and 2 · 0.5³.
    claimed = counted(blocks, "a")["label_effect_q_value"]
    np.testing.assert_allclose(claimed, stats.false_discovery_control([0.5, 1, 0.25]))


def test_a_question_counts_as_a_whole_in_both() -> None:
    def of(shots: int, rows: list[int], questions: list[str], accuracy: list[float]) -> ExactDrops:
        task = task_rows("a", shots, rows, questions, ["passage"] * len(rows))
        return ExactDrops(
            task, np.array([0]), np.zeros((1, len(rows))), np.array([accuracy]), ["passage"] * len(accuracy)
        )

    effect = drop_differences(
        of(1, [0, 1, 2], ["q0", "q0", "q1"], [1.0, 0.5]), of(0, [2, 0, 1], ["q1", "q0", "q0"], [0.25, 0])
    )
    assert effect is not None
    assert effect.accuracy.tolist() == [[1.0, 0.25]]
    assert effect.gold.shape == (1, 3)


def test_the_mean_over_tasks_leaves_out_what_is_out_of_domain() -> None:
    rng = np.random.default_rng(0)
    tasks = ("piqa", "copa", "lambada")
    both = [
        [drops_of(task_rows(task, shots, list(range(6))), rng.normal(size=(3, 6))) for task in tasks]
        for shots in (0, 2)
    ]
    effects = [drop_differences(shown, without) for without, shown in zip(*both, strict=True)]
    blocks = in_context_blocks(UNITS, [effect for effect in effects if effect is not None])
    own = [block for block in blocks if block["task"] != "aggregate"]
    heads = frame("results", [block for block in own if block["kind"] == "head"])
    mean = over_tasks(heads).filter(pl.col("metric") == "icl_effect")
    assert set(mean["task"]) == {"aggregate"}
    of_tasks = [
        heads.filter((pl.col("task") == task) & (pl.col("metric") == "icl_effect"))
        for task in ("piqa", "copa")
    ]
    np.testing.assert_allclose(mean["value"], np.mean([rows["value"] for rows in of_tasks], axis=0))
    np.testing.assert_allclose(
        mean["stderr"], np.sqrt(np.square([rows["stderr"] for rows in of_tasks]).sum(0)) / 2
    )
    assert (set(mean["documents"]), set(mean["other_shots"]), set(mean["shots"])) == ({12}, {0}, {2})
    # Of what a task is compared with, itself without demonstrations, the mean has no task.
    assert set(mean["other_task"]) == {None}
    claims = claim_blocks(UNITS, [drops for of_shots in both for drops in of_shots])
    assert {(block["task"], block["shots"]) for block in claims} == {
        (task, shots) for task in (*tasks, "aggregate") for shots in (0, 2)
    }
    by_kind = {
        block["kind"]: block["value"]
        for block in claims
        if (block["task"], block["shots"], block["metric"]) == ("piqa", 0, "q_value")
    }
    together = q_values(sign_counts(both[0][0].gold, alone(6)))
    np.testing.assert_allclose(np.concatenate([by_kind["head"], by_kind["ffn"]]), together)
