"""The prompts and windows of text on which heads are removed, and the jobs that do it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.patch_jobs import PatchJob, RowTokens
from lowmem_icl.experiments.icl_heads.measure import TaskScores
from lowmem_icl.experiments.patch.prompts import END, VectorPrompts, sized_pairs
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.session.failures import Setting
from lowmem_icl.session.part_jobs import Source
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.prompt_pairs.made import Prompt, prompts_of
from lowmem_icl.tasks.prompt_rows import prompt_row, text_row
from lowmem_icl.tasks.text_windows import TextWindows

DOCUMENTS = slice(0, 64)
"""Evaluation documents of every task that heads are removed for."""


@dataclass(frozen=True, eq=False)
class TaskPrompts:
    """The evaluation documents of a task whose prompts fit the context, and these prompts."""

    task: TaskRows
    prompts: tuple[Prompt, ...]
    truncated: int = 0

    @property
    def sources(self) -> list[Source]:
        """Whose the prompts are."""
        setting = Setting.of(self.task)
        return [Source(setting, f"document {prompt.document}") for prompt in self.prompts]

    def jobs(self, changes: Sequence[Mask], means: UnitMeans | None) -> list[PatchJob]:
        """Return a job per document: heads' means in their place at the prompt's last token; read are the
        options, and after them the first tokens of the right ones.
        """
        jobs = []
        for prompt in self.prompts:
            gold = zip(prompt.options, prompt.gold, strict=True)
            firsts = [option[:1] for option, is_gold in gold if is_gold]
            row = prompt_row(prompt.tokens, [*prompt.options, *firsts], whole=False)
            jobs.append(PatchJob(RowTokens(row, END), tuple(changes), means))
        return jobs

    def scores(self, found: Sequence[Scores]) -> TaskScores:
        """Return what the jobs of all documents scored."""
        counts = [len(prompt.options) for prompt in self.prompts]
        parts = list(zip(found, counts, strict=True))
        return TaskScores(
            self.task,
            np.concatenate([score.logprobs[:, :count] for score, count in parts], 1),
            np.concatenate([score.greedy[:, :count] for score, count in parts], 1),
            np.stack([score.greedy[:, count:].any(1) for score, count in parts], 1),
        )


def vector_settings(vectors: Sequence[VectorPrompts]) -> list[VectorPrompts]:
    """Return the prompts that heads are scored on: of all tasks at the largest shot count there is."""
    of_tasks = [prompts for prompts in vectors if prompts.shots is not None]
    most = max((prompts.shots or 0 for prompts in of_tasks), default=0)
    return [prompts for prompts in of_tasks if prompts.shots == most]


def evaluation_prompts(prepared: Prepared, settings: Sequence[VectorPrompts]) -> Iterator[TaskPrompts]:
    """Yield the evaluation prompts of tasks that have function vectors, at their shot counts."""
    rows = {(task.task, task.shots): task for task in prepared.evaluate}
    for setting in settings:
        task = rows[setting.task, setting.shots or 0]
        task = replace(task, documents=task.documents[DOCUMENTS])
        if prepared.sample_note:
            yield TaskPrompts(task, tuple(_sized_prompts(prepared, task)))
            continue
        prompts = prompts_of(prepared.pack(task))
        whole = {prompt.document for prompt in prompts}
        kept = tuple(document for document in task.documents if document.index in whole)
        yield TaskPrompts(replace(task, documents=kept), prompts, len(task.documents) - len(kept))


def _sized_prompts(prepared: Prepared, task: TaskRows) -> Iterator[Prompt]:
    """Yield prompts of the sizes that documents are expected to have, for plans: one option has all that is
    read, the others end where it begins.
    """
    for pair, document in zip(sized_pairs(prepared, task), task.documents, strict=True):
        (option,) = pair.options
        options = (option, *[option[:1]] * (len(document.gold) - 1))
        yield Prompt(document.index, pair.clean, options, document.gold, pair.cluster)


def text_jobs(text: TextWindows, changes: Sequence[Mask], means: UnitMeans | None) -> list[PatchJob]:
    """Return a job per window: heads' means in their place at all tokens."""
    rows = [text_row(window, text.predicted) for window in text.windows]
    return [PatchJob(RowTokens(row, np.arange(len(row))), tuple(changes), means) for row in rows]
