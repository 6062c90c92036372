"""Everything that must be right before the first sweep: the store, the tasks, their tokens and rows."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from lowmem_icl.conversion.locate import ModelLocation, ensure_store, load_tokenizer, locate, plan_store
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskModel
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import check_names
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store
from lowmem_icl.options import DEMO, PACKAGED_MODEL_NAMES, RunOptions
from lowmem_icl.protocols import Labels
from lowmem_icl.rows import PackedRows
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.session.task_texts import KeptTable, LabelControls, TextMaker, part_rows
from lowmem_icl.session.text_form import TextForm, check_ids, packing_limits, text_form, text_tokeniser
from lowmem_icl.session.text_keys import TableName, tokenizer_digest
from lowmem_icl.session.texts import FOLDER, KeptTexts
from lowmem_icl.system.progress import Progress, unseen
from lowmem_icl.tasks.catalogue import DEMO_TASKS, LEARNT_PAIR_TASKS, PAPER_TASKS, expanded
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import NoLabelControl, with_other_labels
from lowmem_icl.tasks.loading import OpenTask, open_task
from lowmem_icl.tasks.packing import (
    PackedTask,
    PackingLimits,
    TaskOptions,
    first_options,
    fit_context,
    packed,
    tokenised,
)
from lowmem_icl.tasks.prompting import DirectPrompter
from lowmem_icl.tasks.random_sequences import RandomSequences, drawable_ids, random_sequences


@dataclass(frozen=True)
class Prepared:
    """A run's model and documents, checked; their texts are tokens already.

    `evaluate`, `train`: the documents of every task and shot count, in the same order; `importance`: the
    training documents whose gradients are taken; `certify`: training documents that share no cluster with
    `train`, () where none are asked for; `curves`: the first of `evaluate`, as many as pruning curves are
    judged on; `label_controls`, `train_controls`: those of `evaluate` and of `train` that have
    demonstrations, with other answers shown. `notes`: what is left out, and why, in sentences. `masks`: those
    that the user gives, by name, to be evaluated as well as the clean model. The store may be only planned,
    with sizes and no files: `with_store` makes it.
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
    notes: tuple[str, ...] = ()
    masks: Mapping[str, Mask] = field(default_factory=dict)

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
        part = replace(task, documents=task.documents[documents])
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
        tokenizer = load_tokenizer(self.store.tokenizer_folder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        form = {} if backend is None else json.loads(backend.to_str())
        skeleton = self.skeleton
        drawable = drawable_ids(form, tokenizer.all_special_ids, skeleton.vocabulary)
        bos = tokenizer.bos_token_id
        first = self.limits.empty_context if bos is None else bos
        return random_sequences(drawable, first, skeleton.context_tokens, self.options.seed)

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
        controls = (*self.label_controls, *self.train_controls)
        return (*self.evaluate, *self.train, *self.importance, *certify, *controls)


def task_names(options: RunOptions) -> tuple[str, ...]:
    """Return the tasks asked for; where none are named the demo's own, those that small models learn from
    demonstrations, or the paper's 14.
    """
    if options.tasks is not None:
        return expanded(options.tasks)
    if options.model in PACKAGED_MODEL_NAMES:
        return LEARNT_PAIR_TASKS
    return DEMO_TASKS if options.model == DEMO else PAPER_TASKS


def open_tasks(options: RunOptions) -> list[OpenTask]:
    """Load every task's definition and rows."""
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise InputError(
            f"--data-dir {options.data_dir} does not exist; give the folder that holds <task>/*.jsonl"
        )
    return [open_task(name, options.data_dir) for name in task_names(options)]


def prepare(options: RunOptions, *, progress: Progress = unseen, needs_weights: bool = False) -> Prepared:
    """Load and check everything but the weights' values; raises InputError before any long work, also where
    weights that are needed are not there.

    Every document is prompted and tokenised once, here, unless an earlier command with the same options did
    it.
    """
    located = find_model(options, progress)
    if needs_weights and located.checkpoint is not None:
        located.checkpoint.check_weights()
    store = plan_store(located, options.weights)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    digest = tokenizer_digest(tokenizer)
    form = text_form(options, store, tokenizer)
    limits, texts = packing_limits(form, store, tokenizer), KeptTexts(options.resolved_store_dir / FOLDER)
    maker = TextMaker(options, limits, text_tokeniser(tokenizer), digest, texts)
    tables: dict[TableName, KeptTable] = {}
    controls = LabelControls(maker, tables)
    documents: dict[str, list[TaskRows]] = {name: [] for name in part_limits(options)}
    check_names(task_names(options))
    wanted = [(task, shots) for task in open_tasks(options) for shots in options.resolved_shots]
    with progress("texts", len(wanted), "tasks") as advance:
        for task, shots in wanted:
            rows, tables[TableName(task.name, shots, "right")] = maker.documents(task, shots)
            controls.add(task, rows)
            if "certify" in rows:
                rows["certify"] = rows["certify"].unrelated_to(rows["train"])
            for name, part_rows in rows.items():
                documents[name].append(part_rows)
            advance(1)
    check_ids((kept.table.tokens.tokens for kept in tables.values()), store)
    return Prepared(
        options,
        store,
        located,
        form,
        limits,
        evaluate=tuple(documents["evaluate"]),
        train=tuple(documents["train"]),
        importance=tuple(documents["importance"]),
        curves=tuple(documents["curves"]),
        certify=tuple(documents.get("certify", ())),
        tables=tables,
        texts=texts,
        label_controls=tuple(controls.found["evaluate"]),
        train_controls=tuple(controls.found["train"]),
        notes=controls.notes(),
    )


def first_prompts(
    options: RunOptions, count: int, labels: Labels = "right"
) -> Iterator[tuple[TextForm, TaskRows, TaskOptions]]:
    """Yield the first `count` evaluation documents of every task and shot count, with their texts and tokens.

    Raises InputError where their demonstrations cannot show such labels. No other document is prompted,
    unless demonstrations are shared: how many a set keeps depends on all documents of a run.
    """
    store = plan_store(find_model(options), options.weights)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    form = text_form(options, store, tokenizer)
    limits, tokenise = packing_limits(form, store, tokenizer), text_tokeniser(tokenizer)
    prompter = DirectPrompter(partial(fit_context, tokenise=tokenise, limits=limits))
    limit = options.resolved_limit
    if options.demonstrations != "shared":
        limit = min(count, limit or count)
    for task in open_tasks(options):
        for shots in options.resolved_shots:
            rows = part_rows(options, task, shots, ("evaluate", limit), prompter)
            first = replace(rows, documents=rows.documents[:count])
            if labels != "right":
                first = _with_labels_asked_for(options, task, first, labels)
            yield form, first, tokenised(first, tokenise, limits)


def _with_labels_asked_for(options: RunOptions, task: OpenTask, rows: TaskRows, labels: Labels) -> TaskRows:
    try:
        return with_other_labels(task, rows, labels, options.protocol_flags, DirectPrompter())
    except NoLabelControl as error:
        raise InputError(
            f"--labels {labels}: task {task.name} has none at {rows.shots} shots: {error}; "
            "ask for right, or for other --shots"
        ) from error


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
    weights = prepared.store.manifest.weights
    return replace(
        prepared, store=ensure_store(prepared.located, weights, announce=announce, progress=progress)
    )
