"""Where a task's rows and definition come from: our YAML, the demo's, lm-eval's registry, a user's file."""

import hashlib
import logging
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as template_environment

from lowmem_icl.errors import InputError
from lowmem_icl.options import did_you_mean
from lowmem_icl.tasks.catalogue import (
    COLLECTIONS,
    HARNESS_PREFIX,
    KNOWN_TASKS,
    PAIRS_SUFFIX,
    ROWS_SUFFIX,
    bundled_folder,
    definition,
    definitions_folder,
    demo_tasks_folder,
    is_file_name,
    member_names,
    pair_tasks_folder,
    split_files,
)
from lowmem_icl.tasks.harness import SCORED_TYPES, harness_task, task_manager
from lowmem_icl.tasks.row_files import Rows, read_rows
from lowmem_icl.tasks.word_pairs import pair_rows, prompt_text, read_pairs

# What lm-eval raises where it renders a row that lacks a field or has it in another form. Caught around
# rendering alone, so that a defect of ours is not taken for a fault of the rows.
ROW_ERRORS = (KeyError, TypeError, AttributeError, IndexError, ValueError, AssertionError, TemplateError)
# What `datasets` and the hub's client raise where rows cannot be fetched.
HUB_ERRORS = (DatasetsError, HTTPError, OSError)
# A metric of lm-eval's for which every option is scored a second time, by itself.
UNCONDITIONAL_METRIC = "acc_mutual_info"
# What definitions of lm-eval's own registry raise besides: packages they want, data sets that are scripts.
HARNESS_ERRORS = (ImportError, RuntimeError)


MOST_TEMPLATES = 512
LEAST_NEAR = 0.3


@cache
def _keep_compiled_templates() -> None:
    """Make lm-eval compile each template once; it would for every row, which takes longer than rendering."""
    template_environment.from_string = lru_cache(MOST_TEMPLATES)(template_environment.from_string)


@cache
def _own_manager() -> TaskManager:
    folders = (definitions_folder(), demo_tasks_folder(), pair_tasks_folder())
    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def load_members(name: str, data_dir: Path | None) -> list[ConfigurableTask]:
    """Return the lm-eval tasks that make up a task: itself, or a group's members in their order.

    Raises InputError for a name that is not known and for rows that cannot be found or read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    _keep_compiled_templates()
    if name.startswith(HARNESS_PREFIX):
        return [_from_harness(name)]
    if name.endswith(ROWS_SUFFIX):
        return [_own_rows(Path(name))]
    if name.endswith(PAIRS_SUFFIX):
        return [_own_pairs(Path(name))]
    if name not in KNOWN_TASKS:
        raise InputError(f"--tasks: unknown task '{name}'{_unknown_hint(name)}")
    folder = bundled_folder(name) or data_dir
    loaded = []
    for member in member_names(name):
        override: dict[str, Any] = {"task": member}
        if folder is not None:
            paths = split_files(folder / member, definition(member))
            override["custom_dataset"] = _given(
                {split: _dataset(path, read_rows(path)) for split, path in paths.items()}
            )
        loaded.append(_built(_own_manager(), override, HUB_ERRORS))
    return loaded


def _unknown_hint(name: str) -> str:
    known = (*KNOWN_TASKS, *COLLECTIONS)
    near = get_close_matches(name, known, n=3, cutoff=LEAST_NEAR)
    nearest = f"; the nearest are {', '.join(near)}" if near else ""
    return did_you_mean(name, known) or (
        f"{nearest}; `lowmem-icl tasks` lists all, and {HARNESS_PREFIX}NAME or a path to {ROWS_SUFFIX} or "
        f"{PAIRS_SUFFIX} does too"
    )


def rows_digest(name: str, data_dir: Path | None) -> str | None:
    """Return a SHA-256 over the files that a task's rows are read from; None where they come from the hub.

    Raises InputError for a file that is missing.
    """
    summed = hashlib.sha256()
    for split, path in _row_files(name, data_dir):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        summed.update(f"{split} {len(content)} ".encode() + content)
    return summed.hexdigest() if _row_files(name, data_dir) else None


def _row_files(name: str, data_dir: Path | None) -> list[tuple[str, Path]]:
    """Return the files of a task's rows with what each is; none where they come from the hub."""
    if is_file_name(name):
        _check_exists(Path(name))
        return [("", Path(name))]
    folder = None if name not in KNOWN_TASKS else bundled_folder(name) or data_dir
    if folder is None:
        return []
    return [
        (f"{member} {split}", path)
        for member in member_names(name)
        for split, path in split_files(folder / member, definition(member)).items()
    ]


def _given(splits: dict[str, datasets.Dataset]) -> Callable[..., dict[str, datasets.Dataset]]:
    """Return splits in the form in which lm-eval wants to be given them: a function of anything."""
    return lambda **_: splits


def _built(
    manager: TaskManager,
    override: dict[str, Any],
    fetch_errors: tuple[type[Exception], ...],
    *,
    inline: bool = False,
) -> ConfigurableTask:
    """Return lm-eval's task of a definition; its rows are loaded and the first one is rendered.

    inline: the definition is all there is; the manager has none of that name.
    """
    name = override["task"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task = manager.load(override if inline else {"group": "source", "task": [override]})["tasks"][
                name
            ]
    except fetch_errors as error:
        raise InputError(
            f"task {name}: its rows could not be loaded ({type(error).__name__}: {error}); "
            "give a folder with --data-dir"
        ) from error
    except ROW_ERRORS as error:
        raise InputError(
            f"task {name}: its first row does not have the expected fields, or an empty one ({error!r})"
        ) from error
    if not isinstance(task, ConfigurableTask):
        raise InputError(f"task {name}: not defined by YAML in lm-eval; choose another")
    return task


def _dataset(path: Path, rows: Rows) -> datasets.Dataset:
    """Return a file's rows as lm-eval wants them; raise InputError naming a row whose fields are odd."""
    try:
        return datasets.Dataset.from_list(rows)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"{path}{_odd_field(rows)}: cannot be read as a table ({error})") from error


def _odd_field(rows: Rows) -> str:
    """Return, as part of a message, where the first field is whose type differs from rows before."""
    types: dict[str, type] = {}
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if value is not None and types.setdefault(name, type(value)) is not type(value):
                return f", row {number}, field '{name}', which was {types[name].__name__} before"
    return ""


def _from_harness(name: str) -> ConfigurableTask:
    wanted = harness_task(name)
    inline = wanted.fields["task"] not in task_manager().task_index
    task = _built(task_manager(), dict(wanted.fields), HUB_ERRORS + HARNESS_ERRORS, inline=inline)
    if task.OUTPUT_TYPE not in SCORED_TYPES:
        raise InputError(
            f"--tasks: {name} is scored by {task.OUTPUT_TYPE}; expected {' or '.join(SCORED_TYPES)}"
        )
    if UNCONDITIONAL_METRIC in task.aggregation():
        raise InputError(
            f"--tasks: {name} asks for {UNCONDITIONAL_METRIC}, which scores every option without its context "
            "too; choose a task without it"
        )
    return task


def _own_rows(path: Path) -> ConfigurableTask:
    """Build a task from JSON lines with `context`, `options` and `gold`; texts are used as they stand.

    Rows of one option each ask for that continuation, as LAMBADA does.
    """
    _check_exists(path)
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        _check_own_row(path, number, row)
        if (len(row["options"]) == 1) != (len(rows[0]["options"]) == 1):
            raise InputError(
                f"{path}, row {number}: 'options': expected one in every row of a file or several in every "
                f"row, got {len(row['options'])} after rows with {len(rows[0]['options'])}; make two files"
            )
    return _own_task(
        path,
        [
            {"context": row["context"], "options": row["options"], "gold": _as_list(row["gold"])}
            for row in rows
        ],
    )


def _own_pairs(path: Path) -> ConfigurableTask:
    """Build a task from a JSON list of pairs of `input` and `output`."""
    _check_exists(path)
    return _own_task(
        path,
        [
            {
                "context": prompt_text(row["input"]),
                "options": [f" {option}" for option in row["options"]],
                "gold": [row["answer"]],
            }
            for row in pair_rows(read_pairs(path))
        ],
    )


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise InputError(
            f"--tasks: {path} does not exist; give a task's name, a file of JSON lines ({ROWS_SUFFIX}) "
            f"or of word pairs ({PAIRS_SUFFIX})"
        )


def _own_task(path: Path, rows: Rows) -> ConfigurableTask:
    """Build a task named like a file from rows with `context`, `options` and a list as `gold`."""
    scored: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda row: row["options"],
        # lm-eval learns from the first row whether labels are lists, so all rows have one; a demonstration
        # shows the first right option.
        "doc_to_target": lambda row: row["gold"],
        "fewshot_config": {"doc_to_target": lambda row: row["options"][row["gold"][0]]},
    }
    if len(rows[0]["options"]) == 1:
        scored = {"output_type": "loglikelihood", "doc_to_target": lambda row: row["options"][0]}
    config = scored | {
        "task": path.stem,
        "validation_split": "validation",
        "custom_dataset": _given({"validation": _dataset(path, rows)}),
        "doc_to_text": lambda row: row["context"],
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
    if not isinstance(options, list) or not options:
        raise InputError(f"{path}, row {number}: 'options': expected a list of texts, at least one")
    for index, option in enumerate(options):
        if not isinstance(option, str) or not option:
            raise InputError(
                f"{path}, row {number}: 'options': expected texts, none of them empty; "
                f"got {option!r} at index {index}"
            )
    indices = _as_list(gold) if isinstance(gold, (int, list)) and not isinstance(gold, bool) else []
    if not indices or not all(
        isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(options)
        for index in indices
    ):
        raise InputError(
            f"{path}, row {number}: 'gold': expected the index of an option from 0 to {len(options) - 1}, "
            f"or a list of them, got {gold!r}"
        )
