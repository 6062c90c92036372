"""How a model's tokenizer is used: what stands before a prompt, and texts to token ids."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.conversion.locate import begins_with_bos, load_tokenizer
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import Store
from lowmem_icl.options import RunOptions
from lowmem_icl.tasks.packing import PackingLimits, Tokenise
from lowmem_icl.tasks.random_sequences import RandomSequences, drawable_ids, random_sequences

LONGEST_REMEMBERED_TEXT = 200
WORD_START = "▁"


@dataclass(frozen=True)
class TextForm:
    """What is done to prompts, for run.json, the page and `prompts`.

    bos: the token put once before every context, None without; bos_by: who decides, `option` (--bos),
    `family` or `tokenizer`; chat_template: whether the tokenizer has one, which is never applied; notes: what
    was done to the source at conversion that a reader would not expect, such as a tokenizer's rules.
    """

    bos: str | None
    bos_by: str
    chat_template: bool
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """Return plain values for run.json, and the sentence that says it."""
        return asdict(self) | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """What is done to prompts, in words."""
        begins = f"{self.bos} stands before every prompt" if self.bos else "nothing stands before a prompt"
        reason = {
            "option": "as --bos asks",
            "family": "as this family needs it" if self.bos else "as in the paper's protocol",
            "tokenizer": "as the model's tokenizer does",
        }[self.bos_by]
        template = "; the tokenizer has a chat template, which is not applied" if self.chat_template else ""
        return f"{begins}, {reason}{template}"


def text_form(options: RunOptions, store: Store, tokenizer: Any) -> TextForm:
    """Return how prompts begin; raise InputError where --bos asks for a token that there is not.

    Where neither option nor family decide, the tokenizer does: a text of its own begins with BOS or not.
    """
    adds, by = begins_with_bos(store.skeleton.family, tokenizer)
    if options.bos is not None:
        adds, by = options.bos, "option"
    if adds and tokenizer.bos_token_id is None:
        raise InputError(
            "--bos: the tokenizer has no beginning-of-sequence token; leave the option out"
            if by == "option"
            else f"{store.tokenizer_folder}: this family's prompts begin with a beginning-of-sequence token, "
            "and the tokenizer has none; give the model's own tokenizer, or --no-bos"
        )
    has_template = bool(getattr(tokenizer, "chat_template", None))
    notes = tuple(store.manifest.source.notes)
    return TextForm(tokenizer.bos_token if adds else None, by, has_template, notes)


def packing_limits(form: TextForm, store: Store, tokenizer: Any) -> PackingLimits:
    """Return what model and tokenizer set for packing."""
    skeleton = store.skeleton
    return PackingLimits(
        context_tokens=skeleton.context_tokens,
        row_tokens=PackingLimits.row_tokens_for(skeleton.width),
        empty_context=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0,
        bos=None if form.bos is None else tokenizer.bos_token_id,
    )


def check_ids(tokens: Iterable[NDArray[np.int32]], store: Store) -> None:
    """Raise InputError where texts have ids that the model's vocabulary lacks.

    A tokenizer may know more tokens than the model, as long as no text has them.
    """
    largest = max((int(ids.max(initial=0)) for ids in tokens), default=0)
    if largest >= store.skeleton.vocabulary:
        raise InputError(
            f"{store.tokenizer_folder}: the tokenizer gives token {largest}, the model knows only "
            f"{store.skeleton.vocabulary}; they do not belong together"
        )


def sequences_for(store: Store, limits: PackingLimits, seed: int) -> RandomSequences:
    """Return the sequences that a model's heads are scored on; raises InputError where it allows none."""
    tokenizer, skeleton = load_tokenizer(store.tokenizer_folder), store.skeleton
    backend = getattr(tokenizer, "backend_tokenizer", None)
    form = {} if backend is None else json.loads(backend.to_str())
    drawable = drawable_ids(form, tokenizer.all_special_ids, skeleton.vocabulary)
    bos = tokenizer.bos_token_id
    first = limits.empty_context if bos is None else bos
    return random_sequences(drawable, first, skeleton.context_tokens, seed)


def text_tokeniser(tokenizer: Any) -> Tokenise:
    """Return a tokenizer as a function of texts that remembers short ones, such as answers.

    A text that begins with a space continues another. Tokenizers that put a space before every text, also
    before one that has it (Phi-3's, Llama 2's first files), would give it two, so it loses its own.
    """
    remembered: dict[str, list[int]] = {}

    @cache
    def doubles_space() -> bool:
        plain, spaced = tokenizer(["a", " a"], add_special_tokens=False)["input_ids"]
        first = str(tokenizer.convert_ids_to_tokens(plain[:1])[0]) if plain else ""
        return first.startswith(WORD_START) and plain != spaced

    def tokenise(texts: list[str]) -> list[list[int]]:
        new = [text for text in dict.fromkeys(texts) if text not in remembered]
        given = [text.removeprefix(" ") for text in new] if new and doubles_space() else new
        ids = tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"] if given else []
        made = dict(zip(new, ids, strict=True))
        remembered.update(
            (text, text_ids) for text, text_ids in made.items() if len(text) <= LONGEST_REMEMBERED_TEXT
        )
        return [made[text] if text in made else remembered[text] for text in texts]

    return tokenise
