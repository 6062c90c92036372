"""The answer of a run: every sentence by hand, and none of them where there is nothing to say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from conftest import make_checkpoint

from lowmem_icl.masks.files import MaskFile, MaskModel
from lowmem_icl.masks.mask import Mask, all_heads
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.answer import Answer, answer
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.mask_table import Judging, mask_table
from lowmem_icl.tables.unit_table import unit_table

DEMO = Path(__file__).parents[1] / "lowmem_icl" / "demo"
Row = dict[str, Any]
LAYERS, HEADS = 2, 8
JUDGING = Judging(LAYERS, HEADS, "gold_prob", 0.01)
MODEL = MaskModel(id="demo", model_type="opt", layers=LAYERS, heads=HEADS, digest="0")
EVERY_HEAD = frozenset((unit.layer, int(unit.head or 0)) for unit in all_heads(LAYERS, HEADS))


def record(**options: Any) -> Row:
    """As much of a run.json as an answer reads."""
    return {
        "state": "finished",
        "model": {"layers": LAYERS, "heads": HEADS},
        "options": {"protocol": "corrected", "tolerance": 0.01, "objective": "gold_prob"} | options,
        "warnings": [],
    }


def clean(task: str, value: float, low: float, high: float, shots: int = 4) -> list[Row]:
    base = {"experiment": "evaluate", "task": task, "shots": shots, "mask": "clean", "split": "test"}
    return [
        base | {"metric": "acc", "value": value, "low": low, "high": high, "chance": 0.5} | {"documents": 64},
        base | {"metric": "majority", "value": 0.5},
    ]


def greedy(
    task: str, value: float, loss: tuple[float, float | None, float | None], shots: int = 4, **more: Any
) -> list[Row]:
    """A greedy mask on its own task: accuracy and loss with its bounds."""
    base = {
        "experiment": "prune", "procedure": "greedy", "method": "greedy", "task": task, "shots": shots,
        "mask": f"greedy-{task}-{shots}shot", "mask_task": task, "mask_shots": shots, "split": "test",
        "documents": 64, "heads_removed": 14, "ffns_removed": 1,
    } | more  # fmt: skip
    lost, low, high = loss
    return [
        base | {"metric": "acc", "value": value},
        base | {"metric": "gold_prob_drop", "value": lost, "low": low, "high": high},
    ]


def removed_but(*kept: tuple[int, int], ffns: tuple[int, ...] = ()) -> Mask:
    return Mask(EVERY_HEAD - set(kept), frozenset(range(LAYERS)) - set(ffns))


def answer_of(rows: list[Row], masks: Mapping[str, Mask] | None = None, **options: Any) -> Answer:
    results = frame("results", rows)
    files = {name: MaskFile(name, mask, MODEL, {}) for name, mask in (masks or {}).items()}
    table = mask_table(results, files, JUDGING)
    return answer(results, unit_table(results, table), table, record(**options))


HOLDS, FAILS, UNTOLD = (0.001, -0.01, 0.005), (0.05, 0.02, 0.08), (0.008, -0.01, 0.02)
KEPT = removed_but((0, 0), (1, 3), ffns=(0,))
REMOVED = {"heads_removed": 14, "ffns_removed": 1}
DRAWS = [f"induction-random-{number}" for number in range(5)]


def test_the_smallest_circuit_is_told_by_name_beside_clean_and_random() -> None:
    random = greedy("recall", 0.25, HOLDS, method="random", mask="random-recall-4shot")
    rows = [*clean("recall", 0.9, 0.8, 0.95), *greedy("recall", 0.875, HOLDS), *random]
    found = answer_of(rows, {"greedy-recall-4shot": KEPT})
    assert found.sentences[0] == (
        "The smallest circuit that keeps a task: recall, 4 shots: L0H0 L1H3 and FFN 0 suffice: accuracy "
        "0.875 (clean 0.900, random mask of equal size 0.250)."
    )
    assert found.sentences[1] == (
        "What can go: in the only setting above chance greedy masks are shown to lose at most 0.01 of "
        "gold_prob; they remove 88 % of the heads and 50 % of the FFNs together; the paper removed 70 % of "
        "OPT-66B's heads and 20 % of its FFNs with little loss."
    )


def test_a_task_that_demonstrations_teach_comes_before_a_smaller_circuit() -> None:
    rows = [
        *clean("recall", 0.5, 0.4, 0.6, shots=0), *clean("recall", 0.9, 0.8, 0.95),
        *clean("known", 1.0, 0.9, 1.0), *clean("known", 1.0, 0.9, 1.0, shots=0),
        *greedy("recall", 0.875, HOLDS), *greedy("known", 1.0, HOLDS, heads_removed=16, ffns_removed=1),
    ]  # fmt: skip
    first = answer_of(rows, {"greedy-recall-4shot": KEPT}).sentences[0]
    assert first.startswith(
        "The smallest circuit that keeps a task learnt from demonstrations: recall, 4 shots:"
    )


@pytest.mark.parametrize(
    ("mask", "heads", "ffns", "text"),
    [
        (removed_but(), 16, 2, "no head and no FFN is needed: accuracy"),
        (removed_but((1, 2)), 15, 2, "L1H2 suffices: accuracy"),
        (removed_but(ffns=(0, 1)), 16, 0, "FFNs 0 1 suffice: accuracy"),
        (Mask(), 0, 0, "No unit can go within the tolerance of 0.01."),
        (Mask(heads=frozenset({(0, 1)})), 1, 0, "15 of 16 heads and 2 of 2 FFNs suffice: accuracy"),
    ],
)
def test_whatever_is_kept_can_be_said(mask: Mask, heads: int, ffns: int, text: str) -> None:
    rows = [
        *clean("recall", 0.9, 0.8, 0.95),
        *greedy("recall", 0.875, HOLDS, heads_removed=heads, ffns_removed=ffns),
    ]
    assert text in answer_of(rows, {"greedy-recall-4shot": mask}).sentences[0]


def test_of_many_kept_units_the_costliest_are_named_and_estimates_are_said() -> None:
    drops = [
        {
            "experiment": "ablate", "metric": "gold_logprob_drop", "task": "recall", "shots": 4,
            "kind": "head",
            "layer": layer, "head": head, "value": layer + head / 8, "exact": (layer, head) != (1, 7),
        }
        for layer, head in sorted(EVERY_HEAD)
    ]  # fmt: skip
    rows = [
        *clean("recall", 0.9, 0.8, 0.95),
        *greedy("recall", 0.9, HOLDS, heads_removed=1, ffns_removed=0),
    ]
    found = answer_of([*rows, *drops], {"greedy-recall-4shot": Mask(heads=frozenset({(1, 6)}))})
    assert "FFNs (costliest alone: L1H7 L1H5 L1H4 L1H3 L1H2, some by estimate) suffice" in found.sentences[0]
    assert any("estimates to first order" in note for note in found.notes)
    assert ("drops measured exactly", "93.8 %", "warning") in {
        (chip.label, chip.value, chip.level) for chip in found.chips
    }


def test_a_tolerance_that_is_not_shown_to_hold_is_not_told_as_if_it_were() -> None:
    rows = [
        *clean("recall", 0.9, 0.8, 0.95), *clean("copa", 0.9, 0.8, 0.95),
        *greedy("recall", 0.875, UNTOLD), *greedy("copa", 0.75, FAILS),
    ]  # fmt: skip
    circuit, removable, accuracy = answer_of(rows, {"greedy-recall-4shot": KEPT}).sentences
    assert circuit == (
        "No greedy mask is shown to keep the tolerance of 0.01 on new documents: it fails in 1 of 2 settings "
        "above chance and the documents cannot tell in 1 of 2 settings above chance. Closest is recall, 4 "
        "shots: with L0H0 L1H3 and FFN 0 kept, accuracy is 0.875 (clean 0.900), losing 0.008 [-0.010, 0.020] "
        "of gold_prob."
    )
    assert removable.startswith(
        "What can go is not settled: greedy masks remove 88 % of the heads and 50 % of"
    )
    assert accuracy == "The clean model is above chance in 2 of 2 settings."
    unknown = answer_of([*clean("recall", 0.9, 0.8, 0.95), *greedy("recall", 0.875, (0.0, None, None))])
    assert "the documents cannot tell in the only setting" in unknown.sentences[0]


def test_where_everything_is_at_chance_that_is_the_only_sentence() -> None:
    rows = [*clean("recall", 0.5, 0.4, 0.6), *greedy("recall", 0.5, HOLDS), *removal("recall", 0.5, 0.5, 0.0)]
    found = answer_of(rows, {"greedy-recall-4shot": KEPT})
    assert len(found.sentences) == 1
    assert found.sentences[0].startswith("The clean model is at chance in the only setting")
    assert "1 of 1" in {chip.value for chip in found.chips}


def test_where_nothing_was_evaluated_nobody_knows_what_is_at_chance() -> None:
    drop = {
        "experiment": "ablate", "procedure": "single", "metric": "gold_logprob_drop", "method": "ablation",
        "task": "recall", "shots": 4, "kind": "head", "layer": 0, "head": 1, "value": 0.5, "exact": True,
    }  # fmt: skip
    found = answer_of([drop])
    assert ("settings at chance", "0 of 1, 1 unknown", "warning") in {
        (chip.label, chip.value, chip.level) for chip in found.chips
    }
    assert any("was not evaluated" in note for note in found.notes)


def test_what_is_at_chance_has_no_part_in_any_sentence() -> None:
    rows = [
        *clean("recall", 0.9, 0.8, 0.95), *clean("copa", 0.55, 0.45, 0.65),
        *greedy("recall", 0.875, HOLDS), *greedy("copa", 0.5, HOLDS, heads_removed=16, ffns_removed=2),
        *removal("recall", 0.9, 0.25, 0.125), *removal("copa", 0.5, 0.5, 0.0),
        *removal(AGGREGATE, 0.7, 0.375, 0.0625),
    ]  # fmt: skip
    found = answer_of(rows, {"greedy-recall-4shot": KEPT})
    assert "recall, 4 shots" in found.sentences[0]
    assert "takes the accuracy of recall at 4 shots from 0.900 to 0.250" in found.sentences[1]
    assert "cost 0.125" in found.sentences[1]
    assert "copa" not in "".join(found.sentences)
    assert (
        "1 of 2 settings is at chance and left out of these sentences and their means: copa, 4 shots."
        in found.notes
    )


def removal(task: str, before: float, after: float, random: float, shots: int = 4) -> list[Row]:
    """Two induction heads removed, and five draws of as many others."""
    base = {"experiment": "induction", "procedure": "removal", "task": task, "shots": shots, "documents": 9}
    out = base | {"method": "induction", "mask": "induction-heads", "heads_removed": 2, "ffns_removed": 0}
    draws = [
        base | {"method": "random", "mask": name, "metric": "acc_drop", "value": random} for name in DRAWS
    ]
    return [
        base | {"mask": "clean", "metric": "acc", "value": before},
        out | {"metric": "acc", "value": after, "low": after - 0.125, "high": after + 0.125},
        out | {"metric": "acc_drop", "value": before - after},
        *draws,
    ]


def test_without_searches_knees_say_what_can_go() -> None:
    def knee(metric: str, value: float, kind: str, **removed: int) -> Row:
        base = {"experiment": "prune", "procedure": f"curve-{kind}s", "task": "recall", "shots": 4}
        method = "gradient" if kind == "head" else "ablation"
        return base | {"metric": metric, "value": value, "kind": kind, "method": method, **removed}

    rows = [
        *clean("recall", 0.9, 0.8, 0.95),
        knee("knee", 50, "head", heads_removed=8), knee("knee_certain", 10, "head", heads_removed=1),
        # Of two FFNs, 70 % are one.
        knee("knee", 70, "ffn", ffns_removed=1),
    ]  # fmt: skip
    assert (
        answer_of(rows)
        .sentences[0]
        .startswith(
            "What can go: in the only setting above chance, by a task's own ranking, the last level that "
            "costs at most one point of accuracy lies at 6 to 50 % of the heads and 50 % of the FFNs, each "
        )
    )


def test_given_masks_are_told_by_what_they_cost_the_cheapest_first() -> None:
    def given(task: str, value: float, name: str = "own") -> Row:
        base = {"experiment": "evaluate", "mask": name, "task": task, "shots": 4, "split": "test"}
        more = {"metric": "acc", "value": value, "low": value, "high": value, "documents": 64}
        return base | more | {"heads_removed": 14, "ffns_removed": 1}

    drop = given("recall", 0.025) | {"metric": "acc_drop", "low": -0.004, "high": 0.05}
    one = [*clean("recall", 0.9, 0.8, 0.95), given("recall", 0.875), drop]
    assert answer_of(one, {"own": KEPT}).sentences == (
        "own (14 heads and 1 FFN removed) costs 0.03 [0.00, 0.05] of accuracy in recall, 4 shots.",
    )
    two = [*one, *clean("copa", 0.8, 0.7, 0.9), given("copa", 0.5), given("copa", 0.7, "small")]
    assert answer_of(two, {"own": KEPT, "small": KEPT}).sentences == (
        "small (14 heads and 1 FFN removed, the same as own) costs 0.10 of accuracy in copa, 4 shots.",
        "own (14 heads and 1 FFN removed) costs 0.03 (recall, 4 shots) to 0.30 (copa, 4 shots) of accuracy "
        "in 2 settings above chance.",
    )


def test_a_run_of_nothing_has_no_sentence_and_says_its_protocol_and_ablation() -> None:
    found = answer_of([], protocol="reference", ablation="mean")
    assert found.sentences == ()
    chips = {chip.label: chip.value for chip in found.chips}
    assert chips["protocol"] == "reference"
    assert chips["in removed units' place"] == "their mean output"
    assert any(note.startswith("Protocol reference:") for note in found.notes)


def test_of_a_random_model_nothing_is_said_but_that_it_guesses(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "random", vocab_size=528, max_position_embeddings=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((DEMO / name).read_bytes())
    printed = invoke(
        "run", "--model", model, "--store-dir", tmp_path / "stores", "--out", tmp_path / "run", "--quiet",
        "--tasks", "recall,knowledge", "--shots", 4, "--limit", 16, "--train-limit", 8,
        "--experiments", "evaluate,importance,ablate,prune",
    )  # fmt: skip
    assert printed.exit_code == 0, printed.output
    said = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    (sentence,) = said["answer"]["sentences"]
    assert sentence.startswith("The clean model is at chance in all 2 settings")
    assert said["headline_units"] == []
    text = " ".join(printed.stdout.split())
    assert sentence in text
    assert "matter" not in text.replace(sentence, "")
    assert "11H 3F" not in text
    # The last line holds the folder's name.
    assert max(map(len, printed.stdout.splitlines()[:-1])) <= 80
