"""Checkpoint configs, tokenizers and JSON with anything in them: read, or refused in a line, in seconds."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

import lowmem_icl
from lowmem_icl.conversion.checkpoint import read_json
from lowmem_icl.conversion.locate import load_tokenizer
from lowmem_icl.errors import InputError
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.options import run_options
from lowmem_icl.tasks.harness import harness_tasks
from lowmem_icl.tasks.word_pairs import read_pairs

DEMO = Path(lowmem_icl.__file__).parent / "demo"
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
FIELDS = [*CONFIG, "quantization_config", "rope_parameters", "head_dim", "layer_types", "torch_dtype"]
VALUES: list[Any] = [
    *(0, 1, -1, True, None, "", "512", "x" * 5000, [3], [], {}, {"a": 1}, 1.5, "relu"),
    *(2**31, 10**9, 10**30, 1e308),
]
LONGEST_SECONDS = 5
# The smallest inputs that failed: a traceback, or no end.
FOUND: list[dict[str, Any]] = [
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 0},
    {"hidden_size": 0},
    {"vocab_size": 10**30},
    {"ffn_dim": -1},
    {"activation_function": ""},
    {"pad_token_id": 10**9},
    {"quantization_config": []},
]


def is_refused(changes: dict[str, Any]) -> bool:
    started = time.monotonic()
    try:
        Skeleton.from_dict(CONFIG | changes).layer_parameters()
    except InputError:
        return True
    finally:
        assert time.monotonic() - started < LONGEST_SECONDS
    return False


@pytest.mark.parametrize("changes", FOUND, ids=str)
def test_what_once_failed_is_refused(changes: dict[str, Any]) -> None:
    assert is_refused(changes)


@pytest.mark.parametrize("count", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_any_value_of_any_field_is_read_or_refused(count: int) -> None:
    drawn = random.Random(count)
    for _ in range(count):
        is_refused({name: drawn.choice(VALUES) for name in drawn.sample(FIELDS, drawn.randint(1, 2))})


def test_the_demo_is_read() -> None:
    assert not is_refused({})


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"", b"[]", b"9" * 5_000])
def test_json_made_to_break_readers_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    for read in (read_json, read_pairs):
        with pytest.raises(InputError, match=r"broken\.json"):
            read(path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "none"}}'])
def test_a_broken_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_no_name_after_the_harness_prefix_is_refused_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="expected a task of lm-eval after"):
        harness_tasks("lm-eval:")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("model", ["~nobody-of-this-name/x", "a\0b", "\ud83d"])
def test_a_model_that_no_path_can_be_is_refused(model: str) -> None:
    with pytest.raises(InputError, match=r"--model: expected a folder, a file or a model's id on the hub"):
        run_options({"model": model})
