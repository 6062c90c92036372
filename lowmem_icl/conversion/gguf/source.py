"""A GGUF file opened as a checkpoint; what is slow to read of it is kept in a folder of its own."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowmem_icl import __version__
from lowmem_icl.conversion.checkpoint import Checkpoint, FolderShards, read_json
from lowmem_icl.conversion.gguf.config import gguf_config, notes_on_config, quantisation
from lowmem_icl.conversion.gguf.header import read_gguf_header
from lowmem_icl.conversion.gguf.tensors import open_gguf_tensors
from lowmem_icl.conversion.gguf.tokenizer import save_gguf_tokenizer
from lowmem_icl.system.files import atomic_folder, write_text_atomic

READING = "gguf.json"
FLOAT_BYTES = 4
LONGEST_STEM = 40
"""Letters of a file's name that its folder's repeats: of four bytes each, they fit into 255."""


def gguf_folder_name(path: Path) -> str:
    """Return a name for what is made of a file: part of its own, and digits that change with the file."""
    stat = path.stat()
    # Another version may read a file otherwise.
    readers = f"{__version__} {version('transformers')}"
    identity = os.fsencode(path.name) + f" {stat.st_size} {stat.st_mtime_ns} {readers}".encode()
    return f"{path.stem[:LONGEST_STEM]}-{hashlib.sha256(identity).hexdigest()[:8]}"


def open_gguf(path: Path, cache: Path, check_config: Callable[[dict[str, Any]], object]) -> Checkpoint:
    """Open a GGUF file; config and tokenizer are written into a folder of `cache`, once.

    `check_config` raises InputError for a config that is of no use, before the tokenizer is read. Raises
    InputError for a file that is broken, of an unknown architecture or would be read wrongly.
    """
    folder = cache / gguf_folder_name(path)
    if not (folder / READING).is_file():
        header = read_gguf_header(path)
        config = gguf_config(path, header)
        check_config(config)
        open_gguf_tensors(path, config)
        with atomic_folder(folder) as draft:
            write_text_atomic(draft / "config.json", json.dumps(config, indent=1) + "\n")
            notes = notes_on_config(header, config) + save_gguf_tokenizer(path, header, draft)
            found = {"quantisation": quantisation(header), "notes": notes}
            write_text_atomic(draft / READING, json.dumps(found, indent=1) + "\n")
    known, reading = read_json(folder / "config.json"), read_json(folder / READING)
    return Checkpoint(
        folder,
        known,
        FolderShards(path.parent, {path.name: path.stat().st_size}),
        None,
        notes=list(reading["notes"]),
        quantisation=reading["quantisation"],
        float_bytes=FLOAT_BYTES,
        open_shard=partial(open_gguf_tensors, config=known),
    )
