"""Texts once: prompted, tokenised and laid out once for plan, run and resumed run; kept files are checked and
made again.
"""

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.task import ConfigurableTask

from lowmem_icl.conversion import locate
from lowmem_icl.options import RunOptions, run_options
from lowmem_icl.rows import PackedRows, outline
from lowmem_icl.session import prepare as preparing
from lowmem_icl.session.document_limits import part_limits
from lowmem_icl.session.first_prompts import first_prompts
from lowmem_icl.session.prepare import Prepared, prepare
from lowmem_icl.session.task_texts import part_rows
from lowmem_icl.session.text_form import text_tokeniser
from lowmem_icl.session.texts import KeptTexts
from lowmem_icl.tasks import packing
from lowmem_icl.tasks.packing import PackingLimits, pack
from lowmem_icl.tasks.prompt_table import TableWriter
from lowmem_icl.tasks.prompting import DirectPrompter
from lowmem_icl.tasks.row_arrays import arrays_of_rows, outline_of_arrays, rows_of_arrays

FIELDS = ("evaluate", "train", "importance", "curves")
SLICES = (slice(None), slice(0, 3), slice(1, None, 2))


class Calls:
    """Counts what is prompted, tokenised and laid out."""

    def __init__(self) -> None:
        self.prompted: Counter[tuple[int, ...]] = Counter()
        self.rows: list[dict[str, Any]] = []
        self.tokenised: Counter[str] = Counter()
        self.laid_out: Counter[Any] = Counter()

    def forget(self) -> None:
        self.__init__()  # type: ignore[misc]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    context, load, rows = ConfigurableTask.fewshot_context, locate.load_tokenizer, packing.packed

    def fewshot_context(self: ConfigurableTask, row: dict[str, Any], shots: int, **more: Any) -> Any:
        # Documents may say the same: what tells them apart is which row they are.
        counted.rows += [row, *self.sampler.drawn]
        counted.prompted[id(row), *map(id, self.sampler.drawn)] += 1
        return context(self, row, shots, **more)

    def load_tokenizer(folder: Path) -> Any:
        tokenizer = load(folder)
        call = type(tokenizer).__call__

        class Counting(type(tokenizer)):  # type: ignore[misc]
            def __call__(self, texts: list[str], **more: Any) -> Any:
                counted.tokenised.update(texts)
                return call(self, texts, **more)

        tokenizer.__class__ = Counting
        return tokenizer

    def packed(task: Any, options: Any, *, gold_only: bool = False) -> PackedRows:
        documents = tuple((task.split, d.index, d.demonstrations, tuple(d.options)) for d in task.documents)
        counted.laid_out[task.task, task.shots, documents, gold_only] += 1
        return rows(task, options, gold_only=gold_only)

    monkeypatch.setattr(ConfigurableTask, "fewshot_context", fewshot_context)
    monkeypatch.setattr(preparing, "load_tokenizer", load_tokenizer)
    monkeypatch.setattr(preparing, "packed", packed)
    return counted


def small_options(folder: Path, **more: object) -> RunOptions:
    given = {"tasks": "recall,knowledge", "shots": "0,2", "limit": 12, "train_limit": 4, "curve_limit": 5}
    return run_options(given | {"store_dir": folder} | more)


def packs(prepared: Prepared) -> Iterator[PackedRows]:
    for name in FIELDS:
        for task in getattr(prepared, name):
            for documents in SLICES:
                prepared.outline(task, documents)
                yield prepared.pack(task, documents).packed
    for task in prepared.importance:
        prepared.outline(task, gold_only=True)
        yield prepared.pack(task, gold_only=True).packed


def digests(prepared: Prepared) -> list[list[str]]:
    return [[row.digest for row in packed.rows] for packed in packs(prepared)]


def test_texts_are_made_once_for_plan_run_and_resumed_run(tmp_path: Path, calls: Calls) -> None:
    first = prepare(small_options(tmp_path, labels="right", certify_limit=3))
    made = digests(first)
    for counter in (calls.prompted, calls.tokenised, calls.laid_out):
        assert [key for key, count in counter.items() if count > 1] == []
    # Two tasks at two shot counts: 12 documents to evaluate on (curves among them), 4 to train, 3 to certify.
    assert calls.prompted.total() == 2 * 2 * (12 + 4 + 3)
    calls.forget()
    second = prepare(small_options(tmp_path, labels="right", certify_limit=3))
    assert digests(second) == made
    assert second.tasks_digest == first.tasks_digest
    assert not calls.prompted
    assert not calls.tokenised
    assert not calls.laid_out


def test_texts_of_controls_are_made_once_too(tmp_path: Path, calls: Calls) -> None:
    def made() -> tuple[str, list[str]]:
        prepared = prepare(small_options(tmp_path))
        rows = [prepared.pack(control).packed.rows for control in prepared.label_controls]
        return prepared.tasks_digest, [row.digest for packed in rows for row in packed]

    prepare(small_options(tmp_path, labels="right"))
    calls.forget()
    first = made()
    # Two tasks at 2 shots, their 12 documents with two other choices of labels.
    assert calls.prompted.total() == 2 * 12 * 2
    calls.forget()
    assert made() == first
    assert not calls.prompted
    assert not calls.laid_out


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"demonstrations": "shared", "demonstration_sets": 2, "shots": "0,6"},
        {"protocol": "reference", "importance_limit": 6},
    ],
)
def test_documents_and_rows_equal_those_made_without_keeping(tmp_path: Path, more: dict[str, object]) -> None:
    path = tmp_path / "long.jsonl"
    rows = [
        {"context": f"{n} " + "word " * 40, "options": [" a", f" {n}"], "gold": [1, 0]} for n in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = small_options(tmp_path, **({"tasks": f"recall,{path}"} | more))
    for prepared in (prepare(options), prepare(options)):
        tokenise = text_tokeniser(locate.load_tokenizer(prepared.store.tokenizer_folder))
        for task in preparing.open_tasks(options):
            for shots in options.resolved_shots:
                for name, part in part_limits(options).items():
                    kept = {(rows.task, rows.shots): rows for rows in getattr(prepared, name)}[
                        task.name, shots
                    ]
                    prompter = DirectPrompter(
                        partial(packing.fit_context, tokenise=tokenise, limits=prepared.limits)
                    )
                    plain = part_rows(options, task, shots, part, prompter)
                    if name == "certify":
                        train = part_rows(options, task, shots, part_limits(options)["train"], prompter)
                        plain = plain.unrelated_to(train)
                    for left, right in zip(plain.documents, kept.documents, strict=True):
                        assert replace(left, options=()) == replace(right, options=())
                        assert (tuple(left.options), left.row) == (tuple(right.options), right.row)
                    if not plain.documents:
                        assert name == "certify", "where sets are shared, none may be left"
                        continue
                    expected, got = pack(plain, tokenise, prepared.limits), prepared.pack(kept)
                    assert [*expected.options] == [*got.options]
                    assert [r.digest for r in expected.packed.rows] == [r.digest for r in got.packed.rows]
    if options.demonstrations == "shared":
        dropped = {
            rows.task: max(document.dropped for document in rows.documents) for rows in prepared.evaluate
        }
        assert dropped == {"recall": 0, str(path): 5}


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 13},
        {"train_limit": 5},
        {"bos": True},
        {"demonstrations": "shared"},
        {"protocol": "reference"},
    ],
)
def test_other_options_find_no_texts_of_these(
    tmp_path: Path, calls: Calls, change: dict[str, object]
) -> None:
    prepare(small_options(tmp_path))
    calls.forget()
    prepare(small_options(tmp_path, **change))
    assert calls.prompted.total() >= 4 * 16


def test_options_without_influence_on_texts_share_them(tmp_path: Path, calls: Calls) -> None:
    prepare(small_options(tmp_path))
    calls.forget()
    prepare(small_options(tmp_path, seed=7, experiments="evaluate,importance,prune", memory="3GB"))
    prepare(small_options(tmp_path, labels="right"))
    assert not calls.prompted


def test_other_rows_find_no_texts_of_these(tmp_path: Path, calls: Calls) -> None:
    path = tmp_path / "own.jsonl"

    def documents(answer: str) -> list[str]:
        row = {"context": "q", "options": [f" {answer}", " no"], "gold": 0}
        path.write_text("\n".join([json.dumps(row)] * 4))
        prepared = prepare(small_options(tmp_path / "stores", tasks=str(path), shots="0"))
        return [
            prepared.tasks_digest,
            *(text for d in prepared.evaluate[0].documents for _, text in d.options),
        ]

    yes = documents("yes")
    assert documents("maybe") != yes
    assert documents("yes") == yes


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, "flip", "cut"])
@pytest.mark.parametrize("kind", ["prompts.safetensors", "rows-*.npz"])
def test_a_damaged_file_is_made_again(tmp_path: Path, kind: str, damage: bytes | str) -> None:
    options = small_options(tmp_path, tasks="knowledge", shots="0")
    made = digests(prepare(options))
    for path in (tmp_path / "texts").rglob(kind):
        whole = path.read_bytes()
        middle = len(whole) // 2
        spoiled = {
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:-9],
        }.get(damage, damage)  # type: ignore[arg-type]
        path.unlink()  # Not written over: the first Prepared has it mapped.
        path.write_bytes(spoiled)
    assert digests(prepare(options)) == made
    assert not list((tmp_path / "texts").rglob("*.partial"))


def test_rows_of_another_key_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows go by a digest of which documents they are of, so files of two keys may have one name."""
    prepared = prepare(small_options(tmp_path / "stores", tasks="recall", shots="0,4"))
    of = {task.shots: prepared.pack(task).packed for task in prepared.evaluate}
    kept = KeptTexts(tmp_path)
    for shots, packed in of.items():
        kept.rows(f"{shots} shots", "all", lambda packed=packed: packed)  # type: ignore[misc]
    shutil.copyfile(tmp_path / "0 shots" / "rows-all.npz", tmp_path / "4 shots" / "rows-all.npz")
    for again in (KeptTexts(tmp_path), KeptTexts(tmp_path)):
        found = again.rows("4 shots", "all", lambda: of[4])
        for ours, theirs in zip(found.rows, of[4].rows, strict=True):
            assert np.array_equal(ours.tokens, theirs.tokens)
    assert caplog.text.count("is made again") == 1


def test_a_folder_that_cannot_be_written_to_leaves_texts_in_memory(tmp_path: Path, calls: Calls) -> None:
    made = digests(prepare(small_options(tmp_path / "stores")))
    calls.forget()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "texts").write_text("no folder")
    prepared = prepare(small_options(tmp_path / "blocked"))
    assert digests(prepared) == digests(prepared) == made
    assert set(calls.laid_out.values()) == {1}


def test_outlines_have_the_sizes_of_rows(tmp_path: Path) -> None:
    prepared = prepare(small_options(tmp_path, demonstrations="shared", shots="4"))
    for task in prepared.evaluate:
        packed, sizes = prepared.pack(task).packed, prepared.outline(task)
        again = outline_of_arrays(arrays_of_rows(packed))
        stems: dict[Any, Any] = {}
        for row, *outlines in zip(packed.rows, sizes.rows, again.rows, strict=True):
            expected = outline(row, stems)
            for got in outlines:
                assert (len(got), len(got.reads)) == (len(expected), len(expected.reads))
                assert (got.stem is None) == (expected.stem is None)
                assert len(got.stem or ()) == len(expected.stem or ())
        assert len({row.stem for row in sizes.rows}) == len({row.stem for row in packed.rows})
        assert (sizes.token_count, sizes.option_count) == (packed.token_count, packed.option_count)


def test_rows_survive_as_arrays_and_torn_arrays_are_refused(tmp_path: Path) -> None:
    prepared = prepare(small_options(tmp_path, demonstrations="shared", shots="4"))
    packed = prepared.pack(prepared.evaluate[0]).packed
    arrays = arrays_of_rows(packed)
    back = rows_of_arrays(arrays)
    for left, right in zip(packed.rows, back.rows, strict=True):
        assert left.digest == right.digest
        np.testing.assert_array_equal(left.owners, right.owners)
    with pytest.raises(ValueError, match="targets: expected"):
        rows_of_arrays(arrays | {"targets": arrays["targets"][1:]})


def test_many_long_prompts_do_not_stay_in_memory(tmp_path: Path) -> None:
    rows = [{"context": f"{n} " + "word " * 2000, "options": [" a", " b"], "gold": 0} for n in range(400)]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = small_options(tmp_path, tasks=str(path), shots="0", limit=None)
    tracemalloc.start()
    prepared = prepare(options)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    texts = sum(
        len(context) for task in prepared.evaluate for d in task.documents for context, _ in d.options
    )
    # The rows themselves are held as lm-eval has them; lists of tokens would take eight times as much again.
    assert held < 2 * texts
    assert peak < 30 * texts


def test_prompts_makes_only_what_it_shows(tmp_path: Path, calls: Calls) -> None:
    ((_, task, options),) = first_prompts(small_options(tmp_path, tasks="recall", shots="2", limit=9), 3)
    assert calls.prompted.total() == len(task.documents) == 3
    assert len(options) == sum(len(document.gold) for document in task.documents)


def test_a_table_that_lacks_a_prompt_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_options(tmp_path, tasks="knowledge", shots="0")
    empty = TableWriter(lambda texts: [], PackingLimits(8, 8, 0)).arrays()
    kept = KeptTexts.table
    asked = []

    def table(self: KeptTexts, key: str, make: Any, *, again: bool = False) -> Any:
        asked.append(again)
        return kept(self, key, make if again else lambda: empty, again=again)

    monkeypatch.setattr(KeptTexts, "table", table)
    assert len(prepare(options).evaluate[0].documents) == 12
    assert asked == [False, True]


def test_listing_tasks_imports_neither_lm_eval_nor_datasets() -> None:
    code = (
        "import sys; from lowmem_icl.cli.app import app; app(['tasks', '--json'], standalone_mode=False); "
        "heavy = {'lm_eval', 'datasets', 'torch', 'transformers', 'polars'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip().splitlines()[-1] == "[]"
    rows = {entry["task"]: entry["rows"] for entry in json.loads(found.stdout)}
    assert rows["recall"]["validation"] == 512
