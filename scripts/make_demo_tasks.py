"""Write the demo's tasks: lm-eval YAML and JSON lines, the same on every machine.

    python scripts/make_demo_tasks.py [--out lowmem_icl/demo/tasks]

`recall` and `category` are groups: every member fixes one drawing of answers that training never saw, and the
rotations of a drawing's answers make its other members, so that without demonstrations every answer is right
equally often and chance is exact.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from demo_language import (
    CATEGORIES,
    CLASSES,
    HELD_OUT_LABELS,
    HELD_OUT_NAMES,
    HELD_OUT_VALUES,
)

ROWS_A_MEMBER = 64
COPIES_IN_TRAINING = 8

SHARED = """\
output_type: multiple_choice
dataset_path: json
training_split: train
validation_split: validation
fewshot_split: train
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
fewshot_delimiter: "\\n"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

Rows = list[dict[str, Any]]


def rows_of(pairs: list[tuple[str, str]], choices: list[str]) -> Rows:
    """Turn (text, answer) pairs into rows that keep one order of choices."""
    return [{"text": text, "choices": choices, "answer": choices.index(answer)} for text, answer in pairs]


def rotations(answers: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield all rotations of a tuple, itself first."""
    for shift in range(len(answers)):
        yield answers[shift:] + answers[:shift]


def recall_members(rng: np.random.Generator) -> Iterator[tuple[Rows, Rows]]:
    """Yield (train, validation) a drawing of names and rotation of its values."""
    for names, values in zip(HELD_OUT_NAMES, HELD_OUT_VALUES, strict=True):
        asked = [names[int(index)] for index in rng.integers(0, len(names), ROWS_A_MEMBER)]
        for rotated in rotations(values):
            value_of = {name: rotated[index % len(rotated)] for index, name in enumerate(names)}
            train = [(name, value_of[name]) for name in names] * COPIES_IN_TRAINING
            validation = [(name, value_of[name]) for name in asked]
            yield rows_of(train, list(values)), rows_of(validation, list(values))


def category_members(rng: np.random.Generator) -> Iterator[tuple[Rows, Rows]]:
    """Yield (train, validation) a drawing of labels and rotation; any word may be shown and any asked."""
    words = [(word, number) for number, members in enumerate(CATEGORIES.values()) for word in members]
    for labels in HELD_OUT_LABELS:
        chosen = [words[int(index)] for index in rng.integers(0, len(words), ROWS_A_MEMBER)]
        for rotated in rotations(labels):
            train = [(word, rotated[number]) for word, number in words] * 2
            validation = [(word, rotated[number]) for word, number in chosen]
            yield rows_of(train, list(labels)), rows_of(validation, list(labels))


def knowledge_rows(rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Return (train, validation): every word with its class, asked eight times under other demonstrations."""
    pairs = [(word, name) for name, members in CLASSES.items() for word in members]
    mixed = [pairs[int(index)] for index in rng.permutation(len(pairs) * 8) % len(pairs)]
    return rows_of(pairs, list(CLASSES)), rows_of(mixed, list(CLASSES))


def repeat_rows(rng: np.random.Generator, count: int) -> Rows:
    """Return rows of distinct words, two of which come again; the choices are words of the row."""
    words = [word for members in CATEGORIES.values() for word in members]
    rows = []
    for _ in range(count):
        row = [words[int(place)] for place in rng.permutation(len(words))[:7]]
        at = int(rng.integers(1, 5))
        others = [word for word in row if word not in (row[at], row[at + 1], row[at + 2])]
        choices = [row[at + 2], *(str(word) for word in rng.permutation(others)[:3])]
        order = [choices[int(place)] for place in rng.permutation(4)]
        text = " ".join([*row, row[at], row[at + 1]])
        rows.append({"text": text, "choices": order, "answer": order.index(row[at + 2])})
    return rows


def write_rows(folder: Path, train: Rows, validation: Rows) -> None:
    """Write a task's two splits as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", validation)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_task(out: Path, name: str, train: Rows, validation: Rows) -> None:
    """Write one task: its YAML and its rows."""
    (out / f"{name}.yaml").write_text(f"task: {name}\ninclude: _demo.yaml\n", encoding="utf-8")
    write_rows(out / name, train, validation)


def write_group(out: Path, group: str, members: Iterator[tuple[Rows, Rows]]) -> None:
    """Write a group's members and the YAML that lists them."""
    names = []
    for number, (train, validation) in enumerate(members):
        names.append(f"{group}_{number}")
        write_task(out, names[-1], train, validation)
    listed = "".join(f"  - {name}\n" for name in names)
    weighted = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (out / f"{group}.yaml").write_text(f"group: {group}\ntask:\n{listed}{weighted}", encoding="utf-8")


def main() -> None:
    """Write all tasks of the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "lowmem_icl" / "demo" / "tasks"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "_demo.yaml").write_text(SHARED, encoding="utf-8")
    rng = np.random.default_rng(42)
    write_group(out, "recall", recall_members(rng))
    write_group(out, "category", category_members(rng))
    write_task(out, "knowledge", *knowledge_rows(rng))
    write_task(out, "repeat", repeat_rows(rng, 128), repeat_rows(rng, 128))


if __name__ == "__main__":
    main()
