"""The documents of a run's tasks with their prompts, made once or found where they were kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class DocumentMaker(Protocol):
    """Gives the documents of tasks, with their texts or without."""

    @property
    def options(self) -> RunOptions:
        """The options of the run."""
        ...

    def documents(self, task: OpenTask, shots: int) -> dict[str, TaskRows]:
        """Return a task's documents at a shot count, by field of Prepared."""
        ...

    def label_controls(
        self, task: OpenTask, rows: Mapping[str, TaskRows], labels: Labels
    ) -> dict[str, TaskRows]:
        """Return documents, by field of Prepared, with other answers shown.

        Those for which that is not defined, or changes nothing, are left out; raises NoLabelControl where all
        are.
        """
        ...


@dataclass(frozen=True)
class TextMaker:
    """What the texts of tasks are made with, and where they are kept; `tables`: those of their prompts, as
    they are made.
    """

    options: RunOptions
    limits: PackingLimits
    tokenise: Tokenise
    tokenizer_digest: str
    texts: KeptTexts
    tables: dict[TableName, KeptTable] = field(default_factory=dict)

    def documents(self, task: OpenTask, shots: int) -> dict[str, TaskRows]:
        """Return a task's documents at a shot count, by field of Prepared."""
        limits = part_limits(self.options)
        return self._from_table(
            TableName(task.name, shots, "right"),
            task,
            tuple(limits),
            lambda prompter: {
                name: part_rows(self.options, task, shots, part, prompter) for name, part in limits.items()
            },
        )

    def label_controls(
        self, task: OpenTask, rows: Mapping[str, TaskRows], labels: Labels
    ) -> dict[str, TaskRows]:
        """Return documents, by field of Prepared, with other answers shown; see DocumentMaker."""
        (shots,) = {of_part.shots for of_part in rows.values()}
        controls = self._from_table(
            TableName(task.name, shots, labels),
            task,
            tuple(rows),
            lambda prompter: with_others(self.options, task, rows, labels, prompter),
        )
        return changed_only(rows, controls)

    def _from_table(
        self,
        name: TableName,
        task: OpenTask,
        fields: Sequence[str],
        prompted: Callable[[Prompter], dict[str, TaskRows]],
    ) -> dict[str, TaskRows]:
        """Return documents whose prompts come from a table, which is made where it is not there."""

        def make() -> dict[str, NDArray[Any]]:
            writer = TableWriter(self.tokenise, self.limits)
            prompted(writer)
            return writer.arrays()

        key = table_key(self.options, name, fields, task.rows_digest, self.tokenizer_digest, self.limits)
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
        self.tables[name] = KeptTable(key, digest, table)
        return rows


def with_others(
    options: RunOptions, task: OpenTask, rows: Mapping[str, TaskRows], labels: Labels, prompter: Prompter
) -> dict[str, TaskRows]:
    """Return documents, by field of Prepared, with other answers shown, where that is defined; raise
    NoLabelControl where it is for none.
    """
    parts, protocol = part_limits(options), options.protocol_flags
    found, errors = {}, []
    for name, of_part in rows.items():
        try:
            found[name] = with_other_labels(task, of_part, labels, protocol, prompter, parts[name][0])
        except NoLabelControl as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def changed_only(rows: Mapping[str, TaskRows], controls: Mapping[str, TaskRows]) -> dict[str, TaskRows]:
    """Return the controls that change a prompt; raise NoLabelControl where none does."""
    changed = {name: control for name, control in controls.items() if changes_a_prompt(rows[name], control)}
    if not changed:
        raise NoLabelControl("all demonstrations show the same answer")
    return changed


@dataclass
class LabelControls:
    """The documents with other answers shown, by field of Prepared, as they are made, and why some have
    none.
    """

    maker: DocumentMaker
    found: dict[str, list[TaskRows]] = field(default_factory=lambda: {"evaluate": [], "train": []})
    _reasons: dict[tuple[str, str], dict[Labels, None]] = field(default_factory=dict)

    def add(self, task: OpenTask, rows: Mapping[str, TaskRows]) -> None:
        """Add the controls of a task at one shot count; one demonstration alone is not shuffled."""
        fewest: dict[Labels, int] = {"shuffled": 2, "foreign": 1}
        shots = rows["evaluate"].shots
        for labels, fields in self._fields().items():
            if shots < fewest[labels]:
                continue
            wanted = {name: rows[name] for name in fields}
            try:
                controls = self.maker.label_controls(task, wanted, labels)
            except NoLabelControl as error:
                self._note(task, str(error), labels)
                continue
            for name in wanted:
                if name in controls:
                    self.found[name].append(controls[name])
                else:
                    self._note(task, f"no demonstrations before its {name} documents allow it", labels)

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for every task and reason."""
        return tuple(
            f"task {task}: no control with {' or '.join(labels)} labels: {reason}"
            for (task, reason), labels in self._reasons.items()
        )

    def _fields(self) -> dict[Labels, list[str]]:
        """Return which documents are also shown other labels, by labels."""
        options = self.maker.options
        fields: dict[Labels, list[str]] = {labels: ["evaluate"] for labels in options.control_labels}
        if options.label_drops:
            fields.setdefault("shuffled", []).append("train")
        return fields

    def _note(self, task: OpenTask, reason: str, labels: Labels) -> None:
        self._reasons.setdefault((task.name, reason), {})[labels] = None
