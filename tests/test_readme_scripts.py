"""The scripts behind the README: the figure from a run's tables, sizes from checkpoints without weights."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from accelerate import init_empty_weights
from transformers import OPTConfig, OPTModel

from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.masks.files import MaskFile, MaskModel, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.tables.schema import RESULTS, write_table

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str) -> ModuleType:
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    # Dataclasses look their module up by name.
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    return script("plan_sizes")


def record(**fields: Any) -> dict[str, Any]:
    """Return a record of results.parquet with these columns, the others null."""
    return dict.fromkeys(RESULTS) | {"shots": 4, "task": "recall"} | fields


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with the tables and the mask that the figure is drawn from: two layers of two heads."""
    drops = [
        record(experiment="ablate", procedure="single", metric="gold_logprob_drop", kind="head", layer=layer,
               head=head, value=float(layer + 2 * head))
        for layer in range(2)
        for head in range(2)
    ]  # fmt: skip
    scores = {"metric": "acc", "value": 0.5, "low": 0.25, "high": 0.75, "chance": 0.25}
    clean = record(experiment="evaluate", mask="clean", **scores)
    own = {"mask_task": "recall", "mask_shots": 4, "heads_removed": 1, "ffns_removed": 1}
    pruned = [
        record(
            experiment="prune",
            procedure="greedy",
            method=method,
            mask=f"{method}-recall-4shot",
            **own,
            **scores,
        )
        for method in ("greedy", "gradient", "random")
    ]
    write_table(
        pl.DataFrame([*drops, clean, *pruned], schema=RESULTS), "results", tmp_path / "results.parquet"
    )
    model = MaskModel(id="small", model_type="opt", layers=2, heads=2, digest="0")
    (tmp_path / "masks").mkdir()
    mask = MaskFile("greedy-recall-4shot", Mask(frozenset([(0, 1)])), model, {"method": "greedy"})
    write_mask(tmp_path / "masks" / "greedy-recall-4shot.json", mask)
    return tmp_path


def test_the_figure_shows_every_head_and_frames_those_that_the_mask_keeps(run_folder: Path) -> None:
    figure = script("draw_readme_figure").draw(run_folder, "recall")
    heads, masks, _ = figure.axes
    assert heads.images[0].get_array().tolist() == [[0, 2], [1, 3]]
    assert len(heads.patches) == 3, "all heads but the one removed"
    assert [bar.get_height() for bar in masks.patches] == [0.5] * 4


def test_sizes_are_those_of_the_models(sizes: ModuleType) -> None:
    for shape in (sizes.SHAPES["125m"], sizes.SHAPES["350m"]):
        config = {name: value for name, value in shape.config().items() if name != "architectures"}
        with init_empty_weights():
            model = OPTModel(OPTConfig(**config))
        assert shape.parameters == pytest.approx(model.num_parameters(), rel=1e-3)


def test_a_checkpoint_without_weights_has_the_size_of_one_with_them(
    sizes: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer").mkdir()
    shape = sizes.SHAPES["66b"]
    folder = sizes.weightless_checkpoint(tmp_path / "opt-66b", shape, tmp_path / "tokenizer")
    assert open_checkpoint(folder).size_bytes == 2 * shape.parameters
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 1e6


def test_the_table_goes_between_the_marks_of_the_readme(sizes: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sizes.BEGIN}\nold\n{sizes.END}\nafter\n", encoding="utf-8")
    sizes.put_into(page, "new")
    assert page.read_text(encoding="utf-8") == f"before\n{sizes.BEGIN}\nnew\n{sizes.END}\nafter\n"
    readme = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")
    assert readme.count(sizes.BEGIN) == readme.count(sizes.END) == 1
