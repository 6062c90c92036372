"""Generated files of runs: run.json, tables and parts; and how each is read."""

import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from forms_of_files import in_file
from fuzzing import Form
from grammar import broken, file_bytes, json_text, mutated
from synthetic_run import SyntheticRun

from lowmem_icl.report.page.write import render, run_page
from lowmem_icl.report.run_tables import read_run
from lowmem_icl.report.status import status_of
from lowmem_icl.report.summary import run_summary
from lowmem_icl.session.parts import Draft, Parts
from lowmem_icl.session.record import record_text
from lowmem_icl.session.sealed import write_sealed
from lowmem_icl.tables.schema import RESULTS, write_table


def small_run(folder: Path) -> Path:
    """Return the folder of a run that is there from the start, written where there is none."""
    run = folder / "run"
    if not run.is_dir():
        SyntheticRun(layers=2, heads=3, tasks=("a", "b"), shots=(0, 4)).write(run)
    return run


def record_form(read: Callable[[Path], Any]) -> Form:
    """A run's run.json; half of them carry the digest of what they say."""

    def place(given: bytes, folder: Path) -> Path:
        run = small_run(folder)
        if not (folder / "good.json").exists():
            shutil.copyfile(run / "run.json", folder / "good.json")
        (run / "run.json").write_bytes(given)
        return run

    def write(rng: random.Random, folder: Path) -> Path:
        place(b"", folder)
        tree = json.loads((folder / "good.json").read_text())
        del tree["digest"]
        changed = broken(rng, tree, ("running", "finished", "evaluate", "patch", "2026-01-01T00:00:00+00:00"))
        if rng.random() < 0.4 and isinstance(changed, dict):
            return place(record_text(changed).encode(), folder)
        return place(file_bytes(rng, json_text(rng, changed)), folder)

    return Form(write, read, place, ("run.json",))


def read_folder(path: Path) -> None:
    """Read a run as `status`, `--json` and tables do."""
    status_of(path)
    run_summary(read_run(path))


def read_page(path: Path) -> None:
    """Read a run as `report` does, all but its figures."""
    render(run_page(read_run(path)))


ODD_CELLS: dict[pl.DataType, Sequence[Any]] = {
    pl.String(): (
        "",
        "x",
        "clean",
        "../x",
        "aggregate",
        "head",
        "greedy",
        "acc",
        "\x1b[31m",
        "x" * 999,
        "1",
    ),
    pl.Float64(): (float("nan"), float("inf"), -1e308, 0.0, -1.0, 1e9),
    pl.Int32(): (0, -1, 2**31 - 1, -(2**31), 7, 101),
    pl.Boolean(): (True, False),
}


def values_changed(rng: random.Random, frame: pl.DataFrame) -> pl.DataFrame:
    """Return a table with some cells changed, or records gone, doubled or in another order."""
    for _ in range(rng.randrange(1, 4)):
        name, kind = rng.choice(list(RESULTS.items()))
        value = pl.lit(rng.choice((None, *ODD_CELLS.get(kind, (None,)))), dtype=kind)
        share = rng.choice((0.01, 0.2, 1.0))
        chosen = pl.Series([rng.random() < share for _ in range(frame.height)], dtype=pl.Boolean)
        frame = frame.with_columns(pl.when(chosen).then(value).otherwise(pl.col(name)).alias(name))
    change = rng.randrange(6)
    if change == 0:
        frame = frame.filter(pl.Series([rng.random() < 0.3 for _ in range(frame.height)], dtype=pl.Boolean))
    if change == 1:
        frame = pl.concat([frame, frame.head(50)])
    return frame.sample(fraction=1, shuffle=True, seed=1) if change == 2 else frame


def table_form(read: Callable[[Path], Any]) -> Form:
    """A run's results.parquet: other bytes, another table, or the table with other values."""

    def place(given: bytes, folder: Path) -> Path:
        run = small_run(folder)
        if not (folder / "good.parquet").exists():
            shutil.copyfile(run / "results.parquet", folder / "good.parquet")
        (run / "results.parquet").write_bytes(given)
        return run

    def write(rng: random.Random, folder: Path) -> Path:
        run = place(b"", folder)
        good = (folder / "good.parquet").read_bytes()
        drawn = rng.random()
        if drawn < 0.3:
            return place(mutated(rng, good), folder)
        frame = pl.read_parquet(io.BytesIO(good))
        if drawn < 0.9:
            write_table(values_changed(rng, frame), "results", run / "results.parquet")
            return run
        stated = {"table": "results", "schema_version": 2}
        other = (
            frame.select(rng.sample(frame.columns, 9)) if drawn < 0.95 else frame.cast({"value": pl.String})
        )
        written = io.BytesIO()
        other.write_parquet(written, metadata={"lowmem_icl": json_text(rng, broken(rng, stated))})
        return place(written.getvalue(), folder)

    return Form(write, read, place, ("results.parquet",))


def part_file(rng: random.Random) -> bytes:
    """Return a part's file: one of its own, of another, with other arrays, or with other bytes."""
    arrays = {"0.scores": np.arange(12.0).reshape(3, 4), "0.done": np.zeros(3, bool), "1.n": np.array(3)}
    return mutated(rng, _packed(arrays, rng.choice(("run ablate", "run ablate", "run evaluate", ""))))


def _packed(arrays: dict[str, Any], of: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        write_sealed(path, arrays, of)
        return path.read_bytes()


def read_part(path: Path) -> None:
    """Read a part as a run does: what is damaged is set aside and made again, with a note that names it."""
    shutil.copyfile(path, path.with_name("ablate.npz"))
    shutil.copyfile(path, path.with_name("ablate.draft.npz"))
    parts, left = Parts(path.parent, "run"), np.zeros(3)

    def make(draft: Draft) -> dict[str, Any]:
        draft.resume(lambda: {"0.scores": left})
        return {"made": np.ones(2)}

    found = parts.get_or_make("ablate", make)
    assert parts.made + parts.reused == 1
    assert parts.reused or (set(found) == {"made"} and "ablate.npz" in parts.notes[0])
    assert not parts.reused or set(found) == {"0.scores", "0.done", "1.n"}


def forms_of_runs() -> dict[str, Form]:
    """Return the forms by name."""
    return {
        "record": record_form(read_folder),
        "page": record_form(read_page),
        "table": table_form(read_folder),
        "table's page": table_form(read_page),
        "part": Form(**in_file("given.npz", part_file), read=read_part),
    }
