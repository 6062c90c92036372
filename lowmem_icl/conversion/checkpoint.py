"""A Hugging Face checkpoint as a lazy mapping from parameter names to tensors.

safetensors or pickled `.bin` shards, one file or an index. Pickles are opened with `weights_only` and mapped
into memory, so nothing in them is run and a tensor's pages are read when it is asked for.
"""

import json
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_icl.errors import InputError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class ShardSource(Protocol):
    """Where weight files come from: a folder, or the hub, which fetches a file when it is asked for."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every weight file by name."""

    def path(self, name: str) -> Path:
        """Return a weight file on this disk."""

    def release(self, name: str) -> None:
        """Take notice that a file is not needed any more."""

    def clean(self) -> None:
        """Remove what was made for fetching."""

    @property
    def deletes(self) -> bool:
        """Whether released files are deleted."""


@dataclass(frozen=True)
class FolderShards:
    """Weight files of a folder; none is ever deleted."""

    folder: Path
    sizes: Mapping[str, int]

    @property
    def deletes(self) -> bool:
        """Whether released files are deleted: never."""
        return False

    def path(self, name: str) -> Path:
        """Return the file."""
        return self.folder / name

    def release(self, name: str) -> None:
        """Leave the file where it is."""

    def clean(self) -> None:
        """Nothing was made."""


@dataclass
class Checkpoint:
    """An opened checkpoint: its folder holds config and tokenizer, `shards` the weight files.

    `index` maps every parameter to its weight file; None where there is one file that holds all.
    """

    folder: Path
    config: dict[str, Any]
    shards: ShardSource
    index: dict[str, str] | None
    _open_name: str = ""
    _open_shard: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """The weight file of every parameter; without an index, the only file is opened to know."""
        if self.index is not None:
            return self.index
        (single,) = self.shards.sizes
        return dict.fromkeys(self._shard(single), single)

    def tensor(self, name: str) -> Tensor:
        """Return one parameter in its source precision; only one shard is open at a time."""
        if name not in self.shard_of:
            raise InputError(f"{self.folder}: parameter '{name}' is missing; the checkpoint is not complete")
        shard = self.shard_of[name]
        opened = self._shard(shard)
        if name not in opened:
            raise InputError(f"{shard}: expected parameter '{name}' as the index says, not found")
        return opened[name]()

    def _shard(self, name: str) -> dict[str, Callable[[], Tensor]]:
        if name != self._open_name:
            # The old one is closed first: its pages go before the new one's come.
            self._open_shard = {}
            self._open_shard, self._open_name = _open_shard(self.shards.path(name)), name
        return self._open_shard

    def release(self, shard: str) -> None:
        """Say that a shard is not needed any more."""
        if shard == self._open_name:
            self._open_shard, self._open_name = {}, ""
        self.shards.release(shard)

    def source_name(self, name: str) -> str:
        """Return the checkpoint's own name of a parameter: older OPT files lack the leading `model.`."""
        short = name.split(".", 1)[1] if "." in name else name
        return short if name not in self.shard_of and short in self.shard_of else name

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.shards.sizes.values())


def _open_shard(path: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt")
            return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as weights ({error}); fetch the file again") from error
    return {name: partial(_itself, value) for name, value in loaded.items() if isinstance(value, Tensor)}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise InputError naming the file where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON object, cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder without reading weights; raise InputError naming what is missing."""
    if not folder.is_dir():
        raise InputError(
            f"model folder {folder} does not exist; give a checkpoint folder, a store or a hub id"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give a Hugging Face checkpoint folder")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    index, names = weight_files(folder, present)
    missing = sorted(name for name in names if name not in present)
    if missing:
        raise InputError(
            f"{folder}: weight file {missing[0]} is missing ({len(missing)} in all); fetch it again"
        )
    sizes = {name: (folder / name).stat().st_size for name in names}
    opened = Checkpoint(folder, read_json(folder / "config.json"), FolderShards(folder, sizes), index)
    if index is None:
        # Told now rather than in the middle of a run.
        _ = opened.shard_of
    return opened


def weight_files(folder: Path, present: Collection[str]) -> tuple[dict[str, str] | None, list[str]]:
    """Return a checkpoint's index, None where it has one weight file, and its weight files' names in order.

    `present`: the names that the checkpoint has; an index among them lies in `folder`. Raises InputError.
    """
    for name in INDEX_FILES:
        if name in present:
            shard_of = read_json(folder / name).get("weight_map")
            if not isinstance(shard_of, dict) or not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values()
            ):
                raise InputError(f"{folder / name}: expected 'weight_map' from names to files of this folder")
            return shard_of, sorted(set(shard_of.values()))
    single = next((name for name in SINGLE_FILES if name in present), None)
    if single is None:
        raise InputError(f"{folder} has no weights; expected one of {', '.join(INDEX_FILES + SINGLE_FILES)}")
    return None, [single]
