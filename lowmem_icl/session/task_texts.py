"""The documents of a run's tasks with their prompts, made once or found where they were kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import Labels
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.session.text_keys import TableName, table_key
from lowmem_icl.session.texts import KeptTexts
from lowmem_icl.tasks.demonstrations import Demonstrations
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import NoLabelControl, changes_a_prompt, with_other_labels
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.packing import PackingLimits, Tokenise
from lowmem_icl.tasks.prompt_table import MissingPrompt, PromptTable, TablePrompter, TableWriter
from lowmem_icl.tasks.prompting import Prompter
from lowmem_icl.tasks.selection import Part


@dataclass(frozen=True)
class KeptTable:
    """The prompts of one task at one shot count with one choice of labels, the key they are kept under, a
    digest of their content.
    """

    key: str
    digest: str
    table: PromptTable = field(repr=False)


def part_rows(
    options: RunOptions, task: OpenTask, shots: int, part: tuple[Part, int | None], prompter: Prompter
) -> TaskRows:
    """Return the documents of a part, as many as its limit says."""
    return task.rows(
        shots=shots,
        part=part[0],
        limit=part[1],
        demonstrations=Demonstrations(options.demonstrations, options.demonstration_sets),
        protocol=options.protocol_flags,
        prompter=prompter,
    )


@dataclass(frozen=True)
class TextMaker:
    """What the texts of tasks are made with, and where they are kept."""

    options: RunOptions
    limits: PackingLimits
    tokenise: Tokenise
    tokenizer_digest: str
    texts: KeptTexts

    def documents(self, task: OpenTask, shots: int) -> tuple[dict[str, TaskRows], KeptTable]:
        """Return a task's documents at a shot count, by field of Prepared, and the table of their prompts."""
        return self._from_table(
            TableName(task.name, shots, "right"),
            task,
            lambda prompter: {
                name: part_rows(self.options, task, shots, part, prompter)
                for name, part in part_limits(self.options).items()
            },
        )

    def label_control(self, task: OpenTask, rows: TaskRows, labels: Labels) -> tuple[TaskRows, KeptTable]:
        """Return evaluation documents with other answers shown, and the table of their prompts.

        Raises NoLabelControl where that is not defined, or changes nothing.
        """
        protocol = self.options.protocol_flags
        controls, table = self._from_table(
            TableName(task.name, rows.shots, labels),
            task,
            lambda prompter: {labels: with_other_labels(task, rows, labels, protocol, prompter)},
        )
        if not changes_a_prompt(rows, controls[labels]):
            raise NoLabelControl("all demonstrations show the same answer")
        return controls[labels], table

    def _from_table(
        self, name: TableName, task: OpenTask, prompted: Callable[[Prompter], dict[str, TaskRows]]
    ) -> tuple[dict[str, TaskRows], KeptTable]:
        """Return documents whose prompts come from a table, and the table, made where it is not there."""

        def make() -> dict[str, NDArray[Any]]:
            writer = TableWriter(self.tokenise, self.limits)
            prompted(writer)
            return writer.arrays()

        key = table_key(self.options, name, task.rows_digest, self.tokenizer_digest, self.limits)
        for again in (False, True):
            table, digest = self.texts.table(key, make, again=again)
            try:
                rows = prompted(TablePrompter(table, self.limits))
            except MissingPrompt:
                if again:
                    raise
                continue
            break
        for part_rows in rows.values():
            # An option that does not fit is reported now, not in the night.
            table.options(part_rows, self.limits)
        return rows, KeptTable(key, digest, table)


@dataclass
class LabelControls:
    """The evaluation documents with other answers shown, as they are made, and why some have none."""

    maker: TextMaker
    tables: dict[TableName, KeptTable]
    found: list[TaskRows] = field(default_factory=list)
    _reasons: dict[tuple[str, str], dict[Labels, None]] = field(default_factory=dict)

    def add(self, task: OpenTask, rows: TaskRows) -> None:
        """Add the controls of a task at one shot count; one demonstration alone is not shuffled."""
        fewest: dict[Labels, int] = {"shuffled": 2, "foreign": 1}
        for labels in self.maker.options.control_labels:
            if rows.shots < fewest[labels]:
                continue
            try:
                control, table = self.maker.label_control(task, rows, labels)
            except NoLabelControl as error:
                self._reasons.setdefault((task.name, str(error)), {})[labels] = None
                continue
            self.tables[TableName(task.name, rows.shots, labels)] = table
            self.found.append(control)

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for every task and reason."""
        return tuple(
            f"task {task}: no control with {' or '.join(labels)} labels: {reason}"
            for (task, reason), labels in self._reasons.items()
        )
