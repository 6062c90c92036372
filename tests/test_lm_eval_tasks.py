"""Tasks of lm-evaluation-harness as they stand, from definitions on disk, beside what it makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from test_tasks import own_file

from lowmem_icl.errors import InputError
from lowmem_icl.experiments.evaluate.measure import MaskScores, drop_records, evaluation_records
from lowmem_icl.masks.mask import Mask
from lowmem_icl.options import RunOptions
from lowmem_icl.session.document_limits import check_objective
from lowmem_icl.tasks import harness, sources
from lowmem_icl.tasks.harness import expanded_names, harness_tasks
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.packing import PackingLimits, pack
from lowmem_icl.tasks.scoring import document_scores, task_metrics

SENTENCES = [{"text": f"the {n} cats and the {n} dogs ran home"} for n in range(90)]
QUESTIONS = [
    {"question": f"{n} plus {n}", "choices": [str(2 * n), str(n - 3), "none"], "answer": 0} for n in range(12)
]
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
SUMS = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def definitions(folder: Path) -> list[dict[str, object]]:
    def rows(name: str, values: list[dict[str, object]]) -> dict[str, object]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
        }

    words, sums = rows("words", SENTENCES), rows("sums", QUESTIONS)  # type: ignore[arg-type]
    nowhere = {"dataset_path": "nowhere/at-all", "test_split": "test"}
    return [
        {"task": "last_word", **words, **LAST_WORD},
        {"task": "sums", **sums, **SUMS, "tag": "counting"},
        {"task": "sums_told", **sums, **SUMS, "description": "Add.\n\n", "tag": "counting"},
        {"task": "essay", **nowhere, "output_type": "generate_until"},
        {"task": "silent", **nowhere},
        {"task": "rolling", **nowhere, "output_type": "loglikelihood_rolling"},
        {"task": "unconditional", **sums, **SUMS, "metric_list": [{"metric": "acc_mutual_info"}]},
        {"task": "training", **sums, **SUMS, "test_split": None, "training_split": "test"},
        {"group": "inner", "task": ["sums_told", {"task": "sums", "num_fewshot": 3, "task_alias": "s"}]},
        {"group": "outer", "task": ["last_word", "inner", "counting"], "aggregate_metric_list": []},
        {"group": "loud", "task": ["inner", {"task": "shouted", **sums, **SUMS}], "description": "HEAR.\n\n"},
        {"group": "mixed", "task": ["sums", "essay"]},
        {"group": "long", "task": [{"group": "part", "task": [{"task": "sums", "description": "D: "}]}]},
    ]


@pytest.fixture(autouse=True)
def local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """The harness with our own definitions in place of its thousands."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, fields in enumerate(definitions(tmp_path)):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(fields))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for module in (harness, sources):
        monkeypatch.setattr(module, "task_manager", lambda: manager)
    return manager


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sums", ["sums"]),
        ("inner", ["sums_told", "sums"]),
        ("counting", ["sums", "sums_told"]),
        ("outer", ["last_word", "sums_told", "sums"]),
        ("loud", ["loud::sums_told", "loud::sums", "loud::shouted"]),
        ("loud::sums", ["loud::sums"]),
        ("long", ["long::part::sums"]),
        ("long::part::sums", ["long::part::sums"]),
    ],
)
def test_groups_and_tags_stand_for_their_tasks_each_once(name: str, expected: list[str]) -> None:
    assert [task.name for task in harness_tasks(f"lm-eval:{name}")] == [f"lm-eval:{one}" for one in expected]


@pytest.mark.parametrize("name", ["sums", "inner", "outer", "loud", "long", "counting"])
def test_a_groups_tasks_are_those_that_the_harness_loads(name: str, local_tasks: TaskManager) -> None:
    theirs = local_tasks.load([name])["tasks"]
    ours = [open_task(task.name, None) for task in harness_tasks(f"lm-eval:{name}")]
    assert len(ours) == len(theirs)
    for opened, their in zip(ours, theirs.values(), strict=True):
        their.set_config(key="num_fewshot", value=0)
        their.build_all_requests(limit=None, rank=0, world_size=1)
        expected: dict[int, list[tuple[str, str]]] = {}
        for instance in their.instances:
            expected.setdefault(instance.doc_id, []).append(instance.args)
        documents = [
            document
            for part in ("evaluate", "train")
            for document in opened.rows(shots=0, part=part, limit=None).documents
        ]
        assert {document.index: list(document.options) for document in documents} == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("essay", "lm-eval:essay is scored by generate_until; expected multiple_choice or loglikelihood"),
        ("silent", "lm-eval:silent is scored by generate_until; expected"),
        ("rolling", "lm-eval:rolling is scored by loglikelihood_rolling; expected"),
        ("mixed", r"1 of the 2 tasks of lm-eval:mixed are scored by generate_until \(lm-eval:essay\)"),
        ("unconditional", "lm-eval:unconditional asks for acc_mutual_info"),
        ("training", "must have valid or test docs"),
        ("summs", "lm-eval knows no task 'summs'; did you mean 'sums'"),
        ("inner::essay", "lm-eval's group 'inner' has no task for 'inner::essay'"),
        (
            "outer",
            "lm-eval:outer stands for 3 tasks of lm-eval; name one: lm-eval:last_word, lm-eval:sums_told",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(name: str, message: str) -> None:
    """Before rows are fetched: those of `nowhere` cannot be."""
    with pytest.raises(InputError, match=message):
        open_task(f"lm-eval:{name}", None)


def test_a_list_of_tasks_is_expanded_in_place_and_names_none_twice() -> None:
    names = ("lm-eval:counting", "recall", "lm-eval:last_word")
    assert expanded_names(names) == ("lm-eval:sums", "lm-eval:sums_told", "recall", "lm-eval:last_word")
    with pytest.raises(
        InputError, match="'lm-eval:sums_told' is listed twice, by lm-eval:counting and by lm-eval:inner"
    ):
        expanded_names(("lm-eval:counting", "lm-eval:inner"))


def scored(opened: OpenTask) -> tuple[MaskScores, MaskScores]:
    rows = opened.rows(shots=0, part="evaluate", limit=None)
    logprobs = -0.5 - np.arange(len(rows.documents)) / 7
    greedy = np.arange(len(rows.documents)) % 3 == 0
    return MaskScores("clean", Mask(), logprobs, greedy), MaskScores("less", Mask(), logprobs - 1, ~greedy)


def test_one_continuation_is_scored_by_what_the_model_would_say(local_tasks: TaskManager) -> None:
    opened = open_task("lm-eval:last_word", None)
    assert not opened.has_alternatives
    rows = opened.rows(shots=0, part="evaluate", limit=None)
    assert rows.chance == 0
    clean, less = scored(opened)
    metrics = {metric.metric: metric for metric in task_metrics(rows, clean.logprobs, clean.greedy)}
    task = local_tasks.load(["last_word"])["tasks"]["last_word"]
    found = [
        task.process_results(document.row, [(logprob, flag)])
        for document, logprob, flag in zip(rows.documents, clean.logprobs, clean.greedy, strict=True)
    ]
    for name, aggregate in task.aggregation().items():
        assert metrics[name].value == pytest.approx(aggregate([values[name] for values in found]))
    assert np.isnan(metrics["perplexity"].low), "no share, and no mean"
    # The delta method: the logarithm of a perplexity is minus a mean.
    spread = clean.logprobs.std(ddof=1) / np.sqrt(len(clean.logprobs)) * metrics["perplexity"].value
    assert metrics["perplexity"].stderr == pytest.approx(spread, rel=0.05)
    assert np.isnan(document_scores(rows, clean.logprobs, clean.greedy)["gold_prob"]).all()
    packed = pack(rows, lambda texts: [[3] * max(1, len(text)) for text in texts], PackingLimits(512, 128, 2))
    records = {record["metric"] for record in evaluation_records(packed, clean)}
    assert records == {"acc", "perplexity", "gold_logprob", "majority"}
    drops = {record["metric"]: record["value"] for record in drop_records(packed, clean, less)}
    assert drops == {"acc_drop": pytest.approx(np.mean(clean.greedy * 2.0 - 1)), "gold_logprob_drop": 1}


def test_own_rows_may_have_one_option_each(tmp_path: Path) -> None:
    rows = [{"context": f"{n} cats and {n}", "options": [" dogs"], "gold": 0} for n in range(6)]
    opened = open_task(own_file(tmp_path, *rows), None)
    assert not opened.has_alternatives
    documents = opened.rows(shots=1, part="evaluate", limit=None).documents
    for document in documents:
        (shown,) = document.demonstrations
        context = f"{shown} cats and {shown} dogs\n\n{document.index} cats and {document.index}"
        assert (document.options, document.gold) == (((context, " dogs"),), (True,))
    clean, _ = scored(opened)
    (metric,) = task_metrics(opened.rows(shots=0, part="evaluate", limit=None), clean.logprobs, clean.greedy)
    assert (metric.metric, metric.value) == ("acc", clean.greedy.mean())
    with pytest.raises(InputError, match="row 7: 'options': expected one in every row of a file or several"):
        open_task(own_file(tmp_path, *rows, {"context": "c", "options": [" a", " b"], "gold": 0}), None)


@pytest.mark.parametrize("experiments", ["prune", "evaluate"])
@pytest.mark.parametrize("objective", ["gold_prob", "gold_logprob", "acc"])
def test_a_search_cannot_keep_the_share_of_an_only_option(experiments: str, objective: str) -> None:
    options = RunOptions.model_validate({"experiments": experiments, "objective": objective})
    tasks = [open_task("lm-eval:sums", None), open_task("lm-eval:last_word", None)]
    check_objective(options, tasks[:1])
    if (experiments, objective) == ("prune", "gold_prob"):
        with pytest.raises(
            InputError, match=r"lm-eval:last_word have one option each.*--objective gold_logprob"
        ):
            check_objective(options, tasks)
    else:
        check_objective(options, tasks)
