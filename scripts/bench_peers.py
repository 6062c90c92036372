"""What the sweep is measured against: other ways to score options under a mask,
each as its users would do it.

Every peer gets the same tokens: of each option its path (context and continuation without the last token) and
its continuation, and gives the summed log-probability of each continuation. Heads are removed by zeroing
their slice before the output projection, FFNs by zeroing their output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.tasks.packing import OptionTokens

Scores = list[float]
Batch = list[int]
CPU = torch.device("cpu")


def batches_by_length(options: Sequence[OptionTokens], size: int) -> Iterator[Batch]:
    """Yield numbers of options of about the same length, the longest first,
    as lm-eval's harness orders them.
    """
    order = sorted(range(len(options)), key=lambda number: -len(options[number].path))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(options: Sequence[OptionTokens]) -> tuple[Tensor, Tensor]:
    """Return token ids [B, T], filled up on the right, and the attention mask."""
    longest = max(len(option.path) for option in options)
    ids = torch.ones(len(options), longest, dtype=torch.long)
    mask = torch.zeros(len(options), longest, dtype=torch.long)
    for row, option in enumerate(options):
        ids[row, : len(option.path)] = torch.tensor(option.path)
        mask[row, : len(option.path)] = 1
    return ids, mask


def answer_positions(options: Sequence[OptionTokens]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for all answers of a batch the row, the position where it is read, and the token."""
    rows = [row for row, option in enumerate(options) for _ in option.continuation]
    positions = [
        len(option.path) - len(option.continuation) + step
        for option in options
        for step in range(len(option.continuation))
    ]
    targets = [token for option in options for token in option.continuation]
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(targets)


def summed(logits: Tensor, targets: Tensor, options: Sequence[OptionTokens]) -> Scores:
    """Return each option's summed log-probability from logits at its answers, [A, V]."""
    logprobs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
    return [float(part.sum()) for part in logprobs.split([len(option.continuation) for option in options])]


class HuggingFace:
    """Hugging Face's own model of any family with forward hooks, batched by length, the vocabulary at answers
    only.
    """

    def __init__(self, model: Any, device: torch.device = CPU) -> None:
        self.model, self.device = model, device
        self.skeleton = Skeleton(model.config)
        self.layers = model.get_submodule(self.skeleton.blocks_name)

    @contextmanager
    def without(self, mask: Mask) -> Iterator[None]:
        """Remove the units while the context lasts."""
        width, family = self.skeleton.head_width, self.skeleton.family
        handles = []
        for number, layer in enumerate(self.layers):
            heads = mask.heads_in(number)
            if heads:

                def cut(module: Any, arguments: Any, heads: tuple[int, ...] = heads) -> Any:
                    z = arguments[0].clone()
                    for head in heads:
                        z[..., head * width : (head + 1) * width] = 0
                    return (z, *arguments[1:])

                output = layer.get_submodule(family.attention_output)
                handles.append(output.register_forward_pre_hook(cut))
            if number in mask.ffns:
                output = layer.get_submodule(family.ffn_output)
                handles.append(output.register_forward_hook(lambda *seen: torch.zeros_like(seen[2])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [A, V] of final hidden states [A, D], scaled and capped as the model does."""
        form = self.skeleton.logit_form
        logits = self.model.get_output_embeddings()(hidden) * form.scale
        return logits if form.softcap is None else form.softcap * (logits / form.softcap).tanh()

    def score(self, options: Sequence[OptionTokens], mask: Mask, batch_size: int) -> Scores:
        """Return all options' scores under a mask."""
        scores = [0.0] * len(options)
        with torch.no_grad(), self.without(mask):
            for batch in batches_by_length(options, batch_size):
                members = [options[number] for number in batch]
                ids, attention = padded(members)
                ids, attention = ids.to(self.device), attention.to(self.device)
                hidden = self.model.base_model(ids, attention_mask=attention, use_cache=False)
                rows, positions, targets = (part.to(self.device) for part in answer_positions(members))
                logits = self.logits(hidden.last_hidden_state[rows, positions])
                for number, value in zip(batch, summed(logits, targets, members), strict=True):
                    scores[number] = value
        return scores


class TransformerLens:
    """TransformerLens' bridge with its hooks, batched by length;
    the unembedding is given the answers only.
    """

    def __init__(self, checkpoint: Path, model: Any, tokenizer: Any) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(
            str(checkpoint), hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.float32
        )

    def _hooks(self, mask: Mask) -> list[tuple[str, Callable[..., Tensor]]]:
        hooks: list[tuple[str, Callable[..., Tensor]]] = []
        for layer in sorted({at for at, _ in mask.heads}):

            def cut(z: Tensor, hook: Any, heads: tuple[int, ...] = mask.heads_in(layer)) -> Tensor:
                z = z.clone()
                z[:, :, list(heads)] = 0
                return z

            hooks.append((f"blocks.{layer}.attn.hook_z", cut))
        return hooks + [
            (f"blocks.{layer}.hook_mlp_out", lambda out, hook: torch.zeros_like(out))
            for layer in sorted(mask.ffns)
        ]

    def score(self, options: Sequence[OptionTokens], mask: Mask, batch_size: int) -> Scores:
        """Return all options' scores under a mask."""
        scores = [0.0] * len(options)
        with torch.no_grad():
            for batch in batches_by_length(options, batch_size):
                members = [options[number] for number in batch]
                ids, attention = padded(members)
                rows, positions, targets = answer_positions(members)

                def at_answers(
                    hidden: Tensor, hook: Any, rows: Tensor = rows, positions: Tensor = positions
                ) -> Tensor:
                    return hidden[rows, positions][None]

                logits = self.bridge.run_with_hooks(
                    ids,
                    attention_mask=attention,
                    prepend_bos=False,
                    fwd_hooks=[*self._hooks(mask), ("unembed.hook_in", at_answers)],
                )[0]
                for number, value in zip(batch, summed(logits, targets, members), strict=True):
                    scores[number] = value
        return scores


class LmEval:
    """lm-evaluation-harness' own `hf` model, on tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from lm_eval.models.huggingface import HFLM

        self._make: Callable[[int], Any] = lambda size: HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, add_bos_token=False, device="cpu"
        )
        self._models: dict[int, Any] = {}

    def score(self, options: Sequence[OptionTokens], mask: Mask, batch_size: int) -> Scores:
        """Return all options' scores; it knows no masks."""
        assert not len(mask)
        if batch_size not in self._models:
            self._models[batch_size] = self._make(batch_size)
        requests = []
        for option in options:
            whole = [*option.path, option.continuation[-1]]
            start = len(whole) - len(option.continuation)
            requests.append((None, whole[:start], whole[start:]))
        scored = self._models[batch_size]._loglikelihood_tokens(requests, disable_tqdm=True)
        return [float(logprob) for logprob, _ in scored]


class DiskOffload(HuggingFace):
    """accelerate's `disk_offload` of a bfloat16 checkpoint,
    all options in one batch so that weights are read once.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        from accelerate import disk_offload, init_empty_weights
        from transformers import OPTForCausalLM

        with init_empty_weights():
            model = OPTForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        model.tie_weights()
        disk_offload(model, folder, execution_device=CPU)
        super().__init__(model)
