"""`import lowmem_icl`: the same numbers as the commands, in Python's words, without a terminal."""

import doctest
import gc
import importlib
import inspect
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import psutil
import pytest
from commands import invoke
from polars.testing import assert_frame_equal

import lowmem_icl as icl
from lowmem_icl.api import open_model as open_model_module
from lowmem_icl.api.words import in_python
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import EXPERIMENTS
from lowmem_icl.report.figures.registry import FIGURES
from lowmem_icl.system.progress import Advance, unseen

DEMO_MASK = Path(__file__).parents[1] / "masks" / "demo" / "greedy-recall-16shot.json"


@pytest.fixture(scope="module")
def model(stores: Path) -> Iterator[icl.OpenModel]:
    with icl.open_model(store_dir=stores, progress=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def task() -> icl.Task:
    return icl.load_task("recall", shots=4, limit=16)


def public() -> list[str]:
    return [name for name in icl.__all__ if name != "__version__"]


def test_all_names_are_there_listed_and_typed() -> None:
    assert set(icl.__all__) <= set(dir(icl))
    for name in public():
        assert getattr(icl, name).__module__.startswith("lowmem_icl."), name
    assert set(icl._MODULES) == set(public())
    assert (Path(icl.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        _ = icl.scores  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", public())
def test_every_public_name_and_method_has_a_docstring(name: str) -> None:
    value = getattr(icl, name)
    assert inspect.getdoc(value), name
    for method, member in vars(value).items() if inspect.isclass(value) else ():
        function = member.fget if isinstance(member, property) else getattr(member, "func", member)
        if not method.startswith("_") and callable(function):
            assert inspect.getdoc(function), f"{name}.{method}"


def test_importing_is_quick_and_brings_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import lowmem_icl; "
        "took, heavy = time.perf_counter() - began, {'torch', 'transformers', 'polars', 'numpy', 'lm_eval'}; "
        "print(took, sorted(heavy & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert all(run.endswith(" []\n") for run in runs)
    assert min(float(run.split()[0]) for run in runs) < 0.3


@pytest.mark.parametrize("module", sorted({*icl._MODULES.values(), ""} - {"errors"}))
def test_examples_run(module: str, small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    found = importlib.import_module(f"lowmem_icl.{module}".rstrip("."))
    assert doctest.testmod(found, globs={"folder": small_run}).failed == 0


@pytest.mark.parametrize("name", public())
def test_every_public_name_has_an_example(name: str) -> None:
    value = getattr(icl, name)
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert ">>> " in (value.__doc__ or "")


def test_scores_equal_those_of_evaluate(
    model: icl.OpenModel, task: icl.Task, stores: Path, tmp_path: Path
) -> None:
    scored = icl.score(model, task, [icl.Mask(), icl.Mask.read(DEMO_MASK)], progress=False)
    options = ("--tasks", "recall", "--shots", "4", "--limit", "16", "--store-dir", stores)
    assert invoke("evaluate", "--mask", DEMO_MASK, *options, "--out", tmp_path, "--quiet").exit_code == 0
    expected = icl.load(tmp_path).results.filter(pl.col("task") == "recall").select(scored.columns)
    assert set(scored["mask"]) == {"clean", "greedy-recall-16shot"}
    # Where a run has more, it is the accuracy of the best constant answer.
    assert_frame_equal(scored, expected, check_exact=True)


@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_drops_equal_those_of_ablate(model: icl.OpenModel, small_run: Path, part: Any) -> None:
    task = icl.load_task("recall", shots=4, limit=8, part=part)
    drops = icl.ablate(model, task, units="all", progress=False)
    expected = icl.load(small_run).units("recall", shots=4).select(drops.columns)
    if part == "train":
        assert_frame_equal(drops.drop("q_value"), expected.drop("q_value"), check_exact=True)
        assert_frame_equal(drops, expected)
    else:
        assert drops["unit"].sort().to_list() == expected["unit"].sort().to_list()
        assert not drops["drop"].equals(expected["drop"])


def test_units_alone_score_as_their_masks_do(model: icl.OpenModel, task: icl.Task) -> None:
    named = ["L0H0", "L2F", "L1H1"]
    for ablation in ("zero", "mean", "resample"):
        masks = [icl.Mask.parse(unit, ablation) for unit in named]
        scored = icl.score(model, task, masks, progress=False).filter(metric="gold_logprob_drop")
        by_mask = {mask.name: value for mask, value in zip(masks, scored["value"], strict=True)}
        drops = icl.ablate(model, task, named, ablation, progress=False)
        for row in drops.iter_rows(named=True):
            mask = icl.Mask.parse(row["unit"], ablation)
            tolerance = 1e-5 if ablation != "resample" else 1e-3
            assert by_mask[mask.name] == pytest.approx(row["drop"], abs=tolerance), row["unit"]


def test_memory_changes_nothing_and_what_is_too_little_is_named(
    model: icl.OpenModel, task: icl.Task, stores: Path
) -> None:
    masks = [icl.Mask.parse("L0H0 L3F"), icl.Mask.parse("L2H2")]
    plenty = icl.score(model, task, masks, progress=False)
    with icl.open_model(store_dir=stores, memory="60MB", progress=False) as tight:
        assert_frame_equal(icl.score(tight, task, masks, progress=False), plenty, check_exact=True)
    with (
        icl.open_model(store_dir=stores, memory="2MB", progress=False) as least,
        pytest.raises(icl.DoesNotFit, match=r"^memory 0\.002GB: .* the smallest that does is memory \d+MB"),
    ):
        icl.score(least, task, masks, progress=False)


def test_a_closed_model_says_so(task: icl.Task, stores: Path) -> None:
    with icl.open_model(store_dir=stores, progress=False) as closed:
        pass
    assert "closed" in repr(closed)
    with pytest.raises(icl.InputError, match="open it again"):
        icl.score(closed, task, progress=False)


def test_progress_can_be_taken(model: icl.OpenModel, task: icl.Task) -> None:
    told: list[tuple[str, int, str]] = []
    done: list[int] = []

    @contextmanager
    def listen(label: str, total: int, unit: str) -> Iterator[Advance]:
        told.append((label, total, unit))
        yield done.append

    icl.score(model, task, progress=listen)
    label, total, unit = told[-1]
    assert (label, unit) == ("evaluate", "operations")
    assert sum(done[-len(done) :]) > 0
    assert total > 0


def test_nothing_is_printed(model: icl.OpenModel, task: icl.Task, capfd: pytest.CaptureFixture[str]) -> None:
    icl.score(model, task, progress=False)
    icl.ablate(model, task, ["L0H0"], progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_run_without_a_folder_leaves_none(stores: Path, tmp_path: Path) -> None:
    run = icl.run(
        tasks="recall", shots=4, limit=8, experiments=["evaluate"], store_dir=stores, progress=False
    )
    folder = run.folder
    assert (folder / "report.html").is_file()
    kept = run.save(tmp_path / "kept")
    with pytest.raises(icl.InputError, match="exists; choose another"):
        run.save(tmp_path / "kept")
    assert_frame_equal(kept.results, run.results, check_exact=True)
    del run
    gc.collect()
    assert not folder.exists()
    # The same options go on from what was kept: nothing is left to do.
    began = time.perf_counter()
    again = icl.run(
        tasks=["recall"],
        shots=[4],
        limit=8,
        experiments="evaluate",
        store_dir=stores,
        out=kept.folder,
        progress=False,
    )
    assert time.perf_counter() - began < 5
    assert_frame_equal(again.results, kept.results, check_exact=True)


def test_a_run_gives_its_tables_masks_and_answer(small_run: Path) -> None:
    run = icl.load(small_run)
    assert run.tasks[:2] == ["recall", "knowledge"]
    assert run.shots == [0, 4]
    mask = run.mask("greedy", "recall", 4)
    table = run.masks.filter((pl.col("mask") == mask.name) & (pl.col("task") == "recall"))
    assert sorted(mask.kept) == sorted(table["kept"][0])
    assert sorted(mask.removed) == sorted(table["removed"][0])
    assert mask.name in run.mask_names
    assert run.mask(mask.name) == mask
    assert set(mask.kept) | set(mask.removed) >= {"L0H0", "L3F"}
    assert run.answer
    assert all(sentence.endswith(".") for sentence in run.answer)
    assert len(run.effects)
    assert len(run.answers)
    assert "greedy-recall-4shot" in repr(mask)
    assert "demo in int8" in repr(run)
    assert "<li>" in run._repr_html_()
    with pytest.raises(icl.InputError, match="did you mean 'greedy-recall-4shot'"):
        run.mask("greedi", "recall", 4)
    with pytest.raises(icl.InputError, match=r"shots: .* has no 3; it has 0, 4"):
        run.units("recall", shots=3)


def test_figures_one_by_one(small_run: Path, tmp_path: Path) -> None:
    plot = icl.load(small_run).plot
    figure = plot.heads("recall", shots=4)
    # One map and its scale.
    assert len(figure.figure.axes) == 2
    assert len(plot.heads("recall").figure.axes) == 3
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.save(tmp_path / "heads.svg").read_text(encoding="utf-8").startswith("<?xml")
    drawn = [
        plot.accuracy(),
        plot.ffns(),
        plot.importance(),
        plot.estimates(),
        plot.masks(),
        plot.induction(),
    ]
    drawn += [plot.head_curves(), plot.ffn_curves(), plot.induction_removal(), plot.agreement()]
    assert len({figure.caption for figure in drawn}) == len(drawn)
    with pytest.raises(icl.InputError, match="did you mean 'ablate-heads'"):
        plot.figure("ablate-head")
    with pytest.raises(icl.InputError, match="run the experiment patch"):
        plot.figure("patch-heads")
    assert {kind.experiment for kind in FIGURES.values()} <= set(EXPERIMENTS)
    with pytest.raises(icl.InputError, match="expected a name ending in"):
        figure.save(tmp_path / "heads.gif")


REFUSALS: dict[str, tuple[Any, str]] = {
    "unknown option": (lambda: icl.run(limt=3), "limt is not an option of a run; did you mean 'limit'"),
    "a bad value": (
        lambda: icl.run(limit=-1),
        "^limit: expected a whole number of at least 1, or a fraction such as 0.1, got -1",
    ),
    "an unknown task": (
        lambda: icl.load_task("recal"),
        "^tasks: unknown task 'recal'; did you mean 'recall'",
    ),
    "a missing folder": (
        lambda: icl.load_task("piqa", data_dir="/no/such"),
        "^data_dir /no/such does not exist",
    ),
    "several": (lambda: icl.load_task("pairs"), "expected one task, got 'pairs', which is"),
    "a part": (lambda: icl.load_task("recall", part="test"), "part: expected one of evaluate, train"),  # type: ignore[arg-type]
    "a run's option of a model": (lambda: icl.open_model(limit=3), "limit is not an option of this"),
    "a run's option of a task": (
        lambda: icl.load_task("recall", screen="attribution"),
        "screen is not an option",
    ),
    "lm-eval's name": (lambda: icl.run(num_fewshot=3), "num_fewshot: .* here it is shots"),
    "too many shots": (lambda: len(icl.load_task("recall", shots=1000)), "^shots 1000: task recall has"),
    "no run": (lambda: icl.load("/no/such"), "/no/such holds no run"),
    "a unit": (lambda: icl.Mask.parse("L0X"), "unit 'L0X': expected a form such as L12H3"),
    "a negative layer": (lambda: icl.Mask(ffns=[-1]), "expected a form such as L12H3"),
    "an ablation": (lambda: icl.Mask.parse("L0F", "means"), "did you mean 'mean'"),  # type: ignore[arg-type]
    "a mask file": (lambda: icl.Mask.read("/no/such.json"), "cannot be read"),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_refusals_name_the_parameter(refused: str) -> None:
    call, message = REFUSALS[refused]
    with pytest.raises(icl.InputError, match=message) as raised:
        call()
    assert "--" not in str(raised.value)


def test_masks_that_do_not_fit_are_refused(model: icl.OpenModel, task: icl.Task) -> None:
    for mask, message in (
        (icl.Mask.parse("L4H0"), "the model has no L4H0; its last head is L3H7"),
        (icl.Mask.parse("L0H8"), "the model has no L0H8"),
        ("L0H0", "expected a sequence of Mask, got 'L0H0'"),
    ):
        with pytest.raises(icl.InputError, match=message):
            icl.score(model, task, [mask], progress=False)  # type: ignore[list-item]
    with pytest.raises(icl.InputError, match="two are named 'L0H0'"):
        icl.score(model, task, [icl.Mask.parse("L0H0")] * 2, progress=False)
    with pytest.raises(icl.InputError, match="the model has no 'L9H9'; it has L0H0 to L3F"):
        icl.ablate(model, task, ["L9H9"], progress=False)
    assert len(icl.ablate(model, task, (unit for unit in ("L0H0", "L1F")), progress=False)) == 2  # type: ignore[arg-type]
    with pytest.raises(icl.InputError, match="did you mean 'heads'"):
        icl.ablate(model, task, "head", progress=False)


def test_a_folder_that_a_config_names_is_kept(stores: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.toml"
    config.write_text(f'out = "{tmp_path / "kept"}"\ntasks = "recall"\nshots = 4\nlimit = 4\n')
    run = icl.run(config=config, experiments="evaluate", store_dir=stores, progress=False)
    assert run.folder == tmp_path / "kept"
    again = icl.run(config=config, fresh=True, experiments="evaluate", store_dir=stores, progress=False)
    assert again.folder == tmp_path / "kept-2"


def test_a_model_is_opened_once_for_equal_questions(
    task: icl.Task, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = itertools.count(3 * 10**9, -40_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=next(free), total=10**11))
    opened: list[object] = []

    class Counted(StreamedModel):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            opened.append(self)
            super().__init__(*arguments, **named)

    monkeypatch.setattr(open_model_module, "StreamedModel", Counted)
    with icl.open_model(store_dir=stores, progress=False) as once:
        for _ in range(3):
            icl.score(once, task, progress=False)
    assert len(opened) == 1


@pytest.mark.parametrize(("part", "limit"), [("train", 8), ("evaluate", 8), ("evaluate", 0.1)])
def test_of_the_other_part_little_is_made(model: icl.OpenModel, part: Any, limit: float) -> None:
    prepared = model.prepared(icl.load_task("recall", shots=1, limit=limit, part=part), unseen)
    other = prepared.train if part == "evaluate" else prepared.evaluate
    assert len(other[0].documents) <= 32


def test_flags_become_parameters() -> None:
    said = in_python("--data-dir x: give --memory 6MB (or --no-bos)")
    assert said == "data_dir x: give memory 6MB (or bos=False)"
    for command in (
        "mend it: lowmem-icl convert --repair /s/x --weights nf4",
        "run: pip install --force-reinstall --no-deps x",
        "/data/--limit.jsonl, line 3",
        "`lowmem-icl convert --delete-shards`",
    ):
        assert in_python(command) == command
    both = in_python("run: lowmem-icl convert X --weights nf4; or give --weights nf4")
    assert both == "run: lowmem-icl convert X --weights nf4; or give weights nf4"
    assert in_python("a--b -- c") == "a--b -- c"
