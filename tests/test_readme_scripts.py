"""The scripts behind the README: the figure from a run's tables, sizes from checkpoints without weights."""

import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
import typer

from lowmem_icl.masks.files import MaskFile, MaskModel, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store
from lowmem_icl.report.figures.style import figure_style
from lowmem_icl.tables.schema import RESULTS, write_table

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str) -> ModuleType:
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    # As when it is started: a script finds those beside it.
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
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
    clean = record(experiment="evaluate", mask="clean", documents=8, **scores)
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
    with figure_style():
        figure = script("draw_readme_figure").draw(run_folder, "recall")
    heads, masks = figure.axes
    assert heads.images[0].get_array().tolist() == [[0, 2], [1, 3]]
    assert len(heads.patches) == 3, "all heads but the one removed"
    dots = [line.get_xdata().tolist() for line in masks.lines if line.get_marker() in "osD"]
    assert [values for values in dots if values] == [[0.5]] * 3
    ticks = [segment[:, 0].tolist() for ticks in masks.collections for segment in ticks.get_segments()]
    assert [0.25, 0.25] in ticks, "chance"
    assert [0.5, 0.5] in ticks, "the whole model"


# Parameters by the papers and model cards, in billions, of models that are planned by config alone.
PARAMETERS = {
    "opt-125m": 0.125, "opt-350m": 0.331, "opt-1.3b": 1.316, "opt-6.7b": 6.658, "opt-13b": 12.85,
    "opt-30b": 29.97, "opt-66b": 65.72, "llama-3-70b": 70.55, "qwen2.5-72b": 72.71, "gemma-2-27b": 27.23,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_configs_have_the_parameters_of_the_models(sizes: ModuleType, name: str) -> None:
    skeleton = Skeleton.from_dict(sizes.CONFIGS[name])
    in_layers = sum(math.prod(shape) for shape in skeleton.layer_parameters().values())
    outside = sum(math.prod(shape) for shape in skeleton.non_layer_parameters().values())
    assert (skeleton.layers * in_layers + outside) / 1e9 == pytest.approx(PARAMETERS[name], rel=5e-3)


def test_a_table_goes_between_its_marks_or_nowhere(tmp_path: Path) -> None:
    tables, page = script("doc_tables"), tmp_path / "page.md"
    marks = "<!-- sizes: scripts/plan_sizes.py -->", "<!-- /sizes -->"
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n", encoding="utf-8")
    tables.put_table(page, "sizes", "plan_sizes.py", "new")
    told = page.read_text(encoding="utf-8")
    assert told == f"before\n{marks[0]}\nnew\n{marks[1]}\nafter\n"
    with pytest.raises(typer.BadParameter, match="has no table between <!-- night"):
        tables.put_table(page, "night", "plan_night.py", "new")
    assert page.read_text(encoding="utf-8") == told


TABLES = (
    ("README.md", "sizes", "plan_sizes.py"),
    ("README.md", "weights", "weight_forms.py"),
    ("docs/stores.md", "weights", "weight_forms.py"),
    ("docs/masks-elsewhere.md", "structural", "structural_export.py"),
    ("docs/lm-eval.md", "speed", "bench_lm_eval.py"),
    ("docs/experiments.md", "heads", "plan_heads.py"),
    ("docs/overnight.md", "night", "plan_night.py"),
    ("docs/pruning.md", "searches", "compare_searches.py"),
    ("docs/experiments.md", "ablations", "compare_ablations.py"),
    ("docs/benchmarks.md", "memory", "bench_memory.py"),
    ("docs/real-models.md", "tables", "real_models_tables.py"),
    ("docs/real-models.md", "icl-heads", "icl_heads_tables.py"),
)


@pytest.mark.parametrize(("page", "name", "made_by"), TABLES)
def test_every_table_has_its_place(page: str, name: str, made_by: str) -> None:
    told = (SCRIPTS.parent / page).read_text(encoding="utf-8")
    assert told.count(f"<!-- {name}: scripts/{made_by} -->") == told.count(f"<!-- /{name} -->") == 1
    assert f'"{name}", Path(__file__).name' in (SCRIPTS / made_by).read_text(encoding="utf-8")


def test_every_script_that_makes_figures_is_named_and_places_are_known() -> None:
    releasing = (SCRIPTS.parent / "docs" / "releasing.md").read_text(encoding="utf-8")
    for made_by in {*(made_by for _, _, made_by in TABLES), "bench_digests.py", "make_notebooks.py"}:
        assert made_by in releasing
    pages = [SCRIPTS.parent / "README.md", *(SCRIPTS.parent / "docs").glob("*.md")]
    marks = [re.findall(r"<!-- ([\w-]+): scripts/(\S+) -->", page.read_text("utf-8")) for page in pages]
    assert sorted(itertools.chain(*marks)) == sorted((name, made_by) for _, name, made_by in TABLES)


def test_the_table_of_lm_eval_has_the_ratios(tmp_path: Path) -> None:
    bench = script("bench_lm_eval")
    rows = [
        {"task": task, "setting": setting, "weights": form, "ratio": ratio}
        for task in bench.DEFINITIONS
        for setting, *_ in bench.SETTINGS
        for form, ratio in (("float32", 1.26), ("int8", 4.04))
    ]
    told = (SCRIPTS.parent / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    for line in bench.markdown(rows).splitlines():
        assert line.replace("1.3 | 4.0 |", "") in told
    assert bench.document_counts("32,8") == (32, 8)
    assert bench.document_counts("4") == (4, 4)
    for wrong in ("3", "8,8,8", "x", ""):
        with pytest.raises(typer.BadParameter, match="expected one number from 4"):
            bench.document_counts(wrong)


def test_forms_of_weights_are_compared_by_the_right_answers(int8_store: Store, tmp_path: Path) -> None:
    forms = script("weight_forms")
    same = {"task": "a", "shots": 0}
    rows = [
        same | {"document": document, "option": option, "gold": option == 1, "logprob": -1.0}
        for document, option in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    moved = [row | {"logprob": logprob} for row, logprob in zip(rows, (-9.0, -1.0, -9.0, -1.5), strict=True)]
    assert forms.distance(pl.DataFrame(moved), pl.DataFrame(rows)) == 0.25
    size, share = forms.layers_on_disk(int8_store.folder)
    assert size == sum(path.stat().st_size for path in int8_store.layer_paths)
    parameters = sum(math.prod(shape) for shape in int8_store.skeleton.layer_parameters().values())
    assert share == size / (2 * 3 * parameters)
    assert forms.pass_seconds({"int8": int8_store.folder}, rounds=1)["int8"] > 0
    line = forms.table([forms.Form("demo", "nf4", 2_000_000, 0.258, 0.75, 0.0123, 4.0)]).splitlines()[-1]
    assert line == "| demo | nf4 | 2 MB | 26 % | 0.750 | 0.012 | 4 |"
    every = [forms.Form("demo", weights, 2_000_000, 0.258, 0.75, 0.0, 4.0) for weights in forms.FORMS]
    assert forms.short_table(every).splitlines()[-1] == "| nf4 | 26 % | 0.750 |"
