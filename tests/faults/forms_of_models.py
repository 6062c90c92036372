"""Generated files of models: configs, tokenizers, manifests and layers; and how each is read."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from family_models import CASES
from forms_of_files import DEMO, in_file
from fuzzing import Form
from grammar import broken, file_bytes, json_file, json_text, mutated, odd_value

from lowmem_icl.conversion.locate import load_tokenizer, locate, plan_store
from lowmem_icl.model.reading import read_header
from lowmem_icl.model.store import Store, open_store
from lowmem_icl.options import run_options
from lowmem_icl.session.text_form import packing_limits, sequences_for, text_form, text_tokeniser
from lowmem_icl.session.text_keys import tokenizer_digest

TOKENIZER = {
    name: json.loads((DEMO / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
}
TOKENIZER_FILES: dict[str, Any] = {
    **TOKENIZER,
    "special_tokens_map.json": {"bos_token": "</s>", "eos_token": {"content": "</s>"}},
    "added_tokens.json": {"<x>": 600},
    "vocab.json": {"a": 0, "b": 1},
    "merges.txt": "#version: 0.2\na b\n",
}
TOKENIZER_VALUES = ("BPE", "Unigram", "WordPiece", "WordLevel", "GPT2Tokenizer", "OPTTokenizer", 527)


def config_form(store_dir: Path) -> Form:
    """A checkpoint's config.json, of any family, at times with the demo's weights beside it."""
    configs = [{"model_type": case.model_type, **case.config} for case in CASES.values()]
    configs += [json.loads((DEMO / "config.json").read_text())] * len(configs)
    names = sorted({name for config in configs for name in config})
    extra: dict[str, Any] = {
        "quantization_config": {"load_in_8bit": True},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "head_dim": 24,
        "layer_types": ["full_attention"],
        "torch_dtype": "float16",
        "sliding_window": 4,
        "text_config": {"model_type": "llama"},
        "auto_map": {"AutoConfig": "x.py"},
        "num_local_experts": 4,
    }
    usual = [value for config in configs for value in config.values()]

    def content(rng: random.Random) -> bytes:
        tree = dict(rng.choice(configs))
        if rng.random() < 0.3:
            name = rng.choice((*extra, *names))
            tree[name] = extra.get(name, odd_value(rng, usual))
        return json_file(rng, tree, usual)

    def folder_with(given: bytes, folder: Path) -> Path:
        checkpoint = folder / "checkpoint"
        if not checkpoint.is_dir():
            shutil.copytree(DEMO, checkpoint, ignore=lambda *_: ["tasks"])
        (checkpoint / "config.json").write_bytes(given)
        return checkpoint

    def read(path: Path) -> None:
        store = plan_store(locate(str(path), None, "int8", store_dir), "int8")
        store.skeleton.layer_parameters()
        _ = store.size_bytes, store.skeleton.weights_by_part

    return Form(
        lambda rng, folder: folder_with(content(rng), folder),
        read,
        folder_with,
        ("config.json", "model.safetensors"),
    )


def tokenizer_form(store: Store) -> Form:
    """A tokenizer's files in a folder; what a run asks of it."""

    def folder_with(given: bytes, folder: Path, name: str = "tokenizer.json") -> Path:
        at = folder / "tokenizer"
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        for each in (*TOKENIZER, "config.json"):
            shutil.copyfile(DEMO / each, at / each)
        (at / name).write_bytes(given)
        return at

    def write(rng: random.Random, folder: Path) -> Path:
        name = rng.choice((*TOKENIZER_FILES, "tokenizer.json"))
        if name == "merges.txt":
            return folder_with(file_bytes(rng, TOKENIZER_FILES[name]), folder, name)
        return folder_with(json_file(rng, TOKENIZER_FILES[name], TOKENIZER_VALUES), folder, name)

    def read(path: Path) -> None:
        own = Store(store.folder, store.manifest, path)
        tokenizer = load_tokenizer(path)
        limits = packing_limits(text_form(run_options({}), own, tokenizer), own, tokenizer)
        text_tokeniser(tokenizer)(["a", " b", "", "x" * 300, "ä\0\n数"])
        tokenizer_digest(tokenizer)
        sequences_for(own, limits, 1)

    return Form(write, read, folder_with, ("tokenizer",))


def manifest_form(store: Store) -> Form:
    """A store's manifest, with its own digest and without."""
    fields = json.loads((store.folder / "manifest.json").read_text())
    del fields["digest"]

    def folder_with(given: bytes, folder: Path) -> Path:
        copied = folder / "store"
        if not copied.is_dir():
            shutil.copytree(store.folder, copied)
        (copied / "manifest.json").write_bytes(given)
        return copied

    def read(path: Path) -> None:
        found = open_store(path)
        found.skeleton.layer_parameters()
        _ = found.manifest.digest, found.layer_bytes, found.size_bytes, found.layer_paths

    return Form(
        lambda rng, folder: folder_with(json_file(rng, fields), folder), read, folder_with, ("manifest",)
    )


def layer_file(rng: random.Random) -> bytes:
    """Return a layer's file with something wrong in its header or its bytes."""
    header: dict[str, Any] = {"__metadata__": {"digests": "{}"}}
    position = 0
    for name, kind, size in (("a.weight", "I8", 1), ("b", "F32", 4), ("c", "BF16", 2)):
        count = rng.randrange(1, 9) * 4
        header[name] = {
            "dtype": kind,
            "shape": [count // 4, 4],
            "data_offsets": [position, position + size * count],
        }
        position += size * count
    text = json_text(rng, broken(rng, header, ("F32", [0, 8], [4, 2**40], "U8"))).encode(
        "utf-8", "surrogatepass"
    )
    whole = struct.pack("<Q", len(text)) + text + bytes(position)
    return mutated(rng, whole) if rng.random() < 0.4 else whole


def forms_of_models(store: Store, store_dir: Path) -> dict[str, Form]:
    """Return the forms by name."""
    return {
        "config": config_form(store_dir),
        "tokenizer": tokenizer_form(store),
        "manifest": manifest_form(store),
        "layer": Form(**in_file("000.safetensors", layer_file), read=read_header),
    }
