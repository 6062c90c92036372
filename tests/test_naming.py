"""Names of files are one to one with tasks, bounded and legal, whatever the tasks are called."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, MaskModel, read_mask, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import LONGEST_NAME, check_names, mask_name, task_slug
from lowmem_icl.protocols import OUT_OF_DOMAIN_TASKS
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tasks.catalogue import DEMO_TASKS, PAIR_TASKS, PAPER_TASKS

LONGEST_METHOD = "combined-heads-100-ffns-100"
MODEL = MaskModel(id="made", model_type="opt", layers=1, heads=1, digest="d")
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=400)


@pytest.mark.parametrize("task", [*PAPER_TASKS, *DEMO_TASKS, *PAIR_TASKS, *OUT_OF_DOMAIN_TASKS, "aggregate"])
def test_plain_tasks_keep_their_names(task: str) -> None:
    assert mask_name("greedy", task, 16) == f"greedy-{task}-16shot"


def test_other_names_stay_readable() -> None:
    assert task_slug("lm-eval:foo").startswith("lm-eval-foo-")
    assert task_slug("rows/mine.jsonl").startswith("rows-mine.jsonl-")
    assert task_slug("x/" * 300 + "mine.jsonl").count("mine.jsonl-") == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("данные.jsonl", "数据.jsonl"),
        ("a/b.jsonl", "a-b.jsonl"),
        ("a b.jsonl", "a  b.jsonl"),
        ("/a.jsonl", "a.jsonl"),
        ("A.jsonl", "a.jsonl"),
        ("x" * 300 + "/a.jsonl", "y" * 300 + "/a.jsonl"),
        ("lm-eval:foo", "lm-eval-foo"),
        ("…", "unnamed"),
    ],
)
def test_two_tasks_never_share_a_file(left: str, right: str) -> None:
    assert mask_name("greedy", left, 0).casefold() != mask_name("greedy", right, 0).casefold()


def test_a_task_cannot_pass_for_another_tasks_method_or_slug() -> None:
    assert mask_name("gradient", "heads-10-foo", 4) != mask_name("gradient-heads-10", "foo", 4)
    assert task_slug(task_slug("a/b.jsonl")) != task_slug("a/b.jsonl")
    digest = task_slug("a/b.jsonl")[-8:]
    assert mask_name("greedy", digest, 0) != f"greedy-{digest}-0shot"


@given(left=names, right=names)
def test_names_are_one_to_one_and_fit(left: str, right: str) -> None:
    assert (task_slug(left).casefold() == task_slug(right).casefold()) == (left == right)
    assert len(mask_name(LONGEST_METHOD, left, 1000)) <= LONGEST_NAME


@given(task=names)
def test_every_mask_can_be_written_and_read_back(tmp_path_factory: pytest.TempPathFactory, task: str) -> None:
    name = mask_name(LONGEST_METHOD, task, 1000)
    path = tmp_path_factory.mktemp("masks") / f"{name}.json"
    write_mask(path, MaskFile(name, Mask(), MODEL, {"method": "greedy", "tasks": [task]}))
    assert read_mask(path).made["tasks"] == [task]
    assert os.listdir(path.parent) == [f"{name}.json"]


def test_a_file_of_the_longest_legal_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".html")
    write_text_atomic(path, "page")
    assert path.read_text() == "page"


def test_names_are_settled_before_the_first_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    check_names(["recall", "данные.jsonl", "数据.jsonl", "a/b.jsonl", "a-b.jsonl"], ["some-mask"])
    with pytest.raises(InputError, match="mean over tasks"):
        check_names(["aggregate"])
    with pytest.raises(InputError, match="not UTF-8"):
        check_names(["\udcff.jsonl"])
    with pytest.raises(InputError, match="rename the mask"):
        check_names(["recall"], ["clean"])
    monkeypatch.setattr("lowmem_icl.masks.naming.task_slug", lambda task: "same")
    with pytest.raises(InputError, match="'recall' and 'copa' would get one name"):
        check_names(["recall", "copa"])
