"""The smallest inputs that once failed, or nearly, by form: a traceback, a hang, silence, or words that did
not help. Those of TAKEN are read, all others are refused.
"""

import io
import json
import struct
from typing import Any

import numpy as np
from forms_of_files import DEMO, MACHINE, MASK

DEEP = b"[" * 10_000 + b"]" * 10_000
DIGITS = b"9" * 5_000
BOM = b"\xef\xbb\xbf"
ROW = b'{"context": "a", "options": [" b", " c"], "gold": 0}\n'
PAIR = b'{"context": "a b", "corrupted": "b a", "options": [" b", " c"], "gold": 0}\n'


def config(**changes: Any) -> bytes:
    """Return the demo's config.json with some fields changed."""
    return json.dumps(json.loads((DEMO / "config.json").read_text()) | changes).encode()


def changed(tree: dict[str, Any], **changes: Any) -> bytes:
    """Return a tree as JSON with some fields changed."""
    return json.dumps(tree | changes).encode()


def header(text: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    return struct.pack("<Q", len(text)) + text + data


def arrays(**named: Any) -> bytes:
    """Return an .npz file without a seal."""
    written = io.BytesIO()
    np.savez(written, **named)
    return written.getvalue()


NO_JSON = (
    b"",
    b"{",
    b"\xff\xfe{}",
    b"null",
    b"[]",
    b"\0",
    DEEP,
    DIGITS,
    b'{"a": ' + DIGITS + b"}",
    b'"\xe4"',
)
BAD_FIELDS: tuple[dict[str, Any], ...] = (
    {"use_cache": 1},
    {"init_std": "x"},
    {"layerdrop": ""},
    {"max_position_embeddings": "512"},
    {"ffn_dim": [3]},
    {"ffn_dim": -1},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 0},
    {"num_attention_heads": 10**6, "num_hidden_layers": 10**4},
    {"hidden_size": 0},
    {"hidden_size": 80_000},
    {"ffn_dim": 10**6},
    {"vocab_size": 10**30},
    {"vocab_size": 10**8},
    {"activation_function": ""},
    {"activation_function": "x" * 5_000},
    {"pad_token_id": 10**9},
    {"quantization_config": []},
    {"model_type": "x" * 5_000},
    {"model_type": None},
    {"model_type": "\x1b[31m"},
)
REFUSED: dict[str, tuple[bytes, ...]] = {
    "mask": (
        *NO_JSON,
        changed(MASK, model=MASK["model"] | {"layers": 9_999, "heads": 9_999}),
        changed(MASK, name="../x"),
        changed(MASK, removed={"heads": {"0": [8]}}),
        changed(MASK, removed={"ffns": [2, 2]}),
        changed(MASK, ablation="mean"),
        b'{"format": "lowmem-icl-mask/1", "format": 1}',
    ),
    "toml": (
        b"[",
        b"limit",
        b"limit = ",
        b"a.b = 1",
        b"limit = 1\nlimit = 2",
        b"limit = " + DEEP,
        b"limit = " + DIGITS,
        b"x = " + b"{a=" * 2_000 + b"1" + b"}" * 2_000,
        b"\xff",
        b"limit = nan",
        b"tasks = [1]",
        b"text = 'a.txt'",
        b"exact = 5",
        b"preset = 'night'\nexperiments = ['ablate']",
        b"clean = 'a.jsonl'",
        b"model = '~nosuch/x'",
        b"out = '~nosuch/x'",
        b"memory = 1979-05-27",
        b'limit = "\\ud83d"',
        b"\x00",
    ),
    "yaml": (
        b"limit: [",
        b"- a",
        b"a",
        b"limit: 1\nlimit: 2",
        b"limit: !!python/object/apply:os.system ['x']",
        b"limit: &a 1",
        b"limit: *a",
        b"limit: {a: 1}",
        b"limit: " + DEEP,
        b"\xff",
        b"%",
        b"---\n---\n",
        b"text: a.txt",
        b"x: " + b"{a: " * 2_000,
        b"\x1b",
        b"limit: 1:30",
    ),
    "machine": (
        *NO_JSON,
        changed(MACHINE, weights="nf4"),
        changed(MACHINE, call_seconds=1e308),
        changed(MACHINE, memory_bytes=True),
        changed(MACHINE, machine={"processor": [1]}),
    ),
    "config": (
        *NO_JSON,
        *(config(**each) for each in BAD_FIELDS),
    ),
    "tokenizer": (
        (DEMO / "tokenizer.json").read_bytes().replace(b'"<s>": 0', b'"<s>": 4294967295'),
        *NO_JSON,
        b"{}",
        b'{"model": {"type": "none"}}',
        b'{"version": "1.0", "model": {"type": "BPE"}}',
    ),
    "manifest": (*NO_JSON, b"{}", b'{"format": "lowmem-icl-store/1", "files": {"../x": {}}}'),
    "layer": (
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8,
        struct.pack("<Q", 2**62),
        header(b"{"),
        header(b"\xff"),
        header(b"[]"),
        header(b"null"),
        header(DEEP),
        header(b'{"a": ' + DIGITS + b"}"),
        header(b'{"a": 1}'),
        header(b'{"b": {"dtype": "F32", "shape": ["F32", 9223372036854775808], "data_offsets": [0, 0]}}'),
        header(b'{"b": {"dtype": "I8", "shape": [-2, -3], "data_offsets": [0, 6]}}', b"123456"),
        header(b'{"a": {}}'),
        header(
            b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 4]}}', b"\0" * 4
        ),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', b"\0" * 4),
    ),
    "record": (
        *NO_JSON,
        b"{}",
        b'{"format": "lowmem-icl-run/1"}',
        b'{"format": "lowmem-icl-run/2"}',
        b'{"format": 2}',
    ),
    "page": (b"{}",),
    "table": (b"", b"PAR1", b"PAR1PAR1", b"\0" * 100, b"PAR1" + b"\xff" * 8 + b"PAR1"),
    "rows": (
        ROW * 3 + ROW.replace(b'"a"', b'"' + b"a " * 5_000_000 + b'"'),
        b"",
        b"\n",
        b"{",
        b"[]",
        b"null",
        b"1",
        b"{}",
        b"\xff",
        DEEP,
        DIGITS,
        b'{"context": ' + DEEP + b"}",
        b'{"context": "a", "options": [], "gold": 0}',
        b'{"context": "a", "options": [1, 2], "gold": 0}',
        b'{"context": "a", "options": ["", " b"], "gold": 0}',
        b'{"context": "a", "options": [" b"], "gold": true}',
        b'{"context": "a", "options": [" b", " c"], "gold": 2}',
        b'{"context": "a", "options": [" b"], "gold": "0"}',
        b'{"context": "a", "options": [" b", " c"], "gold": NaN}',
        ROW + b'{"context": "a"}',
        b'{"context": "a", "context": "b", "options": [" b", " c"], "gold": 0}',
        b'{"context": "\\ud83d", "options": [" b", " c"], "gold": 0}' + b"\n" + ROW,
        b'{"context": "a", "options": [" b", " \\udc00"], "gold": 0}' + b"\n" + ROW,
        b'{"context": "a", "options": [" b", " c"], "gold": [0, ' + DIGITS + b"]}",
        ROW.replace(b" b", b" " + b"b" * 9_000),
        b'{"context": "a", "options": [" b", " c"], "gold": "' + b"x" * 9_000 + b'"}',
    ),
    "word pairs": (
        *NO_JSON,
        b'[{"input": "a"}]',
        b'[{"input": "a", "output": "b"}]',
        b'[{"input": "a", "output": " "}]',
        b'[{"input": "a", "output": "b"}, {"input": "\\ud83d", "output": "c"}]',
        b"[1]",
        b'{"input": "a"}',
    ),
    "task rows": (
        b"",
        b"{}",
        b'{"goal": "a"}',
        b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}',
        b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n'
        b'{"goal": "a", "sol1": "b", "sol2": "c", "label": "0"}\n',
        b'{"goal": "a", "sol1": 1, "sol2": [], "label": 0}\n' * 2,
        b'{"goal": "a", "sol1": "b", "sol2": "c", "label": {}}',
    ),
    "pairs": (
        b"",
        b"{}",
        b"[]",
        b"\xff",
        DEEP,
        DIGITS,
        PAIR.replace(b"b a", b"a b"),
        PAIR.replace(b"b a", b"b a a"),
        PAIR.replace(b"a b", b"\\ud83d"),
        PAIR.replace(b'"gold": 0', b'"gold": 2'),
    ),
    "prompts": (
        b"",
        b"{}",
        b'{"context": "a"}',
        b'{"context": "a", "tokens": [1], "target": "b"}',
        b'{"tokens": [-1], "target": "b"}',
        b'{"tokens": [1], "target": []}',
        b'{"tokens": [true], "target": "b"}',
    ),
    "text": (b"", b"\xff", b"\0", b"a b c", b"\xed\xa0\xbd"),
    "command line": tuple(
        json.dumps(line).encode()
        for line in (
            ["convert", "demo", "~nosuch/x"],
            ["convert", "~nosuch/x"],
            ["convert", "demo", "x" * 5_000],
            ["convert", "x" * 5_000],
            ["run", "--store-dir", "x" * 5_000],
            ["run", "--out", "~nosuch/x"],
            ["run", "--out", "/proc/x/y"],
            ["run", "--masks-dir", "/dev/null/x"],
            ["plan", "--tasks", "lm-eval:"],
            ["prompts", "recall", "--count", "9" * 5_000],
            ["plan", "--machine", "~nosuch/x"],
            ["plan", "--tasks", "x" * 5_000 + ".jsonl"],
            ["plan", "--tasks", "[/b]"],
            ["plan", "--model", "[/b]"],
            ["plan", "--model", "\udcff"],
            ["plan", "--tasks", "\udcff.jsonl"],
            ["plan", "--memory", "9" * 5_000],
            ["plan", "--limit", "9" * 5_000],
            ["run", "--seed", "1e999"],
            ["status", "~nosuch/x"],
            ["status", "x" * 5_000],
            ["status", "\x1b[31m"],
            ["report", "a\nb"],
            ["report", "run", "--out", "/proc/x"],
            ["report", "run", "--figures", "[/b]"],
            ["masks", "list", "[x]"],
            ["masks", "show", "~nosuch/x"],
            ["masks", "combine", "mask.json", "--out", "/proc/x.json"],
            ["masks", "combine", "mask.json", "--out", "x" * 300 + ".json"],
            ["evaluate", "--mask", "~nosuch/x"],
            ["masks", "export", "mask.json", "--format", "torch", "--out", "/proc/x"],
            ["measure", "--out", "/proc/x"],
            ["--nosuch"],
            ["nosuch"],
            ["run", "--nosuch=\x1b[31m"],
            ["tasks", "--data-dir", "~nosuch/x"],
            ["masks", "pull", "a/b", "~nosuch/x"],
            ["masks", "push", "mask.json", "../x"],
            ["masks", "pull", "a/b", "new", "--revision", "\udcff"],
            ["masks", "pull", "a/\udcff"],
            ["plan", "--model", "a/b", "--revision", "\udcff"],
        )
    ),
    "name": ("\udcff".encode("utf-8", "surrogateescape"),),
}
TAKEN: dict[str, tuple[bytes, ...]] = {
    "mask": (
        json.dumps(MASK).encode(),
        changed(MASK, scores={"before": []}),
        changed(MASK, scores={"acc": "x"}),
    ),
    "toml": (b"", BOM + b"limit = 16", b"limit = 16\r\n", b"# \xf0\x9f\x98\x80"),
    "yaml": (b"", BOM + b"limit: 16", b"limit: 16\r\n", b"seed: 1 # so"),
    "machine": (json.dumps(MACHINE).encode(),),
    "config": (config(), config(tie_word_embeddings=True), config(extra="x" * 5_000)),
    # What is no part is set aside and made again.
    "part": (
        b"",
        b"PK",
        b"PK\x05\x06" + b"\0" * 18,
        b"\x93NUMPY",
        arrays(a=np.ones(3)),
        arrays(),
        b"\xff" * 300,
    ),
    "rows": (
        ROW * 5,
        BOM + ROW * 5,
        ROW.replace(b"\n", b"\r\n") * 5,
        b"\n\n" + ROW * 5,
        ROW.replace(b'"a"', b'"a "') * 5,
        ROW.replace(b'"a"', b'""') * 5,
        ROW.replace(b'"a"', b'" "') * 5,
        ROW.replace(b'"a"', b'"\\u0000"') * 5,
        ROW.replace(b'"a"', b'"[/b] {{x}}"') * 5,
        ROW.replace(b'"a"', b'"' + b"a b " * 9_000 + b'"') * 5,
    ),
    "command line": tuple(
        json.dumps(line).encode()
        for line in (
            ["plan", "--tasks", "rows [v2].jsonl", "--shots", "0"],
            ["plan", "--tasks", "[/b].jsonl", "--shots", "0"],
            ["plan", "--tasks", "данные.jsonl", "--shots", "0"],
            ["run", "--out", "run [x]"],
            ["run", "--out", "g?"],
            ["masks", "show", "mask.json"],
            ["convert", "demo", "run [x]"],
            ["status", "run"],
            ["report", "run"],
        )
    ),
    "name": tuple(
        name.encode()
        for name in (
            "данные",
            "数据",
            "rows [v2]",
            "[/b]",
            "g?",
            "a" * 205,
            "a/" * 129 + "a",
            "run [x]",
            "a\nb",
            "😀",
            " ",
        )
    ),
}
CORPUS = {name: (*REFUSED.get(name, ()), *TAKEN.get(name, ())) for name in {**REFUSED, **TAKEN}}
