"""Everything that must be right before the first sweep: the store, the tasks, their tokens and rows."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from lowmem_icl.conversion.locate import ModelLocation, ensure_store, load_tokenizer, locate, plan_store
from lowmem_icl.masks.files import MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.masks.naming import check_names
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store
from lowmem_icl.options import DEMO, PACKAGED_MODEL_NAMES, RunOptions
from lowmem_icl.rows import PackedRows
from lowmem_icl.session.document_limits import check_objective, count_prompts, part_limits
from lowmem_icl.session.given_prompts import PromptFiles, prompt_files
from lowmem_icl.session.sampled_texts import (
    SampledDocuments,
    SampledTexts,
    has_sample,
    keep_sample,
    kept_sample,
    only_sizes,
)
from lowmem_icl.session.task_texts import KeptTable, TaskDocuments, TextMaker, documents_of
from lowmem_icl.session.text_form import (
    TextForm,
    check_ids,
    packing_limits,
    sequences_for,
    text_form,
    text_tokeniser,
)
from lowmem_icl.session.text_keys import TableName, sample_key, table_key, tokenizer_digest
from lowmem_icl.session.texts import FOLDER, KeptTexts
from lowmem_icl.system.files import try_writing
from lowmem_icl.system.progress import Progress, unseen
from lowmem_icl.tasks.catalogue import DEMO_TASKS, LEARNT_PAIR_TASKS, PAPER_TASKS, expanded
from lowmem_icl.tasks.document_sizes import estimated_rows
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.harness import expanded_names
from lowmem_icl.tasks.listing import check_data_dir
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.packing import (
    PackedTask,
    PackingLimits,
    TaskOptions,
    Tokenise,
    first_options,
    packed,
)
from lowmem_icl.tasks.random_sequences import RandomSequences
from lowmem_icl.tasks.sources import rows_digest

MOST_EXACT = 3000
"""Prompts that a plan makes and tokenises, all of them; of more it reads a sample."""


@dataclass(frozen=True)
class Prepared:
    """A run's model and documents, checked; their texts are tokens already.

    `evaluate`, `train`: the documents of every task and shot count, in the same order; `importance`: the
    training documents whose gradients are taken; `certify`: training documents that share no cluster with
    `train`, () where none are asked for; `curves`: the first of `evaluate`, as many as pruning curves are
    judged on; `label_controls`, `train_controls`: those of `evaluate` and of `train` that have
    demonstrations, with other answers shown; `corrupted`: those of `train` that are patched, after corrupted
    prompts; `given`: prompts that the user gives. `notes`: what is left out, and why, in sentences;
    `pair_notes`: which tasks make no pairs of prompts. `sample_note`:
    what the sizes of documents rest on where these have no texts, which does for a plan; else empty. `masks`:
    those that the user gives, by name, to be evaluated as well as the clean model; `given_means`: the tables
    of means that these name. The store may be only planned, with sizes and no files: `with_store` makes it.
    """

    options: RunOptions
    store: Store
    located: ModelLocation
    text_form: TextForm
    limits: PackingLimits
    evaluate: tuple[TaskRows, ...]
    train: tuple[TaskRows, ...]
    importance: tuple[TaskRows, ...]
    curves: tuple[TaskRows, ...]
    tables: Mapping[TableName, KeptTable] = field(repr=False)
    texts: KeptTexts = field(repr=False)
    certify: tuple[TaskRows, ...] = ()
    label_controls: tuple[TaskRows, ...] = ()
    train_controls: tuple[TaskRows, ...] = ()
    corrupted: tuple[TaskRows, ...] = ()
    given: PromptFiles = field(default_factory=PromptFiles)
    notes: tuple[str, ...] = ()
    pair_notes: tuple[str, ...] = ()
    sample_note: str = ""
    masks: Mapping[str, Mask] = field(default_factory=dict)
    given_means: Mapping[str, UnitMeans] = field(default_factory=dict, repr=False)
    counted: dict[tuple[object, ...], Any] | None = field(default=None, repr=False, compare=False)
    """What a plan has counted, by what it depends on, so that alternatives are counted by what differs; None
    for a run, whose memory it would take."""
    resampled: dict[tuple[object, ...], tuple[TaskRows, object]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Sizes of rows whose units get other documents' values, kept likewise, by `session.donors`."""
    _outlines: dict[tuple[object, ...], tuple[TaskRows, PackedRows]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def skeleton(self) -> Skeleton:
        """The model without its weights."""
        return self.store.skeleton

    @property
    def mask_model(self) -> MaskModel:
        """The model as mask files name it."""
        source, skeleton = self.store.manifest.source, self.skeleton
        return MaskModel(
            id=source.id,
            revision=source.revision,
            model_type=skeleton.config.model_type,
            layers=skeleton.layers,
            heads=skeleton.heads,
            digest=source.digest,
        )

    @property
    def pair_settings(self) -> tuple[tuple[TaskRows, TaskRows], ...]:
        """The training documents that are patched, by task and shot count: as they are, and corrupted."""
        clean = {(rows.task, rows.shots): rows for rows in self.train}
        return tuple((clean[rows.task, rows.shots], rows) for rows in self.corrupted)

    def pack(self, task: TaskRows, documents: slice = slice(None), *, gold_only: bool = False) -> PackedTask:
        """Pack a slice of a task's documents; rows are planned when they are first asked for, and kept."""
        part = replace(task, documents=task.documents[documents])
        options = self._table(task).table.options(part, self.limits)
        plan = partial(self._rows, self.texts.rows, part, options, gold_only)
        return PackedTask(part, options, first_options(part.documents), plan)

    def outline(
        self, task: TaskRows, documents: slice = slice(None), *, gold_only: bool = False
    ) -> PackedRows:
        """Return the rows of a slice of a task's documents in their sizes alone, without content."""
        # A plan asks for the same ones again and again. The task is kept with them, so that its id stays its.
        key = (id(task), documents.start, documents.stop, documents.step, gold_only)
        if key not in self._outlines:
            self._outlines[key] = task, self._outline(task, documents, gold_only)
        return self._outlines[key][1]

    def _outline(self, task: TaskRows, documents: slice, gold_only: bool) -> PackedRows:
        part = replace(task, documents=task.documents[documents])
        if self.sample_note:
            return estimated_rows(part.documents, self.limits.row_tokens, gold_only=gold_only)
        options = self._table(task).table.options(part, self.limits)
        return self._rows(self.texts.outline, part, options, gold_only)

    def _table(self, task: TaskRows) -> KeptTable:
        return self.tables[TableName(task.task, task.shots, task.labels)]

    def _rows(
        self,
        keep: Callable[[str, str, Callable[[], PackedRows]], PackedRows],
        task: TaskRows,
        options: TaskOptions,
        gold_only: bool,
    ) -> PackedRows:
        kept = self._table(task)
        numbers = kept.table.option_numbers(task)
        counts = np.array([len(document.gold) for document in task.documents])
        packing = f"{self.limits.row_tokens} {gold_only} {len(counts)} ".encode()
        name = hashlib.sha256(packing + counts.tobytes() + numbers.tobytes()).hexdigest()[:24]
        return keep(kept.key, name, lambda: packed(task, options, gold_only=gold_only))

    @cached_property
    def random_sequences(self) -> RandomSequences:
        """The sequences that heads are scored on; raises InputError where the model allows none."""
        return sequences_for(self.store, self.limits, self.options.seed)

    @cached_property
    def tasks_digest(self) -> str:
        """SHA-256 over all texts, tokens, labels and demonstrations of both parts."""
        summed = hashlib.sha256()
        for task in self._all_documents:
            kept = self._table(task)
            summed.update(repr((task.task, task.shots, task.split, kept.digest)).encode())
            summed.update(np.array([document.index for document in task.documents]).tobytes())
            summed.update(kept.table.option_numbers(task).tobytes())
        return summed.hexdigest()

    @property
    def _all_documents(self) -> tuple[TaskRows, ...]:
        certify = (task for task in self.certify if task.documents)
        controls = (*self.label_controls, *self.train_controls, *self.corrupted)
        return (*self.evaluate, *self.train, *self.importance, *certify, *controls)


def task_names(options: RunOptions) -> tuple[str, ...]:
    """Return the tasks asked for; where none are named the demo's own, those that small models learn from
    demonstrations, or the paper's 14; none where a run takes only prompts that are given.
    """
    if not options.takes_tasks:
        return ()
    if options.tasks is not None:
        return expanded_names(expanded(options.tasks))
    if options.model in PACKAGED_MODEL_NAMES:
        return LEARNT_PAIR_TASKS
    return DEMO_TASKS if options.model == DEMO else PAPER_TASKS


def open_tasks(options: RunOptions) -> list[OpenTask]:
    """Load every task's definition and rows."""
    check_data_dir(options.data_dir)
    return [open_task(name, options.data_dir) for name in task_names(options)]


@dataclass(frozen=True)
class ModelBasis:
    """What a run has before its documents: the model, planned, and how its tokenizer is used."""

    options: RunOptions
    located: ModelLocation
    store: Store
    tokenizer: Any
    form: TextForm
    limits: PackingLimits
    texts: KeptTexts

    @classmethod
    def of(cls, options: RunOptions, progress: Progress, *, needs_weights: bool) -> "ModelBasis":
        """Find the model; raise InputError where weights that are needed are not there."""
        located = find_model(options, progress)
        if needs_weights and located.checkpoint is not None:
            located.checkpoint.check_weights()
        store = plan_store(located, options.weights)
        if needs_weights and not store.is_written:
            try_writing(store.folder)
        tokenizer = load_tokenizer(store.tokenizer_folder)
        form = text_form(options, store, tokenizer)
        limits = packing_limits(form, store, tokenizer)
        texts = KeptTexts(options.resolved_store_dir / FOLDER)
        check_names(task_names(options))
        return cls(options, located, store, tokenizer, form, limits, texts)

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 over what the tokenizer does to texts."""
        return tokenizer_digest(self.tokenizer)

    @cached_property
    def tokenise(self) -> Tokenise:
        """The tokenizer as a function of texts."""
        return text_tokeniser(self.tokenizer)

    @cached_property
    def rows_digests(self) -> dict[str, str]:
        """Digests of the rows of all tasks; what comes from the hub is loaded for that."""
        check_data_dir(self.options.data_dir)
        folder = self.options.data_dir
        return {
            name: rows_digest(name, folder) or open_task(name, folder).rows_digest
            for name in task_names(self.options)
        }

    def texts_are_kept(self) -> bool:
        """Tell whether an earlier command tokenised the texts of all tasks and shot counts."""
        options, fields = self.options, tuple(part_limits(self.options))
        return all(
            self.texts.has_table(
                table_key(
                    options,
                    TableName(name, shots, "right"),
                    fields,
                    digest,
                    self.tokenizer_digest,
                    self.limits,
                )
            )
            for name, digest in self.rows_digests.items()
            for shots in options.resolved_shots
        )

    def with_texts(self, tasks: Sequence[OpenTask], progress: Progress) -> Prepared:
        """Return the run with the texts of all its documents, found or made."""
        check_objective(self.options, tasks)
        maker = TextMaker(self.options, self.limits, self.tokenise, self.tokenizer_digest, self.texts)
        documents = documents_of(tasks, maker, progress)
        check_ids((kept.table.tokens.tokens for kept in maker.tables.values()), self.store)
        return self._prepared(documents, maker.tables)

    @cached_property
    def _sample_key(self) -> str:
        return sample_key(self.options, self.rows_digests, self.tokenizer_digest, self.limits)

    def has_sample(self) -> bool:
        """Tell whether an earlier plan kept the sizes of these documents."""
        return has_sample(self.texts.folder, self._sample_key)

    def sampled(self, tasks: Callable[[], Sequence[OpenTask]], progress: Progress) -> Prepared:
        """Return the run with the sizes of its documents, found or estimated from a few."""
        sample = kept_sample(self.texts.folder, self._sample_key)
        if sample is None:
            maker = SampledTexts(self.options, self.limits, self.tokenise)
            check_objective(self.options, tasks())
            made = documents_of(tasks(), maker, progress, only_sizes)
            sample = SampledDocuments(made.by_field, made.notes, made.pair_notes)
            keep_sample(self.texts.folder, self._sample_key, sample)
        return replace(self._prepared(sample, {}), sample_note=sample.note)

    def _prepared(self, documents: TaskDocuments, tables: Mapping[TableName, KeptTable]) -> Prepared:
        by_field, options = documents.by_field, self.options
        vocabulary = self.store.skeleton.vocabulary
        given = prompt_files(options, self.tokenizer, self.tokenise, self.limits, vocabulary)
        documents.check_pairs(options)
        return Prepared(
            self.options,
            self.store,
            self.located,
            self.form,
            self.limits,
            evaluate=by_field["evaluate"],
            train=by_field["train"],
            importance=by_field["importance"],
            curves=by_field["curves"],
            tables=tables,
            texts=self.texts,
            certify=by_field.get("certify", ()),
            label_controls=by_field["label_controls"],
            train_controls=by_field["train_controls"],
            corrupted=by_field["corrupted"],
            given=given,
            notes=documents.notes,
            pair_notes=documents.pair_notes,
        )


def prepare(options: RunOptions, *, progress: Progress = unseen, needs_weights: bool = False) -> Prepared:
    """Load and check everything but the weights' values; raises InputError before any long work, also where
    weights that are needed are not there.

    Every document is prompted and tokenised once, here, unless an earlier command with the same options did
    it.
    """
    basis = ModelBasis.of(options, progress, needs_weights=needs_weights)
    return basis.with_texts(open_tasks(options), progress)


OpenedTasks = dict[tuple[object, ...], list[OpenTask]]


def prepare_plan(
    options: RunOptions, *, progress: Progress = unseen, opened: OpenedTasks | None = None
) -> Prepared:
    """Load and check as much as a plan needs; raises InputError.

    Where there are many documents, and no earlier command tokenised them, only a few are, and the others have
    sizes by these. `opened`: the tasks that other plans have opened, to which these are added.
    """
    tasks = partial(_opened_once, {} if opened is None else opened, options)
    basis = ModelBasis.of(options, progress, needs_weights=False)
    if basis.texts_are_kept():
        return replace(basis.with_texts(tasks(), progress), counted={})
    if basis.has_sample() or count_prompts(tasks(), options) > MOST_EXACT:
        return replace(basis.sampled(tasks, progress), counted={})
    return replace(basis.with_texts(tasks(), progress), counted={})


def _opened_once(opened: OpenedTasks, options: RunOptions) -> list[OpenTask]:
    key = task_names(options), options.data_dir
    if key not in opened:
        opened[key] = open_tasks(options)
    return opened[key]


def find_model(options: RunOptions, progress: Progress = unseen) -> ModelLocation:
    """Find the model, without converting it."""
    return locate(
        options.model, options.revision, options.weights, options.resolved_store_dir, progress=progress
    )


def with_store(
    prepared: Prepared,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = unseen,
) -> Prepared:
    """Return the same with its store on disk, converted now where it was only planned."""
    store = ensure_store(
        prepared.located,
        prepared.store.manifest.weights,
        announce=announce,
        progress=progress,
        waits=not prepared.options.no_wait,
    )
    return replace(prepared, store=store)
