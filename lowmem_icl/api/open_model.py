"""A model that is open: its layers streamed from the store, for as many questions as a user has."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from lowmem_icl.api.options import check_only, checked_options
from lowmem_icl.api.progress import Shown, progress_of
from lowmem_icl.api.task import Task
from lowmem_icl.api.words import python_errors
from lowmem_icl.conversion.locate import ensure_store
from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import operations, sweep_cost
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import Job
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskModel
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store, is_store, open_store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions, run_options
from lowmem_icl.planning.memory import FREE_SHARE, MemoryPlan, plan_memory
from lowmem_icl.planning.plan import check_memory
from lowmem_icl.session.parts import Parts
from lowmem_icl.session.prepare import ModelBasis, Prepared
from lowmem_icl.session.work import Work
from lowmem_icl.system.machine import device_allowance, device_in_use, resolved_device
from lowmem_icl.system.memory import check_memory_given, free_memory
from lowmem_icl.system.progress import PartProgress, Progress
from lowmem_icl.tasks.packing import PackingLimits

MODEL_OPTIONS = ("model", "revision", "weights", "store_dir", "bos", "memory", "device_memory", "device")


class OpenModel:
    """A model that answers questions, its layers streamed from its store; use as a context manager.

    Made by `open_model`. What it holds keeps to `memory`, dealt out anew for every question; what does not
    fit lies in a temporary folder until it is closed.

    >>> import lowmem_icl as icl
    >>> with icl.open_model("demo") as model:
    ...     model.skeleton.layers, model.skeleton.heads
    (4, 8)
    """

    def __init__(self, basis: ModelBasis) -> None:
        self.basis = basis
        self._files = tempfile.TemporaryDirectory(prefix="lowmem-icl-", ignore_cleanup_errors=True)
        self._streamed: tuple[tuple[int, bool], StreamedModel] | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory and files; a closed model answers nothing."""
        self._is_closed = True
        self._close_streamed()
        self._files.cleanup()

    def __repr__(self) -> str:
        skeleton, source = self.skeleton, self.store.manifest.source
        return (
            f"OpenModel({source.id!r} in {self.store.manifest.weights}: {skeleton.layers} layers of "
            f"{skeleton.heads} heads, {self.store.size_bytes / 1e9:.2g} GB on disk"
            f"{', closed' if self._is_closed else ''})"
        )

    @property
    def store(self) -> Store:
        """The store on disk."""
        return self.basis.store

    @property
    def skeleton(self) -> Skeleton:
        """The model's shape: layers, heads, widths, its transformers config."""
        return self.store.skeleton

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""
        return self.basis.tokenizer

    @property
    def limits(self) -> PackingLimits:
        """How many tokens a prompt may have, and what stands before it."""
        return self.basis.limits

    @property
    @python_errors
    def mask_model(self) -> MaskModel:
        """The model as mask files name it."""
        return self._prepared_without_tasks().mask_model

    @property
    def options(self) -> RunOptions:
        """What it was opened with."""
        return self.basis.options

    def prepared(self, task: Task, progress: Progress, **settled: Any) -> Prepared:
        """Return a task's documents as this model's tokens; settled: options that a caller decides."""
        self._check_open()
        options = {name: getattr(self.options, name) for name in MODEL_OPTIONS}
        of_task = {name: getattr(task.options, name) for name in task.options.model_fields_set}
        given = {**of_task, **options, **settled, "out": Path(self._files.name)}
        basis = replace(self.basis, options=run_options(given))
        return basis.with_texts([task.opened], progress)

    @contextmanager
    def work(self, prepared: Prepared, progress: Progress) -> Iterator[Work]:
        """Give what does the parts of experiments, for one question; its files go when it is left."""
        memory = check_memory(prepared)
        with (
            tempfile.TemporaryDirectory(dir=self._files.name) as folder,
            self._streaming(memory) as model,
            CleanCache(memory.cache_bytes, memory.spill_bytes, Path(folder)) as cache,
        ):
            yield Work(prepared, model, memory.limits(), cache, Parts(Path(folder)), _of_parts(progress))

    @python_errors
    def sweep(self, jobs: Sequence[Job], progress: Shown = True) -> list[Scores]:
        """Return the scores of jobs: packed rows, each under all of its masks, sharing every read of the
        weights.

        Raises DoesNotFit where the longest row does not fit the memory.
        """
        rows = [row for job in jobs for row in job.packed.rows]
        longest = max((len(row) + (0 if row.stem is None else len(row.stem)) for row in rows), default=1)
        allowed = device_allowance(self._device, self.options.device_memory, FREE_SHARE)
        memory = plan_memory(self._prepared_without_tasks(), longest, allowed)
        skeleton, limits = self.skeleton, memory.limits()
        total = operations(sweep_cost(jobs, skeleton.width, skeleton.layers, limits), skeleton)
        with (
            self._streaming(memory) as model,
            CleanCache(memory.cache_bytes, memory.spill_bytes, Path(self._files.name)) as cache,
            progress_of(progress)("scoring", total, "operations") as advance,
        ):
            setup = PassSetup(model, limits, cache, lambda cost: advance(operations(cost, skeleton)))
            return sweep(setup, jobs)

    @property
    def _device(self) -> Any:
        return resolved_device(self.options.device)

    def _prepared_without_tasks(self) -> Prepared:
        self._check_open()
        basis = self.basis
        options = basis.options.model_copy(update={"out": Path(self._files.name)})
        return Prepared(
            *(options, basis.store, basis.located, basis.form, basis.limits),
            evaluate=(),
            train=(),
            importance=(),
            curves=(),
            tables={},
            texts=basis.texts,
        )

    @contextmanager
    def _streaming(self, memory: MemoryPlan) -> Iterator[StreamedModel]:
        """Give the model, opened again where memory is dealt out otherwise than before."""
        wanted = memory.resident_bytes, memory.tables_in_memory
        with device_in_use(self._device, self.options.device_memory):
            if self._streamed is None or self._streamed[0] != wanted:
                self._close_streamed()
                model = StreamedModel(
                    self.store,
                    device=self._device,
                    resident_bytes=memory.resident_bytes,
                    tables_in_memory=memory.tables_in_memory,
                )
                self._streamed = wanted, model
            yield self._streamed[1]

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError("model: expected an open model, got one that is closed; open it again")

    def _close_streamed(self) -> None:
        if self._streamed is not None:
            self._streamed[1].__exit__()
            self._streamed = None


def _of_parts(progress: Progress) -> PartProgress:
    return lambda stage, label, total, ablations: progress(label, total, "operations")


def _with_allowance(options: RunOptions) -> RunOptions:
    """Return options that say how much may be held, of what is free now: what a model holds between questions
    is not free any more, and must not make the next one's share smaller.
    """
    device = resolved_device(options.device)
    check_memory_given(options.memory)
    memory = options.memory or int(free_memory() * FREE_SHARE)
    of_device = device_allowance(device, options.device_memory, FREE_SHARE)
    return options.model_copy(update={"memory": memory, "device_memory": of_device})


@python_errors
def open_model(
    model: str = "demo",
    *,
    weights: str | None = None,
    memory: str | int | None = None,
    progress: Shown = True,
    **options: Any,
) -> OpenModel:
    """Open a model: `demo`, a store, a checkpoint folder, a `.gguf` file or a model's id on the hub.

    weights: `int8` (the default), `bfloat16`, `float32` or `nf4`; a store has its own. memory: what may be
    held, in bytes or as a text such as 6GB; 80 % of what is free by default. options: `revision`,
    `store_dir`, `bos`, `device`, `device_memory`, as `run` takes them. A checkpoint is converted to a store
    first, unless that is there.
    Raises InputError or DoesNotFit naming what to change.

    >>> import lowmem_icl as icl
    >>> with icl.open_model("demo") as model:
    ...     print(model)
    OpenModel('demo' in int8: 4 layers of 8 heads, 0.0023 GB on disk)
    """
    path = Path(model).expanduser()
    if weights is None and is_store(path):
        weights = open_store(path).manifest.weights
    given = {"model": model, "weights": weights, "memory": memory, **options}
    check_only(given, MODEL_OPTIONS)
    checked = _with_allowance(checked_options({**given, "experiments": ("evaluate",)}))
    shown = progress_of(progress)
    basis = ModelBasis.of(checked, shown, needs_weights=True)
    store = ensure_store(basis.located, basis.store.manifest.weights, progress=shown)
    return OpenModel(replace(basis, store=store))
