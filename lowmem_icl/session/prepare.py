"""Everything that must be right before the first sweep: the store, the tasks, the packed rows."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from lowmem_icl.conversion.locate import ModelLocation, ensure_store, load_tokenizer, locate, plan_store
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskModel
from lowmem_icl.model.store import Store
from lowmem_icl.options import DEMO, RunOptions
from lowmem_icl.system.progress import Progress, unseen
from lowmem_icl.tasks.demonstrations import Demonstrations
from lowmem_icl.tasks.gradient_documents import gradient_documents
from lowmem_icl.tasks.loading import Fits, OpenTask, Part, TaskRows, open_task
from lowmem_icl.tasks.packing import PackedTask, PackingLimits, Tokenise, fit_context, pack, tokenise_options
from lowmem_icl.tasks.random_sequences import RandomSequences, drawable_ids, random_sequences
from lowmem_icl.tasks.sources import DEMO_TASKS, PAPER_TASKS


@dataclass(frozen=True)
class Prepared:
    """A run's model and documents, checked and tokenisable.

    `evaluate`, `train`: the documents of every task and shot count, in the same order; `importance`: the training documents
    whose gradients are taken; `curves`: the first of `evaluate`, as many as pruning curves are judged on. The store may be only planned, with sizes and no files: `with_store` makes it.
    """

    store: Store
    tokenise: Tokenise
    limits: PackingLimits
    evaluate: tuple[TaskRows, ...]
    train: tuple[TaskRows, ...]
    importance: tuple[TaskRows, ...]
    curves: tuple[TaskRows, ...]
    located: ModelLocation

    @property
    def mask_model(self) -> MaskModel:
        """The model as mask files name it."""
        source, skeleton = self.store.manifest.source, self.store.skeleton
        return MaskModel(
            id=source.id,
            revision=source.revision,
            model_type=skeleton.config.model_type,
            layers=skeleton.layers,
            heads=skeleton.heads,
            digest=source.digest,
        )

    def pack(self, task: TaskRows, places: slice = slice(None), *, gold_only: bool = False) -> PackedTask:
        """Pack a slice of a task's documents."""
        return pack(
            replace(task, documents=task.documents[places]), self.tokenise, self.limits, gold_only=gold_only
        )

    def random_sequences(self, seed: int) -> RandomSequences:
        """Draw the sequences that heads are scored on; raise InputError where the model allows none."""
        tokenizer = load_tokenizer(self.store.tokenizer_folder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        form = {} if backend is None else json.loads(backend.to_str())
        skeleton = self.store.skeleton
        drawable = drawable_ids(form, tokenizer.all_special_ids, skeleton.vocabulary)
        bos = tokenizer.bos_token_id
        return random_sequences(
            drawable, self.limits.empty_context if bos is None else bos, skeleton.context_tokens, seed
        )

    @property
    def tasks_digest(self) -> str:
        """SHA-256 over all texts, labels and demonstrations of both parts."""
        summed = hashlib.sha256()
        for task in (*self.evaluate, *self.train, *self.importance):
            summed.update(repr((task.task, task.shots, task.split)).encode())
            for document in task.documents:
                summed.update(repr((document.index, document.options, document.gold)).encode())
        return summed.hexdigest()


def task_names(options: RunOptions) -> tuple[str, ...]:
    """Return the tasks asked for: the demo's own, or the paper's 14, where none are named."""
    if options.tasks is not None:
        return options.tasks
    return DEMO_TASKS if options.model == DEMO else PAPER_TASKS


def open_tasks(options: RunOptions) -> list[OpenTask]:
    """Load every task's definition and rows."""
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise InputError(
            f"--data-dir {options.data_dir} does not exist; give the folder that holds <task>/*.jsonl"
        )
    return [open_task(name, options.data_dir) for name in task_names(options)]


def documents(
    options: RunOptions, tasks: list[OpenTask], part: Part, limit: int | None, fits: Fits
) -> tuple[TaskRows, ...]:
    """Return the documents of all tasks and shot counts of a part; `fits` tells whether options fit the model."""
    how = Demonstrations(options.demonstrations, options.demonstration_sets)
    return tuple(
        task.rows(
            shots=shots,
            part=part,
            limit=limit,
            demonstrations=how,
            protocol=options.protocol_choices,
            fits=fits,
        )
        for task in tasks
        for shots in options.resolved_shots
    )


def find_model(options: RunOptions) -> ModelLocation:
    """Find the model, without converting it."""
    return locate(options.model, options.revision, options.weights, options.resolved_store_dir)


def packing_limits(options: RunOptions, store: Store) -> tuple[PackingLimits, Tokenise]:
    """Return what the model sets for packing, and its tokenizer as a function of texts."""
    tokenizer = load_tokenizer(store.tokenizer_folder)
    skeleton = store.skeleton
    bos = tokenizer.bos_token_id
    use_bos = skeleton.family.adds_bos if options.bos is None else options.bos
    if use_bos and bos is None:
        raise InputError("--bos: the tokenizer has no beginning-of-sequence token; leave the option out")
    if len(tokenizer) > skeleton.vocabulary:
        raise InputError(
            f"{store.tokenizer_folder}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{skeleton.vocabulary}; they do not belong together"
        )
    limits = PackingLimits(
        context_tokens=skeleton.context_tokens,
        row_tokens=PackingLimits.row_tokens_for(skeleton.width),
        empty_context=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0,
        bos=bos if use_bos else None,
    )
    return limits, lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def prepare(options: RunOptions) -> Prepared:
    """Load and check everything but the weights; raises InputError before any long work."""
    located = find_model(options)
    store = plan_store(located, options.weights)
    limits, tokenise = packing_limits(options, store)
    tasks = open_tasks(options)
    fits = partial(fit_context, tokenise=tokenise, limits=limits)
    evaluate = documents(options, tasks, "evaluate", options.limit, fits)
    train = documents(options, tasks, "train", options.resolved_train_limit, fits)
    importance = documents(options, tasks, "train", options.resolved_importance_limit, fits)
    importance = tuple(gradient_documents(task, options.protocol_choices) for task in importance)
    curves = documents(options, tasks, "evaluate", options.resolved_curve_limit, fits)
    for task in (*evaluate, *train, *importance):
        # An option that does not fit is told now, not in the night.
        tokenise_options(task.documents, tokenise, limits, task.task)
    return Prepared(store, tokenise, limits, evaluate, train, importance, curves, located)


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
