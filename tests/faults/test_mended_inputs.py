"""What users' files and words once did, and what is said of it now."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import invoke
from conftest import make_checkpoint, small_config

import lowmem_icl
from lowmem_icl.conversion.locate import load_tokenizer, locate, plan_store
from lowmem_icl.errors import InputError
from lowmem_icl.options import run_options
from lowmem_icl.report.run_tables import read_run
from lowmem_icl.session.prepare import prepare
from lowmem_icl.session.sealed import Damaged, read_sealed
from lowmem_icl.system.visible import LONGEST_LINE, visible_line
from lowmem_icl.tables.schema import read_table, write_table
from lowmem_icl.tasks.loading import open_task
from lowmem_icl.tasks.scoring import task_metrics

DEMO = Path(lowmem_icl.__file__).parent / "demo"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"hidden_size": 80_000, "word_embed_proj_dim": 80_000},
            r"embed_tokens\.weight': expected shape \[300, 80000\].*got \[300, 32\]",
        ),
        ({"ffn_dim": 65}, r"layers\.0\.fc1\.weight': expected shape \[65, 32\].*got \[64, 32\]"),
        (
            {"max_position_embeddings": 97},
            r"embed_positions\.weight': expected shape \[99, 32\].*got \[98, 32\]",
        ),
    ],
)
def test_a_config_is_held_against_the_weights_before_any_is_read(
    changes: dict[str, int], named: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").write_text(json.dumps(small_config(**changes).to_dict()))
    with pytest.raises(InputError, match=rf"parameter '.*{named}; config\.json and weights do not belong"):
        plan_store(locate(str(folder), None, "int8", tmp_path / "stores"), "int8")
    assert not (tmp_path / "stores").exists()


def test_options_that_do_not_fit_together_are_named_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text("label-drops = true\nexperiments = 'evaluate'")
    with pytest.raises(InputError, match=rf"^--label-drops in {path}: expected ablate"):
        run_options({}, path)
    with pytest.raises(InputError, match=r"^--label-drops: expected ablate"):
        run_options({"label_drops": True}, path)


def test_a_second_yaml_document_is_never_left_out_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("---\n---\nlimit: 4\n")
    with pytest.raises(InputError, match="one document in the file"):
        run_options({}, path)


@pytest.mark.parametrize(("end", "count"), [(" ", 5), ("\n", 5), ("\t", 5), ("", 0)])
def test_contexts_that_end_in_white_space_are_told_once(
    end: str, count: int, tmp_path: Path, stores: Path
) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"context": f"lusa{end}", "options": ["tiro", "mepi"], "gold": n % 2} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = run_options(
        {"tasks": str(path), "shots": "0,1", "experiments": "evaluate", "store_dir": stores}
    )
    notes = [note for note in prepare(options).notes if "white space" in note]
    assert len(notes) == bool(count)
    assert all(f"own.jsonl: {count} of {count} contexts" in note for note in notes)


def test_a_path_has_its_users_home_where_no_shell_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    told = invoke("convert", "demo", "~nosuch/x")
    assert told.exit_code == 2
    assert "expected a path, got '~nosuch/x'; correct it" in told.stderr
    assert list(tmp_path.iterdir()) == []
    assert invoke("convert", "demo", "~/store").exit_code == 0
    assert (tmp_path / "home" / "store" / "manifest.json").is_file()


def test_a_file_for_rates_that_cannot_be_written_is_named_before_measuring() -> None:
    told = invoke("measure", "--out", "/proc/x/machine.json")
    assert told.exit_code == 2
    assert "/proc/x: cannot be written" in told.stderr


def test_a_tokenizers_fields_are_no_commands_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    config = {"added_tokens_decoder": {"2": {"content": "</s>", "\x1b[31m": 1}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    assert "\x1b" not in "".join(capfd.readouterr())


def test_an_empty_option_makes_no_warning_of_numpys(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "a", "sol1": "" if n else "b", "sol2": "c", "label": n % 2} for n in range(4)]
    for split in ("train", "validation"):
        (tmp_path / "piqa" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task("piqa", tmp_path).rows(shots=0, part="evaluate", limit=None)
    # Warnings are errors in tests.
    metrics = {value.metric: value.value for value in task_metrics(task, np.full(8, -1.0), np.zeros(8, bool))}
    assert metrics["acc"] == 0.5


def test_a_strangers_long_value_is_cut_in_the_middle() -> None:
    line = visible_line(f"begins {'x' * 99_999} ends")
    assert line.startswith("begins xxx")
    assert line.endswith("xxx ends")
    assert len(line) < LONGEST_LINE + 10


def test_a_part_whose_places_lie_before_its_beginning_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    # An empty zip file whose directory would begin before the file does.
    path.write_bytes(b"PK\x05\x06" + b"\0" * 4 + b"\1\0\1\0" + b"\x00\xff\0\0" + b"\x00\xff\xff\0" + b"\0\0")
    with pytest.raises(Damaged):
        read_sealed(path, "x")


@pytest.mark.parametrize(("column", "value", "has"), [("head", 8, 8), ("layer", 4, 4)])
def test_a_table_of_units_that_the_model_lacks_is_refused(
    column: str, value: int, has: int, small_run: Path, tmp_path: Path
) -> None:
    """Head 8 of layer 0 would be shown as the first of layer 1."""
    shutil.copy(small_run / "run.json", tmp_path)
    results = read_table(small_run / "results.parquet", "results")
    of_others = results.with_columns(
        pl.when(pl.col(column) == 1).then(value).otherwise(pl.col(column)).alias(column)
    )
    write_table(of_others.cast({column: results.schema[column]}), "results", tmp_path / "results.parquet")
    with pytest.raises(InputError, match=f"is of {column} {value}, and the model has {has}"):
        read_run(tmp_path)
