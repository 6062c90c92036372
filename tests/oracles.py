"""Slow and obvious: what the fast paths must equal. Nothing here shares code with what it checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from transformers import OPTForCausalLM

from lowmem_icl.masks.mask import Mask

# An FFN by its layer, or a head by its layer and number.
Removable = int | tuple[int, int]


def option_logprob(
    model: OPTForCausalLM, path: list[int], continuation: list[int], mask: Mask = Mask()
) -> float:
    """Log-probability of a continuation after `path` minus it,
    by one run of the whole model on this option alone.
    """
    with torch.no_grad():
        return float(_summed_logprob(model, path, continuation, mask))


def _summed_logprob(model: OPTForCausalLM, path: list[int], continuation: list[int], mask: Mask) -> Tensor:
    handles = hook_mask(model, mask)
    try:
        logits = model(torch.tensor([path])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    # In float32 as the design has it, summed in float64.
    logprobs = logits[len(path) - len(continuation) :].float().log_softmax(-1).double()
    return torch.stack([logprobs[index, token] for index, token in enumerate(continuation)]).sum()


def hook_mask(model: OPTForCausalLM, mask: Mask) -> list[torch.utils.hooks.RemovableHandle]:
    """Zero removed heads' slices before out_proj and removed FFNs' outputs, by plain hooks."""
    width = model.config.hidden_size // model.config.num_attention_heads
    handles = []
    for number, layer in enumerate(model.model.decoder.layers):
        heads = [head for at, head in mask.heads if at == number]

        def cut(module: Module, arguments: tuple[Tensor, ...], heads: Sequence[int] = heads) -> tuple[Tensor]:
            z = arguments[0].clone()
            for head in heads:
                z[..., head * width : (head + 1) * width] = 0
            return (z,)

        handles.append(layer.self_attn.out_proj.register_forward_pre_hook(cut))
        if number in mask.ffns:
            handles.append(
                layer.fc2.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
            )
    return handles


def places_from_the_end(tokens: int, context: int, donor_tokens: int, donor_context: int) -> list[int]:
    """Which token of a donor stands for each token of a path, one by one, counted from the last token of the
    context: the donor's first token for all that is further before, its last for all that is further behind.
    """
    places = []
    for token in range(tokens):
        before_the_end = (context - 1) - token
        place = (donor_context - 1) - before_the_end
        places.append(0 if place < 0 else donor_tokens - 1 if place >= donor_tokens else place)
    return places


def gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient retained at a tensor; 0 where it leads nowhere, as a removed FFN's output."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def unit_gradients(
    model: OPTForCausalLM, path: list[int], continuation: list[int], mask: Mask = Mask()
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Σ_t |⟨z, g⟩| and Σ_t ⟨z, g⟩ by head [L, H] and FFN [L], from the whole graph of one example at once.

    Under a mask z is what a head gives before it is removed, so its terms are 0; likewise an FFN's output.
    """
    heads = model.config.num_attention_heads
    kept: dict[tuple[str, int], Tensor] = {}
    handles = []
    for number, layer in enumerate(model.model.decoder.layers):

        def keep_z(module: Module, arguments: tuple[Tensor, ...], number: int = number) -> None:
            arguments[0].retain_grad()
            kept["z", number] = arguments[0]

        def keep_ffn(
            module: Module, arguments: tuple[Tensor, ...], output: Tensor, number: int = number
        ) -> None:
            output.retain_grad()
            kept["ffn", number] = output

        handles += [
            layer.self_attn.out_proj.register_forward_pre_hook(keep_z),
            layer.fc2.register_forward_hook(keep_ffn),
        ]
    _summed_logprob(model, path, continuation, mask).backward()
    for handle in handles:
        handle.remove()
    layers = len(model.model.decoder.layers)
    by_head, by_ffn = [], []
    for number in range(layers):
        z, ffn = kept["z", number], kept["ffn", number]
        by_head.append((z * gradient_of(z))[0].view(len(path), heads, -1).sum(-1).detach().numpy())
        by_ffn.append((ffn * gradient_of(ffn)).view(len(path), -1).sum(-1).detach().numpy())
    head, ffn_terms = np.stack(by_head), np.stack(by_ffn)
    return np.abs(head).sum(1), head.sum(1), np.abs(ffn_terms).sum(1), ffn_terms.sum(1)


def reference_importance(model: OPTForCausalLM, examples: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Importance of heads [L, H] as the paper's code computes it, example by example: (context,
    continuation) tokens.

    Cross-entropy, a mean over the continuation's tokens; Σ over all tokens of |⟨A, ∂L/∂A⟩| by head, A the
    input of the attention's output projection; divided by Σ (N − 1), in the last layer by Σ continuation
    tokens.
    """
    heads = model.config.num_attention_heads
    layers = model.model.decoder.layers
    total, all_tokens, answer_tokens = np.zeros((len(layers), heads)), 0, 0
    for context, continuation in examples:
        kept: list[Tensor] = []

        def keep(module: Module, arguments: tuple[Tensor, ...], kept: list[Tensor] = kept) -> None:
            arguments[0].retain_grad()
            kept.append(arguments[0])

        handles = [layer.self_attn.out_proj.register_forward_pre_hook(keep) for layer in layers]
        labels = torch.tensor([[-100] * len(context) + continuation])
        model(torch.tensor([context + continuation]), labels=labels).loss.backward()
        for handle in handles:
            handle.remove()
        for number, attended in enumerate(kept):
            by_head = (attended * gradient_of(attended))[0].unflatten(-1, (heads, -1)).sum(-1)
            total[number] += by_head.abs().sum(0).detach().numpy()
        all_tokens += len(context) + len(continuation) - 1
        answer_tokens += len(continuation)
    total[:-1] /= all_tokens
    total[-1] /= answer_tokens
    return total


@dataclass(frozen=True)
class GreedyQuestion:
    """What is pruned how: a model's shape, what may be lost in all, and in which order units are visited.

    `weights`: what a head and an FFN count, where they are removed jointly.
    """

    layers: int
    heads: int
    tolerance: float
    up: bool = False
    joint: bool = False
    weights: tuple[int, int] = (1, 1)


def greedy_layerwise(
    asked: GreedyQuestion, choose: Callable[[Mask], float], check: Callable[[Mask], float]
) -> Mask:
    """The pruner of the description, one evaluation at a time; choose, check: mask to how much is lost."""
    order_of_layers = list(range(asked.layers)) if asked.up else list(reversed(range(asked.layers)))
    groups: list[list[Removable]] = [
        [(layer, head) for head in range(asked.heads)] for layer in order_of_layers
    ]
    if asked.joint:
        groups = [[*group, layer] for group, layer in zip(groups, order_of_layers, strict=True)]
    else:
        groups += [[layer] for layer in order_of_layers]

    def weight(unit: Removable) -> int:
        return asked.weights[isinstance(unit, int)]

    mask, visited, whole = Mask(), 0, sum(weight(unit) for group in groups for unit in group)
    for group in groups:
        left = list(group)
        while left:
            order = sorted(left, key=lambda unit: choose(mask | _mask(unit)) / weight(unit))
            removed = False
            for unit in order:
                visited += weight(unit)
                left.remove(unit)
                if check(mask | _mask(unit)) <= asked.tolerance * visited / whole:
                    mask, removed = mask | _mask(unit), True
                    break
            if not removed:
                break
    return mask


def _mask(unit: Removable) -> Mask:
    return Mask(ffns=frozenset([unit])) if isinstance(unit, int) else Mask(heads=frozenset([unit]))


def pattern_scores(
    attention: np.ndarray, base_tokens: int, *, reference: bool = False
) -> dict[str, list[float]]:
    """Prefix matching, previous-token and duplicate-token scores of heads, [H, T, T],
    by the description's nested loops.
    """
    scores: dict[str, list[float]] = {"prefix_matching": [], "previous_token": [], "duplicate_token": []}
    last = 4 * base_tokens
    for head in range(len(attention)):
        prefix = previous = duplicate = 0.0
        for query in range(base_tokens + 1, last + 1):
            if reference:
                for earlier in range(query // base_tokens):
                    prefix += float(attention[head, query, earlier * base_tokens + query % base_tokens + 1])
            for back in (1, 2, 3):
                occurrence = query - back * base_tokens
                if occurrence >= 1:
                    duplicate += float(attention[head, query, occurrence])
                    if not reference:
                        prefix += float(attention[head, query, occurrence + 1])
        for query in range(2, last + 1):
            previous += float(attention[head, query, query - 1])
        scores["prefix_matching"].append(prefix / (3 * base_tokens))
        scores["previous_token"].append(previous / (last - 1))
        scores["duplicate_token"].append(duplicate / (3 * base_tokens))
    return scores


def copying(
    model: OPTForCausalLM,
    tokens: list[int],
    *,
    final_norm: bool = False,
    softmax: bool = False,
    bias: bool = False,
    own_token: bool = False,
) -> np.ndarray:
    """Copying [L, H] of a row by paper.md 5.3, a head and a token at a time; `own_token`:
    its reference code's way.
    """
    heads, layers = model.config.num_attention_heads, model.model.decoder.layers
    width = model.config.hidden_size // heads
    ids = torch.tensor([tokens])
    run = model(ids, output_attentions=True, output_hidden_states=True)
    scores = np.zeros((len(layers), heads))
    for number, layer in enumerate(layers):
        entering = run.hidden_states[0] if own_token else run.hidden_states[number]
        normed = layer.self_attn_layer_norm(entering)
        _, attention = layer.self_attn(normed, attention_mask=_causal(len(tokens)), output_attentions=True)
        if not own_token:
            torch.testing.assert_close(attention, run.attentions[number], atol=1e-6, rtol=1e-5)
        values = layer.self_attn.v_proj(normed)[0]
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            output = values[:, mine] if own_token else attention[0, head] @ values[:, mine]
            written = output @ layer.self_attn.out_proj.weight[:, mine].t()
            if bias:
                written = written + layer.self_attn.out_proj.bias
            if final_norm:
                written = model.model.decoder.final_layer_norm(written)
            logits = model.lm_head(written)
            if softmax:
                logits = logits.softmax(-1)
            total = 0.0
            for index in range(1, len(tokens)):
                attended = int(attention[0, head, index, : index + 1].argmax())
                candidates = logits[index, tokens[: index + 1]].double()
                above = (candidates - candidates.mean()).relu()
                total += float(above[attended] / above.sum()) if above.sum() > 0 else 0.0
            scores[number, head] = total / (len(tokens) - 1)
    return scores


def _causal(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]


def copying_eigenvalues(model: OPTForCausalLM) -> np.ndarray:
    """Σ Re λ / Σ |λ| [L, H] over the eigenvalues of every head's whole product from vocabulary to
    vocabulary.
    """
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    embedding = model.get_input_embeddings().weight.double().numpy()
    unembedding = model.lm_head.weight.double().numpy()
    scores = []
    for layer in model.model.decoder.layers:
        values = layer.self_attn.v_proj.weight.double().numpy()
        output = layer.self_attn.out_proj.weight.double().numpy()
        of_layer = []
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            circuit = unembedding @ output[:, mine] @ values[mine] @ embedding.T
            eigenvalues = np.linalg.eigvals(circuit)
            of_layer.append(eigenvalues.real.sum() / np.abs(eigenvalues).sum())
        scores.append(of_layer)
    return np.array(scores)
