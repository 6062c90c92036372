#!/usr/bin/env python3
"""Write the word-pair tasks that come with the tool: definitions and rows, from the facts in pair_facts/.

    python scripts/make_pairs.py

Prompts have the form of Todd et al. (2024). Facts are split evenly between demonstrations and training
documents (train) and what is judged (validation). Tasks that choose an item of a list take the lists of a
split from words that the other split never uses.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lowmem_icl.tasks.catalogue import PAIR_TASKS, pair_tasks_folder
from lowmem_icl.tasks.row_files import Rows
from lowmem_icl.tasks.word_pairs import ITEM_SEPARATOR, WordPair, drawn, pair_rows, prompt_text

FACTS = Path(__file__).parent / "pair_facts"
SHARED = f"""output_type: multiple_choice
dataset_path: json
training_split: train
validation_split: validation
fewshot_split: train
doc_to_text: {json.dumps(prompt_text("{{input}}"))}
doc_to_choice: options
doc_to_target: answer
target_delimiter: " "
fewshot_delimiter: "\\n\\n"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
LISTS_A_SPLIT = 128
ITEMS_A_LIST = 5

# Tasks whose pairs are two columns of a table.
COLUMNS = {
    "country_capital": ("countries", "country", "capital"),
    "antonym": ("antonyms", "word", "opposite"),
    "singular_plural": ("nouns", "singular", "plural"),
    "present_past": ("verbs", "present", "past"),
    "present_participle": ("verbs", "present", "participle"),
    "comparative": ("adjectives", "adjective", "comparative"),
    "english_french": ("translations", "english", "french"),
    "english_spanish": ("translations", "english", "spanish"),
    "word_category": ("categories", "word", "category"),
}
# Tasks that choose, of a list's words, the only one of a kind: files of the chosen and of the others.
KINDS = {
    "animal_among_objects": ("animals", "objects"),
    "object_among_animals": ("objects", "animals"),
    "verb_among_nouns": ("verbs", "nouns"),
}
# Tasks that choose a list's item by its place.
PLACES = {"first_of_five": 0, "last_of_five": ITEMS_A_LIST - 1}


class Split(NamedTuple):
    """The pairs of a task's two splits."""

    validation: list[WordPair]
    train: list[WordPair]


def words(name: str) -> list[str]:
    """Return the words of a file of facts."""
    return (FACTS / f"{name}.txt").read_text(encoding="utf-8").split()


def columns(name: str, left: str, right: str) -> list[WordPair]:
    """Return the pairs that two columns of a table make."""
    with (FACTS / f"{name}.csv").open(encoding="utf-8", newline="") as table:
        return [WordPair(row[left], row[right]) for row in csv.DictReader(table)]


def following_items() -> list[WordPair]:
    """Return every item of the sequences with the one that follows it."""
    lines = (FACTS / "sequences.txt").read_text(encoding="utf-8").splitlines()
    sequences = [line.split(ITEM_SEPARATOR) for line in lines]
    return [WordPair(*pair) for items in sequences for pair in pairwise(items)]


def facts_of(task: str) -> list[WordPair]:
    """Return all pairs of a task that is not about lists."""
    if task == "capitalize":
        return [WordPair(word, word.capitalize()) for word in words("words")]
    if task == "first_letter":
        return [WordPair(word, word[0].upper()) for word in words("words")]
    return following_items() if task == "next_item" else columns(*COLUMNS[task])


def halves(texts: Sequence[str], task: str) -> tuple[list[str], list[str]]:
    """Return texts in the task's order, cut into validation and train."""
    order = drawn(texts, task, "splits")
    middle = (len(order) + 1) // 2
    return order[:middle], order[middle:]


def split_facts(task: str) -> Split:
    """Return the facts of a task, half of them for either split."""
    by_input = {pair.input: pair for pair in facts_of(task)}
    validation, train = halves(list(by_input), task)
    return Split([by_input[text] for text in validation], [by_input[text] for text in train])


def lists(task: str, chosen: Sequence[str], others: Sequence[str]) -> list[WordPair]:
    """Return lists of one chosen word and four others; at the task's place, or else at each place in turn."""
    pairs: list[WordPair] = []
    for number in range(LISTS_A_SPLIT):
        word = chosen[number % len(chosen)]
        items = drawn([other for other in others if other != word], task, str(number))[: ITEMS_A_LIST - 1]
        # Options go round with the row's number (pair_rows); the places in lists must not go with them.
        items.insert(PLACES.get(task, number // ITEMS_A_LIST % ITEMS_A_LIST), word)
        pairs.append(WordPair(ITEM_SEPARATOR.join(items), word))
    return pairs


def split_lists(task: str) -> Split:
    """Return the lists of a task; no word is in lists of both splits."""
    chosen, others = KINDS.get(task, ("words", "words"))
    by_split = zip(halves(words(chosen), task), halves(words(others), task), strict=True)
    return Split(*(lists(task, *of_split) for of_split in by_split))


def task_rows(task: str) -> tuple[Rows, Rows]:
    """Return (train, validation); wrong options are drawn from the answers of both."""
    split = split_lists(task) if task in KINDS or task in PLACES else split_facts(task)
    rows = pair_rows([*split.validation, *split.train])
    return rows[len(split.validation) :], rows[: len(split.validation)]


def write_task(out: Path, task: str) -> None:
    """Write one task: its YAML and its two splits as JSON lines."""
    (out / f"{task}.yaml").write_text(f"task: {task}\ninclude: _pairs.yaml\n", encoding="utf-8")
    (out / task).mkdir(exist_ok=True)
    for split, rows in zip(("train", "validation"), task_rows(task), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Write all word-pair tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=pair_tasks_folder())
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "_pairs.yaml").write_text(SHARED, encoding="utf-8")
    for task in PAIR_TASKS:
        write_task(out, task)


if __name__ == "__main__":
    main()
