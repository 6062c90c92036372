"""Pairs and prompts that users give in files, read strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.errors import InputError
from lowmem_icl.tasks.packing import PackingLimits
from lowmem_icl.tasks.prompt_pairs.files import PromptReader
from lowmem_icl.tasks.prompt_pairs.pair import parting_index

BOS, VOCABULARY = 256, 300
LIMITS = PackingLimits(context_tokens=4000, row_tokens=128, empty_context=0, bos=BOS)


def by_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


READER = PromptReader(by_bytes, lambda token: chr(token), PackingLimits(20, 128, 0, BOS), VOCABULARY)
PAIR = {"context": "Ann and Bob", "corrupted": "Bob and Ann", "options": [" Ann", " B"], "gold": 1}
PROMPT: dict[str, Any] = {"tokens": [5, 6, 7], "target": " Ann"}


def write_lines(folder: Path, *lines: Any) -> Path:
    path = folder / "given.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path, PAIR, "", PAIR | {"corrupted": "Bob and Bob", "gold": [0, 1]})
    first, second = READER.pairs(path)
    assert first.clean == (BOS, *b"Ann and Bob")
    assert first.corrupted == (BOS, *b"Bob and Ann")
    assert first.options == (tuple(b" Ann"), tuple(b" B"))
    assert (first.gold, second.gold) == ((False, True), (True, True))
    assert (first.document, second.document) == (0, 2)
    assert first.cluster == second.cluster, "of one clean prompt"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path, PROMPT, {"context": "Ann", "target": [9, 8]})
    first, second = READER.prompts(path)
    assert (first.tokens, first.target) == ((5, 6, 7), tuple(b" Ann")), "tokens are taken as they are"
    assert (second.tokens, second.target) == ((BOS, *b"Ann"), (9, 8))
    assert (first.document, second.document) == (0, 1)


@given(st.text(max_size=6), st.text(max_size=6))
def test_prompts_part_where_their_first_difference_is(left: str, right: str) -> None:
    clean, changed = (tuple(text.encode()) for text in (left, right))
    index = parting_index(clean, changed)
    if index is None:
        assert clean == changed
    else:
        assert clean[:index] == changed[:index]
        assert clean[index : index + 1] != changed[index : index + 1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (PAIR | {"corrupted": "Ann or Bob"}, "12 and 11 tokens, which part at token 6: 'a' and 'o'"),
        (PAIR | {"corrupted": "Ann and Bobby"}, "12 and 14 tokens, which part at token 13: the end and 'b'"),
        (PAIR | {"corrupted": PAIR["context"]}, "expected another prompt than context"),
        (PAIR | {"gold": 2}, "'gold': expected the index of the right option, or a list of indices, from 0"),
        (PAIR | {"gold": True}, "'gold'"),
        (PAIR | {"gold": []}, "'gold'"),
        (PAIR | {"gold": [0, 0]}, "none twice"),
        (PAIR | {"options": []}, "'options': expected a list of texts"),
        (PAIR | {"options": [" a", ""]}, "not empty"),
        (PAIR | {"options": [" a", " a"]}, "none twice"),
        (PAIR | {"options": " Ann"}, "'options': expected a list"),
        (PAIR | {"options": [" a" * 9, " b"]}, "have 29 tokens, the model's context holds 20; shorten"),
        (PAIR | {"context": 7}, "'context': expected a text, got 7"),
        ({"context": "a"}, "field 'corrupted' is missing"),
        ('{"context": "a", "context": "b"}', "field 'context' is given twice"),
        ('{"context": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"context": "\\ud800"}', "whole characters"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, line: Any, expected: str) -> None:
    path = write_lines(tmp_path, PAIR, line)
    with pytest.raises(InputError) as raised:
        READER.pairs(path)
    assert f"{path}, line 2" in str(raised.value)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"target": " Ann"}, "expected either 'context', a text, or 'tokens'"),
        (PROMPT | {"context": "a"}, "got both"),
        (PROMPT | {"tokens": [1, 300]}, "token ids from 0 to 299, the model's vocabulary, got 300"),
        (PROMPT | {"tokens": [1, True]}, "token ids"),
        (PROMPT | {"tokens": [1, 2.0]}, "token ids"),
        (PROMPT | {"tokens": []}, "a list of token ids"),
        (PROMPT | {"target": [-1]}, "'target': expected token ids"),
        (PROMPT | {"target": ""}, "not empty"),
        (PROMPT | {"tokens": [1] * 18}, "have 21 tokens"),
        ({"tokens": [1]}, "field 'target' is missing"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, line: Any, expected: str) -> None:
    path = write_lines(tmp_path, line)
    with pytest.raises(InputError, match="line 1") as raised:
        READER.prompts(path)
    assert expected in str(raised.value)


def test_files_without_lines_and_texts_with_bos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no lines"):
        READER.pairs(write_lines(tmp_path, ""))
    with pytest.raises(InputError, match="there is no such file"):
        READER.pairs(tmp_path / "missing.jsonl")
    doubled = PromptReader(lambda texts: [[BOS, 7] for _ in texts], chr, LIMITS, VOCABULARY)
    with pytest.raises(InputError, match="without the beginning-of-sequence token"):
        doubled.prompts(write_lines(tmp_path, {"context": "<s>a", "target": [1]}))
