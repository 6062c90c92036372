"""What patching is given: a run's pairs of prompts, made of its tasks or read from files."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions, run_options
from lowmem_icl.planning.plan import make_plan
from lowmem_icl.protocols import CORRUPTIONS, Corruption
from lowmem_icl.session import prepare as preparing
from lowmem_icl.session import task_texts
from lowmem_icl.session.identity import identity_of
from lowmem_icl.session.prepare import Prepared, prepare, prepare_plan
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import NoLabelControl
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.prompt_pairs import corruptions
from lowmem_icl.tasks.prompt_pairs.made import pairs_of

PAIR = {"context": "red blue", "corrupted": "blue red", "options": [" red", " blue"], "gold": 0}


def options_of(stores: Path, **changes: Any) -> RunOptions:
    fields = {"experiments": "patch", "limit": "4", "train_limit": "6", "store_dir": str(stores)}
    return run_options(fields | {name: str(value) for name, value in changes.items()})


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def settings_of(prepared: Prepared) -> list[tuple[str, int, str]]:
    assert all(
        (clean.task, clean.shots, clean.labels) == (corrupted.task, corrupted.shots, "right")
        for clean, corrupted in prepared.pair_settings
    )
    return [(rows.task, rows.shots, rows.labels) for rows in prepared.corrupted]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_training_documents_are_corrupted_at_every_shot_count(
    tmp_path: Path, stores: Path, corruption: Corruption
) -> None:
    prepared = prepare(options_of(stores, tasks="recall,category", shots="0,1,4", corrupt=corruption))
    shots = (4,) if corruption == "shuffled" else (1, 4)
    assert settings_of(prepared) == [(task, n, corruption) for task in ("recall", "category") for n in shots]
    for clean, corrupted in prepared.pair_settings:
        made = pairs_of(prepared.pack(clean), prepared.pack(corrupted))
        assert [pair.document for pair in made.pairs] == [document.index for document in clean.documents]
        assert made.aligned == made.pairs, "a word is a token of the demo"
    assert not prepared.train_controls
    assert prepared.pair_notes == ()


def test_label_drops_and_pairs_share_the_shuffled_documents(stores: Path) -> None:
    changes = {"tasks": "recall", "shots": "4", "experiments": "ablate,patch"}
    both = prepare(options_of(stores, **changes, label_drops=True))
    assert both.corrupted == both.train_controls
    assert len(both.corrupted) == 1
    wrong = prepare(options_of(stores, **changes, label_drops=True, corrupt="wrong"))
    assert [rows.labels for rows in (*wrong.train_controls, *wrong.corrupted)] == ["shuffled", "wrong"]
    assert wrong.tasks_digest != both.tasks_digest


def test_a_plan_by_sizes_has_the_same_settings(
    tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "MOST_EXACT", 0)
    for corruption in ("wrong", "queries"):
        options = options_of(tmp_path / corruption, tasks="recall", shots="4", corrupt=corruption)
        made, kept = prepare_plan(options), prepare_plan(options)
        assert made.sample_note
        for sampled in (made, kept):
            assert settings_of(sampled) == [("recall", 4, corruption)]
            (rows,) = sampled.corrupted
            assert sampled.outline(rows).token_count > 0


def test_tasks_that_cannot_be_corrupted_are_named(tmp_path: Path, stores: Path) -> None:
    lines = [{"context": f"red {number}", "options": [" a", " b"], "gold": 0} for number in range(30)]
    same = write_lines(tmp_path / "same.jsonl", *lines)
    changes = {"shots": "2", "corrupt": "wrong"}
    with pytest.raises(InputError, match=r"--corrupt wrong: task .*same.jsonl: .* another answer than 'a'"):
        prepare(options_of(stores, tasks=same, **changes))
    prepared = prepare(options_of(stores, tasks=f"recall,{same}", **changes))
    assert settings_of(prepared) == [("recall", 2, "wrong")]
    (note,) = prepared.pair_notes
    assert note.startswith(f"task {same}: no pairs of prompts (wrong) at 2 shots: ")
    assert prepared.notes == ()


def test_a_shot_count_that_cannot_be_corrupted_takes_no_other_along(
    stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_at_one(task: OpenTask, rows: TaskRows, *others: Any) -> TaskRows:
        if rows.shots == 1:
            raise NoLabelControl("nothing else to show")
        return corruptions.corrupted(task, rows, *others)

    monkeypatch.setattr(task_texts, "corrupted", fails_at_one)
    for tasks in ("recall", "recall,category"):
        prepared = prepare(options_of(stores, tasks=tasks, shots="1,2,4", corrupt="wrong"))
        names = tasks.split(",")
        assert settings_of(prepared) == [(name, shots, "wrong") for name in names for shots in (2, 4)]
        assert prepared.pair_notes == tuple(
            f"task {name}: no pairs of prompts (wrong) at 1 shot: nothing else to show" for name in names
        )


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_tasks_with_answers_in_their_contexts_are_named_once(
    shared_data: Path, stores: Path, corruption: Corruption
) -> None:
    changes = {"shots": "2,3", "corrupt": corruption, "data_dir": shared_data}
    prepared = prepare(options_of(stores, tasks="recall,winogrande", **changes))
    assert settings_of(prepared) == [("recall", shots, corruption) for shots in (2, 3)]
    (note,) = prepared.pair_notes
    assert note.startswith(f"task winogrande: no pairs of prompts ({corruption}): its answers stand in")


def test_given_prompts_need_no_tasks(tmp_path: Path, stores: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIR, PAIR | {"gold": [0]})
    clean = write_lines(tmp_path / "clean.jsonl", {"context": "red blue", "target": " red"})
    corrupted = write_lines(tmp_path / "corrupted.jsonl", {"tokens": [1, 2, 3], "target": [4]})
    options = options_of(stores, pairs=pairs, clean=clean, corrupted=corrupted)
    for made in (prepare(options), prepare_plan(options)):
        assert made.evaluate == made.train == made.corrupted == ()
        assert [pair.gold for pair in made.given.pairs] == [(True, False)] * 2
        assert made.given.prompts is not None
        assert made.given.prompts.clean[0].tokens == made.given.pairs[0].clean
        assert made.given.prompts.corrupted[0].tokens == (1, 2, 3)
        assert made.given.prompts.corrupted[0].target == (4,)
        make_plan(made)
    with_tasks = prepare(options_of(stores, pairs=pairs, tasks="recall", shots="4"))
    assert (len(with_tasks.given.pairs), len(with_tasks.corrupted)) == (2, 1)
    write_lines(pairs, PAIR | {"corrupted": "blue red red"})
    with pytest.raises(InputError, match="line 1: expected 'context' and 'corrupted' of equally many tokens"):
        prepare(options)


def test_a_run_belongs_to_the_content_of_its_prompts(tmp_path: Path, stores: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PAIR)
    options = options_of(stores, pairs=path)

    def identity() -> Any:
        prepared = prepare(options)
        return identity_of(options, "cpu", "w", prepared.tasks_digest, {}, prepared.given.digest)

    first = identity()
    assert first == identity()
    write_lines(path, PAIR | {"gold": 1})
    (difference,) = identity().differences(first)
    assert difference.startswith("the prompts given: digest ")
    assert prepare(options_of(stores, tasks="recall", shots="4")).given.digest == ""


# --- Options. ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"experiments": "evaluate", "corrupt": "wrong"}, "--corrupt: expected patch or icl-heads among"),
        ({"experiments": "evaluate", "at": "all"}, "--at: expected patch among"),
        ({"experiments": "evaluate", "pairs": "p"}, "--pairs: expected patch among"),
        ({"experiments": "icl-heads", "at": "all"}, "--at: expected patch among"),
        ({"clean": "c"}, "--clean: expected --corrupted with it, got only one of the two; give both"),
        ({"corrupted": "c"}, "--corrupted: expected --clean with it"),
        ({"shots": "0"}, "--experiments patch: expected demonstrations to corrupt, got --shots 0; add other"),
        ({"experiments": "icl-heads", "shots": "0"}, "--experiments icl-heads: expected dem"),
        ({"shots": "0,1"}, "--corrupt shuffled: expected --shots of at least 2"),
        ({"pairs": "p", "corrupt": "wrong"}, "--corrupt: only given prompts are patched; name --tasks"),
        ({"corrupt": "swapped"}, "--corrupt: expected one of shuffled, wrong, queries, got 'swapped'"),
        (
            {"at": "first"},
            "--at: expected a comma-separated list without repeats, each item one of last, all",
        ),
        ({"at": ""}, "--at: expected"),
    ],
)
def test_options_of_patching_are_checked(changes: dict[str, str], expected: str) -> None:
    with pytest.raises(InputError) as raised:
        run_options({"experiments": "patch"} | changes)
    assert expected in str(raised.value)


def test_options_of_patching_change_no_other_run() -> None:
    plain, patched = run_options({}), run_options({"experiments": "patch"})
    names = {"corrupt", "at", "pairs", "clean", "corrupted"}
    assert not names & plain.identity_values.keys()
    assert names <= patched.identity_values.keys()
    assert plain.experiments == ("evaluate", "importance", "ablate", "prune", "induction", "overlap")
    assert (patched.corrupt, patched.at) == ("shuffled", ("last",))
    assert run_options({"experiments": "patch", "at": "last,all"}).at == ("last", "all")
    assert run_options({"experiments": "evaluate,patch", "pairs": "p"}).makes_pairs is False
    assert run_options({"experiments": "patch", "pairs": "p"}).takes_tasks is False
    assert run_options({"experiments": "icl-heads,evaluate"}).experiments_in_order == (
        "evaluate",
        "icl-heads",
    )


def test_options_of_patching_come_from_a_file_too(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('experiments = ["patch"]\ncorrupt = "queries"\nat = ["all"]\n')
    options = run_options({}, config)
    assert (options.corrupt, options.at, options.makes_pairs) == ("queries", ("all",), True)
