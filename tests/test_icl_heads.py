"""Which heads carry learning in context: rankings, sets, what removal costs, losses in text."""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from commands import invoke
from demo_scores import DEMO
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import hypergeom
from transformers import AutoModelForCausalLM

from lowmem_icl.conversion.locate import ensure_store, locate
from lowmem_icl.engine.answers import Scores as Answers
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.passes import PassSetup
from lowmem_icl.engine.patch_jobs import PatchJob
from lowmem_icl.engine.patching import patch
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.errors import InputError
from lowmem_icl.experiments.icl_heads.measure import overlap_records, text_blocks
from lowmem_icl.experiments.icl_heads.prompts import evaluation_prompts, text_jobs, vector_settings
from lowmem_icl.experiments.icl_heads.removals import (
    PERCENTS,
    RANDOM,
    Scores,
    all_removals,
    levels,
    random_removals,
    ranked_removals,
    struck,
)
from lowmem_icl.experiments.patch.prompts import prompts_of
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.masks.rankings import highest_heads
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.report.page.sections.icl_heads import icl_heads_section
from lowmem_icl.report.run_tables import read_run
from lowmem_icl.session.prepare import Prepared, prepare
from lowmem_icl.statistics.shared_units import chance_of_sharing, chance_within_layers
from lowmem_icl.tasks.text_windows import TextWindows, text_windows

PLENTY = SweepLimits.of(1 << 28)
SOME = Mask(frozenset([(0, 1), (1, 0), (1, 1), (3, 5)]))
FLAGS = ("--tasks", "recall,repeat", "--shots", 4, "--train-limit", 4, "--limit", 4, "--quiet")


@pytest.fixture(scope="module")
def hooked() -> Any:
    """Hugging Face's own demo model."""
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prepared(stores: Path) -> Prepared:
    return prepare(
        RunOptions.model_validate(
            {"experiments": "icl-heads", "tasks": "recall,repeat", "shots": "4", "limit": 3, "train_limit": 3}
            | {"store_dir": str(stores)}
        )
    )


@pytest.fixture(scope="module")
def means(hooked: Any) -> UnitMeans:
    rng, config = np.random.default_rng(0), hooked.config
    shape = config.num_hidden_layers, config.hidden_size
    return UnitMeans(*(rng.normal(0, 0.3, shape).astype(np.float32) for _ in range(2)))


def removed_logits(model: Any, tokens: list[int], mask: Mask, means: UnitMeans, at: slice) -> torch.Tensor:
    """Hugging Face's log-probabilities [T, V] with heads' means at some tokens, by plain hooks."""
    width, handles = model.config.hidden_size // model.config.num_attention_heads, []
    for number, layer in enumerate(model.model.decoder.layers):

        def put(module: Any, arguments: Any, number: int = number) -> tuple[torch.Tensor]:
            z = arguments[0].clone()
            for head in mask.heads_in(number):
                mine = slice(head * width, (head + 1) * width)
                z.view(-1, z.shape[-1])[at, mine] = torch.tensor(means.heads[number, mine])
            return (z,)

        handles.append(layer.self_attn.out_proj.register_forward_pre_hook(put))
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    for handle in handles:
        handle.remove()
    return torch.log_softmax(logits.double(), -1)


def scored(stores: Path, jobs: list[PatchJob]) -> list[Answers]:
    store = ensure_store(locate("demo", None, "float32", stores), "float32")
    scores = [Answers.empty(len(job.changes), len(job.into.row.answered)) for job in jobs]
    with (
        StreamedModel(store, device=torch.device("cpu"), resident_bytes=0) as model,
        CleanCache(PLENTY.cache_bytes, 0, None) as cache,
    ):
        patch(PassSetup(model, PLENTY, cache), jobs, scores)
    return scores


def test_heads_removed_from_prompts_are_those_of_hooks_on_the_whole_prompt(
    hooked: Any, prepared: Prepared, means: UnitMeans, stores: Path
) -> None:
    settings = vector_settings(prompts_of(prepared).vectors)
    for task in evaluation_prompts(prepared, settings):
        answers = scored(stores, task.jobs((Mask(), SOME), means))
        found = task.scores(answers)
        assert found.logprobs.shape[1] == sum(len(document.gold) for document in task.task.documents)
        logprobs: list[list[float]] = [[], []]
        first: list[list[bool]] = [[], []]
        for shown, document in zip(task.prompts, task.task.documents, strict=True):
            prompt, options = shown.tokens, shown.options
            last = slice(len(prompt) - 1, len(prompt))
            for index, mask in enumerate((Mask(), SOME)):
                for option in options:
                    tokens = [*prompt, *option]
                    whole = removed_logits(hooked, tokens, mask, means, last)
                    at = range(len(prompt) - 1, len(tokens) - 1)
                    logprobs[index].append(sum(float(whole[place, tokens[place + 1]]) for place in at))
                said = int(removed_logits(hooked, list(prompt), mask, means, last)[-1].argmax())
                right = [option[0] for option, gold in zip(options, document.gold, strict=True) if gold]
                first[index].append(said in right)
        np.testing.assert_allclose(found.logprobs, logprobs, atol=2e-4)
        np.testing.assert_array_equal(found.first_token, first)


def test_losses_in_text_are_transformers_own(hooked: Any, means: UnitMeans, stores: Path) -> None:
    tokens = np.random.default_rng(1).integers(4, hooked.config.vocab_size, 300).tolist()
    text = text_windows(tokens, 2, 160)
    assert text is not None
    answers = scored(stores, text_jobs(text, (Mask(), SOME), means))
    logprobs = np.stack([found.logprobs for found in answers], 1)
    blocks = list(text_blocks(logprobs, list(ranked_removals(random_scores(4, 8)))[:1], "text-mean"))
    values: dict[str, float] = {
        str(block["metric"]): float(block["value"]) for block in blocks if block["mask"] == "clean"
    }
    early: list[float] = []
    late: list[float] = []
    masked: list[float] = []
    for window in text.windows:
        each = -removed_logits(hooked, list(window), SOME, means, slice(None))
        masked.append(sum(float(each[at - 1, window[at]]) for at in range(42, 59)) / 17)
        # transformers' own loss: the mean over tokens whose label is not -100.
        for middle, losses in ((50, early), (148, late)):
            ids = torch.tensor([window])
            labels = torch.full_like(ids, -100)
            labels[:, middle - 8 : middle + 9] = ids[:, middle - 8 : middle + 9]
            with torch.no_grad():
                losses.append(float(hooked(ids, labels=labels).loss))
    assert values["early_loss"] == pytest.approx(np.mean(early), abs=1e-4)
    assert values["late_loss"] == pytest.approx(np.mean(late), abs=1e-4)
    assert values["loss_difference"] == pytest.approx(np.mean(early) - np.mean(late), abs=2e-4)
    (under,) = [block for block in blocks if block["metric"] == "early_loss" and block["mask"] != "clean"]
    assert under["value"][0] == pytest.approx(np.mean(masked), abs=1e-4)


def random_scores(layers: int, heads: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(rng.random((layers, heads)), rng.random((layers, heads)))


@given(layers=st.integers(2, 12), heads=st.integers(4, 16), seed=st.integers(0, 99))
def test_removed_sets_are_nested_of_their_size_and_without_what_is_struck_out(
    layers: int, heads: int, seed: int
) -> None:
    scores = random_scores(layers, heads, seed)
    removals, counts = all_removals(scores, seed, draws=3), levels(layers * heads)
    by_name: dict[str, list[Mask]] = {}
    for removal in removals:
        assert len(removal.mask) == counts[removal.percent] == removal.fields["heads_removed"]
        by_name.setdefault(removal.name, []).append(removal.mask)
    for masks in by_name.values():
        assert all(small.heads <= large.heads for small, large in pairwise(masks))
    tops = {method: struck(values) for method, values in scores.by_method.items()}
    for removal in removals:
        method, excluding, other = removal.method.partition("-excluding-")
        if excluding:
            assert not removal.mask & tops[other]
            # What is left is in the ranking's own order.
            values = scores.by_method[method]
            rest = [values[head] for head in np.ndindex(layers, heads) if head not in tops[other].heads]
            assert sorted(values[head] for head in removal.mask.heads) == sorted(rest)[-len(removal.mask) :]
        elif method == RANDOM:
            assert not removal.mask & (tops["function_vector"] | tops["induction"])
        else:
            assert removal.mask == highest_heads(scores.by_method[method], len(removal.mask))


def test_random_draws_are_seeded_and_differ() -> None:
    scores = random_scores(6, 10)
    assert list(random_removals(scores, 5, 4)) == list(random_removals(scores, 5, 4))
    assert len({removal.mask for removal in random_removals(scores, 5)}) > 60
    assert set(levels(60)) == {2, 5, 10, 20}
    assert set(levels(100)) == set(PERCENTS)


@given(seed=st.integers(0, 200), layers=st.integers(1, 4), heads=st.integers(2, 6))
def test_chance_over_all_heads_is_hypergeometric(seed: int, layers: int, heads: int) -> None:
    left, right = drawn_sets(seed, layers, heads)
    drawn = hypergeom(layers * heads, left.sum(), right.sum())
    chance = chance_of_sharing(left, right)
    with np.errstate(all="ignore"):
        # Kurtosis, which scipy computes with the mean, divides by zero for sets of nothing.
        assert chance.expected == pytest.approx(drawn.mean())
    assert chance.p_value == pytest.approx(drawn.sf((left & right).sum() - 1))


@given(seed=st.integers(0, 200))
def test_chance_within_layers_is_that_of_all_sets_of_these_sizes(seed: int) -> None:
    left, right = drawn_sets(seed, 2, 4)
    shared, all_counts = int((left & right).sum()), np.zeros(1)
    for of_left, of_right in zip(left, right, strict=True):
        sets = [set(chosen) for chosen in combinations(range(4), int(of_right.sum()))]
        counts = np.bincount([len(chosen & set(np.flatnonzero(of_left))) for chosen in sets]) / len(sets)
        all_counts = np.convolve(all_counts, counts) if all_counts.sum() else counts
    chance = chance_within_layers(left, right)
    assert chance.expected == pytest.approx(float(np.arange(len(all_counts)) @ all_counts))
    assert chance.p_value == pytest.approx(float(all_counts[shared:].sum()))


def drawn_sets(seed: int, layers: int, heads: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    left, right = (rng.random((layers, heads)) < rng.random() for _ in range(2))
    return left, right


def test_equal_rankings_share_all_their_top_heads() -> None:
    scores = random_scores(10, 12).induction
    records = {(r["metric"], r.get("percent")): r for r in overlap_records(Scores(scores, scores))}
    assert records["spearman", None]["value"] == pytest.approx(1)
    assert records["top_overlap", 5]["value"] == records["layer_overlap", 5]["value"] == 1
    assert records["top_overlap", 5]["chance"] == pytest.approx(6 / 120)
    assert records["layer_overlap", 5]["chance"] > records["top_overlap", 5]["chance"]
    assert records["top_overlap_p_value", 10]["value"] < 1e-6


def test_windows_stand_beside_each_other_or_overlap_evenly() -> None:
    long = text_windows(range(10_000), None, 1024)
    assert long is not None
    assert [window[0] for window in long.windows] == [512 * number for number in range(16)]
    assert (long.early, long.late, long.overlap) == (50, 500, False)
    short = text_windows(range(700), 9999, 1024)
    assert short is not None
    assert short.overlap
    assert {window[0] for window in short.windows} == {9999}
    assert {len(window) for window in short.windows} == {512}
    assert [window[1] for window in short.windows][::7] == [0, 189]
    assert text_windows(range(700), None, 100) is None
    assert isinstance(text_windows(range(1000), 1, 200), TextWindows)


def test_a_text_that_is_too_short_says_how_many_tokens_are_needed(tmp_path: Path, stores: Path) -> None:
    def refused(path: Path, text: bytes) -> str:
        path.write_bytes(text)
        values = {"experiments": "icl-heads", "tasks": "recall", "shots": "4", "text": str(path)}
        with pytest.raises(InputError) as error:
            prepare(RunOptions.model_validate(values | {"store_dir": str(stores)}))
        return str(error.value)

    assert "expected at least 2048 tokens, which make 4 windows, got" in refused(tmp_path / "a", b"kova mepi")
    assert "cannot be read as UTF-8 text" in refused(tmp_path / "b", b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"experiments": "patch", "text": "a"}, "--text: expected icl-heads among --experiments; add it"),
        ({"experiments": "icl-heads", "corrupt": "queries"}, "--corrupt queries: icl-heads scores heads"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunOptions.model_validate({"tasks": "recall", "shots": "4"} | given)


def test_other_runs_keep_their_folders() -> None:
    assert "text" not in RunOptions(experiments=("patch",), shots=(4,)).identity_values
    assert "text" in RunOptions(experiments=("icl-heads",), shots=(4,)).identity_values


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a run that has no other experiments."""
    out = tmp_path_factory.mktemp("icl-heads") / "alone"
    run = invoke("run", "--experiments", "icl-heads", *FLAGS, "--store-dir", stores, "--out", out)
    assert run.exit_code == 0, run.output
    return out


def test_a_run_does_the_passes_it_needs_and_has_bands_and_means(alone: Path) -> None:
    own = ("icl-heads", "icl-heads-induction", "icl-heads-text-means", "icl-heads-text")
    names = {path.name for path in (alone / "parts").iterdir()}
    assert {f"{name}.npz" for name in ("patch-means", "patch-vectors", *own)} <= names
    results = pl.read_parquet(alone / "results.parquet")
    removal = results.filter((pl.col("procedure") == "removal") & (pl.col("task") == "aggregate"))
    assert set(removal["other_method"].unique()) == {None, "own-mean", "task-mean"}
    drops = removal.filter((pl.col("metric") == "acc_drop") & (pl.col("percent") == 5))
    assert drops.filter(pl.col("method") == "random").height == 2 * 20
    bands = drops.filter(pl.col("method") == "random-median")
    assert bands.height == 2
    assert (bands["low"] <= bands["value"]).all()
    assert results.filter(pl.col("value").is_null()).is_empty()
    explained = (Path(__file__).parents[1] / "docs" / "tables.md").read_text(encoding="utf-8")
    assert not [metric for metric in results["metric"].unique() if f"`{metric}`" not in explained]


def test_the_page_shows_what_is_left_without_heads_as_the_table_has_it(alone: Path) -> None:
    run = read_run(alone)
    section = icl_heads_section(run)
    assert section is not None
    assert section.table is not None
    left = run.results.filter(metric="first_token_acc", task="aggregate")
    left = left.filter(pl.col("method").is_not_null() & (pl.col("method") != "random"))
    shown = {(row[0], row[1].partition(" ")[0]): row for row in section.table.rows}
    assert len(shown) == left.select("other_method", "percent").n_unique()
    place = {"task-mean": "the mean over tasks", "own-mean": "the task's own mean"}
    for row in left.filter(pl.col("method").is_in(["function_vector", "induction"])).iter_rows(named=True):
        cells = shown[place[row["other_method"]], str(row["percent"])]
        assert cells[2 if row["method"] == "function_vector" else 3].startswith(f"{row['value']:.3f} (")
    assert len(section.plots) == 2
    assert "both rankings have" in section.text
    assert icl_heads_section(replace(run, results=run.results.clear())) is None


@pytest.mark.slow
def test_what_other_experiments_found_gives_the_same(alone: Path, tmp_path: Path, stores: Path) -> None:
    out = tmp_path / "all"
    flags = ("--experiments", "patch,induction,icl-heads", *FLAGS, "--store-dir", stores, "--out", out)
    run = invoke("run", *flags)
    assert run.exit_code == 0, run.output
    results = pl.read_parquet(out / "results.parquet").filter(pl.col("experiment") == "icl-heads")
    assert results.equals(pl.read_parquet(alone / "results.parquet"))
    assert not (out / "parts" / "icl-heads-induction.npz").exists()
