"""Which of two tied tables a checkpoint stores: the embedding, the unembedding, or both."""

import torch

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.model.skeleton import Skeleton


def tied_names(skeleton: Skeleton) -> dict[str, str]:
    """Return the first and the second name of every parameter that a model uses in two places."""
    first_names: dict[int, str] = {}
    pairs: dict[str, str] = {}
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            pairs[first] = name
    return pairs


def settle_tied_tables(checkpoint: Checkpoint) -> None:
    """Let either name of a tied pair serve; untie the config where both are stored and differ.

    That is what Hugging Face does (`PreTrainedModel.tie_weights`). Reads both tables where both are stored;
    the checkpoint's notes say what was found.
    """
    if checkpoint.tied_tables_settled:
        return
    checkpoint.tied_tables_settled = True
    for embedding, head in tied_names(Skeleton.from_dict(checkpoint.config)).items():
        if embedding in checkpoint.stored_name or not checkpoint.holds(head):
            continue
        if not checkpoint.holds(embedding):
            checkpoint.stored_name[embedding] = head
            checkpoint.notes.append(f"of the tied tables only {head} is stored; it serves as {embedding} too")
        elif not _are_equal(checkpoint, embedding, head):
            checkpoint.config["tie_word_embeddings"] = False
            checkpoint.notes.append(
                f"config.json ties {head} to {embedding}, but the two are stored with different values: "
                f"{head} is used, as Hugging Face does"
            )


def _are_equal(checkpoint: Checkpoint, *names: str) -> bool:
    first, second = (checkpoint.tensor(checkpoint.source_name(name)) for name in names)
    return torch.equal(first, second)
