"""Runs that patch prompts, as a user starts them, against loops over hooked runs of Hugging Face's model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from commands import invoke
from demo_scores import DEMO
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_icl.experiments.patch.measure import pair_scores
from lowmem_icl.tasks.prompt_pairs.pair import PromptPair

CLEAN = ["Q: kova\nA: mepi\n\nQ: lusa\nA: tiro\n\nQ: kova\nA:", "Q: lusa\nA: tiro\n\nQ: lusa\nA:"]
CORRUPTED = ["Q: kova\nA: tiro\n\nQ: lusa\nA: mepi\n\nQ: kova\nA:", "Q: lusa\nA: mepi\n\nQ: lusa\nA:"]
OPTIONS = [" mepi", " tiro", " kova"]


class Peer:
    """Hugging Face's own model of the demo, one run of a whole prompt for every head and effect."""

    def __init__(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self.heads: int = self.model.config.num_attention_heads
        self.width = self.model.config.hidden_size // self.heads
        self.layers = self.model.model.decoder.layers

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def last_z(self, prompt: list[int]) -> list[Tensor]:
        """What heads give at the last token, by layer, [Z]."""
        found: list[Tensor] = []
        handles = [
            layer.self_attn.out_proj.register_forward_pre_hook(
                lambda module, given: found.append(given[0].reshape(-1, given[0].shape[-1])[-1].clone())
            )
            for layer in self.layers
        ]
        with torch.no_grad():
            self.model(torch.tensor([prompt]))
        for handle in handles:
            handle.remove()
        return found

    def logprobs(self, prompt: list[int], following: list[int], patch: tuple[int, int, Tensor] | None) -> Any:
        """What follows a prompt, summed, and its first token alone, with one head's slice of z replaced."""
        handles = []
        if patch is not None:
            layer, head, z = patch
            width = len(z) // self.heads
            mine, at = slice(head * width, (head + 1) * width), len(prompt) - 1

            def put(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
                changed = given[0].clone()
                changed.view(-1, changed.shape[-1])[at, mine] = z[mine]
                return (changed,)

            handles.append(self.layers[layer].self_attn.out_proj.register_forward_pre_hook(put))
        with torch.no_grad():
            logits = self.model(torch.tensor([(prompt + following)[:-1]])).logits[0].double()
        for handle in handles:
            handle.remove()
        found = logits.log_softmax(-1)[len(prompt) - 1 :]
        each = [float(found[index, token]) for index, token in enumerate(following)]
        return sum(each), each[0]

    def last_gradients(self, prompt: list[int], following: list[int]) -> list[Tensor]:
        """The gradients of what follows a prompt, by what heads give at its last token, by layer, [Z]."""
        kept: list[Tensor] = []

        def keep(module: Any, given: tuple[Tensor, ...]) -> None:
            given[0].retain_grad()
            kept.append(given[0])

        handles = [layer.self_attn.out_proj.register_forward_pre_hook(keep) for layer in self.layers]
        found = self.model(torch.tensor([(prompt + following)[:-1]])).logits[0].log_softmax(-1)
        at = len(prompt) - 1
        sum(found[at + index, token] for index, token in enumerate(following)).backward()
        for handle in handles:
            handle.remove()
        return [z.grad.reshape(-1, z.shape[-1])[at] for z in kept if z.grad is not None]


@pytest.fixture(scope="module")
def peer() -> Peer:
    return Peer()


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def patched(out: Path, stores: Path, *flags: object) -> pl.DataFrame:
    run = invoke(
        "run", "--experiments", "patch", "--weights", "float32", "--store-dir", stores, "--out", out, *flags
    )
    assert run.exit_code == 0, run.output
    return pl.read_parquet(out / "results.parquet")


def of_heads(results: pl.DataFrame, metric: str) -> dict[tuple[int, int], float]:
    found = results.filter((pl.col("metric") == metric) & (pl.col("kind") == "head"))
    return {(r["layer"], r["head"]): r["value"] for r in found.iter_rows(named=True)}


def test_function_vector_scores_of_given_prompts_are_those_of_a_loop_over_heads_and_prompts(
    peer: Peer, tmp_path: Path, stores: Path
) -> None:
    clean = written(
        tmp_path / "shown.jsonl", [{"context": text, "target": " mepi"} for text in (*CLEAN, CLEAN[0])]
    )
    targets = [" mepi", " tiro"]
    corrupted = written(
        tmp_path / "hidden.jsonl",
        [
            {"tokens": peer.ids(text), "target": target}
            for text, target in zip(CORRUPTED, targets, strict=True)
        ],
    )
    results = patched(tmp_path / "out", stores, "--clean", clean, "--corrupted", corrupted)
    runs = [peer.last_z(peer.ids(text)) for text in (*CLEAN, CLEAN[0])]
    means = [torch.stack([run[layer] for run in runs]).mean(0) for layer in range(len(peer.layers))]
    first, whole = of_heads(results, "function_vector"), of_heads(results, "function_vector_logprob")
    assert len(first) == len(peer.layers) * peer.heads
    prompts = [(peer.ids(text), peer.ids(target)) for text, target in zip(CORRUPTED, targets, strict=True)]
    before = [peer.logprobs(*prompt, None) for prompt in prompts]
    for (layer, head), effect in first.items():
        after = [peer.logprobs(*prompt, (layer, head, means[layer])) for prompt in prompts]
        pairs = list(zip(after, before, strict=True))
        expected = np.mean([np.exp(new[1]) - np.exp(old[1]) for new, old in pairs])
        assert effect == pytest.approx(expected, abs=1e-5)
        expected = np.mean([new[0] - old[0] for new, old in pairs])
        assert whole[layer, head] == pytest.approx(expected, abs=1e-4)
    assert results["task"].unique().to_list() == ["shown"]


def test_patches_of_given_pairs_are_those_of_a_loop_over_heads_and_pairs(
    peer: Peer, tmp_path: Path, stores: Path
) -> None:
    lines: list[dict[str, Any]] = [
        {"context": clean, "corrupted": corrupted, "options": OPTIONS, "gold": gold}
        for clean, corrupted, gold in zip(CLEAN, CORRUPTED, (0, 1), strict=True)
    ]
    pairs = written(tmp_path / "pairs.jsonl", lines)
    results = patched(tmp_path / "out", stores, "--pairs", pairs)
    restored, broken = (of_heads(results, f"{kind}_logit_difference") for kind in ("restore", "break"))
    normalised = of_heads(results, "restore_normalised")
    estimated = of_heads(results.filter(pl.col("method") == "attribution"), "restore_gold_logprob")

    def difference(prompt: str, gold: int, patch: Any) -> float:
        scores = [peer.logprobs(peer.ids(prompt), peer.ids(option), patch)[0] for option in OPTIONS]
        return float(scores[gold] - max(score for index, score in enumerate(scores) if index != gold))

    values = [
        (peer.last_z(peer.ids(line["context"])), peer.last_z(peer.ids(line["corrupted"]))) for line in lines
    ]
    base = [
        (difference(line["context"], line["gold"], None), difference(line["corrupted"], line["gold"], None))
        for line in lines
    ]
    gradients = [
        peer.last_gradients(peer.ids(line["corrupted"]), peer.ids(OPTIONS[line["gold"]])) for line in lines
    ]
    for layer, head in restored:
        mine = slice(head * peer.width, (head + 1) * peer.width)
        estimates = [
            float(((clean[layer] - corrupted[layer]) * gradient[layer])[mine].sum())
            for (clean, corrupted), gradient in zip(values, gradients, strict=True)
        ]
        assert estimated[layer, head] == pytest.approx(np.mean(estimates), abs=1e-4)
        into_corrupted, into_clean = [], []
        for line, (clean, corrupted) in zip(lines, values, strict=True):
            given = (layer, head, clean[layer]), (layer, head, corrupted[layer])
            into_corrupted.append(difference(line["corrupted"], line["gold"], given[0]))
            into_clean.append(difference(line["context"], line["gold"], given[1]))
        of_clean, of_corrupted = np.array(base).T
        assert restored[layer, head] == pytest.approx(np.mean(into_corrupted - of_corrupted), abs=1e-4)
        assert broken[layer, head] == pytest.approx(np.mean(into_clean - of_clean), abs=1e-4)
        share = np.mean((into_corrupted - of_corrupted) / (of_clean - of_corrupted))
        assert normalised[layer, head] == pytest.approx(share, abs=1e-3)


def test_pairs_of_documents_are_patched_at_both_places_and_go_on(tmp_path: Path, stores: Path) -> None:
    flags = ("--tasks", "recall", "--shots", 2, "--train-limit", 4, "--at", "last,all")
    results = patched(tmp_path / "out", stores, *flags)
    assert set(results["procedure"].unique()) == {"last", "all"}
    assert set(results["labels"].unique()) == {"right", "shuffled"}
    again = patched(tmp_path / "out", stores, *flags)
    assert again.equals(results)


def test_a_files_name_is_no_mean_over_tasks(tmp_path: Path, stores: Path) -> None:
    line = {"context": CLEAN[1], "corrupted": CORRUPTED[1], "options": OPTIONS, "gold": 1}
    pairs = written(tmp_path / "aggregate.jsonl", [line])
    refused = invoke("run", "--experiments", "patch", "--pairs", pairs, "--store-dir", stores)
    assert refused.exit_code == 2
    assert "names the mean over tasks" in refused.output


def test_of_equal_options_the_first_counts() -> None:
    pair = PromptPair(0, (1,), (2,), ((3,), (4,)), (False, True), "a")
    scores = pair_scores(pair, np.array([[-1.0, -1.0], [-2.0, -1.0]]))
    np.testing.assert_array_equal(scores["acc"], [0, 1])
