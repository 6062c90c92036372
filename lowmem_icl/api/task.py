"""Tasks as Python users hold them: whose rows are loaded, and how their prompts are made."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from lowmem_icl.api.options import check_only, checked_options
from lowmem_icl.api.words import python_errors
from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions, did_you_mean
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.session.prepare import open_tasks
from lowmem_icl.session.task_texts import part_rows
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.prompting import DIRECT_PROMPTER

Part = Literal["evaluate", "train"]
PARTS: tuple[Part, ...] = get_args(Part)
TASK_OPTIONS = ("demonstrations", "demonstration_sets", "protocol", "seed")
EVERY = 1 << 31
"""More documents than any task has."""
DEFAULT_TRAIN_LIMIT = 32


@dataclass(frozen=True)
class Task:
    """A task's documents at one number of demonstrations; `len` says how many.

    options: how prompts are made; part: `evaluate`, or `train`, on which masks are chosen.

    >>> import lowmem_icl as icl
    >>> task = icl.load_task("recall", shots=1, limit=8)
    >>> document = task.documents[0]
    >>> len(task), len(document.options), document.gold.count(True)
    (8, 4, 1)
    """

    name: str
    shots: int
    part: Part
    options: RunOptions = field(repr=False)
    opened: OpenTask = field(repr=False, compare=False)

    @cached_property
    @python_errors
    def rows(self) -> TaskRows:
        """The documents, and what scores them."""
        limit = part_limits(self.options)[self.part][1]
        return part_rows(self.options, self.opened, self.shots, (self.part, limit), DIRECT_PROMPTER)

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents in the order in which they are scored: texts of their options, and which are gold.

        As they are before a model's context cuts them.
        """
        return self.rows.documents

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        rows = self.rows
        shots = f"{self.shots} shot{'' if self.shots == 1 else 's'}"
        return f"Task({self.name!r}, {shots}, {len(rows.documents)} documents of {rows.split}, {rows.metric})"


@python_errors
def load_task(
    name: str,
    *,
    shots: int = 0,
    limit: int | float | None = None,
    part: Part = "evaluate",
    data_dir: str | Path | None = None,
    **options: Any,
) -> Task:
    """Return a task, its rows loaded.

    name: a task's name, `lm-eval:NAME` or a path to JSON lines or pairs. limit: so many documents, or with
    a number below 1 such a share of all; None for all, of part `train` 32. data_dir: folder of
    `TASK/{train,validation,test}.jsonl`; else the hub. options: `demonstrations`, `demonstration_sets`,
    `protocol` and `seed`, as `run` takes them. Raises InputError for what is not known, missing or malformed.

    >>> import lowmem_icl as icl
    >>> icl.load_task("recall", shots=4, limit=8)
    Task('recall', 4 shots, 8 documents of validation, acc)
    """
    if part not in PARTS:
        raise InputError(
            f"part: expected one of {', '.join(PARTS)}, got {part!r}{did_you_mean(str(part), PARTS)}"
        )
    check_only(options, TASK_OPTIONS)
    # Of the other part no more is made than needs be: training documents give means, evaluation none.
    limits = {"limit": EVERY if limit is None else limit, "train_limit": DEFAULT_TRAIN_LIMIT}
    if part == "train":
        limits = {"limit": 1, "train_limit": limit or DEFAULT_TRAIN_LIMIT}
    settled = {"tasks": (name,), "shots": shots, "data_dir": data_dir, "experiments": ("evaluate",)}
    checked = checked_options({**options, **settled, **limits})
    tasks = open_tasks(checked)
    if len(tasks) != 1:
        listed = ", ".join(task.name for task in tasks)
        raise InputError(f"name: expected one task, got {name!r}, which is {len(tasks)}: {listed}")
    return Task(tasks[0].name, shots, part, checked, tasks[0])
