"""Where a task's rows and its definition come from: our YAML, the demo's, lm-eval's registry, or a file of one's own."""

import difflib
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import OUT_OF_DOMAIN_TASKS

PAPER_TASKS = (
    "hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq", "cb", "copa", "wic", "wsc",
    "multirc", "rte", "record",
)  # fmt: skip
DEMO_TASKS = ("recall", "category", "knowledge", "repeat")
HARNESS_PREFIX = "lm-eval:"
SPLITS = ("train", "validation", "test")

# What templates raise on a row that lacks a field or has it in another form.
ROW_ERRORS = (KeyError, TypeError, AttributeError, IndexError, ValueError, TemplateError)

Rows = list[dict[str, Any]]


def definitions_folder() -> Path:
    """Folder of the paper's task definitions."""
    return Path(str(files("lowmem_icl.tasks"))) / "definitions"


def demo_tasks_folder() -> Path:
    """Folder of the demo's definitions and rows."""
    return Path(str(files("lowmem_icl"))) / "demo" / "tasks"


def read_rows(path: Path) -> Rows:
    """Return a file's JSON lines; raise InputError naming the file and line of what is wrong.

    Every row must have the fields of the first.
    """
    try:
        # Not splitlines(): JSON may hold a bare U+2028 or U+0085 inside a text, and that ends no row.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    rows: Rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        missing = rows[0].keys() - row.keys() if rows else set()
        if missing:
            raise InputError(f"{path}, line {number}: field '{sorted(missing)[0]}' is missing")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no rows; give a file with one JSON object a line")
    return rows


@cache
def _own_manager() -> TaskManager:
    return TaskManager(
        include_path=[str(definitions_folder()), str(demo_tasks_folder())], include_defaults=False
    )


def load_members(name: str, data_dir: Path | None) -> list[tuple[str, ConfigurableTask]]:
    """Return the lm-eval tasks that make up a task: itself, or a group's members in their order.

    Raises InputError for a name that is not known and for rows that cannot be found or read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if name.startswith(HARNESS_PREFIX):
        return _from_harness(name)
    if name.endswith(".jsonl"):
        return [(name, _own_file(Path(name)))]
    manager = _own_manager()
    known = (*PAPER_TASKS, *OUT_OF_DOMAIN_TASKS, *DEMO_TASKS)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise InputError(
            f"--tasks: unknown task '{name}'; {hint}expected one of {', '.join(known)}, "
            f"{HARNESS_PREFIX}NAME or a path to .jsonl"
        )
    folder = demo_tasks_folder() if name in DEMO_TASKS else data_dir
    entry = manager.task_index[name].cfg or {}
    members = entry["task"] if "group" in entry else [name]
    loaded = []
    for member in members:
        override: dict[str, Any] = {"task": member}
        if folder is not None:
            override["custom_dataset"] = _from_folder(folder / member, manager.task_index[member].cfg or {})
        loaded.append((member, _built(manager, override)))
    return loaded


def _built(manager: TaskManager, override: dict[str, Any]) -> ConfigurableTask:
    name = override["task"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task = manager.load({"group": "source", "task": [override]})["tasks"][name]
    except InputError:
        raise
    except ROW_ERRORS as error:
        raise InputError(
            f"task {name}: its first row does not have the expected fields ({error!r})"
        ) from error
    except Exception as error:
        # The hub's client raises errors of many kinds when it cannot be reached.
        raise InputError(
            f"task {name}: its rows could not be loaded ({type(error).__name__}: {error}); "
            "give a folder with --data-dir"
        ) from error
    if not isinstance(task, ConfigurableTask):
        raise InputError(f"task {name}: not defined by YAML in lm-eval; choose another")
    return task


def _from_folder(folder: Path, config: Mapping[str, Any]) -> Callable[..., dict[str, datasets.Dataset]]:
    """Return a loader of a task's splits from JSON lines; raises InputError at once where a file is missing."""
    named = {config.get(f"{split}_split") for split in ("training", "validation", "test")} - {None}
    needed = [split for split in SPLITS if split in named]
    at = {split: folder / f"{split}.jsonl" for split in needed}
    if needed == ["validation"] and not at["validation"].is_file() and (folder / "test.jsonl").is_file():
        # LAMBADA's one file is a test split on the hub and the validation split of the paper's harness.
        at["validation"] = folder / "test.jsonl"
    missing = [split for split in needed if not at[split].is_file()]
    # Where a test split decides, the validation split is not read.
    if "test" in needed:
        missing = [split for split in missing if split != "validation"]
    if missing:
        raise InputError(f"--data-dir: {at[missing[0]]} does not exist; put the task's rows there")

    def load(**_: object) -> dict[str, datasets.Dataset]:
        return {
            split: datasets.Dataset.from_list(read_rows(path)) for split, path in at.items() if path.is_file()
        }

    return load


def _from_harness(name: str) -> list[tuple[str, ConfigurableTask]]:
    wanted = name.removeprefix(HARNESS_PREFIX)
    manager = TaskManager()
    if wanted not in manager.task_index:
        close = difflib.get_close_matches(wanted, manager.all_tasks, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise InputError(f"--tasks: lm-eval knows no task '{wanted}'{hint}")
    entry = manager.task_index[wanted].cfg or {}
    if "group" in entry:
        raise InputError(f"--tasks: {name} is a group of lm-eval; name its tasks one by one")
    task = _built(manager, {"task": wanted})
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise InputError(
            f"--tasks: {name} is scored by {task.OUTPUT_TYPE}; expected multiple choice or loglikelihood"
        )
    return [(wanted, task)]


def _own_file(path: Path) -> ConfigurableTask:
    """Build a task from a user's JSON lines with `context`, `options` and `gold`; texts are used as they stand."""
    if not path.is_file():
        raise InputError(f"--tasks: {path} does not exist; give a task's name or a file of JSON lines")
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        _check_own_row(path, number, row)
    plain = [
        {"context": row["context"], "options": row["options"], "gold": _as_list(row["gold"])} for row in rows
    ]
    config = {
        "task": path.stem,
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(plain)},
        "doc_to_text": lambda row: row["context"],
        "doc_to_choice": lambda row: row["options"],
        # lm-eval learns from the first row whether labels are lists, so all rows have one; a demonstration shows
        # the first right option.
        "doc_to_target": lambda row: row["gold"],
        "fewshot_config": {"doc_to_target": lambda row: row["options"][row["gold"][0]]},
        "target_delimiter": "",
        "fewshot_delimiter": "\n\n",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return ConfigurableTask(config=config)


def _as_list(gold: int | list[int]) -> list[int]:
    return gold if isinstance(gold, list) else [gold]


def _check_own_row(path: Path, number: int, row: dict[str, Any]) -> None:
    options, gold = row.get("options"), row.get("gold")
    if not isinstance(row.get("context"), str):
        raise InputError(f"{path}, row {number}: 'context': expected a text")
    if (
        not isinstance(options, list)
        or len(options) < 2
        or not all(isinstance(option, str) and option for option in options)
    ):
        raise InputError(f"{path}, row {number}: 'options': expected a list of texts, at least two")
    places = _as_list(gold) if isinstance(gold, (int, list)) and not isinstance(gold, bool) else []
    if not places or not all(
        isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(options)
        for place in places
    ):
        raise InputError(
            f"{path}, row {number}: 'gold': expected the place of an option from 0 to {len(options) - 1}, or a list of "
            f"them, got {gold!r}"
        )


def task_metric(name: str) -> str:
    """Return the main metric of one of our tasks without loading its rows."""
    entry = _own_manager().task_index[name].cfg or {}
    member = entry["task"][0] if "group" in entry else name
    listed = (_own_manager().task_index[member].cfg or {})["metric_list"]
    names = [str(metric["metric"]) for metric in listed]
    return "em" if "em" in names else names[0]
