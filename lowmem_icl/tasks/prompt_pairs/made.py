"""Pairs of prompts from a task's documents and the same ones corrupted."""

from dataclasses import dataclass

from lowmem_icl.tasks.packing import PackedTask
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair, Tokens


class NoPromptPairs(Exception):
    """The documents of a task make no pairs; the message says why."""


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
    prompts, changed_prompts = _prompts(clean), _prompts(corrupted)
    documents = zip(
        clean.task.documents,
        corrupted.task.documents,
        prompts,
        changed_prompts,
        clean.task.clusters,
        clean.first_option.tolist(),
        strict=True,
    )
    for document, other, prompt, changed, cluster, first in documents:
        assert document.index == other.index, "both are of the same documents"
        if prompt is None or changed is None:
            truncated += 1
        elif prompt == changed:
            equal += 1
        else:
            options = clean.options[first : first + len(document.gold)]
            continuations = tuple(option.continuation for option in options)
            pairs.append(PromptPair(document.index, prompt, changed, continuations, document.gold, cluster))
    return MadePairs(tuple(pairs), equal, truncated)


def _prompts(packed: PackedTask) -> list[Tokens | None]:
    """Return the one context of every document's options; None where it was cut to fit."""
    options = packed.options
    # Not `truncated`, which is also said of whole prompts from which demonstrations were left out.
    whole_tokens = options.limits.context_lengths(options.table.lengths[options.contexts])
    is_cut = options.context_tokens < whole_tokens
    found: list[Tokens | None] = []
    for document, first in zip(packed.task.documents, packed.first_option.tolist(), strict=True):
        end = first + len(document.gold)
        if is_cut[first:end].any():
            found.append(None)
            continue
        contexts = {option.path[: option.context_tokens] for option in options[first:end]}
        if len(contexts) > 1:
            raise NoPromptPairs(
                f"task {packed.task.task}: its answers stand in the context, so a document has a prompt per "
                "option and not one to patch"
            )
        found.append(contexts.pop())
    return found
