"""The demo model is what the README says: it learns in context,
by induction heads that can be found and removed.
"""

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import invoke
from demo_scores import DEMO, DemoScores
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import highest_heads, lowest_heads, removed_count
from lowmem_icl.tables.schema import read_table

TASKS = ("recall", "category", "knowledge", "repeat")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def prefix_matching() -> np.ndarray:
    """Scores [L, H] by the description: the mean over queries of the attention to what followed earlier
    occurrences.
    """
    model = OPTForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(7)
    scores = []
    for period in (25, 50, 75, 100, 127):
        segment = rng.choice(np.arange(4, model.config.vocab_size), period, replace=False)
        tokens = torch.from_numpy(np.concatenate([[2], np.tile(segment, 4)]))[None]
        with torch.no_grad():
            attentions = torch.stack(model(tokens, output_attentions=True).attentions)[:, 0]
        total = torch.zeros(attentions.shape[:2])
        for query in range(period + 1, 4 * period + 1):
            for back in (1, 2, 3):
                if query - back * period >= 1:
                    total += attentions[:, :, query, query - back * period + 1]
        scores.append(total / (3 * period))
    return torch.stack(scores).mean(0).numpy()


def test_the_folder_is_small_and_the_model_as_described() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 10e6
    model = OPTForCausalLM.from_pretrained(DEMO)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() < 4e6
    assert 4 <= model.config.num_hidden_layers <= 6
    assert model.config.num_attention_heads == 8
    assert model.config.max_position_embeddings >= 512


@pytest.mark.parametrize("text", ["cat dax\ndog", "Zürich 東京 \t x", "word  two  spaces\n\n", "🙂"])
def test_any_text_goes_through_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_context_and_continuation_apart_are_the_tokens_of_both_together(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("cat dax\ndog", " wug")]
    assert apart[0] + apart[1] == tokenizer("cat dax\ndog wug", add_special_tokens=False)["input_ids"]


def test_it_has_induction_heads_and_only_a_few(prefix_matching: np.ndarray) -> None:
    assert prefix_matching.max() >= 0.9
    assert 1 <= (prefix_matching >= 0.3).sum() <= prefix_matching.size / 4


def test_int8_says_what_float32_says(demo_scores: DemoScores) -> None:
    gold: dict[str, list[np.ndarray]] = {"int8": [], "float32": []}
    for task, shots in itertools.product(TASKS, (0, 4, 16)):
        (ours,) = demo_scores.scores(task, shots)
        (exact,) = demo_scores.scores(task, shots, weights="float32")
        accuracies = [scores["acc"].mean() for scores in (ours, exact)]
        assert abs(accuracies[0] - accuracies[1]) <= 0.01, (task, shots, accuracies)
        gold["int8"].append(ours["gold_logprob"])
        gold["float32"].append(exact["gold_logprob"])
    int8, float32 = np.concatenate(gold["int8"]), np.concatenate(gold["float32"])
    assert len(int8) > 4000
    assert np.corrcoef(int8, float32)[0, 1] >= 0.999


@pytest.mark.parametrize("task", ["recall", "category"])
def test_in_context_tasks_rise_from_chance(demo_scores: DemoScores, task: str) -> None:
    (nothing,), (enough,) = demo_scores.accuracy(task, 0), demo_scores.accuracy(task, 16)
    assert nothing == 0.25, "exactly chance, by the rotations"
    assert enough >= 0.9


@pytest.mark.parametrize("shots", [0, 4, 16])
def test_knowledge_needs_no_demonstrations(demo_scores: DemoScores, shots: int) -> None:
    assert demo_scores.accuracy("knowledge", shots)[0] >= 0.95


def test_without_its_induction_heads_it_recalls_nothing_and_knows_all(
    demo_scores: DemoScores, prefix_matching: np.ndarray
) -> None:
    induction = [(int(layer), int(head)) for layer, head in np.argwhere(prefix_matching >= 0.3)]
    layers = {layer for layer, _ in induction}
    rng = np.random.default_rng(0)
    others = [(layer, head) for layer in layers for head in range(8) if (layer, head) not in induction]
    draws = [
        Mask(
            frozenset(others[int(drawn)] for drawn in rng.choice(len(others), len(induction), replace=False))
        )
        for _ in range(9)
    ]
    (without,) = demo_scores.accuracy("recall", 16, Mask(frozenset(induction)))
    assert without <= 0.25 + 0.1
    clean, *random = demo_scores.accuracy("recall", 16, Mask(), *draws)
    assert clean - float(np.median(random)) < 0.1
    assert demo_scores.accuracy("knowledge", 0, Mask(frozenset(induction)))[0] >= 0.9


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> pl.DataFrame:
    """What the default run says of every head on training documents with 16 demonstrations."""
    out = tmp_path_factory.mktemp("importance") / "run"
    result = invoke(
        "run",
        "--experiments",
        "importance,ablate",
        "--shots",
        16,
        "--store-dir",
        stores,
        "--out",
        out,
        "--quiet",
    )
    assert result.exit_code == 0, result.output
    rows = read_table(out / "results.parquet", "results")
    return rows.filter(pl.col("kind") == "head").sort("layer", "head")


def head_scores(importance: pl.DataFrame, task: str, metric: str) -> np.ndarray:
    task_rows = importance.filter((pl.col("task") == task) & (pl.col("metric") == metric))
    return task_rows["value"].to_numpy().reshape(4, 8)


@pytest.mark.parametrize("task", ["recall", "category"])
def test_what_aggregate_importance_finds_is_what_in_context_tasks_need(
    demo_scores: DemoScores, importance: pl.DataFrame, task: str
) -> None:
    scores = head_scores(importance, "aggregate", "gradient_rank")
    count = scores.size
    clean, without_lowest, without_top = demo_scores.accuracy(
        task, 16, Mask(), lowest_heads(scores, removed_count(50, count)),
        highest_heads(scores, removed_count(15, count)),
    )  # fmt: skip
    assert clean - without_lowest <= 0.05
    assert without_top <= 0.25 + 0.10


def test_knowledge_needs_none_of_the_heads_that_only_in_context_tasks_need(
    demo_scores: DemoScores, importance: pl.DataFrame
) -> None:
    """Needed is a head whose removal alone costs five points of accuracy on training documents."""
    drops = {task: head_scores(importance, task, "acc_drop") for task in ("recall", "category", "knowledge")}
    in_context = np.maximum(drops["recall"], drops["category"]) >= 0.05
    only = np.argwhere(in_context & (drops["knowledge"] < 0.05))
    assert len(only)
    removed = Mask(heads=frozenset((int(layer), int(head)) for layer, head in only))
    assert demo_scores.accuracy("knowledge", 16, removed)[0] >= 0.9
