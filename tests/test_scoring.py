"""Standard errors of metrics that are no means, and files of one's own with several right options."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from lowmem_icl.errors import InputError
from lowmem_icl.tasks.loading import Document, TaskRows, open_task
from lowmem_icl.tasks.scoring import document_scores, task_metrics, unit_accuracy


def own_file(folder: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path = folder / "own.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def no_flags(task: TaskRows) -> np.ndarray:
    return np.zeros(sum(len(document.gold) for document in task.documents), dtype=bool)


def test_multirc_error_is_that_of_questions_drawn_by_passage(shared_data: Path) -> None:
    task = open_task("multirc", shared_data).rows(shots=0, part="evaluate", limit=None)
    rng = np.random.default_rng(1)
    judged_right = {unit: rng.random() < 0.5 for unit in dict.fromkeys(d.unit for d in task.documents)}
    logprobs = np.concatenate(
        [
            np.where(np.array(document.gold) == judged_right[document.unit], -1.0, -2.0)
            for document in task.documents
        ]
    )
    (metric,) = task_metrics(task, logprobs, no_flags(task))
    accuracy, clusters = unit_accuracy(task, document_scores(task, logprobs, no_flags(task))["acc"])
    assert metric.value == pytest.approx(np.mean(list(judged_right.values())))
    # The slow way: draw passages again, a question as often as its passage was drawn.
    passages = [accuracy[[c == cluster for c in clusters]] for cluster in dict.fromkeys(clusters)]
    drawn = [
        np.concatenate([passages[index] for index in rng.integers(0, len(passages), len(passages))]).mean()
        for _ in range(2000)
    ]
    assert metric.stderr == pytest.approx(np.std(drawn), rel=0.1)


@pytest.mark.parametrize("several_first", [True, False])
def test_rows_with_one_and_with_several_right_options_mix(tmp_path: Path, several_first: bool) -> None:
    several = [[0, 1] if (place % 2 == 0) == several_first else 0 for place in range(8)]
    rows = [
        {"context": f"q{n}", "options": [" a", " b", " c"], "gold": gold} for n, gold in enumerate(several)
    ]
    task = open_task(own_file(tmp_path, rows), None).rows(shots=1, part="evaluate", limit=None)
    for document in task.documents:
        (shown,) = document.demonstrations
        assert document.options[0] == (f"q{shown} a\n\nq{document.index}", " a")
    logprobs = np.tile([-2.0, -1.0, -3.0], len(task.documents))
    right = [isinstance(several[document.index], list) for document in task.documents]
    (metric,) = task_metrics(task, logprobs, no_flags(task))
    assert metric.value == np.mean(right)
    assert document_scores(task, logprobs, no_flags(task))["acc"].tolist() == right


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    context = "one\u2028two\u0085three\u000bfour"
    rows = [{"context": context, "options": [" a", " b"], "gold": 0}] * 2
    task = open_task(own_file(tmp_path, rows), None).rows(shots=0, part="evaluate", limit=None)
    assert [document.options[0][0] for document in task.documents] == [context]


def test_a_single_option_has_no_chance_no_margin_and_no_share() -> None:
    """As tasks of lm-eval have it that ask for one continuation."""
    documents = tuple(Document(n, (("q", " a"),), (True,), str(n), (), str(n), 0, {}) for n in range(2))
    task = TaskRows("one", 0, "test", documents, "acc", ())
    assert task.chance == 0
    scores = document_scores(task, np.array([-1.0, -1.0]), np.array([True, False]))
    assert scores["acc"].tolist() == [1, 0]
    assert np.isnan(scores["margin"]).all()
    assert np.isnan(scores["gold_prob"]).all()


def test_one_row_cannot_be_halved(tmp_path: Path) -> None:
    task = open_task(own_file(tmp_path, [{"context": "q", "options": [" a", " b"], "gold": 0}]), None)
    with pytest.raises(InputError, match="at least 2 rows"):
        task.rows(shots=0, part="train", limit=None)


def test_scores_of_many_masks_equal_those_of_each_document_alone() -> None:
    rng = np.random.default_rng(3)
    counts = [2, 4, 1, 3, 2]
    gold = [tuple(bool(flag) for flag in rng.random(count) < 0.4) for count in counts]
    gold = [flags if any(flags) else (True, *flags[1:]) for flags in gold]
    documents = tuple(
        Document(n, (("q", " a"),) * len(flags), flags, str(n), (), str(n), 0, {})
        for n, flags in enumerate(gold)
    )
    task = TaskRows("several", 0, "test", documents, "acc", ())
    # Few different values, so that ties are met.
    logprobs, greedy = rng.integers(-3, 0, (6, 12)).astype(float), rng.random((6, 12)) < 0.5
    scores = document_scores(task, logprobs, greedy)
    for mask in range(6):
        start = 0
        for index, flags in enumerate(gold):
            values, here = logprobs[mask, start : start + len(flags)], np.array(flags)
            best = int(np.argmax(values))
            right = greedy[mask, start] if len(flags) == 1 else flags[best]
            weights = np.exp(values)
            assert scores["acc"][mask, index] == right
            assert scores["gold_logprob"][mask, index] == values[here].max()
            share = weights[here].sum() / weights.sum() if len(flags) > 1 else np.nan
            assert scores["gold_prob"][mask, index] == pytest.approx(share, nan_ok=True)
            if here.all():
                assert np.isnan(scores["margin"][mask, index])
            else:
                assert scores["margin"][mask, index] == values[here].max() - values[~here].max()
            start += len(flags)
