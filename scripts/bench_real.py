"""The sweep on a real model against Hugging Face's own with hooks: both sides' parts, and the comparison."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from bench_common import Side, in_child
from bench_peers import HuggingFace
from bench_results import Say, ablations_of, compared
from bench_sides import BenchTask, Inputs, Row, arithmetic
from safetensors.torch import load_file

from lowmem_icl.errors import InputError
from lowmem_icl.experiments.ablate.measure import ablated_units
from lowmem_icl.model.store import NON_LAYER, Store, Weights, is_store, open_store
from lowmem_icl.options import RunOptions
from lowmem_icl.session.prepare import Prepared, prepare, with_store
from lowmem_icl.tasks.packing import PackedTask

TASKS = ("copa", "arc_easy")
SHOTS = (0, 5)
LARGEST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class RealTask(BenchTask):
    """The first documents of a task for a real model, which our side holds in these weights."""

    weights: Weights = "float32"

    BATCH_SIZES: ClassVar[tuple[int, ...]] = (1, 4, 8, 16, 32)
    TUNING_SHARE: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """The task as results name it."""
        return f"{self.name}, {self.shots}-shot, {self.weights}"

    def store(self) -> Store:
        """Return the weights of our side."""
        return _prepared(self.inputs, self.documents, self.weights).store

    def packed_task(self) -> PackedTask:
        """Return the documents as a run packs them, not packed yet."""
        prepared = _prepared(self.inputs, self.documents, self.weights)
        wanted = (self.name, self.shots)
        (task,) = (task for task in prepared.evaluate if (task.task, task.shots) == wanted)
        return prepared.pack(task)

    def peer(self, kind: str) -> Any:
        """Return Hugging Face's model with the weights of our float32 side."""
        return hugging_face(replace(self, weights="float32").store().folder)


@cache
def _prepared(inputs: Inputs, documents: int, weights: Weights) -> Prepared:
    """Return the documents of all tasks and the store, converted where it is not there."""
    options = RunOptions(
        model=inputs.model, weights=weights, store_dir=inputs.folder / "stores", data_dir=inputs.data_dir,
        tasks=TASKS, shots=SHOTS, limit=documents, train_limit=1, demonstrations="shared",
        demonstration_sets=1, labels=("right",), experiments=("evaluate",), device="cpu",
    )  # fmt: skip
    return with_store(prepare(options))


@cache
def hugging_face(store_folder: Path) -> HuggingFace:
    """Return transformers' own model, filled with the tensors of a float32 store, with hooks."""
    from transformers import AutoModelForCausalLM

    store = open_store(store_folder)
    skeleton = store.skeleton
    tensors = load_file(store.folder / NON_LAYER)
    for layer, path in enumerate(store.layer_paths):
        for name, value in load_file(path).items():
            whole = value.t() if name in skeleton.transposed_weights else value
            tensors[f"{skeleton.blocks_name}.{layer}.{name}"] = whole
    # The fast attention of transformers knows no cap on its logits.
    attention = "eager" if getattr(skeleton.config, "attn_logit_softcapping", None) else "sdpa"
    model = AutoModelForCausalLM.from_config(
        skeleton.config, dtype=torch.float32, attn_implementation=attention
    )
    if {name for name, _ in model.named_parameters()} != tensors.keys():
        raise RuntimeError(f"{store_folder}: expected the parameters of transformers' model, got others")
    model.load_state_dict(tensors, strict=False)
    return HuggingFace(model.eval())


def forms_of(model: str) -> tuple[Weights, ...]:
    """Return the weights in which our side holds a model; raise InputError for a store not in float32."""
    if not is_store(Path(model)):
        return ("float32", "int8")
    weights = open_store(Path(model)).manifest.weights
    if weights != "float32":
        raise InputError(f"--model {model}: expected a store in float32, which the peer needs, got {weights}")
    return (weights,)


def layers_and_heads(inputs: Inputs, forms: Sequence[Weights]) -> tuple[int, int]:
    """Convert the model into every form; return how many layers and heads it has."""
    stores = [_prepared(inputs, inputs.documents, weights).store for weights in forms]
    return stores[0].skeleton.layers, stores[0].skeleton.heads


def real_model(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Case real: every unit of a real model alone, at 0 and 5 shots, against one hooked pass an ablation."""
    forms = forms_of(inputs.model)
    units = ablated_units(*in_child(layers_and_heads, inputs, forms))
    masks = [unit.as_mask() for unit in units]
    rows: list[Row] = []
    with ExitStack() as stack:
        us, them = stack.enter_context(Side()), stack.enter_context(Side())
        threads = us.call(torch.get_num_threads), them.call(torch.get_num_threads)
        if len(set(threads)) > 1:
            raise RuntimeError(f"expected as many threads on both sides, got {threads}")
        for shots in SHOTS:
            allowed = []
            for name in TASKS:
                tasks = [RealTask(inputs, name, shots, inputs.documents, weights) for weights in forms]
                allowed.append(us.call(arithmetic, tasks[0], masks))
                for task, row in zip(
                    tasks,
                    ablations_of(tasks, masks, inputs.peer_units, us, {"HuggingFace": them}),
                    strict=True,
                ):
                    check_equal(row, task.weights)
                    say(
                        f"case {case}, {row['task']}: ours {row['ours_seconds']:.0f} s, {row['peer']} "
                        f"{row['peer_seconds']:.0f} s (batches of {row['batch_size']})"
                    )
                    rows.append({"case": case, "shots": shots, "weights": task.weights} | row)
            arithmetic_ratio = sum(theirs for theirs, _ in allowed) / sum(ours for _, ours in allowed)
            same = {"model": inputs.model, "documents": inputs.documents, "threads": threads[0]}
            rows += totals(rows, shots, same | {"arithmetic_ratio": arithmetic_ratio})
    return rows


def check_equal(row: Row, weights: Weights) -> None:
    """Stop where both sides' scores differ in the same precision: then no ratio means anything."""
    if weights == "float32" and not row["largest_difference"] <= LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"{row['task']}: scores differ by up to {row['largest_difference']:.2g} nats, expected at most "
            f"{LARGEST_DIFFERENCE:g}"
        )


def totals(rows: Sequence[Row], shots: int, more: Row) -> Iterator[Row]:
    """Yield the comparison over all tasks at a shot count, by the weights of our side."""
    here = sorted(
        (row for row in rows if row["shots"] == shots and "task" in row), key=lambda row: row["weights"]
    )
    for weights, members in groupby(here, key=lambda row: row["weights"]):
        of_tasks = list(members)
        yield compared(
            f"real {shots}-shot" + ("" if weights == "float32" else f", {weights}"),
            of_tasks[0]["peer"],
            sum(row["ours_seconds"] for row in of_tasks),
            sum(row["peer_seconds"] for row in of_tasks),
            max(row["largest_difference"] for row in of_tasks),
            shots=shots,
            weights=weights,
            sampled=of_tasks[0]["sampled"],
            **more,
        )
