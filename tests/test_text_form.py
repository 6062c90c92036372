"""How prompts begin, and what tokenizers do to texts that continue others."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import invoke
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions
from lowmem_icl.session.text_form import text_form, text_tokeniser

WORDS = ["<unk>", "<s>", "▁Paris", "▁", "Paris", "▁a", "a", "▁is", "is"]


def doubling_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, also before one that has it, as Phi-3's does."""
    words = {word: n for n, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def tokenizer(prepend: str, *, bos: str | None = "<s>", adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; `prepend`: when it puts a space before a text, as Llama 2's always does."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, unk_token="<unk>")


def store(adds_bos: bool | None) -> Any:
    """What is asked of a store: whether its family decides on BOS, and what was noted of its source."""
    source = SimpleNamespace(notes=["tokenizer rules 'default'"])
    return SimpleNamespace(
        skeleton=SimpleNamespace(family=SimpleNamespace(adds_bos=adds_bos)),
        manifest=SimpleNamespace(source=source),
        tokenizer_folder="tokenizer",
    )


@pytest.mark.parametrize(
    ("option", "family", "by_itself", "expected", "by"),
    [
        (None, None, True, "<s>", "tokenizer"),
        (None, None, False, None, "tokenizer"),
        (None, False, True, None, "family"),
        (None, True, False, "<s>", "family"),
        (False, True, True, None, "option"),
        (True, False, False, "<s>", "option"),
    ],
)
def test_option_then_family_then_tokenizer_decide_on_bos(
    option: bool | None, family: bool | None, by_itself: bool, expected: str | None, by: str
) -> None:
    form = text_form(RunOptions(bos=option), store(family), tokenizer("never", adds_bos=by_itself))
    assert (form.bos, form.bos_by) == (expected, by)
    assert form.as_record()["notes"] == ("tokenizer rules 'default'",)
    assert form.sentence.startswith(f"{expected} stands" if expected else "nothing stands")


def test_a_tokenizer_without_bos_has_none_to_add() -> None:
    without = tokenizer("never", bos=None)
    assert text_form(RunOptions(), store(None), without).bos is None
    with pytest.raises(InputError, match="--bos"):
        text_form(RunOptions(bos=True), store(None), without)


def test_a_chat_template_is_named_and_not_applied() -> None:
    with_template = tokenizer("never")
    with_template.chat_template = "{{ messages }}"
    assert "not applied" in text_form(RunOptions(), store(None), with_template).sentence


@pytest.mark.parametrize(
    ("made", "puts_space"),
    [(tokenizer("always"), True), (tokenizer("never"), False), (doubling_tokenizer(), True)],
    ids=["once", "never", "doubling"],
)
def test_a_text_that_continues_another_begins_with_its_own_spaces(
    made: PreTrainedTokenizerFast, puts_space: bool
) -> None:
    """As the whole text would have it: what stands before a space does not decide what comes after."""
    tokenise = text_tokeniser(made)
    texts = {" Paris": ["▁Paris"], "  Paris": ["▁", "▁Paris"], "Paris": ["▁Paris" if puts_space else "Paris"]}
    for text, expected in texts.items():
        (ids,) = tokenise([text])
        assert [WORDS[number] for number in ids] == expected, text


def test_prompts_say_what_stands_before_them(tmp_path: Path) -> None:
    shown = invoke("prompts", "recall", "--shots", "1", "--count", "1", "--store-dir", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "nothing stands before a prompt, as in the paper's protocol" in shown.stdout
    arguments = ("prompts", "recall", "--json", "--count", "1", "--store-dir", tmp_path)
    (with_bos,), (without,) = (
        json.loads(invoke(*arguments, *more).stdout) for more in (("--bos",), ("--no-bos",))
    )
    assert with_bos["prompts"]["bos_by"] == without["prompts"]["bos_by"] == "option"
    ids = [entry["options"][0]["context_ids"] for entry in (with_bos, without)]
    assert ids[0][1:] == ids[1], "once, and at the front"
