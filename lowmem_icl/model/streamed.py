"""A model whose layers come from a store one after the other; all that is no layer is its vocabulary."""

import copy
from collections.abc import Iterator, Sequence
from typing import Self

import torch

from lowmem_icl.model.contents import check_layer
from lowmem_icl.model.integrity import check_file, damaged
from lowmem_icl.model.layer import DecoderLayer
from lowmem_icl.model.reading import LayerReader
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import NON_LAYER, Store, layer_file
from lowmem_icl.model.vocabulary import Vocabulary
from lowmem_icl.model.watch import FiniteWatch
from lowmem_icl.system.allocator import keep_freed_memory


class StreamedModel:
    """The vocabulary and, by stream, the decoder layers of a store.

    `resident_bytes`: how much of the layers may stay between passes, in the device's memory.
    `tables_in_memory`: whether the vocabulary's tables stay there too. `watch`: whether what went through it
    was finite. Use as a context manager.
    """

    def __init__(
        self, store: Store, *, device: torch.device, resident_bytes: int, tables_in_memory: bool = True
    ) -> None:
        keep_freed_memory()
        self.store = store
        # Its own, since it holds weights: a store, and another model of it, are never written to.
        self.skeleton = Skeleton(copy.deepcopy(store.skeleton.config))
        self.device = device
        self._layer = DecoderLayer(self.skeleton, store.manifest.weights, device)
        self.watch = FiniteWatch(device)
        self.watch.follow([*self._layer.norms, *self.skeleton.last_norms])
        files = store.manifest.files
        self._reader = LayerReader(
            store.layer_paths,
            resident_layers(store, resident_bytes),
            device,
            [files[layer_file(layer)].quickest for layer in range(store.skeleton.layers)],
        )
        for path, locations in zip(store.layer_paths, self._reader.locations, strict=True):
            check_layer(path, locations, store.skeleton, store.manifest.weights)
        # Tables are read row by row later, so the whole file is looked through first.
        check_file(store.folder / NON_LAYER, files[NON_LAYER].quickest)
        # Last: it keeps files open.
        self.vocabulary = Vocabulary(
            self.skeleton, store.folder / NON_LAYER, device, in_memory=tables_in_memory
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self.vocabulary.close()

    @property
    def read_bytes(self) -> int:
        """Bytes of layers and tables read from disk so far."""
        return self._reader.read_bytes + self.vocabulary.read_bytes

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, DecoderLayer]]:
        """Yield (layer number, the layer filled with its weights); valid until the next one.

        Raises InputError naming the file that is damaged.
        """
        for number, tensors in self._reader.layers(order):
            try:
                self._layer.fill(number, tensors)
            except ValueError as error:
                raise damaged(self.store.layer_paths[number], str(error)) from error
            yield number, self._layer


def resident_layers(store: Store, resident_bytes: int) -> frozenset[int]:
    """Return the layers that are kept in memory under this allowance, the first ones; the rest stream."""
    return frozenset(range(min(store.skeleton.layers, resident_bytes // store.layer_bytes)))
