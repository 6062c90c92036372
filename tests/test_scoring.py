"""Standard errors of metrics that are no means, and files of one's own with several right options."""

import json
from pathlib import Path

import numpy as np
import pytest

from lowmem_icl.errors import InputError
from lowmem_icl.tasks.loading import Document, TaskRows, open_task
from lowmem_icl.tasks.scoring import document_scores, task_metrics, unit_accuracy


def own_file(folder: Path, rows: list[dict]) -> str:
    path = folder / "own.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def no_flags(task: TaskRows) -> list[np.ndarray]:
    return [np.zeros(len(document.gold), dtype=bool) for document in task.documents]


def test_multirc_error_is_that_of_questions_drawn_by_passage(shared_data: Path) -> None:
    task = open_task("multirc", shared_data).rows(shots=0, part="evaluate", limit=None)
    rng = np.random.default_rng(1)
    judged_right = {unit: rng.random() < 0.5 for unit in dict.fromkeys(d.unit for d in task.documents)}
    logprobs = [
        np.where(np.array(document.gold) == judged_right[document.unit], -1.0, -2.0)
        for document in task.documents
    ]
    (metric,) = task_metrics(task, logprobs, no_flags(task))
    accuracy, clusters = unit_accuracy(task, document_scores(task, logprobs, no_flags(task))["acc"])
    assert metric.value == pytest.approx(np.mean(list(judged_right.values())))
    # The slow way: draw passages again, a question as often as its passage was drawn.
    passages = [accuracy[[c == cluster for c in clusters]] for cluster in dict.fromkeys(clusters)]
    drawn = [
        np.concatenate([passages[place] for place in rng.integers(0, len(passages), len(passages))]).mean()
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
    logprobs = [np.array([-2.0, -1.0, -3.0])] * len(task.documents)
    right = [isinstance(several[document.index], list) for document in task.documents]
    (metric,) = task_metrics(task, logprobs, no_flags(task))
    assert metric.value == np.mean(right)
    assert document_scores(task, logprobs, no_flags(task))["acc"].tolist() == right


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    context = "one\u2028two\u0085three\u000bfour"
    rows = [{"context": context, "options": [" a", " b"], "gold": 0}] * 2
    task = open_task(own_file(tmp_path, rows), None).rows(shots=0, part="evaluate", limit=None)
    assert [document.options[0][0] for document in task.documents] == [context]


def test_a_single_option_has_no_chance_and_no_margin() -> None:
    """As tasks of lm-eval have it that ask for one continuation."""
    documents = tuple(Document(n, (("q", " a"),), (True,), str(n), (), str(n), 0, {}) for n in range(2))
    task = TaskRows("one", 0, "test", documents, "acc", ())
    assert task.chance == 0
    scores = document_scores(task, [np.array([-1.0])] * 2, [np.array([True]), np.array([False])])
    assert scores["acc"].tolist() == [1, 0]
    assert np.isnan(scores["margin"]).all()


def test_one_row_cannot_be_halved(tmp_path: Path) -> None:
    task = open_task(own_file(tmp_path, [{"context": "q", "options": [" a", " b"], "gold": 0}]), None)
    with pytest.raises(InputError, match="at least 2 rows"):
        task.rows(shots=0, part="train", limit=None)
