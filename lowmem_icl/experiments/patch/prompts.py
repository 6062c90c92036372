"""The prompts that are patched, by task and shot count or by file, and the jobs that patch them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowmem_icl.engine.patch_jobs import Change, PatchJob, RowTokens
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.session.failures import Setting
from lowmem_icl.session.part_jobs import Source
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.prompt_pairs.made import NoPromptPairs, pairs_of
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair, Tokens
from lowmem_icl.tasks.prompt_rows import prompt_row

GIVEN = "given"
"""What `labels` says of prompts that the user gives."""
VECTOR_LABELS = ("shuffled", "wrong")
"""Corruptions of demonstrations' answers: what such prompts lack is the task."""

At = Literal["last", "all"]

END = np.array([0])
"""Where a prompt's last token stands in its row, behind its stem."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of prompts of a task at a shot count, or of a file, whose shot count is None.

    labels: what the corrupted prompts show, or GIVEN.
    """

    task: str
    shots: int | None
    split: str | None
    labels: str
    pairs: tuple[PromptPair, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """The columns that say which prompts a number is of."""
        return {"task": self.task, "shots": self.shots, "split": self.split, "documents": len(self.pairs)}

    @property
    def sources(self) -> list[Source]:
        """Whose the pairs are."""
        setting = Setting(self.task, self.shots, self.labels)
        return [Source(setting, f"document {pair.document}") for pair in self.pairs]

    def at(self, at: At) -> "Pairs":
        """Return the pairs that can be patched there: at all tokens, those that align."""
        if at == "last":
            return self
        aligned = tuple(pair for pair in self.pairs if pair.is_aligned)
        return Pairs(self.task, self.shots, self.split, self.labels, aligned)


@dataclass(frozen=True, eq=False)
class VectorPrompts:
    """What function vectors of a task are made of: prompts that show it, and prompts that do not, with the
    answers that they should have, and what intervals cluster by.
    """

    task: str
    shots: int | None
    split: str | None
    labels: str
    clean: tuple[Tokens, ...]
    corrupted: tuple[Tokens, ...]
    targets: tuple[Tokens, ...]
    clusters: tuple[str, ...]

    @property
    def setting(self) -> Setting:
        """What numbers of them are of."""
        return Setting(self.task, self.shots, self.labels)

    def sources(self, prompts: Sequence[Tokens]) -> tuple[Source, ...]:
        """Return whose some of the prompts are, in their order."""
        return tuple(Source(self.setting, f"prompt {number + 1}") for number in range(len(prompts)))

    @property
    def fields(self) -> dict[str, Any]:
        """The columns that say which prompts a number is of."""
        return {
            "task": self.task, "shots": self.shots, "split": self.split, "labels": self.labels,
            "documents": len(self.corrupted),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class PromptsFound:
    """All that is patched, and sentences on what is left out."""

    pairs: tuple[Pairs, ...]
    vectors: tuple[VectorPrompts, ...]
    notes: tuple[str, ...]


def prompts_of(prepared: Prepared) -> PromptsFound:
    """Return the pairs and the prompts for function vectors that a run's options ask for."""
    found: list[Pairs] = []
    notes = list(prepared.pair_notes)
    for clean, corrupted in prepared.pair_settings:
        name = f"{clean.task}, {clean.shots} shot{'s' if clean.shots != 1 else ''}"
        if prepared.sample_note:
            pairs = sized_pairs(prepared, clean)
        else:
            try:
                made = pairs_of(prepared.pack(clean), prepared.pack(corrupted))
            except NoPromptPairs as reason:
                notes.append(f"patch: {reason}; it is left out")
                continue
            pairs = made.pairs
            if made.equal or made.truncated:
                notes.append(
                    f"patch: {name}: of {len(clean.documents)} documents {made.equal} have the same prompt "
                    f"corrupted and {made.truncated} one that does not fit the context; they are left out"
                )
            if "all" in prepared.options.at and len(made.aligned) < len(pairs):
                notes.append(
                    f"patch: {name}: {len(made.aligned)} of {len(pairs)} pairs have equally many tokens; "
                    "only these are patched at all of them"
                )
        if pairs:
            found.append(Pairs(clean.task, clean.shots, clean.split, corrupted.labels, pairs))
    if prepared.given.pairs:
        assert prepared.options.pairs is not None
        found.append(Pairs(prepared.options.pairs.stem, None, None, GIVEN, prepared.given.pairs))
    vectors = [_vector_prompts(pairs) for pairs in found if pairs.labels in VECTOR_LABELS]
    if prepared.given.prompts is not None:
        vectors.append(_given_vector_prompts(prepared))
    return PromptsFound(tuple(found), tuple(vectors), tuple(notes))


def sized_pairs(prepared: Prepared, task: TaskRows) -> tuple[PromptPair, ...]:
    """Return pairs of the sizes that documents are expected to have, for plans: after its last token, a
    prompt goes on with what else is read.
    """
    pairs = []
    for place, document in enumerate(task.documents):
        rows = prepared.outline(task, slice(place, place + 1)).rows
        reads = sum(len(row.reads) for row in rows)
        prompt = (0,) * max(1, sum(map(len, rows)) - reads + 1)
        pairs.append(PromptPair(document.index, prompt, prompt, (tuple(range(reads)),), (True,), ""))
    return tuple(pairs)


def _vector_prompts(pairs: Pairs) -> VectorPrompts:
    return VectorPrompts(
        pairs.task, pairs.shots, pairs.split, pairs.labels,
        clean=tuple(pair.clean for pair in pairs.pairs),
        corrupted=tuple(pair.corrupted for pair in pairs.pairs),
        targets=tuple(pair.options[pair.gold.index(True)] for pair in pairs.pairs),
        clusters=tuple(pair.cluster for pair in pairs.pairs),
    )  # fmt: skip


def _given_vector_prompts(prepared: Prepared) -> VectorPrompts:
    given, path = prepared.given.prompts, prepared.options.clean
    assert given is not None
    assert path is not None
    return VectorPrompts(
        path.stem, None, None, GIVEN,
        clean=tuple(prompt.tokens for prompt in given.clean),
        corrupted=tuple(prompt.tokens for prompt in given.corrupted),
        targets=tuple(prompt.target for prompt in given.corrupted),
        clusters=tuple(str(prompt.document) for prompt in given.corrupted),
    )  # fmt: skip


def pair_jobs(pairs: Sequence[PromptPair], units: Sequence[Unit], at: At) -> list[PatchJob]:
    """Return two jobs a pair: the clean prompt's values into the corrupted one, and the reverse; the first
    change of each is none.
    """
    changes: tuple[Change, ...] = (Mask(), *(unit.as_mask() for unit in units))
    jobs = []
    for pair in pairs:
        whole = at == "all"
        rows = [prompt_row(prompt, pair.options, whole=whole) for prompt in (pair.corrupted, pair.clean)]
        tokens = [
            RowTokens(row, np.arange(len(prompt)) if whole else END)
            for row, prompt in zip(rows, (pair.corrupted, pair.clean), strict=True)
        ]
        jobs += [PatchJob(tokens[0], changes, tokens[1]), PatchJob(tokens[1], changes, tokens[0])]
    return jobs


def vector_jobs(prompts: VectorPrompts, means: UnitMeans | None, changes: Sequence[Change]) -> list[PatchJob]:
    """Return a job per corrupted prompt: means of the clean ones in units' place at its last token; read are
    the target's first token, and the target.
    """
    return [
        PatchJob(
            RowTokens(prompt_row(prompt, target_options(target), whole=False), END),
            (Mask(), *changes),
            means,
        )
        for prompt, target in zip(prompts.corrupted, prompts.targets, strict=True)
    ]


def target_options(target: Tokens) -> list[Tokens]:
    """Return what is read of a target: its first token, and all of it where it has more."""
    return [target[:1]] if len(target) == 1 else [target[:1], target]
