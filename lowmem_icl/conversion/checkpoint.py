"""A Hugging Face checkpoint as a lazy mapping from parameter names to tensors.

safetensors or pickled `.bin` shards, one file or an index. Pickles are opened with `weights_only`, so nothing
in them is run, and mapped into memory, so a tensor's pages are read when it is asked for; torch's old form of
them (before 1.6) cannot be mapped and is read whole.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lowmem_icl.conversion.weight_files import OpenShard, has_old_form, open_weight_file
from lowmem_icl.errors import InputError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which Hugging Face looks for them."""
INDEX_FILES = tuple(name for name in WEIGHT_FILES if name.endswith(".index.json"))
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
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

    `index` maps every parameter to its weight file; None where there is one file that holds all. `notes` say
    what a user would not expect of it; `quantisation` names what its weights were rounded to before;
    `float_bytes` are the bytes of an element as it is read, None where only the files' sizes tell them;
    `stored_name` maps a parameter to the name of another that is stored in its place; `on_read` is told name
    and tensor of all that is read.
    """

    folder: Path
    config: dict[str, Any]
    shards: ShardSource
    index: dict[str, str] | None
    notes: list[str] = field(default_factory=list)
    quantisation: str | None = None
    float_bytes: int | None = None
    open_shard: OpenShard = open_weight_file
    stored_name: dict[str, str] = field(default_factory=dict)
    tied_tables_settled: bool = False
    on_read: Callable[[str, Tensor], None] | None = None
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
        tensor = opened[name]()
        if self.on_read is not None:
            self.on_read(name, tensor)
        return tensor

    def _shard(self, name: str) -> dict[str, Callable[[], Tensor]]:
        if name != self._open_name:
            # The old one is closed first: its pages go before the new one's come.
            self._open_shard = {}
            self._open_shard, self._open_name = self.open_shard(self.shards.path(name)), name
        return self._open_shard

    def release(self, shard: str) -> None:
        """Say that a shard is not needed any more."""
        if shard == self._open_name:
            self._open_shard, self._open_name = {}, ""
        self.shards.release(shard)

    def source_name(self, name: str) -> str:
        """Return the checkpoint's own name of a parameter: older OPT files lack the leading `model.`."""
        name = self.stored_name.get(name, name)
        short = name.split(".", 1)[1] if "." in name else name
        return short if name not in self.shard_of and short in self.shard_of else name

    def check_weights(self) -> None:
        """Raise InputError where there is a config, and no weights."""
        if not self.shards.sizes:
            raise InputError(
                f"{self.folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}; without them only "
                "`plan` and `prompts` have what they need"
            )

    def holds(self, name: str) -> bool:
        """Tell whether a parameter is stored under its own name."""
        return self.source_name(name) in self.shard_of

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.shards.sizes.values())


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise InputError naming the file where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object, cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder without reading weights; raise InputError naming what is missing.

    A folder without any weights can be planned with, see `check_weights`.
    """
    if not folder.is_dir():
        raise InputError(
            f"model folder {folder} does not exist; give a checkpoint folder, a store or a hub id"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give a Hugging Face checkpoint folder")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if not present & set(WEIGHT_FILES):
        # Enough to plan with; converting asks for weights.
        return Checkpoint(folder, read_json(folder / "config.json"), FolderShards(folder, {}), {})
    files = weight_files(folder, present)
    sizes = {name: (folder / name).stat().st_size for name in files.names}
    notes = [*files.notes, *(note for name in files.names for note in _old_form_notes(folder / name))]
    shards = FolderShards(folder, sizes)
    opened = Checkpoint(folder, read_json(folder / "config.json"), shards, files.index, notes)
    if files.index is None:
        # Reported now rather than in the middle of a run.
        _ = opened.shard_of
    return opened


def _old_form_notes(path: Path) -> list[str]:
    if path.suffix == ".safetensors" or not has_old_form(path):
        return []
    return [
        f"{path.name} has torch's old form, which cannot be mapped: its {path.stat().st_size / 1e9:.3g} GB "
        "are read into memory at once; save_pretrained writes it anew"
    ]


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of a checkpoint, by name, and the index that spreads parameters over them, if any."""

    index: dict[str, str] | None
    names: list[str]
    notes: tuple[str, ...] = ()


def weight_files(folder: Path, present: Collection[str]) -> WeightFiles:
    """Return the first of WEIGHT_FILES that is there with all it names; a note says what was passed over.

    `present`: the names that the checkpoint has; an index among them lies in `folder`. Raises InputError.
    """
    passed_over: list[str] = []
    for name in WEIGHT_FILES:
        if name not in present:
            continue
        index = _read_index(folder / name) if name in INDEX_FILES else None
        names = [name] if index is None else sorted(set(index.values()))
        missing = [shard for shard in names if shard not in present]
        if not missing:
            return WeightFiles(index, names, tuple(f"{text}; {name} is used" for text in passed_over))
        passed_over.append(f"{name} names {missing[0]}, which is missing ({len(missing)} missing in all)")
    if passed_over:
        raise InputError(f"{folder}: weight file {passed_over[0]}; fetch what is missing again")
    raise InputError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}")


def _read_index(path: Path) -> dict[str, str]:
    shard_of = read_json(path).get("weight_map")
    if (
        not isinstance(shard_of, dict)
        or not shard_of
        or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values())
    ):
        raise InputError(f"{path}: expected 'weight_map' from names to files of this folder")
    return shard_of
