"""Sweeps of the evaluation split, clean and under masks, shared by the stages that need them."""

from collections.abc import Mapping
from typing import Any

from lowmem_icl.experiments.evaluate import measure as evaluate
from lowmem_icl.masks.mask import Mask
from lowmem_icl.session.work import EVALUATE_CHUNK, Row, Work


def evaluation_rows(
    work: Work, experiment: str, answers: list[dict[str, Any]] | None, masks: Mapping[str, Mask]
) -> list[Row]:
    """Return the result rows of all tasks clean and under masks, in an experiment's time.

    Option scores are added to `answers`, if given.
    """
    tasks = work.prepared.evaluate
    named = {evaluate.CLEAN: Mask()} | dict(masks)
    wanted = [tuple(named.values())] * len(tasks)
    scores = work.sweep_in_chunks(experiment, "evaluate", "evaluate", tasks, wanted, EVALUATE_CHUNK)
    rows: list[Row] = []
    for task, score in zip(tasks, scores, strict=True):
        packed = work.prepared.pack(task)
        for (name, mask), logprobs, greedy in zip(named.items(), score.logprobs, score.greedy, strict=True):
            rows += evaluate.evaluation_rows(packed, name, mask, logprobs, greedy, work.options.seed)
            if answers is not None:
                answers.append(evaluate.answer_columns(packed, name, logprobs))
    return rows
