"""Plain hooks on Hugging Face's own model of any family: one run of the whole model per question."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from family_models import HEADS, LAYERS, FamilyCase
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from lowmem_icl.masks.mask import Mask


def slices(z: Tensor) -> list[Tensor]:
    """Views of the heads' outputs in the input of an attention's output projection."""
    return list(z.chunk(HEADS, dim=-1))


@contextmanager
def without(case: FamilyCase, model: Any, mask: Mask) -> Iterator[None]:
    """Zero removed heads before the output projection, and what removed FFNs give."""
    handles = []
    for number in range(LAYERS):
        heads = [head for layer, head in mask.heads if layer == number]

        def cut(module: Module, arguments: tuple[Tensor, ...], heads: Sequence[int] = heads) -> tuple[Tensor]:
            z = arguments[0].clone()
            for head in heads:
                slices(z)[head].zero_()
            return (z,)

        handles.append(case.module(model, number, case.output).register_forward_pre_hook(cut))
        if number in mask.ffns:
            ffn = case.module(model, number, case.ffn)
            handles.append(ffn.register_forward_hook(lambda module, given, output: torch.zeros_like(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def option_logprob(case: FamilyCase, model: Any, option: Any, mask: Mask = Mask()) -> Tensor:
    """Summed log-probability of an option, by one run of the whole model on it alone."""
    path, continuation = list(option.path), list(option.continuation)
    with without(case, model, mask):
        logprobs = model(torch.tensor([path])).logits[0].float().log_softmax(-1).double()
    first = len(path) - len(continuation)
    return torch.stack([logprobs[first + index, token] for index, token in enumerate(continuation)]).sum()


def option_logprobs(case: FamilyCase, model: Any, options: Sequence[Any], mask: Mask) -> NDArray[np.float64]:
    """Summed log-probabilities of options, each by itself, [O]."""
    with torch.no_grad():
        return np.array([float(option_logprob(case, model, option, mask)) for option in options])


@contextmanager
def without_each(case: FamilyCase, model: Any, masks: Sequence[Mask]) -> Iterator[None]:
    """As `without`, of as many equal rows as there are masks: each row under its own."""

    def rows_of(tensor: Tensor) -> Tensor:
        # OPT's FFNs see all rows as one.
        return tensor.view(len(masks), -1, tensor.shape[-1])

    handles = []
    for number in range(LAYERS):

        def cut(module: Module, arguments: tuple[Tensor, ...], number: int = number) -> tuple[Tensor]:
            z = arguments[0].clone()
            for row, mask in zip(rows_of(z), masks, strict=True):
                for head in (head for layer, head in mask.heads if layer == number):
                    slices(row)[head].zero_()
            return (z,)

        def silence(module: Module, given: Any, output: Tensor, number: int = number) -> Tensor:
            silenced = output.clone()
            for row, mask in zip(rows_of(silenced), masks, strict=True):
                if number in mask.ffns:
                    row.zero_()
            return silenced

        handles.append(case.module(model, number, case.output).register_forward_pre_hook(cut))
        handles.append(case.module(model, number, case.ffn).register_forward_hook(silence))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def option_logprobs_by_mask(
    case: FamilyCase, model: Any, options: Sequence[Any], masks: Sequence[Mask]
) -> NDArray[np.float64]:
    """Summed log-probabilities of options, each by itself, a row of the whole model per mask, [M, O]."""
    columns = []
    with torch.no_grad(), without_each(case, model, masks):
        for option in options:
            path, continuation = list(option.path), list(option.continuation)
            logits = model(torch.tensor([path]).repeat(len(masks), 1)).logits
            ends = logits[:, -len(continuation) :].float().log_softmax(-1).double()
            chosen = torch.tensor(continuation).repeat(len(masks), 1)[..., None]
            columns.append(ends.gather(-1, chosen)[..., 0].sum(1).numpy())
    return np.stack(columns, axis=1)


def unit_gradients(case: FamilyCase, model: Any, option: Any) -> tuple[NDArray[Any], ...]:
    """Σ_t |⟨z, g⟩| and Σ_t ⟨z, g⟩ by head [L, H] and by FFN [L], from the whole graph at once."""
    kept: dict[tuple[str, int], Tensor] = {}
    handles = []
    for number in range(LAYERS):

        def keep_z(module: Module, arguments: tuple[Tensor, ...], number: int = number) -> None:
            arguments[0].retain_grad()
            kept["head", number] = arguments[0]

        def keep_ffn(module: Module, arguments: Any, output: Tensor, number: int = number) -> Tensor:
            output.retain_grad()
            kept["ffn", number] = output
            # Falcon adds its attention to it in place.
            return output.clone()

        written = case.module(model, number, case.written_ffn or case.ffn)
        handles.append(case.module(model, number, case.output).register_forward_pre_hook(keep_z))
        handles.append(written.register_forward_hook(keep_ffn))
    option_logprob(case, model, option).backward()
    for handle in handles:
        handle.remove()
    heads, ffns = [], []
    for number in range(LAYERS):
        z, ffn = kept["head", number], kept["ffn", number]
        assert z.grad is not None
        assert ffn.grad is not None
        products = (z * z.grad)[0].unflatten(-1, (HEADS, -1)).sum(-1)
        heads.append(products.detach().numpy())
        ffns.append((ffn * ffn.grad).reshape(-1, ffn.shape[-1]).sum(-1).detach().numpy())
    by_head, by_ffn = np.stack(heads), np.stack(ffns)
    return np.abs(by_head).sum(1), by_head.sum(1), np.abs(by_ffn).sum(1), by_ffn.sum(1)


def attention_patterns(model: Any, tokens: Tensor) -> list[Tensor]:
    """Attention probabilities of every layer on one row, [H, T, T], as the model gives them itself."""
    with torch.no_grad():
        return [attention[0] for attention in model(tokens[None], output_attentions=True).attentions]


def prefix_matching(pattern: Tensor, base_tokens: int) -> Tensor:
    """Attention to what followed earlier occurrences, a mean over queries from the second copy on, [H]."""
    total = torch.zeros(len(pattern), dtype=torch.float64)
    for query in range(base_tokens + 1, 4 * base_tokens + 1):
        for back in range(1, 4):
            if query - back * base_tokens >= 1:
                total += pattern[:, query, query - back * base_tokens + 1].double()
    return total / (3 * base_tokens)


def copying(case: FamilyCase, model: Any, tokens: Tensor, layer: int, writes: Tensor) -> Tensor:
    """Share of the most attended token among raised logits of the row's tokens, a mean over positions, [H].

    writes: [H, T, D], what each head puts into the residual, up to a positive factor per token.
    """
    pattern = attention_patterns(model, tokens)[layer]
    unembedding = model.get_output_embeddings().weight.detach()[tokens]
    scores = torch.zeros(len(writes), dtype=torch.float64)
    for head in range(len(writes)):
        for at in range(1, len(tokens)):
            logits = unembedding[: at + 1] @ writes[head, at]
            above = (logits - logits.mean()).relu()
            if above.sum() > 0:
                scores[head] += float(above[pattern[head, at].argmax()] / above.sum())
    return scores / (len(tokens) - 1)
