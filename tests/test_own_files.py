"""Rows of one's own and folders of rows: used as they stand, and what is wrong with them is named."""

import json
import re
from pathlib import Path
from types import ModuleType

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from test_tasks import Row, own_file

from lowmem_icl.errors import InputError
from lowmem_icl.tasks import loading, prompting, sources
from lowmem_icl.tasks.loading import open_task
from lowmem_icl.tasks.row_files import count_rows

GOOD: list[Row] = [
    {"context": f"{n} plus {n} is", "options": [f" {2 * n}", " none"], "gold": 0} for n in range(9)
]


def test_a_file_of_ones_own_is_halved_and_used_as_it_stands(tmp_path: Path) -> None:
    opened = open_task(own_file(tmp_path, *GOOD), None)
    evaluate, train = (opened.rows(shots=2, part=part, limit=None) for part in ("evaluate", "train"))
    judged, trained = ({document.index for document in rows.documents} for rows in (evaluate, train))
    assert judged | trained == set(range(9))
    assert not judged & trained
    for document in (*evaluate.documents, *train.documents):
        assert set(document.demonstrations) <= trained - {document.index}
        assert document.options[0][0].endswith(GOOD[document.index]["context"])
        assert document.options[0][1] == GOOD[document.index]["options"][0]


def test_text_of_strangers_is_never_a_template(tmp_path: Path) -> None:
    text = "{{ 7 * 7 }} {% for x in y %}"
    opened = open_task(
        own_file(tmp_path, *[{"context": text, "options": [" {{a}}", " b"], "gold": 0}] * 4), None
    )
    document = opened.rows(shots=0, part="evaluate", limit=1).documents[0]
    assert document.options == ((text, " {{a}}"), (text, " b"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": 1, "options": ["a"], "gold": 0}, "'context': expected a text"),
        ({"context": "", "options": [], "gold": 0}, "'options': expected a list"),
        (
            {"context": "", "options": ["a", ""], "gold": 0},
            "'options': expected texts, none of them empty; got '' at",
        ),
        (
            {"context": "", "options": [1, "a"], "gold": 0},
            "'options': expected texts, none of them empty; got 1 at",
        ),
        ({"context": "", "options": ["a", "b"], "gold": 2}, "'gold': expected the index"),
        ({"context": "", "options": ["a", "b"], "gold": True}, "'gold': expected the index"),
        ({"context": "", "options": ["a", "b"], "gold": []}, "'gold': expected the index"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_bad_rows_of_ones_own_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_task(own_file(tmp_path, GOOD[0] if isinstance(row, list) else row, row), None)


@pytest.mark.parametrize("error", [AttributeError("ours"), TypeError("ours"), ValueError("ours")])
@pytest.mark.parametrize(
    "where", [(sources, "read_rows"), (sources, "_dataset"), (loading, "Document"), (prompting, "Prompt")]
)
def test_a_defect_of_ours_is_not_blamed_on_the_rows(
    monkeypatch: pytest.MonkeyPatch, where: tuple[ModuleType, str], error: Exception
) -> None:
    def defect(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(*where, defect)
    with pytest.raises(type(error), match="ours"):
        open_task("knowledge", None).rows(shots=1, part="evaluate", limit=1)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no net"),
        DatasetNotFoundError("no such"),
        LocalEntryNotFoundError("offline"),
        HTTPError("503"),
    ],
)
def test_a_hub_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def unreachable(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"rows could not be loaded .*; give a folder with --data-dir"):
        open_task("piqa", None)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD), encoding="utf-8-sig")
    assert len(open_task(str(path), None).rows(shots=0, part="evaluate", limit=None).documents) == 5
    assert count_rows(path) == 9


def test_a_folder_named_like_a_file_of_rows_is_called_a_folder(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").mkdir()
    with pytest.raises(InputError, match=r"own\.jsonl is a folder; expected a file of JSON lines"):
        open_task(str(tmp_path / "own.jsonl"), None)


def test_the_row_to_blame_is_named_where_a_field_changes_its_type(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}] * 7
    rows += [rows[0] | {"label": "0"}]
    for split in ("train", "validation"):
        (tmp_path / "piqa" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"train\.jsonl, row 8, field 'label', which was int before"):
        open_task("piqa", tmp_path)
    text = {"context": "\ud83d", "options": [" a", " b"], "gold": 0}
    with pytest.raises(InputError, match=r"own\.jsonl, line 1: expected texts of whole characters"):
        open_task(own_file(tmp_path, text, text), None)


def test_bad_names_files_and_sizes_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'pika'; did you mean 'piqa'"):
        open_task("pika", tmp_path)
    with pytest.raises(InputError, match=r"piqa.train\.jsonl does not exist"):
        open_task("piqa", tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        open_task(str(tmp_path / "nowhere.jsonl"), None)
    (tmp_path / "piqa").mkdir()
    good = json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 0})
    (tmp_path / "piqa" / "train.jsonl").write_text(good + "\n")
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"validation\.jsonl holds no rows"):
        open_task("piqa", tmp_path)
    (tmp_path / "piqa" / "validation.jsonl").write_text(good + "\n{broken\n")
    with pytest.raises(InputError, match="line 2: not JSON"):
        open_task("piqa", tmp_path)
    for more, said in (("NaN", "NaN is no JSON number"), ('1, "label": 0', "field 'label' is given twice")):
        line = good.replace('"label": 0', f'"label": {more}')
        (tmp_path / "piqa" / "validation.jsonl").write_text(f"{good}\n{line}\n")
        with pytest.raises(InputError, match=f"line 2: {said}"):
            open_task("piqa", tmp_path)
    (tmp_path / "piqa" / "validation.jsonl").write_text(good + '\n{"goal": "g"}\n')
    with pytest.raises(InputError, match="line 2: field 'label' is missing"):
        open_task("piqa", tmp_path)
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"question": "g"}\n')
    with pytest.raises(InputError, match="does not have the expected fields"):
        open_task("piqa", tmp_path).rows(shots=0, part="evaluate", limit=None)
    (tmp_path / "piqa" / "validation.jsonl").write_text(good + "\n")
    with pytest.raises(InputError, match="has 1 rows to draw demonstrations from, 2 are needed"):
        open_task("piqa", tmp_path).rows(shots=2, part="evaluate", limit=None)
    with pytest.raises(InputError, match="--limit: expected at least 1, or a fraction, got 0"):
        open_task("piqa", tmp_path).rows(shots=0, part="evaluate", limit=0)
