"""Generated files that are not rows: masks, options, checkpoints, stores, runs; and how each is read."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Form
from grammar import file_bytes, json_file, json_text, odd_value

import lowmem_icl
from lowmem_icl.cli.masks import _kept_text, _summary, _words
from lowmem_icl.masks.files import read_mask
from lowmem_icl.model.store import Store
from lowmem_icl.options import FLAGS, form_of, run_options
from lowmem_icl.planning.machine_file import read_machine

DEMO = Path(lowmem_icl.__file__).parent / "demo"
MASK: dict[str, Any] = {
    "format": "lowmem-icl-mask/1",
    "name": "greedy-recall-4shot",
    "ablation": "zero",
    "model": {
        "id": "demo",
        "revision": None,
        "model_type": "opt",
        "layers": 4,
        "heads": 8,
        "digest": "0" * 64,
    },
    "removed": {"heads": {"0": [1, 2], "3": [7]}, "ffns": [2]},
    "made": {"method": "greedy", "tasks": ["recall"], "shots": [4], "documents": 32, "seed": 42},
    "scores": {
        "before": {"acc": 0.9, "em": 0.5},
        "after": {"acc": 0.8},
        "acc": 0.8,
        "verdict": "kept",
        "at_chance": False,
    },
}
RATES = ("attention", "projection", "ffn", "backward", "vocabulary")
MACHINE: dict[str, Any] = {
    "format": "lowmem-icl-machine/1",
    "version": "0.2.0",
    "model": "demo",
    "weights": "int8",
    "machine": {"processor": "x86", "threads": 2, "cuda": None},
    "memory_bytes": 3 * 10**9,
    "device_memory_bytes": None,
    "call_seconds": 1e-5,
    "disk_bytes_per_second": 1e9,
    **{f"{name}_products_per_second": 1e9 for name in RATES},
}
OPTIONS: dict[str, Any] = {
    "model": "demo",
    "tasks": ["recall", "knowledge"],
    "shots": [0, 4],
    "limit": 16,
    "train-limit": 0.5,
    "memory": "6GB",
    "hours": 2.5,
    "curves": "heads",
    "label_drops": True,
    "tolerance": 0.02,
    "out": "run",
}
TOML_TEXTS = (
    *("1979-05-27", "07:32:00", "0x10", "0o7", "1_000", "inf", "-nan", "+1", "'''a\nb'''", '"""a"""', "''"),
    *("{a = 1}", "{limit = {x = [1, {y = 2}]}}", "[1, [2, [3]]]", "[1, 'a']", "true # so", '"\\u0000"'),
    *('"\\ud83d"', '"\\U0001F600"', "[" * 2_000 + "]" * 2_000, "{a=" * 2_000 + "1" + "}" * 2_000, "1e400"),
)
YAML_TEXTS = (
    *("!!python/object/apply:os.system ['x']", "&a [x]", "*a", "{a: 1}", "[a, [b, {c: d}]]", "|\n  a\n  b"),
    *(
        ">-\n  a",
        "!x y",
        "~",
        "no",
        "1:30",
        "0o7",
        ".inf",
        "'a",
        '"a',
        "a: b",
        "- a",
        "? a",
        "@a",
        "`a",
        "%a",
    ),
    *(
        "[" * 2_000 + "]" * 2_000,
        "{a: " * 2_000,
        "\n  - a\n  - b",
        "\n  - a\n -b",
        "a #b",
        "\\x",
        '"\\x"',
        "\t",
    ),
)


def in_file(name: str, content: Callable[[random.Random], bytes]) -> dict[str, Any]:
    """Return how generated and given content come into a file of this name."""

    def place(given: bytes, folder: Path) -> Path:
        (folder / name).write_bytes(given)
        return folder / name

    return {"write": lambda rng, folder: place(content(rng), folder), "place": place}


def read_whole_mask(path: Path) -> None:
    """Read a mask as `masks show` and `list` do, and write it again."""
    mask_file = read_mask(path)
    _words(_summary(path, mask_file))
    _kept_text(mask_file)
    mask_file.to_json()


def toml_file(rng: random.Random) -> bytes:
    """Return options in TOML: their names and others, values as they should be and of any type."""
    lines = []
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice((*OPTIONS, *OPTIONS, *FLAGS, "x", "a.b", '"x y"', '""', "num_fewshot", "limit"))
        drawn = rng.random()
        if drawn < 0.4 and name in OPTIONS:
            value = json.dumps(OPTIONS[name])
        elif drawn < 0.6:
            value = rng.choice(TOML_TEXTS)
        elif drawn < 0.75:
            value = json.dumps(rng.choice((form_of(name).choices if name in FLAGS else ()) or ("x",)))
        else:
            value = json_text(rng, odd_value(rng))
        lines.append(f"{name} = {value}")
    if rng.random() < 0.1:
        places = ("[limit]", "[[tasks]]", "[a.b]", "[", "= 1", "limit", "limit =", "# \x00", "limit = 1 2")
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(places))
    return file_bytes(rng, "\n".join(lines))


def yaml_file(rng: random.Random) -> bytes:
    """Return options in YAML, likewise."""
    lines = []
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(
            (*OPTIONS, *OPTIONS, *FLAGS, "x", "<<", "? a", "'limit'", "num_fewshot", "!!str limit")
        )
        if rng.random() < 0.5 and name in OPTIONS:
            listed = OPTIONS[name]
            value = f"[{', '.join(map(str, listed))}]" if isinstance(listed, list) else str(listed)
        else:
            value = rng.choice((*YAML_TEXTS, json_text(rng, odd_value(rng))))
        lines.append(f"{name}: {value}")
    if rng.random() < 0.15:
        places = (
            "---",
            "...",
            "%YAML 9.9",
            "%TAG ! x",
            "- a",
            "x",
            "\t",
            "limit",
            ": ",
            "{",
            "  limit: 1",
            "&a",
        )
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(places))
    return file_bytes(rng, "\n".join(lines))


def forms_of_files(store: Store) -> dict[str, Form]:
    """Return the forms by name."""
    return {
        "mask": Form(
            **in_file("mask.json", lambda rng: json_file(rng, MASK, ("mean", "resample", "prune"))),
            read=read_whole_mask,
        ),
        "toml": Form(**in_file("options.toml", toml_file), read=lambda path: run_options({}, path)),
        "yaml": Form(**in_file("options.yaml", yaml_file), read=lambda path: run_options({}, path)),
        "machine": Form(
            **in_file("machine.json", lambda rng: json_file(rng, MACHINE)),
            read=lambda path: read_machine(path).rates_for(store),
            names=("--machine",),
        ),
    }
