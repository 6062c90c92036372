"""A Hugging Face checkpoint as a lazy mapping from parameter names to tensors.

safetensors or pickled `.bin` shards, one file or an index. Pickles are opened with `weights_only` and mapped
into memory, so nothing in them is run and a tensor's pages are read when it is asked for.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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


@dataclass
class Checkpoint:
    """An opened checkpoint folder; `shard_of` maps every parameter to the file that holds it."""

    folder: Path
    config: dict[str, Any]
    shard_of: dict[str, str]
    _open_name: str = ""
    _open_shard: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return one parameter in its source precision; only one shard is open at a time."""
        if name not in self.shard_of:
            raise InputError(f"{self.folder}: parameter '{name}' is missing; the checkpoint is not complete")
        shard = self.shard_of[name]
        if shard != self._open_name:
            self._open_shard, self._open_name = _open_shard(self.folder / shard), shard
        if name not in self._open_shard:
            raise InputError(
                f"{self.folder / shard}: expected parameter '{name}' as the index says, not found"
            )
        return self._open_shard[name]()

    def source_name(self, name: str) -> str:
        """Return the checkpoint's own name of a model parameter: older OPT files lack the leading `model.`."""
        short = name.split(".", 1)[1] if "." in name else name
        return short if name not in self.shard_of and short in self.shard_of else name

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files on disk."""
        return sum((self.folder / shard).stat().st_size for shard in sorted(set(self.shard_of.values())))


def _open_shard(path: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt")
            return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
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
    config = read_json(folder / "config.json")
    for index in INDEX_FILES:
        if (folder / index).is_file():
            shard_of = read_json(folder / index).get("weight_map")
            if not isinstance(shard_of, dict) or not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values()
            ):
                raise InputError(
                    f"{folder / index}: expected 'weight_map' from names to files of this folder"
                )
            break
    else:
        single = next((name for name in SINGLE_FILES if (folder / name).is_file()), None)
        if single is None:
            raise InputError(
                f"{folder} has no weights; expected one of {', '.join(INDEX_FILES + SINGLE_FILES)}"
            )
        shard_of = dict.fromkeys(_open_shard(folder / single), single)
    missing = sorted({shard for shard in shard_of.values() if not (folder / shard).is_file()})
    if missing:
        raise InputError(
            f"{folder}: weight file {missing[0]} is missing ({len(missing)} in all); fetch it again"
        )
    return Checkpoint(folder, config, shard_of)
