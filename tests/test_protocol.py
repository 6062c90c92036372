"""What the reference protocol does differently, and the two tasks that the paper only judged by others'
rankings.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import oracles
import polars as pl
import pytest
from commands import invoke, run_small
from conftest import reference_model
from test_engine import gradients, packed_task

from lowmem_icl.experiments.evaluate.measure import MaskScores, evaluation_records, top_answer_share
from lowmem_icl.experiments.importance.measure import importance
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.store import Store
from lowmem_icl.protocols import CORRECTED, DIFFERENCES, REFERENCE, Protocol
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.schema import read_table
from lowmem_icl.tasks.catalogue import PAPER_TASKS
from lowmem_icl.tasks.listing import known_tasks
from lowmem_icl.tasks.loading import open_task
from lowmem_icl.tasks.packing import PackingLimits, pack
from lowmem_icl.tasks.scoring import task_metrics

MATHQA = [
    {"Problem": "what is 3 + 4 ?", "Rationale": "add",
     "options": "a ) 7 , b ) 8 , c ) 1,000 , d ) 2 ( two ) , e ) none", "correct": "a",
     "annotated_formula": "add(3,4)", "linear_formula": "add(n0,n1)", "category": "general"},
    {"Problem": "a car goes 10 km in 2 hours . how fast is it ?", "Rationale": "divide",
     "options": "a ) 2 km / h , b ) 5 km / h , c ) 8 km / h , d ) 20 km / h , e ) none of these",
     "correct": "b", "annotated_formula": "divide(10,2)", "linear_formula": "divide(n0,n1)",
     "category": "physics"},
    {"Problem": "half of 6 is", "Rationale": "halve", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5",
     "correct": "c", "annotated_formula": "divide(6,2)", "linear_formula": "divide(n0,n1)",
     "category": "general"},
]  # fmt: skip
LAMBADA = [
    {"text": "the baker opened the oven and took out the bread"},
    {"text": "she looked at the sky and saw the moon"},
    {"text": "he forgot his umbrella and came home wet"},
    {"text": "the cat sat by the window and watched the birds"},
]
RECORD = [
    {"passage": "Ann met Bob in Rome.\n@highlight\nThey talked", "query": "@placeholder left early",
     "entities": ["Rome", "Bob", "Ann"], "answers": ["Bob", "Ann"]},
    {"passage": "Eve wrote to Max.\n@highlight\nMax was away", "query": "@placeholder got no answer",
     "entities": ["Max", "Eve"], "answers": ["Eve"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hand-written rows in the hub's field names."""
    folder = tmp_path_factory.mktemp("rows")
    for task, split, rows in (
        ("mathqa", "train", MATHQA), ("mathqa", "test", MATHQA[:2]), ("lambada", "validation", LAMBADA),
        ("record", "train", RECORD), ("record", "validation", RECORD),
    ):  # fmt: skip
        path = folder / task / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_mathqa_asks_the_problem_and_offers_the_choices(data: Path) -> None:
    rows = open_task("mathqa", data).rows(shots=1, part="evaluate", limit=None)
    assert (rows.split, rows.metric, len(rows.documents)) == ("test", "acc", 2)
    document = next(document for document in rows.documents if document.index == 0)
    shown = MATHQA[document.demonstrations[0]]
    answers = {"a": " 7", "b": " 5 km / h", "c": " 3"}
    context = (
        f"Question: {shown['Problem']}\nAnswer:{answers[shown['correct']]}\n\n"
        "Question: what is 3 + 4 ?\nAnswer:"
    )
    assert document.options == tuple(
        (context, choice) for choice in (" 7", " 8", " 1,000", " 2 ( two )", " none")
    )
    assert document.gold == (True, False, False, False, False)


def test_lambada_is_right_where_its_last_word_is_what_the_model_would_say(data: Path) -> None:
    task = open_task("lambada", data)
    rows = task.rows(shots=0, part="evaluate", limit=None)
    train = task.rows(shots=1, part="train", limit=None)
    assert {d.index for d in rows.documents} | {d.index for d in train.documents} == {0, 1, 2, 3}
    assert not {d.index for d in rows.documents} & {d.index for d in train.documents}
    for document in rows.documents:
        text, word = LAMBADA[document.index]["text"].rsplit(" ", 1)
        assert document.options == ((text, f" {word}"),)
    for document in train.documents:
        text, word = LAMBADA[document.index]["text"].rsplit(" ", 1)
        (shown,) = document.demonstrations
        assert document.options == ((f"{LAMBADA[shown]['text']}\n\n{text}", f" {word}"),)
    (metric,) = task_metrics(rows, np.array([-1.0, -2.0]), np.array([True, False]))
    assert (metric.metric, metric.value) == ("acc", 0.5)
    assert rows.chance == 0
    assert rows.split == "validation"


def test_lambadas_file_may_be_named_as_on_the_hub(data: Path, tmp_path: Path) -> None:
    (tmp_path / "lambada").mkdir()
    shutil.copyfile(data / "lambada" / "validation.jsonl", tmp_path / "lambada" / "test.jsonl")
    both = [
        open_task("lambada", folder).rows(shots=0, part="evaluate", limit=None, protocol=REFERENCE)
        for folder in (tmp_path, data)
    ]
    assert both[0] == both[1]
    assert (both[0].split, len(both[0].documents)) == ("validation", 4)
    (listed,) = [entry for entry in known_tasks(tmp_path) if entry["task"] == "lambada"]
    assert listed["rows"] == {"validation": 4}


def test_both_are_known_by_name() -> None:
    told = json.loads(invoke("tasks", "--json").stdout)
    kinds = {entry["task"]: entry["from"] for entry in told}
    assert kinds["mathqa"] == kinds["lambada"] == "out of domain"


def test_a_folder_need_not_hold_all_tasks(data: Path) -> None:
    told = json.loads(invoke("tasks", "--json", "--data-dir", data).stdout)
    sizes = {entry["task"]: entry["rows"] for entry in told}
    assert sizes["mathqa"] == {"train": 3, "test": 2}
    assert sizes["piqa"] == {}


def test_training_documents_come_in_file_order_and_may_show_themselves(data: Path) -> None:
    task = open_task("mathqa", data)
    corrected = task.rows(shots=2, part="train", limit=None)
    reference = task.rows(shots=2, part="train", limit=None, protocol=REFERENCE)
    assert [document.index for document in reference.documents] == [0, 1, 2]
    assert all(document.index not in document.demonstrations for document in corrected.documents)
    many = [task.rows(shots=3, part="train", limit=3, protocol=REFERENCE)]
    assert all(document.index in document.demonstrations for rows in many for document in rows.documents)
    record = open_task("record", data)
    evaluated = [
        record.rows(shots=2, part="evaluate", limit=None, protocol=protocol)
        for protocol in (CORRECTED, REFERENCE)
    ]
    assert evaluated[0].documents == evaluated[1].documents, "evaluation is the same"


def test_mathqa_shows_answers_without_their_space_and_scores_them_with_it(data: Path) -> None:
    task = open_task("mathqa", data)
    for part in ("evaluate", "train"):
        asked = [
            task.rows(shots=2, part=part, limit=None, protocol=protocol).documents
            for protocol in (REFERENCE, CORRECTED, REFERENCE)
        ]
        assert asked[0] == asked[2]
        for document in asked[0]:
            shown = [MATHQA[place] for place in document.demonstrations]
            answers = {"a": "7", "b": "5 km / h", "c": "3"}
            before = "".join(
                f"Question: {row['Problem']}\nAnswer:{answers[row['correct']]}\n\n" for row in shown
            )
            context, answer = document.options[document.gold.index(True)]
            assert context == f"{before}Question: {MATHQA[document.index]['Problem']}\nAnswer:"
            assert answer == " " + answers[MATHQA[document.index]["correct"]]
        assert all("Answer: " in document.options[0][0] for document in asked[1])


def test_a_task_of_one_split_is_ranked_and_judged_on_the_same_documents(data: Path) -> None:
    task = open_task("lambada", data)
    evaluate, train = (
        task.rows(shots=3, part=part, limit=None, protocol=REFERENCE) for part in ("evaluate", "train")
    )
    assert sorted(document.index for document in evaluate.documents) == [0, 1, 2, 3]
    assert [document.index for document in train.documents] == [0, 1, 2, 3]
    for document in (*evaluate.documents, *train.documents):
        assert {document.index, *document.demonstrations} == {0, 1, 2, 3}, "one more is drawn, itself dropped"


def test_gradients_are_of_answers_without_their_space(data: Path) -> None:
    task = open_task("mathqa", data)
    rows = task.rows(shots=0, part="train", limit=1)
    assert task.rows(shots=0, part="importance", limit=1) == rows
    (document,), (bare,) = (
        task.rows(shots=0, part=part, limit=1, protocol=REFERENCE).documents
        for part in ("train", "importance")
    )
    assert [text for _, text in bare.options] == [text[1:] for _, text in document.options]
    assert [context for context, _ in bare.options] == [context for context, _ in document.options]


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_only_five_of_the_papers_tasks_lose_the_space(shared_data: Path, task: str) -> None:
    opened = open_task(task, shared_data)
    rows, gradients = (
        opened.rows(shots=1, part=part, limit=3, protocol=REFERENCE) for part in ("train", "importance")
    )
    indices = [document.index for document in rows.documents]
    assert indices == sorted(indices)
    bare = task in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa")
    for document, differentiated in zip(rows.documents, gradients.documents, strict=True):
        expected = [(context, text[1:] if bare else text) for context, text in document.options]
        assert list(differentiated.options) == expected
        assert all(text[0] == " " for _, text in document.options)


def test_gradients_are_of_the_first_accepted_answer(data: Path) -> None:
    rows, gradients = (
        open_task("record", data).rows(shots=0, part=part, limit=None, protocol=REFERENCE)
        for part in ("train", "importance")
    )
    of_first = {document.index: document for document in gradients.documents}
    assert rows.documents[0].gold == (True, True, False)
    assert of_first[0].gold == (False, True, False), "Ann, Bob, Rome"
    assert of_first[1].gold == (True, False)


@pytest.mark.parametrize("protocol", [CORRECTED, REFERENCE], ids=lambda protocol: protocol.name)
def test_importance_equals_the_codes_formulas(
    checkpoint: Path, float_store: Store, protocol: Protocol
) -> None:
    task = packed_task(4, gold_only=True)
    result = gradients(float_store, task)
    scores = importance(task, result, last_layer_by_continuation=protocol.last_layer_by_continuation)
    examples = []
    for owner, document in enumerate(task.task.documents):
        option = task.options[int(task.first_option[owner]) + document.gold.index(True)]
        context = len(option.path) + 1 - len(option.continuation)
        examples.append((list(option.path)[:context], list(option.continuation)))
    model = reference_model(checkpoint)
    if protocol is REFERENCE:
        expected = oracles.reference_importance(model, examples)
    else:
        predictions = sum(len(context) + len(answer) - 1 for context, answer in examples)
        paths = [([*context, *answer][:-1], answer) for context, answer in examples]
        of_sums = [oracles.unit_gradients(model, path, answer)[0] / len(answer) for path, answer in paths]
        expected = np.sum(of_sums, axis=0) / predictions
    np.testing.assert_allclose(scores.gradient_heads, expected, rtol=1e-4, atol=1e-6 * expected.max())


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    result = run_small(
        folder / "run", stores, "--protocol", "reference", "--shots", 4, "--experiments", "importance,prune"
    )
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_reference_run_says_so_and_ranks_by_raw_scores(reference_run: Path) -> None:
    results = read_table(reference_run / "results.parquet", "results")
    assert set(results["protocol"]) == {"reference"}
    heads = results.filter(
        (pl.col("metric") == "gradient") & (pl.col("kind") == "head") & (pl.col("shots") == 4)
    )
    raw = heads.filter(pl.col("task") == "aggregate").sort("layer", "head")
    lowest = raw.sort("value", "layer", "head", maintain_order=True).head(16)
    mask = json.loads((reference_run / "masks" / "gradient-heads-50-aggregate-4shot.json").read_text())
    removed = {(int(layer), head) for layer, of in mask["removed"]["heads"].items() for head in of}
    assert removed == set(zip(lowest["layer"], lowest["head"], strict=True))
    page = (reference_run / "report.html").read_text()
    assert all(one.sentence.split("'")[0][:40] in page for one in DIFFERENCES)


def test_a_model_that_always_says_the_same_is_seen(data: Path) -> None:
    rows = open_task("mathqa", data).rows(shots=0, part="evaluate", limit=None)
    constant = np.array([0.0, -1, -2, -3, -4] * 2)
    assert top_answer_share(rows, constant) == 1
    assert top_answer_share(rows, np.array([0.0, -1, -2, -3, -4, -1, 0, -2, -3, -4])) == 0.5
    lambada = open_task("lambada", data).rows(shots=0, part="evaluate", limit=None)
    assert top_answer_share(lambada, np.array([-1.0, -2.0])) is None
    packed = pack(rows, lambda texts: [[3] * max(1, len(text)) for text in texts], PackingLimits(512, 128, 2))
    told = {
        row["metric"]: row["value"]
        for row in evaluation_records(packed, MaskScores("clean", Mask(), constant, np.zeros(10, dtype=bool)))
    }
    assert told["majority"] == 0.5
    assert told["acc"] == 0.5
    assert told["top_answer_share"] == 1
    both = [
        {"task": task, "metric": "majority", "value": value, "documents": 2, "exact": True}
        for task, value in (("a", 0.5), ("b", 1.0))
    ]
    (mean,) = over_tasks(frame("results", both)).to_dicts()
    assert (mean["value"], mean["stderr"], mean["low"]) == (0.75, None, None)
