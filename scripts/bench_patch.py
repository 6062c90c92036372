"""Patching on a real model against one hooked pass of Hugging Face's own for every head and prompt."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bench_common import in_child
from bench_real import LARGEST_DIFFERENCE, hugging_face
from bench_results import Say, compared, sample_of
from bench_sides import Inputs, Row
from numpy.typing import NDArray
from torch import Tensor

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost, operations
from lowmem_icl.engine.passes import PassSetup, unit_means
from lowmem_icl.engine.patching import patch
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.engine.unit_means import MeanSums
from lowmem_icl.experiments.patch.prompts import VectorPrompts, prompts_of, vector_jobs
from lowmem_icl.experiments.patch.stage import means_part, vectors_part
from lowmem_icl.masks.mask import Mask, all_heads
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.options import RunOptions
from lowmem_icl.session.prepare import Prepared, prepare, with_store

TASK = "present_past"
SHOTS = 5
PAIRS = 16
MOST_BYTES = 4 << 30

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Timed:
    """What a side took, in seconds and in operations, and the log-probabilities that it found, [heads,
    prompts].
    """

    seconds: float
    operations: float
    logprobs: Values
    threads: int


def _prepared(inputs: Inputs) -> Prepared:
    options = RunOptions(
        model=inputs.model, weights="float32", store_dir=inputs.folder / "stores", tasks=(TASK,),
        shots=(SHOTS,), limit=2, train_limit=PAIRS, labels=("right",), experiments=("patch",), device="cpu",
    )  # fmt: skip
    return with_store(prepare(options))


def _prompts(prepared: Prepared) -> VectorPrompts:
    (prompts,) = prompts_of(prepared).vectors
    return prompts


def _means(prepared: Prepared, prompts: VectorPrompts, setup: PassSetup) -> MeanSums:
    skeleton, part = prepared.skeleton, means_part([prompts])
    sums = [MeanSums.empty(len(prompts.clean), skeleton.layers, skeleton.attention_width, skeleton.width)]
    unit_means(setup, part.packed(prepared), sums, ends_only=True)
    return sums[0]


def our_side(inputs: Inputs) -> tuple[Timed, Values]:
    """Patch all heads of all prompts; also returns the means that are put in, [L, Z]."""
    prepared = _prepared(inputs)
    prompts, skeleton = _prompts(prepared), prepared.skeleton
    heads = [unit.as_mask() for unit in all_heads(skeleton.layers, skeleton.heads)]
    with (
        StreamedModel(prepared.store, device=torch.device("cpu"), resident_bytes=MOST_BYTES) as model,
        CleanCache(0, 0, None) as cache,
    ):
        setup = PassSetup(model, SweepLimits(MOST_BYTES), cache)
        means = _means(prepared, prompts, setup).means()
        jobs = vector_jobs(prompts, means, heads)
        scores = [Scores.empty(len(job.changes), len(job.into.row.answered)) for job in jobs]
        started = time.perf_counter()
        patch(setup, jobs, scores)
        seconds = time.perf_counter() - started
    found = np.stack([score.logprobs[1:, 0] for score in scores], 1)
    cost = vectors_part(prepared, [prompts], [means]).cost(prepared, setup.limits, ())
    done = operations(cost, skeleton)
    return Timed(seconds, done, found, torch.get_num_threads()), means.heads.astype(np.float64)


def peer_side(inputs: Inputs, means: Values, sampled: Sequence[int]) -> Timed:
    """Run the whole model once per sampled head and prompt, the head's slice replaced at the last token."""
    prepared = _prepared(inputs)
    prompts, heads = _prompts(prepared), prepared.skeleton.heads
    model = hugging_face(prepared.store.folder).model
    layers = dict(model.named_modules())
    width = prepared.skeleton.head_width
    found = np.zeros((len(sampled), len(prompts.corrupted)))
    started = time.perf_counter()
    with torch.no_grad():
        for row, index in enumerate(sampled):
            layer, head = divmod(index, heads)
            mine = slice(head * width, (head + 1) * width)
            given = torch.tensor(means[layer, mine], dtype=torch.float32)

            def put(
                module: object, arguments: tuple[Tensor, ...], mine: slice = mine, given: Tensor = given
            ) -> tuple[Tensor]:
                z = arguments[0].clone()
                z[0, -1, mine] = given
                return (z,)

            name = f"{prepared.skeleton.blocks_name}.{layer}.{prepared.skeleton.family.attention_output}"
            handle = layers[name].register_forward_pre_hook(put)
            for column, (prompt, target) in enumerate(zip(prompts.corrupted, prompts.targets, strict=True)):
                logits = model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
                found[row, column] = float(logits.double().log_softmax(-1)[target[0]])
            handle.remove()
    seconds, tokens = time.perf_counter() - started, sum(map(len, prompts.corrupted))
    through = tokens * prepared.skeleton.layers
    once = SweepCost(through, through, through, answers=len(prompts.corrupted))
    done = len(sampled) * operations(once, prepared.skeleton)
    return Timed(seconds, done, found, torch.get_num_threads())


def patching(case: str, inputs: Inputs, say: Say) -> list[Row]:
    """Case patch: every head's mean at the last token of 16 corrupted prompts of 5 demonstrations."""
    ours, means = in_child(our_side, inputs)
    count = len(ours.logprobs)
    sampled = sample_of([Mask()] * count, inputs.peer_units)
    theirs = in_child(peer_side, inputs, means, sampled)
    if ours.threads != theirs.threads:
        raise RuntimeError(f"expected as many threads on both sides, got {ours.threads}, {theirs.threads}")
    worst = float(np.abs(ours.logprobs[sampled] - theirs.logprobs).max())
    if not worst <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"log-probabilities differ by up to {worst:.2g} nats")
    scaled = theirs.seconds * count / len(sampled)
    say(f"case {case}: ours {ours.seconds:.1f} s for {count} heads, a loop {scaled:.0f} s")
    return [
        compared(
            case,
            "HuggingFace",
            ours.seconds,
            scaled,
            worst,
            shots=SHOTS,
            weights="float32",
            model=inputs.model,
            documents=PAIRS,
            threads=ours.threads,
            sampled=f"{len(sampled)} of {count}",
            arithmetic_ratio=theirs.operations * count / len(sampled) / ours.operations,
        )
    ]
