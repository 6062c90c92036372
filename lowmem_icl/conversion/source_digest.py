"""The digest of a source's tensors, which is the same for every form of weights; masks name it."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lowmem_icl.conversion.checkpoint import Checkpoint
from lowmem_icl.model.skeleton import Skeleton


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's type and bytes."""
    digest = hashlib.sha256(str(tensor.dtype).encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a whole source from those of its parameters, by their names."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def stored_parameters(
    checkpoint: Checkpoint, skeleton: Skeleton, layer: int | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the model's name and the shape of every parameter of a layer, None: of those outside the layers,
    by the names that digests are kept under.
    """
    if layer is not None:
        blocks = skeleton.blocks_name
        return {
            f"{blocks}.{layer}.{name}": (name, shape) for name, shape in skeleton.layer_parameters().items()
        }
    older = skeleton.family.stored_names
    return {
        older[name] if older.get(name) in checkpoint.shard_of else name: (name, shape)
        for name, shape in skeleton.non_layer_parameters().items()
    }


class DigestAsRead:
    """The digest of a checkpoint's parameters, taken of each when it is first read."""

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self._checkpoint, self._skeleton = checkpoint, skeleton
        self._digests: dict[str, str] = {}
        checkpoint.on_read = self._take

    def _take(self, name: str, tensor: Tensor) -> None:
        if name not in self._digests:
            self._digests[name] = tensor_digest(tensor)

    def whole(self) -> str:
        """Return the digest that a store of the checkpoint names; parameters not read yet are read now."""
        digests = {}
        for layer in (None, *range(self._skeleton.layers)):
            for name in stored_parameters(self._checkpoint, self._skeleton, layer):
                own = self._checkpoint.source_name(name)
                if own not in self._digests:
                    self._checkpoint.tensor(own)
                digests[name] = self._digests[own]
        return combined_digest(digests)
