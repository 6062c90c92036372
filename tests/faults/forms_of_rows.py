"""Generated rows, pairs, prompts and texts of a user's own, prepared as a run prepares them."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from forms_of_files import in_file
from fuzzing import Form
from grammar import broken, file_bytes, json_text

from lowmem_icl.options import run_options
from lowmem_icl.session.given_prompts import prompt_files
from lowmem_icl.session.prepare import ModelBasis, open_tasks
from lowmem_icl.session.texts import KeptTexts
from lowmem_icl.system.progress import unseen

ROWS: list[dict[str, Any]] = [
    {"context": "Q: lusa\nA:", "options": [" tiro", " mepi", " kano"], "gold": number % 3}
    for number in range(7)
] + [{"context": "Q: mepi\nA:", "options": [" lusa", " tiro"], "gold": [0, 1], "id": 7}]
CONTINUED: list[dict[str, Any]] = [
    {"context": f"lusa {word}", "options": [" tiro"], "gold": 0} for word in "abcd"
]
WORDS = {"lusa": "tiro", "mepi": "kano", "a": "b", "c": "d"}
PAIRS: list[dict[str, Any]] = [{"input": word, "output": other} for word, other in WORDS.items()]
TASK_ROWS: list[dict[str, Any]] = [
    {"goal": f"to {word}", "sol1": "do this", "sol2": "do that", "label": number % 2}
    for number, word in enumerate(("eat", "go", "see", "hear"))
]
CLEAN, CORRUPTED = "Q: lusa\nA: tiro\n\nQ: lusa\nA:", "Q: lusa\nA: mepi\n\nQ: lusa\nA:"
GIVEN_PAIRS: list[dict[str, Any]] = [
    {"context": CLEAN, "corrupted": CORRUPTED, "options": [" mepi", " tiro"], "gold": 1},
    {"context": CORRUPTED, "corrupted": CLEAN, "options": [" mepi", " tiro"], "gold": [0]},
]
PROMPTS: list[dict[str, Any]] = [
    {"context": CLEAN, "target": " tiro"},
    {"tokens": [5, 6, 7], "target": [9]},
    {"context": "", "target": "x"},
]
ODD_TEXTS = (
    " ",
    "\n",
    "\t",
    "a ",
    "",
    "x" * 20_000,
    "\ud83d",
    "😀",
    "\0",
    "a\u2028b",
    "</s>",
    "<pad>",
    "数据",
    "{{x}}",
)


def json_lines(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """Return rows, one a line, in any of which something may be wrong, or between them."""
    listed = broken(rng, rows, ODD_TEXTS) if rng.random() < 0.8 else rows
    lines = [
        json_text(rng, row).replace("\n", " ") for row in (listed if isinstance(listed, list) else [listed])
    ]
    if rng.random() < 0.15 and lines:
        lines.insert(
            rng.randrange(len(lines)), rng.choice(("", "  ", "{}", "x", "[]", lines[0], "// x", "null"))
        )
    return file_bytes(rng, "\n".join(lines) + rng.choice(("", "\n")))


def plain_text(rng: random.Random) -> bytes:
    """Return a text long enough, or not, of words or of anything."""
    words = [rng.choice(("lusa", "tiro", "mepi", "\n")) for _ in range(rng.choice((0, 5, 2_500, 5_000)))]
    for _ in range(rng.randrange(4)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(ODD_TEXTS))
    return file_bytes(rng, " ".join(words))


def prepared(basis: ModelBasis, **options: Any) -> None:
    """Read tasks and prompts that options name, tokenise them, and lay them out in rows, for the demo."""
    checked = run_options({"limit": 4, "train_limit": 3, "store_dir": basis.options.store_dir, **options})
    texts = KeptTexts(basis.texts.folder)
    ready = replace(basis, options=checked, texts=texts)
    # What it keeps does not depend on options.
    ready.__dict__["tokenise"], ready.__dict__["tokenizer_digest"] = basis.tokenise, basis.tokenizer_digest
    found = ready.with_texts(open_tasks(checked), unseen)
    _ = found.tasks_digest
    for rows in (*found.evaluate, *found.train, *found.importance):
        assert found.pack(rows).packed.token_count


def given(basis: ModelBasis, option: str) -> Callable[[Path], None]:
    """Return the reading of a file of prompts or of text that an option names."""
    experiments = "icl-heads" if option == "text" else "patch"

    def read(path: Path) -> None:
        both = {"corrupted": path, "clean": path} if option == "clean" else {option: path}
        options = run_options({"experiments": experiments, **both})
        vocabulary = basis.store.skeleton.vocabulary
        prompt_files(options, basis.tokenizer, basis.tokenise, basis.limits, vocabulary)

    return read


def task_rows(basis: ModelBasis) -> Form:
    """Rows of a known task in --data-dir, in that task's own fields."""

    def place(content: bytes, folder: Path) -> Path:
        (folder / "piqa").mkdir(exist_ok=True)
        for split in ("train", "validation"):
            (folder / "piqa" / f"{split}.jsonl").write_bytes(content)
        return folder / "piqa"

    return Form(
        lambda rng, folder: place(json_lines(rng, TASK_ROWS), folder),
        lambda path: prepared(
            basis, tasks=("piqa",), data_dir=path.parent, shots=(0, 1), experiments="evaluate"
        ),
        place,
        ("piqa", "--data-dir"),
    )


def forms_of_rows(basis: ModelBasis) -> dict[str, Form]:
    """Return the forms by name."""

    def own(path: Path) -> None:
        prepared(basis, tasks=(str(path),), shots=(0, 1))

    def patched(path: Path) -> None:
        prepared(basis, tasks=(str(path),), shots=(2,), experiments="evaluate,patch")

    def continued(path: Path) -> None:
        prepared(basis, tasks=(str(path),), shots=(0, 1), objective="gold_logprob")

    return {
        "rows": Form(**in_file("own.jsonl", lambda rng: json_lines(rng, ROWS)), read=own),
        "rows, patched": Form(**in_file("own.jsonl", lambda rng: json_lines(rng, ROWS)), read=patched),
        "continuations": Form(**in_file("own.jsonl", lambda rng: json_lines(rng, CONTINUED)), read=continued),
        "word pairs": Form(
            **in_file("own.json", lambda rng: file_bytes(rng, json_text(rng, broken(rng, PAIRS, ODD_TEXTS)))),
            read=own,
        ),
        "task rows": task_rows(basis),
        "pairs": Form(
            **in_file("pairs.jsonl", lambda rng: json_lines(rng, GIVEN_PAIRS)), read=given(basis, "pairs")
        ),
        "prompts": Form(
            **in_file("clean.jsonl", lambda rng: json_lines(rng, PROMPTS)), read=given(basis, "clean")
        ),
        "text": Form(**in_file("own.txt", plain_text), read=given(basis, "text")),
    }
