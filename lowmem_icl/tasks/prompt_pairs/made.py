"""Pairs of prompts from a task's documents and the same ones corrupted."""

from dataclasses import dataclass

from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair, Tokens


class NoPromptPairs(Exception):
    """The documents of a task make no pairs; the message says why."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A document's prompt by itself: its index, its tokens, its options and which are right, and what
    intervals cluster by.
    """

    document: int
    tokens: Tokens
    options: tuple[Tokens, ...]
    gold: tuple[bool, ...]
    cluster: str

    @property
    def right(self) -> Tokens:
        """The first right option."""
        return self.options[self.gold.index(True)]


@dataclass(frozen=True)
class MadePairs:
    """The pairs of a task's documents, in their order, and how many documents were left out: those whose
    prompts are `equal`, and those of which a prompt is `truncated` to fit the context.
    """

    pairs: tuple[PromptPair, ...]
    equal: int
    truncated: int

    @property
    def aligned(self) -> tuple[PromptPair, ...]:
        """The pairs whose prompts have equally many tokens."""
        return tuple(pair for pair in self.pairs if pair.is_aligned)


def pairs_of(clean: PackedTask, corrupted: PackedTask) -> MadePairs:
    """Return the pairs of documents as they are and corrupted, which must be the same ones in the same order.

    Options and their continuations are the clean document's. Raises NoPromptPairs where the options of a
    document have different contexts, as where answers stand in the context: there is no one prompt to patch.
    """
    pairs: list[PromptPair] = []
    equal = truncated = 0
    for prompt, changed in zip(_prompts(clean), _prompts(corrupted), strict=True):
        if prompt is None or changed is None:
            truncated += 1
            continue
        assert prompt.document == changed.document, "both are of the same documents"
        if prompt.tokens == changed.tokens:
            equal += 1
            continue
        same = prompt.options, prompt.gold, prompt.cluster
        pairs.append(PromptPair(prompt.document, prompt.tokens, changed.tokens, *same))
    return MadePairs(tuple(pairs), equal, truncated)


def prompts_of(packed: PackedTask) -> tuple[Prompt, ...]:
    """Return the prompts of documents that fit the context; raises NoPromptPairs as `pairs_of` does."""
    return tuple(prompt for prompt in _prompts(packed) if prompt is not None)


def _prompts(packed: PackedTask) -> list[Prompt | None]:
    """Return every document's prompt; None where it was cut to fit."""
    options = packed.options
    # Not `truncated`, which is also said of whole prompts from which demonstrations were left out.
    whole_tokens = options.limits.context_lengths(options.table.lengths[options.contexts])
    is_cut = options.context_tokens < whole_tokens
    task = packed.task
    found: list[Prompt | None] = []
    for document, cluster, first in zip(
        task.documents, task.clusters, packed.first_option.tolist(), strict=True
    ):
        end = first + len(document.gold)
        if is_cut[first:end].any():
            found.append(None)
            continue
        own = options[first:end]
        contexts = {option.path[: option.context_tokens] for option in own}
        if len(contexts) > 1:
            raise NoPromptPairs(
                f"task {task.task}: its answers stand in the context, so a document has a prompt per option "
                "and not one to patch"
            )
        continuations = tuple(option.continuation for option in own)
        found.append(Prompt(document.index, contexts.pop(), continuations, document.gold, cluster))
    return found
