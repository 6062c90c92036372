"""The demo's small language: its words, its tokenizer and the sequences its model is trained on.

Lines have the form `word answer` and end with a newline. Four kinds of line:

- recall: a name and a value; which belongs to which is drawn anew for every sequence;
- category: a word of one of four hidden categories and that category's label, drawn anew for every sequence;
- knowledge: a word and its class, always the same;
- repeat: distinct words, then again some of them from the middle; the answer is the word that follows.

Everything is drawn from a numpy generator, so a seed gives the same language everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
BOS = 2

# Tokens of a question and the token of its answer.
Line = tuple[list[int], int]
DrawLine = Callable[[], Line]


def _split(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


CATEGORIES = {
    "animal": _split("cat dog horse cow pig sheep goat lion bear wolf fox deer mouse duck frog snake"),
    "food": _split("bread cheese apple rice soup cake bean egg honey butter lemon onion pear plum corn milk"),
    "tool": _split(
        "hammer saw drill rope nail spade rake axe knife brush ladder wrench pump broom needle chisel"
    ),
    "place": _split(
        "house street river forest island bridge tower garden market valley harbor castle desert "
        "lake farm cave"
    ),
}
CLASSES = {
    "metal": _split(
        "iron gold silver copper tin lead zinc nickel steel bronze brass chrome cobalt mercury "
        "titanium radium"
    ),
    "music": _split(
        "piano violin flute drum harp guitar trumpet organ cello horn banjo lute bell oboe tuba fiddle"
    ),
    "weather": _split(
        "rain snow wind storm fog hail frost cloud thunder sleet breeze drizzle mist sun ice gale"
    ),
    "body": _split("hand foot nose ear eye knee arm leg neck back chin heel wrist elbow thumb tooth"),
}
NAMES = _split(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Nora Oscar Paul "
    "Rosa Sam Tina Uma Victor Wanda Xenia Yara Zoe Adam Bella Carl Dora Eric Fiona George"
)
LABELS = _split(
    "dax wug blick fep toma zib nalu kiv rop sefi gug mave pilo tup lorn brax hesk jun quo vit "
    "yem oss ulk cray dorn fash glim hoot jeb krul lim moxy nub pard rill snar trem vosk wem zorp"
)
# Drawings of labels that training never uses; the demo's tasks use these alone.
HELD_OUT_LABELS = (("dax", "kiv", "lorn", "vit"), ("fep", "mave", "quo", "glim"))
HELD_OUT_VALUES = (("wug", "rop", "brax", "ulk"), ("blick", "tup", "oss", "snar"))
HELD_OUT_NAMES = (("Anna", "Felix", "Kate", "Oscar", "Uma"), ("Ben", "Grace", "Leo", "Rosa", "Yara"))


def byte_symbols() -> list[str]:
    """Return the 256 symbols that stand for bytes in byte-level tokenizers."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def words() -> list[str]:
    """Return all whole-word tokens; a leading Ġ stands for the space before a word."""
    in_categories = [word for members in CATEGORIES.values() for word in members]
    in_classes = [word for members in CLASSES.values() for word in members]
    spaced = [*in_categories, *LABELS, *CLASSES]
    return [*in_categories, *in_classes, *NAMES, *(f"Ġ{word}" for word in spaced)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: whole words of the language, single bytes for all other text."""
    symbols = [*SPECIAL, *byte_symbols(), *words()]
    assert len(set(symbols)) == len(symbols), "every token is listed once"
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    # Without merges a word that is no token falls apart into its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Sequence:
    """Token ids [T] of a kind; `answers` [T] is true where the token must be predicted;
    `period` of a repeat or 0.

    `start`: where the repeated part begins to be predictable (after BOS and the first copy).
    """

    kind: str
    tokens: np.ndarray
    answers: np.ndarray
    period: int = 0
    start: int = 0


class Language:
    """Draws training sequences; `ids` maps a token's symbol to its number."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.ids = tokenizer.get_vocab()
        self.rng = rng
        self.newline = self.ids["Ċ"]
        self.categories = [[self.ids[word] for word in members] for members in CATEGORIES.values()]
        self.spaced = [self.ids[f"Ġ{word}"] for members in CATEGORIES.values() for word in members]
        self.unspaced = [word for members in self.categories for word in members]
        self.classes = [[self.ids[word] for word in members] for members in CLASSES.values()]
        self.class_names = [self.ids[f"Ġ{name}"] for name in CLASSES]
        self.names = np.array([self.ids[name] for name in NAMES])
        self.labels = np.array([self.ids[f"Ġ{label}"] for label in LABELS])
        held = HELD_OUT_LABELS + HELD_OUT_VALUES
        self.held_out = [frozenset(self.ids[f"Ġ{label}"] for label in labels) for labels in held]

    def random_repeat(self, length: int) -> Sequence:
        """Distinct random ids over and over, every id but the special ones; half of them after BOS."""
        period = int(self.rng.integers(4, max(5, min(128, length // 2 - 1))))
        segment = self.rng.choice(np.arange(len(SPECIAL), len(self.ids)), period, replace=False)
        bos = int(self.rng.random() < 0.5)
        tokens = np.concatenate([[BOS] * bos, np.resize(segment, length - bos)]).astype(np.int64)
        answers = np.arange(length) >= bos + period + 1
        return Sequence("random", tokens, answers, period, bos + period)

    def lines(self, kind: str, length: int) -> Sequence:
        """Lines of one kind up to `length` tokens."""
        draw = getattr(self, f"_{kind}_lines")()
        tokens: list[int] = []
        answers: list[bool] = []
        while len(tokens) < length:
            question, answer = draw()
            tokens += [*question, answer, self.newline]
            answers += [False] * len(question) + [True, False]
        return Sequence(kind, np.array(tokens[:length]), np.array(answers[:length]))

    def _drawn_labels(self, count: int) -> np.ndarray:
        while True:
            drawn = self.rng.choice(self.labels, count, replace=False)
            if not any(held <= set(drawn.tolist()) for held in self.held_out):
                return drawn

    def _recall_lines(self) -> DrawLine:
        keys = self.rng.choice(self.names, int(self.rng.integers(3, 9)), replace=False)
        values = self._drawn_labels(int(self.rng.integers(2, 6)))
        of_key = self.rng.integers(0, len(values), len(keys))

        def draw() -> Line:
            key = int(self.rng.integers(len(keys)))
            return [int(keys[key])], int(values[of_key[key]])

        return draw

    def _category_lines(self) -> DrawLine:
        labels = self._drawn_labels(len(self.categories))

        def draw() -> Line:
            category = int(self.rng.integers(len(self.categories)))
            return [int(self.rng.choice(self.categories[category]))], int(labels[category])

        return draw

    def _knowledge_lines(self) -> DrawLine:
        def draw() -> Line:
            number = int(self.rng.integers(len(self.classes)))
            return [int(self.rng.choice(self.classes[number]))], self.class_names[number]

        return draw

    def _repeat_lines(self) -> DrawLine:
        def draw() -> Line:
            chosen = self.rng.choice(len(self.spaced), int(self.rng.integers(5, 11)), replace=False)
            at = int(self.rng.integers(1, len(chosen) - 2))
            first, rest = self.unspaced[chosen[0]], [self.spaced[word] for word in chosen[1:]]
            row = [first, *rest]
            return [*row, row[at], row[at + 1]], row[at + 2] if at + 2 < len(row) else row[-1]

        return draw
