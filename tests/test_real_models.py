"""Real pretrained models from GGUF files: the engine in float32 against plain hooks on transformers' model.

The files are those that `models/get.py` beside the project puts together; without them the tests skip.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowmem_icl.conversion.calibration import CalibrationText, fixed_text
from lowmem_icl.conversion.claim import Conversion
from lowmem_icl.conversion.convert import convert
from lowmem_icl.conversion.locate import load_tokenizer, locate, tokeniser
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.head_scores import HeadQuestions, HeadScores
from lowmem_icl.engine.passes import GradientJob, PassSetup, score_heads, sweep, unit_gradients
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.store import Store
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.rows import stem_of
from lowmem_icl.session.prepare import prepare
from lowmem_icl.tasks.packing import PackedTask

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LIMITS = SweepLimits.of(4 << 30)
FILES = {"gemma3-270m": "gemma3-270m", "smollm2": "smollm2-135m", "qwen2.5-coder": "qwen2.5-coder-0.5b"}


@dataclass(frozen=True)
class RealModel:
    """A model as transformers reads it from its file, its float32 store, and a task's prompts as rows."""

    model: Any
    store: Store
    prompts: PackedTask
    gold_alone: PackedTask

    @property
    def layers(self) -> Any:
        return self.model.model.layers


@pytest.fixture(scope="module", params=FILES)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    file, folder = _file(FILES[request.param]), tmp_path_factory.mktemp("real")
    located = locate(str(file), None, "float32", folder)
    assert located.checkpoint is not None
    store = convert(
        Conversion(located.checkpoint, located.store_folder, "float32", request.param),
        CalibrationText(tokeniser(load_tokenizer(located.checkpoint.folder))(fixed_text())),
    )
    options = RunOptions(
        model=str(store.folder), weights="float32", store_dir=folder, tasks=("english_french",), shots=(2,),
        limit=3, train_limit=2,
    )  # fmt: skip
    prepared = prepare(options)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    return RealModel(
        model.eval().requires_grad_(False),
        store,
        prepared.pack(prepared.evaluate[0]),
        prepared.pack(prepared.importance[0], gold_only=True),
    )


def _file(name: str) -> Path:
    """Put a model's file together, or find it."""
    script = SHARED / "models" / "get.py"
    if not script.is_file():
        pytest.skip(f"real models are put together by {script}, which is not there")
    folder = os.environ.get("LOWMEM_ICL_MODELS", "")
    found = subprocess.run(
        [sys.executable, script, name, *([folder] if folder else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        pytest.skip(f"{name} cannot be put together: {found.stderr[-200:]}")
    return Path(found.stdout.strip())


def logprob(real: RealModel, path: tuple[int, ...], continuation: tuple[int, ...], mask: Mask) -> Tensor:
    """An option's summed log-probability by one hooked run of transformers' model."""
    handles = []
    width = real.store.skeleton.head_width
    for number, layer in enumerate(real.layers):
        heads = [head for at, head in mask.heads if at == number]

        def cut(module: Any, arguments: tuple[Tensor, ...], heads: list[int] = heads) -> tuple[Tensor]:
            z = arguments[0].clone()
            for head in heads:
                z[..., head * width : (head + 1) * width] = 0
            return (z,)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(cut))
        if number in mask.ffns:
            down = layer.mlp.down_proj
            handles.append(down.register_forward_hook(lambda module, given, output: torch.zeros_like(output)))
    try:
        logits = real.model(torch.tensor([path])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    logprobs = logits.float().log_softmax(-1).double()[len(path) - len(continuation) :]
    return logprobs.gather(1, torch.tensor(continuation)[:, None]).sum()


def some_units(store: Store) -> list[Mask]:
    """The clean run, a few heads of every third layer and a few FFNs."""
    skeleton = store.skeleton
    heads = [
        Mask(heads=frozenset([(layer, layer % skeleton.heads)])) for layer in range(0, skeleton.layers, 3)
    ]
    return [Mask(), *heads, *(Mask(ffns=frozenset([layer])) for layer in (0, skeleton.layers // 2))]


def test_options_and_ablations_equal_hooked_transformers(real: RealModel) -> None:
    masks = some_units(real.store)
    with (
        StreamedModel(real.store, device=CPU, resident_bytes=0, tables_in_memory=False) as model,
        CleanCache(LIMITS.cache_bytes, 0, None) as cache,
    ):
        (scores,) = sweep(PassSetup(model, LIMITS, cache), [Job(real.prompts.packed, tuple(masks))])
    for mask, values in zip(masks, scores.logprobs, strict=True):
        expected = [
            float(logprob(real, option.path, option.continuation, mask))
            for option in real.prompts.options[:5]
        ]
        np.testing.assert_allclose(values[:5], expected, atol=1e-3)


def test_gradients_equal_those_of_the_whole_graph(real: RealModel) -> None:
    task, skeleton = real.gold_alone, real.store.skeleton
    chosen = np.array([gold for document in task.task.documents for gold in document.gold])
    documents = len(task.task.documents)
    result = UnitGradients.empty(documents, task.packed.option_count, skeleton.layers, skeleton.heads)
    with (
        StreamedModel(real.store, device=CPU, resident_bytes=1 << 31) as model,
        CleanCache(LIMITS.cache_bytes, 0, None) as cache,
    ):
        job = GradientJob(task.packed.rows, lambda logprobs: chosen)
        unit_gradients(PassSetup(model, LIMITS, cache), [job], [result])
    kept: list[Tensor] = []

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        kept.append(arguments[0].detach().requires_grad_())
        return (kept[-1],)

    # One layer at a time is cut off the graph below it, so the last is enough and cheap.
    last = real.layers[-1].self_attn.o_proj
    handle = last.register_forward_pre_hook(keep)
    option = task.options[int(task.first_option[0]) + task.task.documents[0].gold.index(True)]
    logprob(real, option.path, option.continuation, Mask()).backward()
    handle.remove()
    gradient = kept[0].grad
    assert gradient is not None
    expected = (kept[0].detach() * gradient)[0].unflatten(-1, (skeleton.heads, -1)).sum(-1).sum(0)
    np.testing.assert_allclose(result.head_signed[0, -1], expected, atol=1e-3)


def test_prefix_matching_equals_the_models_own_attention(real: RealModel) -> None:
    skeleton, base = real.store.skeleton, 30
    tokens = np.random.default_rng(0).choice(np.arange(1000, 20_000), 2 * base, replace=False)
    rows = [np.concatenate([[2], np.tile(tokens[:base], 4)]), np.concatenate([[2], np.tile(tokens, 2)])]
    questions = HeadQuestions((stem_of(rows[0].tolist()),), (stem_of(rows[1].tolist()),), (base,))
    scores = HeadScores.empty(1, skeleton.layers, skeleton.heads)
    with (
        StreamedModel(real.store, device=CPU, resident_bytes=0) as model,
        CleanCache(LIMITS.cache_bytes, 0, None) as cache,
    ):
        score_heads(PassSetup(model, LIMITS, cache), questions, scores)
    with torch.no_grad():
        attentions = real.model(torch.from_numpy(rows[0])[None], output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        total = torch.zeros(skeleton.heads, dtype=torch.float64)
        for query in range(base + 1, 4 * base + 1):
            for back in range(1, 4):
                if query - back * base >= 1:
                    total += attention[0, :, query, query - back * base + 1].double()
        np.testing.assert_allclose(scores.prefix_matching[0, layer], total / (3 * base), atol=1e-4)
