"""The documents of a run's tasks with their prompts, made once or found where they were kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import PromptForm
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.session.space_notes import space_note
from lowmem_icl.session.text_keys import TableName, table_key
from lowmem_icl.session.texts import KeptTexts
from lowmem_icl.system.progress import Progress
from lowmem_icl.tasks.demonstrations import Demonstrations
from lowmem_icl.tasks.document_counts import DocumentLimit
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import NoLabelControl, changes_a_prompt, with_other_labels
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.packing import PackingLimits, Tokenise
from lowmem_icl.tasks.prompt_pairs.corruptions import check_one_prompt, corrupted
from lowmem_icl.tasks.prompt_table import MissingPrompt, PromptTable, TablePrompter, TableWriter
from lowmem_icl.tasks.prompting import MeasuringPrompter, Prompter
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
    options: RunOptions, task: OpenTask, shots: int, part: tuple[Part, DocumentLimit], prompter: Prompter
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
        self, task: OpenTask, rows: Mapping[str, TaskRows], labels: PromptForm
    ) -> dict[str, TaskRows]:
        """Return documents, by field of Prepared, with other answers shown, or corrupted.

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
        self, task: OpenTask, rows: Mapping[str, TaskRows], labels: PromptForm
    ) -> dict[str, TaskRows]:
        """Return documents, by field of Prepared, with other answers shown or corrupted, as DocumentMaker's
        `label_controls` says.
        """
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
        prompted: Callable[[MeasuringPrompter], dict[str, TaskRows]],
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
    options: RunOptions,
    task: OpenTask,
    rows: Mapping[str, TaskRows],
    labels: PromptForm,
    prompter: MeasuringPrompter,
) -> dict[str, TaskRows]:
    """Return documents, by field of Prepared, with other answers shown or corrupted, where that is defined;
    raise NoLabelControl where it is for none.
    """
    parts, protocol = part_limits(options), options.protocol_flags
    found, errors = {}, []
    for name, of_part in rows.items():
        try:
            if labels == "wrong" or labels == "queries":
                found[name] = corrupted(task, of_part, labels, protocol, prompter, parts[name][0])
            else:
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
    """The documents with other answers shown or corrupted, by field of Prepared, as they are made, and why
    some have none: pairs by task and shot count, which is None where a task has none at any.
    """

    maker: DocumentMaker
    _found: dict[str, list[TaskRows]] = field(default_factory=lambda: {"evaluate": [], "train": []})
    _reasons: dict[tuple[str, str], dict[PromptForm, None]] = field(default_factory=dict)
    _without_pairs: dict[tuple[str, int | None], str] = field(default_factory=dict)

    def add(self, task: OpenTask, rows: Mapping[str, TaskRows]) -> None:
        """Add the controls of a task at one shot count; one demonstration alone is not shuffled."""
        shots = rows["evaluate"].shots
        if self._options.makes_pairs:
            self._note_where_answers_stand_in_contexts(task)
        for labels, fields in self._fields().items():
            if shots < (2 if labels == "shuffled" else 1):
                continue
            wanted = {name: rows[name] for name in fields}
            try:
                controls = self.maker.label_controls(task, wanted, labels)
            except NoLabelControl as error:
                for name in wanted:
                    self._note((task.name, shots), str(error), labels, name)
                continue
            for name in wanted:
                if name in controls:
                    self._found[name].append(controls[name])
                else:
                    reason = f"no demonstrations before its {name} documents allow it"
                    self._note((task.name, shots), reason, labels, name)

    def by_field(self) -> dict[str, tuple[TaskRows, ...]]:
        """Return the documents that were made, by field of Prepared."""
        options, train = self._options, self._found["train"]
        drops = [rows for rows in train if options.label_drops and rows.labels == "shuffled"]
        pairs = [
            rows
            for rows in train
            if options.makes_pairs
            and rows.labels == options.corrupt
            and (rows.task, None) not in self._without_pairs
        ]
        return {
            "label_controls": tuple(self._found["evaluate"]),
            "train_controls": tuple(drops),
            "corrupted": tuple(pairs),
        }

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for every task and reason."""
        return tuple(
            f"task {task}: no control with {' or '.join(labels)} labels: {reason}"
            for (task, reason), labels in self._reasons.items()
        )

    def pair_notes(self) -> tuple[str, ...]:
        """Return a sentence for every task without pairs of prompts, and for every shot count without them
        that could have some.
        """
        return tuple(
            f"task {task}: no pairs of prompts ({self._options.corrupt}){_at_shots(shots)}: {reason}"
            for (task, shots), reason in self._without_pairs.items()
        )

    @property
    def _options(self) -> RunOptions:
        return self.maker.options

    def _fields(self) -> dict[PromptForm, list[str]]:
        """Return which documents are also shown other labels, or corrupted, by labels."""
        options = self._options
        fields: dict[PromptForm, list[str]] = {labels: ["evaluate"] for labels in options.control_labels}
        if options.label_drops:
            fields.setdefault("shuffled", []).append("train")
        if options.makes_pairs and "train" not in fields.get(options.corrupt, []):
            fields.setdefault(options.corrupt, []).append("train")
        return fields

    def _note(self, setting: tuple[str, int], reason: str, labels: PromptForm, name: str) -> None:
        """Note why a task has no documents of a field with such labels at a shot count."""
        options, (task, _) = self._options, setting
        is_pair = name == "train" and options.makes_pairs and labels == options.corrupt
        # Other shot counts may well have pairs. What holds at all of them is said once.
        if is_pair and (task, None) not in self._without_pairs:
            self._without_pairs[setting] = reason
        if not is_pair or (options.label_drops and labels == "shuffled"):
            self._reasons.setdefault((task, reason), {})[labels] = None

    def _note_where_answers_stand_in_contexts(self, task: OpenTask) -> None:
        try:
            check_one_prompt(task)
        except NoLabelControl as error:
            self._without_pairs[task.name, None] = str(error)


def _at_shots(shots: int | None) -> str:
    return "" if shots is None else f" at {shots} shot{'s' if shots != 1 else ''}"


def documents_of(
    tasks: Sequence[OpenTask],
    maker: DocumentMaker,
    progress: Progress,
    reduced: Callable[[TaskRows], TaskRows] = lambda rows: rows,
) -> "TaskDocuments":
    """Return the documents of tasks at all shot counts; reduced: to what is kept of them."""
    options, controls = maker.options, LabelControls(maker)
    documents: dict[str, list[TaskRows]] = {name: [] for name in part_limits(options)}
    wanted = [(task, shots) for task in tasks for shots in options.resolved_shots]
    about_space: dict[str, str | None] = {}
    with progress("texts", len(wanted), "tasks") as advance:
        for task, shots in wanted:
            rows = maker.documents(task, shots)
            about_space[task.name] = about_space.get(task.name) or space_note(rows["evaluate"])
            controls.add(task, rows)
            if "certify" in rows:
                rows["certify"] = rows["certify"].unrelated_to(rows["train"])
            for name, of_part in rows.items():
                documents[name].append(reduced(of_part))
            advance(1)
    by_field = {name: tuple(rows) for name, rows in documents.items()}
    notes = (*filter(None, about_space.values()), *controls.notes())
    return TaskDocuments(by_field | controls.by_field(), notes, controls.pair_notes())


@dataclass(frozen=True)
class TaskDocuments:
    """The documents of a run, by field of Prepared; `notes`: what is left out, and which contexts end in
    white space; `pair_notes`: which tasks make no pairs of prompts. Both in sentences.
    """

    by_field: Mapping[str, tuple[TaskRows, ...]]
    notes: tuple[str, ...]
    pair_notes: tuple[str, ...] = ()

    def check_pairs(self, options: RunOptions) -> None:
        """Raise InputError where no task makes the pairs of prompts that a run patches."""
        if options.makes_pairs and not options.has_given_prompts and not self.by_field["corrupted"]:
            raise InputError(
                f"--corrupt {options.corrupt}: {'; '.join(self.pair_notes)}; give other --tasks, or corrupt "
                "otherwise"
            )
