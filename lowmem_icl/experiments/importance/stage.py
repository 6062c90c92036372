"""One part of a run: the gradients of the training documents, of the whole model or of a pruned one."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from lowmem_icl.engine.cost import gradients_cost, operations
from lowmem_icl.engine.passes import unit_gradients
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.experiments.importance import measure as importance
from lowmem_icl.masks.mask import Mask
from lowmem_icl.session.parts import Draft
from lowmem_icl.session.work import Work
from lowmem_icl.tasks.packing import PackedTask

FIELDS = ("head_absolute", "head_signed", "ffn_absolute", "ffn_signed", "logprobs")


def unit_gradient_arrays(
    work: Work, experiment: str, part: str, label: str, masks: Sequence[Mask] | None = None
) -> dict[str, NDArray[Any]]:
    """Return the unit gradients of the training documents by task, from a part's file or from two reads of the weights.

    `masks`: the heads that each task's model lacks. Names are `<place of the task>.<field of UnitGradients>`.
    """
    tasks, skeleton = work.prepared.importance, work.model.skeleton

    def make(draft: Draft) -> dict[str, NDArray[Any]]:
        packed = [work.prepared.pack(task, gold_only=True) for task in tasks]
        gradients = [
            UnitGradients.unmade(
                len(task.task.documents), task.packed.option_count, skeleton.layers, skeleton.heads
            )
            for task in packed
        ]

        def arrays() -> dict[str, NDArray[Any]]:
            return {
                f"{number}.{name}": array
                for number, gradient in enumerate(gradients)
                for name, array in gradient.arrays().items()
            }

        def after_block() -> None:
            draft.now_and_then()
            work.check_time(experiment)

        draft.begin(arrays)
        total = operations(gradients_cost([task.packed for task in packed], skeleton.layers), skeleton)
        with work.progress(label, total, "operations") as advance:
            unit_gradients(
                work.model,
                [task.packed.rows for task in packed],
                [partial(importance.choose_gold, task) for task in packed],
                gradients,
                limits=work.limits,
                cache=work.cache,
                masks=masks,
                after_block=after_block,
                account=work.account(advance),
            )
        return arrays()

    return work.parts.get_or_make(part, make)


def importance_of(
    work: Work, task: PackedTask, number: int, arrays: Mapping[str, NDArray[Any]]
) -> importance.Importance:
    """Return the scores of the task at a place from what `unit_gradient_arrays` returned."""
    return importance.importance(
        task,
        *(arrays[f"{number}.{name}"] for name in FIELDS),
        last_layer_by_continuation=work.options.protocol_choices.last_layer_by_continuation,
    )
