"""Word pairs: chance is exact, splits share nothing, facts agree with others', files of pairs are read."""

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from conftest import SHARED

from lowmem_icl.errors import InputError
from lowmem_icl.options import run_options
from lowmem_icl.session.prepare import open_tasks
from lowmem_icl.tasks.catalogue import COLLECTIONS, PAIR_TASKS, expanded, pair_tasks_folder
from lowmem_icl.tasks.loading import open_task

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
OF_LISTS = ("first_of_five", "last_of_five", "animal_among_objects", "object_among_animals",
            "verb_among_nouns")  # fmt: skip
MAX_BUNDLED_BYTES = 1_500_000
CAPITALS = [
    {"input": "France", "output": "Paris"},
    {"input": "Spain", "output": "Madrid"},
    {"input": "Italy", "output": "Rome"},
    {"input": "Peru", "output": "Lima"},
    {"input": "Cuba", "output": "Havana"},
    {"input": "Japan", "output": "Tokyo"},
    {"input": "Egypt", "output": "Cairo"},
]


def bundled_rows(task: str, split: str) -> list[Row]:
    text = (pair_tasks_folder() / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def all_rows(task: str) -> list[Row]:
    return bundled_rows(task, "train") + bundled_rows(task, "validation")


def pair_file(folder: Path, entries: object) -> str:
    path = folder / "own.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return str(path)


def shared_pairs(name: str) -> Path:
    path = SHARED / "pairs" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the word pairs of Todd et al. are not at {path.parent}")
    return path


def test_the_committed_tasks_are_what_the_script_writes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_pairs.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, timeout=120)
    ours, made = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (pair_tasks_folder(), tmp_path)
    )
    assert ours == made
    assert sum(map(len, ours.values())) < MAX_BUNDLED_BYTES
    assert {path.parts[0] for path in ours if len(path.parts) > 1} == set(PAIR_TASKS)


@pytest.mark.parametrize("task", PAIR_TASKS)
def test_chance_is_one_in_five_and_splits_share_no_input(task: str) -> None:
    rows = all_rows(task)
    answers = {row["output"] for row in rows}
    right: dict[str, set[str]] = {}
    for row in rows:
        right.setdefault(row["input"], set()).add(row["output"])
    for row in rows:
        assert len(set(row["options"])) == len(row["options"]) == 5
        assert row["options"][row["answer"]] == row["output"]
        assert right[row["input"]] == {row["output"]}
        items = set(row["input"].split(", "))
        assert set(row["options"]) == items if task in OF_LISTS else set(row["options"]) <= answers
    assert len(right) == len(rows) >= 150
    for split in ("train", "validation"):
        places = Counter(row["answer"] for row in bundled_rows(task, split))
        assert max(places.values()) - min(places.values()) <= 1
    assert len(bundled_rows(task, "validation")) >= 64
    documents = open_task(task, None).rows(shots=0, part="evaluate", limit=None)
    assert documents.chance == pytest.approx(0.2)
    assert documents.majority == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("task", OF_LISTS)
def test_lists_of_the_two_splits_share_no_word(task: str) -> None:
    train, validation = (
        {word for row in bundled_rows(task, split) for word in row["options"]}
        for split in ("train", "validation")
    )
    assert not train & validation


@pytest.mark.parametrize("task", ["animal_among_objects", "object_among_animals", "verb_among_nouns"])
def test_neither_a_place_in_the_list_nor_an_option_gives_the_only_one_of_its_kind_away(task: str) -> None:
    rows = all_rows(task)
    both = Counter((row["input"].split(", ").index(row["output"]), row["answer"]) for row in rows)
    assert len(both) == 25
    assert max(both.values()) <= 0.06 * len(rows)


@pytest.mark.parametrize(("task", "times"), [("first_letter", 10), ("word_category", 14)])
def test_answers_to_many_inputs_are_right_equally_often(task: str, times: int) -> None:
    assert set(Counter(row["output"] for row in all_rows(task)).values()) == {times}


@pytest.mark.parametrize(("chosen", "others"), [("animals", "objects"), ("verbs", "nouns")])
def test_no_word_is_of_both_kinds(chosen: str, others: str) -> None:
    facts = ROOT / "scripts" / "pair_facts"
    of_kind = [(facts / f"{name}.txt").read_text(encoding="utf-8").split() for name in (chosen, others)]
    assert len({*of_kind[0], *of_kind[1]}) == len(of_kind[0]) + len(of_kind[1])


@pytest.mark.parametrize("task", ["antonym", "country_capital", "english_french", "english_spanish"])
def test_no_word_is_on_either_side_twice(task: str) -> None:
    rows = all_rows(task)
    assert len({row["input"] for row in rows}) == len({row["output"] for row in rows}) == len(rows)
    assert not {row["input"] for row in rows} & {row["output"] for row in rows}


def test_tables_of_facts_have_neither_gaps_nor_stray_spaces() -> None:
    for path in (ROOT / "scripts" / "pair_facts").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as table:
            lines = list(csv.reader(table))
        for line in lines:
            assert len(line) == len(lines[0]), (path.name, line)
            assert line[0] not in line[1:], (path.name, line)
            assert all(text and text == text.strip() for text in line), (path.name, line)


@pytest.mark.parametrize(
    ("task", "theirs", "agreeing"),
    [
        ("country_capital", "country-capital", 0.93),  # the rest is spelling: Kyiv, Bogota, Saint George's
        ("antonym", "antonym", 0.85),  # the rest has two right answers: reward, punish or punishment
        ("singular_plural", "singular-plural", 1),
        ("present_past", "present-past", 1),
        ("english_french", "english-french", 0.95),  # cœur, coeur; work is travailler or travail
        ("next_item", "next_item", 1),
    ],
)
def test_facts_agree_with_those_of_todd_et_al(task: str, theirs: str, agreeing: float) -> None:
    right: dict[str, set[str]] = {}
    for entry in json.loads(shared_pairs(theirs).read_text(encoding="utf-8")):
        right.setdefault(entry["input"], set()).add(entry["output"])
    known = [row for row in all_rows(task) if row["input"] in right]
    assert len(known) > 50
    assert sum(row["output"] in right[row["input"]] for row in known) >= agreeing * len(known)
    for row in known:
        assert not (set(row["options"]) - {row["output"]}) & right[row["input"]]


def test_prompts_have_the_form_of_todd_et_al() -> None:
    rows = open_task("antonym", None).rows(shots=2, part="evaluate", limit=4)
    scored, shown = bundled_rows("antonym", "validation"), bundled_rows("antonym", "train")
    for document in rows.documents:
        one, other = (shown[index] for index in document.demonstrations)
        row = scored[document.index]
        context = (
            f"Q: {one['input']}\nA: {one['output']}\n\nQ: {other['input']}\nA: {other['output']}\n\n"
            f"Q: {row['input']}\nA:"
        )
        assert document.options == tuple((context, f" {option}") for option in row["options"])
        assert document.gold.index(True) == row["answer"]


def test_pairs_stands_for_its_tasks_one_by_one() -> None:
    assert expanded(["copa", "pairs"]) == ("copa", *PAIR_TASKS)
    opened = open_tasks(run_options({"tasks": "pairs,recall"}))
    assert [task.name for task in opened] == [*PAIR_TASKS, "recall"]
    assert len(PAIR_TASKS) >= 10
    refused = invoke("plan", "--tasks", "antonym,pairs")
    assert refused.exit_code == 2
    assert "'antonym' is listed twice" in refused.stderr
    with pytest.raises(InputError, match="unknown task 'pair'; did you mean 'pairs'"):
        open_task("pair", None)
    assert set(COLLECTIONS) == {"pairs"}


def test_the_tasks_are_listed_with_their_sizes() -> None:
    listed = {entry["task"]: entry for entry in json.loads(invoke("tasks", "--json").stdout)}
    for task in PAIR_TASKS:
        assert listed[task]["from"] == "pairs"
        assert listed[task]["rows"] == {
            split: len(bundled_rows(task, split)) for split in ("train", "validation")
        }


def test_a_file_of_pairs_is_halved_and_asked_like_the_bundled_ones(tmp_path: Path) -> None:
    opened = open_task(pair_file(tmp_path, [*CAPITALS, CAPITALS[0]]), None)
    evaluate, train = (opened.rows(shots=1, part=part, limit=None) for part in ("evaluate", "train"))
    judged, trained = ({document.index for document in rows.documents} for rows in (evaluate, train))
    assert judged | trained == set(range(7))
    assert not judged & trained
    for document in evaluate.documents:
        (shown,) = document.demonstrations
        before = f"Q: {CAPITALS[shown]['input']}\nA: {CAPITALS[shown]['output']}\n\n"
        asked = CAPITALS[document.index]
        assert {context for context, _ in document.options} == {f"{before}Q: {asked['input']}\nA:"}
        texts = [text for _, text in document.options]
        assert len(set(texts)) == 5
        assert set(texts) <= {f" {pair['output']}" for pair in CAPITALS}
        assert [text for text, gold in zip(texts, document.gold, strict=True) if gold] == [
            f" {asked['output']}"
        ]
        assert document.gold.index(True) == document.index % 5


def test_few_answers_make_fewer_options_and_a_second_right_answer_is_none(tmp_path: Path) -> None:
    outputs = ["guitar", "piano", "guitar", "drums"]
    entries = [{"input": f"player {n}", "output": output} for n, output in enumerate(outputs)]
    entries.append({"input": "player 0", "output": "drums"})
    rows = open_task(pair_file(tmp_path, entries), None).rows(shots=0, part="evaluate", limit=None)
    train = open_task(pair_file(tmp_path, entries), None).rows(shots=0, part="train", limit=None)
    for document in (*rows.documents, *train.documents):
        options = {text.strip() for _, text in document.options}
        if entries[document.index]["input"] == "player 0":
            assert options == {entries[document.index]["output"], "piano"}
        else:
            assert options == {"guitar", "piano", "drums"}


def test_lists_are_asked_with_their_items(tmp_path: Path) -> None:
    entries = [
        {"input": "cat, beef, tomato", "output": "cat"},
        {"input": "ink, walrus, rock", "output": "walrus"},
    ]
    (document,) = (
        open_task(pair_file(tmp_path, entries), None).rows(shots=0, part="evaluate", limit=None).documents
    )
    assert {text.strip() for _, text in document.options} == set(entries[document.index]["input"].split(", "))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"input": "a", "output": "b"}, "own.json: expected a list of pairs"),
        ([], "expected a list of pairs"),
        ([CAPITALS[0], ["Spain", "Madrid"]], 'entry 2: expected {"input": ..., "output": ...}, got list'),
        ([CAPITALS[0], {"input": "Spain"}], "entry 2: 'output': expected a text that is not empty, got None"),
        ([{"input": 3, "output": "4"}], "entry 1: 'input': expected a text that is not empty, got 3"),
        ([{"input": "a", "output": " "}], "entry 1: 'output': expected a text that is not empty, got ' '"),
        ([CAPITALS[0], {"input": "Gaul", "output": "Paris"}], "entry 1: no other entry has a different"),
    ],
)
def test_what_is_wrong_with_a_file_of_pairs_is_named(tmp_path: Path, entries: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_task(pair_file(tmp_path, entries), None)


def test_a_file_that_is_no_json_list_or_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    with pytest.raises(InputError, match=r"own\.json does not exist"):
        open_task(str(path), None)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in CAPITALS))
    with pytest.raises(InputError, match=r"own\.json: not JSON .*; name a file of JSON lines \.jsonl"):
        open_task(str(path), None)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"own\.json is a folder; expected a file of word pairs"):
        open_task(str(path), None)


@pytest.mark.parametrize(
    ("name", "options"),
    [("country-capital", 5), ("choose_first_of_5", 5), ("animal_v_object_3", 3), ("person-instrument", 4)],
)
def test_files_of_todd_et_al_are_read(name: str, options: int) -> None:
    path = shared_pairs(name)
    outputs = {(entry["input"], entry["output"]) for entry in json.loads(path.read_text(encoding="utf-8"))}
    rows = open_task(str(path), None).rows(shots=0, part="evaluate", limit=None)
    assert len(rows.documents) == (len(outputs) + 1) // 2
    assert rows.chance == pytest.approx(1 / options, abs=0.01)
    for document in rows.documents:
        context, answer = document.options[document.gold.index(True)]
        assert (context.removeprefix("Q: ").removesuffix("\nA:"), answer.strip()) in outputs
