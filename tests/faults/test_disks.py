"""Whatever a disk refuses, or wherever the process is killed: one line at most, nothing torn, and the same
command goes on to what it would have been.
"""

import gc
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from commands import invoke
from failing_disk import FailingDisk, Killed, failing, points

from lowmem_icl.masks.files import MaskFile, MaskModel, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.store import open_store
from lowmem_icl.report.run_tables import read_run

QUICK = ("--tasks", "recall", "--shots", "0", "--limit", "8", "--quiet")
RUN = (*QUICK, "--train-limit", "4", "--experiments", "evaluate,ablate,prune", "--curves", "")
TABLES = ("results", "effects", "answers", "units", "masks")
CODES = {"full": 3, "broken": 2}
# What takes a moment in every way, what takes longer in one.
SHORT = [
    *((name, how) for name in ("convert", "combine", "export torch") for how in ("full", "broken", "killed")),
    *(("run", "killed"), ("evaluate", "full"), ("plan", "broken")),
]


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
    return {path.name: path.read_bytes() for path in sorted((folder / "new").rglob("*")) if path.is_file()}


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


@pytest.fixture(scope="module")
def made(stores: Path) -> Path:
    """Folder of a store of the demo."""
    if not list(stores.glob("demo-*-int8/manifest.json")):
        assert invoke("convert", "demo", "--store-dir", stores, "--quiet").exit_code == 0
    return stores


@pytest.fixture(scope="module")
def undisturbed(
    made: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[object, list[str]]]:
    """From a case to what it leaves, and what it asks of the disk."""
    known: dict[str, tuple[object, list[str]]] = {}

    def of(name: str) -> tuple[object, list[str]]:
        if name not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            CASES[name].given(folder, made)
            with failing(FailingDisk(folder)) as disk:
                result = invoke(*CASES[name].arguments(folder))
            assert result.exit_code == 0, result.output
            known[name] = CASES[name].left(folder), disk.asked
        return known[name]

    return of


def leftovers(folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.name.endswith(".partial") or path.name.startswith("tmp")
    ]


def disturb(name: str, how: str, number: int, folder: Path, made: Path) -> str:
    """Run a case on a disk that fails there, then once more on one that does not; return what it said."""
    case = CASES[name]
    folder.mkdir()
    case.given(folder, made)
    said: list[str] = []
    result = None
    with failing(FailingDisk(folder, number, how)) as disk, suppress(Killed):
        result = invoke(*case.arguments(folder))
    where = f"{how} at {number}: {disk.asked[number] if number < len(disk.asked) else None}"
    if result is None or how == "killed":
        # What it held, its locks among it, goes with the process.
        gc.collect()
    else:
        said = [line for line in result.stderr.splitlines() if line.startswith("lowmem-icl: ")]
        assert result.exception is None or isinstance(result.exception, SystemExit), (where, result.exc_info)
        # Some it can do without: texts, rates, the log.
        assert result.exit_code in (0, CODES[how]), (where, result.output)
        assert len(said) == (result.exit_code != 0), (where, result.output)
        assert leftovers(folder) == [], where
        if result.exit_code == 0:
            return where
    again = invoke(*case.arguments(folder))
    assert again.exit_code == 0, (where, again.output, again.exception)
    return "".join(said) + where


def check(name: str, how: str, numbers: list[int], tmp_path: Path, made: Path, whole: object) -> None:
    for number in numbers:
        folder = tmp_path / f"{how}-{number}"
        where = disturb(name, how, number, folder, made)
        assert CASES[name].left(folder) == whole, where
        assert leftovers(folder) == [], where
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "how"), SHORT)
def test_some_failures(
    name: str, how: str, made: Path, undisturbed: Callable[[str], tuple[object, list[str]]], tmp_path: Path
) -> None:
    whole, asked = undisturbed(name)
    check(name, how, [random.Random(f"{name} {how}").choice(points(asked))], tmp_path, made, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "broken", "killed"])
@pytest.mark.parametrize("name", CASES)
def test_every_failure(
    name: str, how: str, made: Path, undisturbed: Callable[[str], tuple[object, list[str]]], tmp_path: Path
) -> None:
    whole, asked = undisturbed(name)
    check(name, how, points(asked), tmp_path, made, whole)
