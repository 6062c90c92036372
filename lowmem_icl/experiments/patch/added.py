"""Function vectors added to prompts without demonstrations: how often the answer then comes, beside a random
vector as long and another task's (Todd et al. 2024, section 3.1).

Axis letters: N prompts, L layers, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.patch_jobs import Addition, Change, PatchJob, RowTokens
from lowmem_icl.experiments.patch.prompts import END, VectorPrompts
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.statistics.intervals import CHANGE, PROPORTION, mean_interval
from lowmem_icl.tasks.prompt_pairs.made import NoPromptPairs, Prompt, prompts_of
from lowmem_icl.tasks.prompt_rows import prompt_row

Vectors = NDArray[np.float32]

MOST_DOCUMENTS = 64
"""Prompts of every task that vectors are added to."""
FEWEST_HEADS = 10
LARGEST_SHARE = 0.25
TOP_SHARE = 0.02
"""Yin and Steinhardt's (2025); Todd et al.'s ten of GPT-J's 448 heads are as many."""
METHODS = ("own", "other_task", "random")
METRIC = "first_token_acc"


def top_heads(scores: NDArray[np.float64], heads: Sequence[Unit]) -> Mask:
    """Return the heads whose mean outputs make up a function vector, by their scores [H]: TOP_SHARE of them,
    at least ten where that is no more than a quarter.
    """
    least = min(FEWEST_HEADS, max(1, int(LARGEST_SHARE * len(heads))))
    count = max(least, round(TOP_SHARE * len(heads)))
    best = np.argsort(-scores, kind="stable")[:count]
    return Mask(frozenset((heads[index].layer, int(heads[index].head or 0)) for index in best))


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """A task's prompts without demonstrations, and the prompts that its vector is made of."""

    vectors: VectorPrompts
    split: str
    prompts: tuple[Prompt, ...]


def zero_shot(prepared: Prepared, vectors: Sequence[VectorPrompts]) -> list[ZeroShot]:
    """Return the first evaluation documents without demonstrations of every task that has a vector."""
    by_task = {task.task: task for task in prepared.evaluate if task.shots == 0}
    found = []
    for of_task in vectors:
        if (task := by_task.get(of_task.task)) is None or of_task.shots is None:
            continue
        if prepared.sample_note:
            rows = prepared.outline(task, slice(0, MOST_DOCUMENTS)).rows
            tokens = sum(map(len, rows)) // max(1, len(task.documents[:MOST_DOCUMENTS]))
            prompts = tuple(
                Prompt(document.index, (0,) * max(1, tokens), ((0,),), (True,), "")
                for document in task.documents[:MOST_DOCUMENTS]
            )
        else:
            try:
                prompts = prompts_of(prepared.pack(task, slice(0, MOST_DOCUMENTS)))
            except NoPromptPairs:
                continue
        if prompts:
            found.append(ZeroShot(of_task, task.split, prompts))
    return found


def jobs_of(found: Sequence[ZeroShot], layers: int, vectors: Mapping[str, Vectors]) -> list[PatchJob]:
    """Return a job per prompt: every vector added at every layer's output, at the prompt's last token; read
    is the first token of the right answer. `vectors` by `name_of`; empty before there are any.
    """
    jobs = []
    for index, of_task in enumerate(found):
        names = [name_of(index, method) for method in methods_of(found)]
        changes: tuple[Change, ...] = (
            Mask(),
            *(Addition(layer, name) for name in names for layer in range(layers)),
        )
        given = {name: vectors[name] for name in names if name in vectors}
        for prompt in of_task.prompts:
            row = prompt_row(prompt.tokens, [prompt.right[:1]], whole=False)
            jobs.append(PatchJob(RowTokens(row, END), changes, vectors=given))
    return jobs


def name_of(index: int, method: str) -> str:
    """Return the name of a setting's own vector, of another task's or of a random one."""
    return f"{index}-{method}"


def methods_of(found: Sequence[ZeroShot]) -> list[str]:
    """Return what is added: another task's vector only where there is one."""
    tasks = {of_task.vectors.task for of_task in found}
    return [method for method in METHODS if method != "other_task" or len(tasks) > 1]


def other_of(found: Sequence[ZeroShot], index: int) -> int:
    """Return which setting's vector stands for another task's: the next one of another task, of as many shots
    where there is one.
    """
    own = found[index].vectors
    others = [(index + step) % len(found) for step in range(1, len(found))]
    unlike = [other for other in others if found[other].vectors.task != own.task]
    alike = [other for other in unlike if found[other].vectors.shots == own.shots]
    return (alike or unlike)[0]


def named_vectors(found: Sequence[ZeroShot], own: Sequence[Vectors], seed: int) -> dict[str, Vectors]:
    """Return all vectors by name, from every setting's own, [D] each."""
    vectors: dict[str, Vectors] = {}
    for index, vector in enumerate(own):
        vectors[name_of(index, "own")] = vector
        if "other_task" in methods_of(found):
            vectors[name_of(index, "other_task")] = own[other_of(found, index)]
        drawn = np.random.default_rng([seed, index]).standard_normal(len(vector))
        scaled = drawn / np.linalg.norm(drawn) * np.linalg.norm(vector)
        vectors[name_of(index, "random")] = scaled.astype(np.float32)
    return vectors


def records(
    found: Sequence[ZeroShot], layers: int, heads: int, scores: Iterator[Scores]
) -> Iterator[dict[str, Any]]:
    """Yield how often the right answer's first token is what the model would say, without a vector and with
    each at every layer, and what it gains.
    """
    told: set[str] = set()
    for index, of_task in enumerate(found):
        # [1 + vectors · L, N]
        said = np.stack([next(scores).greedy[:, 0] for _ in of_task.prompts], 1).astype(np.float64)
        clusters = [prompt.cluster for prompt in of_task.prompts]
        same = {
            "procedure": "added", "task": of_task.vectors.task, "shots": 0, "split": of_task.split,
            "mask_task": of_task.vectors.task, "mask_shots": of_task.vectors.shots, "labels": None,
            "documents": len(clusters), "exact": True,
        }  # fmt: skip
        if of_task.vectors.task not in told:
            told.add(of_task.vectors.task)
            clean = mean_interval(said[0], clusters, PROPORTION)._asdict()
            yield same | clean | {"metric": METRIC, "mask_task": None, "mask_shots": None}
        for number, method in enumerate(methods_of(found)):
            source = found[other_of(found, index)].vectors if method == "other_task" else of_task.vectors
            of_method = same | {
                "method": method, "count": heads,
                "mask_task": source.task, "mask_shots": source.shots,
            }  # fmt: skip
            for layer in range(layers):
                hits = said[1 + number * layers + layer]
                at = of_method | {"layer": layer}
                yield at | mean_interval(hits, clusters, PROPORTION)._asdict() | {"metric": METRIC}
                gained = mean_interval(hits - said[0], clusters, CHANGE)._asdict()
                yield at | gained | {"metric": f"{METRIC}_gain"}
