"""Commands whose disk fails or whose process is killed, what they are given, and what they are to leave."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from commands import invoke

from lowmem_icl.masks.files import MaskFile, MaskModel, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.store import open_store
from lowmem_icl.report.run_tables import read_run

QUICK = ("--tasks", "recall", "--shots", "0", "--limit", "8", "--quiet")
RUN = (*QUICK, "--train-limit", "4", "--experiments", "evaluate,ablate,prune", "--curves", "")
TABLES = ("results", "effects", "answers", "units", "masks")


@dataclass(frozen=True)
class Case:
    """A command as it stands in a folder, given what was made before it, and what it leaves there."""

    arguments: Callable[[Path], tuple[object, ...]]
    left: Callable[[Path], object]
    given: Callable[[Path, Path], object] = lambda folder, made: None


def of_run(folder: Path) -> object:
    """Return all that a run has found, and its masks."""
    tables = {table: pl.read_parquet(folder / "out" / f"{table}.parquet").rows() for table in TABLES}
    masks = {path.name: path.read_text() for path in (folder / "masks").glob("*.json")}
    return (
        repr(tables),
        masks,
        read_run(folder / "out").record["state"],
        (folder / "out/report.html").exists(),
    )


def of_files(folder: Path) -> object:
    files = sorted(path for path in (folder / "new").rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in files
    }


def of_json(folder: Path) -> object:
    return json.loads((folder / "new.json").read_text())


def with_store(folder: Path, made: Path) -> None:
    (store,) = (path for path in made.glob("demo-*-int8") if (path / "manifest.json").exists())
    shutil.copytree(store, folder / "stores" / store.name)


def with_masks(folder: Path, made: Path) -> None:
    (store,) = (path for path in made.glob("demo-*-int8") if (path / "manifest.json").exists())
    config, digest = open_store(store).skeleton, open_store(store).manifest.source.digest
    model = MaskModel(
        id="demo",
        model_type=config.config.model_type,
        layers=config.layers,
        heads=config.heads,
        digest=digest,
    )
    for name, mask in {"a": Mask(frozenset({(0, 1)})), "b": Mask(frozenset({(1, 1)}))}.items():
        write_mask(folder / f"{name}.json", MaskFile(name, mask, model, {"method": "given"}))


def with_store_and_masks(folder: Path, made: Path) -> None:
    with_store(folder, made)
    with_masks(folder, made)


def with_run(folder: Path, made: Path) -> None:
    once = made.parent / "reported"
    if not once.exists():
        assert invoke("run", *RUN, "--store-dir", made, "--out", once).exit_code == 0
    shutil.copytree(once, folder / "out")


CASES = {
    "run": Case(
        lambda folder: (
            *("run", *RUN, "--store-dir", folder / "stores", "--out", folder / "out"),
            *("--masks-dir", folder / "masks"),
        ),
        of_run,
        with_store,
    ),
    "evaluate": Case(
        lambda folder: (
            *("evaluate", *QUICK, "--mask", folder / "a.json", "--out", folder / "out"),
            *("--store-dir", folder / "stores"),
        ),
        lambda folder: repr(pl.read_parquet(folder / "out" / "results.parquet").rows()),
        with_store_and_masks,
    ),
    "convert": Case(lambda folder: ("convert", "demo", folder / "new", "--quiet"), of_files),
    "plan": Case(
        lambda folder: ("plan", *RUN, "--store-dir", folder / "stores", "--out", folder / "out"),
        lambda folder: None,
        with_store,
    ),
    "report": Case(
        lambda folder: ("report", folder / "out", "--out", folder / "page.html"),
        lambda folder: (folder / "page.html").exists(),
        with_run,
    ),
    "combine": Case(
        lambda folder: (
            *("masks", "combine", folder / "a.json", folder / "b.json", "--operation", "union"),
            *("--out", folder / "new.json"),
        ),
        of_json,
        with_masks,
    ),
    "export torch": Case(
        lambda folder: (
            *("masks", "export", folder / "a.json", "--format", "torch", "--out", folder / "new.json"),
        ),
        lambda folder: (folder / "new.json").exists(),
        with_masks,
    ),
}


def leftovers(folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.name.endswith(".partial") or path.name.startswith("tmp")
    ]
