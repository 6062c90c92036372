"""The tasks that the tool knows by name, from the YAML of their definitions alone, without lm-eval."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import OUT_OF_DOMAIN_TASKS

PAPER_TASKS = (
    "hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq", "cb", "copa",
    "wic", "wsc", "multirc", "rte", "record",
)  # fmt: skip
DEMO_TASKS = ("recall", "category", "knowledge", "repeat")
PAIR_TASKS = (
    "country_capital", "antonym", "singular_plural", "present_past", "present_participle", "comparative",
    "english_french", "english_spanish", "word_category", "capitalize", "first_letter", "next_item",
    "first_of_five", "last_of_five", "animal_among_objects", "object_among_animals", "verb_among_nouns",
)  # fmt: skip
# Word pairs that a model of a few hundred million parameters learns from demonstrations, by much.
LEARNT_PAIR_TASKS = ("next_item", "english_french")
KNOWN_TASKS = (*PAPER_TASKS, *OUT_OF_DOMAIN_TASKS, *DEMO_TASKS, *PAIR_TASKS)
# Names that stand for several tasks, each of which is a task of its own in every table.
COLLECTIONS = {"pairs": PAIR_TASKS}
HARNESS_PREFIX = "lm-eval:"
ROWS_SUFFIX, PAIRS_SUFFIX = ".jsonl", ".json"
SPLITS = ("train", "validation", "test")

Definition = Mapping[str, Any]


def definitions_folder() -> Path:
    """Folder of the paper's task definitions."""
    return Path(str(files("lowmem_icl.tasks"))) / "definitions"


def demo_tasks_folder() -> Path:
    """Folder of the demo's definitions and rows."""
    return Path(str(files("lowmem_icl"))) / "demo" / "tasks"


def pair_tasks_folder() -> Path:
    """Folder of the definitions and rows of the word pairs."""
    return Path(str(files("lowmem_icl.tasks"))) / "pairs"


def bundled_folder(name: str) -> Path | None:
    """Return the folder of a task's rows where they come with the tool; None for other tasks."""
    if name in PAIR_TASKS:
        return pair_tasks_folder()
    return demo_tasks_folder() if name.split("_")[0] in DEMO_TASKS else None


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Return tasks by name, with the tasks of a collection in its place.

    Raises InputError where a task is then listed twice.
    """
    listed = [task for name in names for task in COLLECTIONS.get(name, (name,))]
    repeated = next((task for task in listed if listed.count(task) > 1), None)
    if repeated is not None:
        raise InputError(f"--tasks: '{repeated}' is listed twice, once in a collection; name it once")
    return tuple(listed)


def is_file_name(name: str) -> bool:
    """Tell whether a task is named by its file: of rows or of word pairs."""
    return name.endswith((ROWS_SUFFIX, PAIRS_SUFFIX))


class _DefinitionLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads lm-eval's YAML; a function that it names stays a name."""


_DefinitionLoader.add_constructor("!function", lambda loader, node: str(node.value))


@cache
def definition(name: str) -> Definition:
    """Return the fields of one of our definitions, those it includes among them."""
    return _read_definition((bundled_folder(name) or definitions_folder()) / f"{name}.yaml")


def _read_definition(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_DefinitionLoader)
    included = fields.pop("include", None)
    return (_read_definition(path.parent / included) if included else {}) | fields


def member_names(name: str) -> tuple[str, ...]:
    """Return the lm-eval tasks that make up one of our tasks: itself, or a group's members in their order."""
    fields = definition(name)
    return tuple(fields["task"]) if "group" in fields else (name,)


def main_metric(metrics: list[str]) -> str:
    """Return a task's main metric: `em` where it lists that, else `acc`, else the first."""
    return next((metric for metric in ("em", "acc") if metric in metrics), metrics[0])


def task_metric(name: str) -> str:
    """Return the main metric of one of our tasks."""
    listed = definition(member_names(name)[0])["metric_list"]
    return main_metric([str(metric["metric"]) for metric in listed])


def split_files(folder: Path, fields: Definition) -> dict[str, Path]:
    """Return the files of a task's splits in a folder, by split; raise InputError naming one that is missing.

    fields: the task's definition, which names the splits it has. Where a test split decides, the validation
    split may be missing, and is then left out.
    """
    named = {fields.get(f"{split}_split") for split in ("training", "validation", "test")}
    needed = [split for split in SPLITS if split in named]
    paths = {split: folder / f"{split}.jsonl" for split in needed}
    if needed == ["validation"] and not paths["validation"].is_file() and (folder / "test.jsonl").is_file():
        # LAMBADA's one file is a test split on the hub and the validation split of the paper's harness.
        paths["validation"] = folder / "test.jsonl"
    missing = [split for split in needed if not paths[split].is_file()]
    required = [split for split in missing if split != "validation" or "test" not in needed]
    if required:
        raise InputError(f"--data-dir: {paths[required[0]]} does not exist; put the task's rows there")
    return {split: path for split, path in paths.items() if split not in missing}
