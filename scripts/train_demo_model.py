"""Train the demo model: a small OPT that learns in context by a mechanism that is known.

    python scripts/train_demo_model.py [--seed 1] [--out lowmem_icl/demo]

Stage 1 teaches sequences that repeat, with an auxiliary loss on attention that makes one head of layer 0 look
at the previous token and two heads of layer 1 at the token after an earlier occurrence (an induction circuit,
Olsson et al. 2022). Stage 2 mixes in the four kinds of line of `demo_language.py`; all heads but the
circuit's are dropped at random, so that these few carry what is learned from the context. Repeats on 2 CPU
cores in about a quarter of an hour.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_language import Language, Sequence, build_tokenizer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

KINDS = ("recall", "category", "knowledge", "repeat")


@dataclass(frozen=True)
class Settings:
    """Sizes, steps and the heads of the circuit, as (layer, head)."""

    layers: int = 4
    heads: int = 8
    width: int = 192
    context: int = 512
    repeat_steps: int = 450
    mixture_steps: int = 1800
    tokens_a_step: int = 4096
    learning_rate: float = 1.5e-3
    attention_weight: float = 0.3
    late_attention_weight: float = 0.1
    previous_token: tuple[tuple[int, int], ...] = ((0, 0),)
    induction: tuple[tuple[int, int], ...] = ((1, 0), (1, 1))
    free: tuple[tuple[int, int], ...] = ((2, 0),)

    @property
    def circuit(self) -> tuple[tuple[int, int], ...]:
        """Heads that are never dropped."""
        return self.previous_token + self.induction + self.free


def new_model(settings: Settings, vocabulary: int) -> OPTForCausalLM:
    """Return an untrained OPT of the demo's size."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        word_embed_proj_dim=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        ffn_dim=4 * settings.width,
        max_position_embeddings=settings.context,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
        init_std=0.02,
    )
    return OPTForCausalLM._from_config(config, attn_implementation="eager")


class HeadDrop:
    """Drops heads outside the circuit at random, a draw a sequence,
    by zeroing their slices before out_proj.
    """

    def __init__(self, model: OPTForCausalLM, settings: Settings) -> None:
        self.keep: Tensor | None = None
        self.settings = settings
        for number, layer in enumerate(model.model.decoder.layers):
            layer.self_attn.out_proj.register_forward_pre_hook(
                lambda module, arguments, number=number: self._cut(number, arguments[0])
            )

    def draw(self, batch: list[Sequence], generator: torch.Generator) -> None:
        """Draw for a batch: in a third of the sequences all go, in a third half of them, in a third none.

        The circuit's heads always stay, but for half of the sequences that need no context: what is known
        must not come to rest on them.
        """
        shape = (len(batch), self.settings.layers, self.settings.heads)
        share = torch.randint(0, 3, (len(batch), 1, 1), generator=generator) / 2
        self.keep = (torch.rand(shape, generator=generator) >= share).float()
        without_context = torch.tensor([sequence.kind == "knowledge" for sequence in batch])
        freed = without_context & (torch.rand(len(batch), generator=generator) < 0.5)
        for layer, head in self.settings.circuit:
            self.keep[:, layer, head] = (~freed).float()

    def _cut(self, layer: int, z: Tensor) -> tuple[Tensor] | None:
        if self.keep is None:
            return None
        rows, tokens, _ = z.shape
        kept = z.view(rows, tokens, self.settings.heads, -1) * self.keep[:, layer][:, None, :, None]
        return (kept.view(z.shape),)


def attention_loss(attentions: tuple[Tensor, ...], batch: list[Sequence], settings: Settings) -> Tensor:
    """Mean of −log of the attention that the circuit's heads should pay where the sequences repeat."""
    tokens = attentions[0].shape[-1]
    losses = []
    for layer, head in settings.previous_token:
        diagonal = torch.diagonal(attentions[layer][:, head], offset=-1, dim1=1, dim2=2)
        losses.append(-(diagonal + 1e-6).log().mean())
    rows = [(number, sequence) for number, sequence in enumerate(batch) if sequence.period]
    if rows:
        target = torch.zeros(len(rows), tokens, tokens)
        for index, (_, sequence) in enumerate(rows):
            for back in range(1, -(-(tokens - sequence.start) // sequence.period) + 1):
                queries = torch.arange(sequence.start + (back - 1) * sequence.period, tokens)
                target[index, queries, queries - back * sequence.period + 1] = 1
        asked = target.any(-1)
        numbers = [number for number, _ in rows]
        for layer, head in settings.induction:
            paid = (attentions[layer][numbers, head] * target).sum(-1)[asked]
            losses.append(-(paid + 1e-6).log().mean())
    return torch.stack(losses).mean()


def draw_batch(
    language: Language, settings: Settings, rng: np.random.Generator, mixture: bool
) -> list[Sequence]:
    """Draw sequences of one length; short ones are more frequent."""
    length = int(
        rng.choice([64, 128, 256, 512], p=[0.45, 0.3, 0.2, 0.05] if mixture else [0.6, 0.2, 0.1, 0.1])
    )
    kinds = ("random", *KINDS) if mixture else ("random",)
    weights = np.array([0.12, 0.2, 0.23, 0.25, 0.2]) if mixture else np.array([1.0])
    return [
        language.random_repeat(length) if kind == "random" else language.lines(kind, length)
        for kind in rng.choice(kinds, settings.tokens_a_step // length, p=weights)
    ]


def train(settings: Settings, seed: int) -> tuple[OPTForCausalLM, PreTrainedTokenizerFast]:
    """Train from scratch; the same seed and thread count give the same model."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    language = Language(tokenizer, rng)
    model = new_model(settings, len(tokenizer))
    drop = HeadDrop(model, settings)
    steps = settings.repeat_steps + settings.mixture_steps
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.03
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 50) * min(1, 0.02 + 1.2 * (steps - step) / steps)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        shown = progress.add_task("training", total=steps)
        for step in range(steps):
            mixture = step >= settings.repeat_steps
            batch = draw_batch(language, settings, rng, mixture)
            tokens = torch.from_numpy(np.stack([sequence.tokens for sequence in batch]))
            answers = torch.from_numpy(np.stack([sequence.answers for sequence in batch]))
            free = settings.context - tokens.shape[1]
            # Lines mostly start where a prompt starts; random offsets train every position.
            offset = int(rng.integers(0, free + 1)) if free and rng.random() < 0.6 else 0
            if mixture:
                drop.draw(batch, generator)
            positions = torch.arange(tokens.shape[1]).expand_as(tokens) + offset
            out = model(input_ids=tokens, position_ids=positions, output_attentions=True, use_cache=False)
            predicted = out.logits[:, :-1][answers[:, 1:]]
            loss = nn.functional.cross_entropy(predicted, tokens[:, 1:][answers[:, 1:]])
            weight = settings.late_attention_weight if mixture else settings.attention_weight
            total = loss + weight * attention_loss(out.attentions, batch, settings)
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.update(shown, advance=1, description=f"loss {loss.item():.3f} all {total.item():.3f}")
            if step % 100 == 0:
                progress.console.print(
                    f"step {step}: loss {loss.item():.4f}, with attention {total.item():.4f}"
                )
    drop.keep = None
    return model.eval(), tokenizer


@torch.no_grad()
def prefix_matching(model: OPTForCausalLM, vocabulary: int, sequences: int = 20) -> Tensor:
    """Return every head's prefix-matching score [L, H] on repeated random ids after BOS (paper's appendix
    A.4).
    """
    rng = np.random.default_rng(0)
    scores = []
    for number in range(sequences):
        period = 25 + number * 102 // max(1, sequences - 1)
        segment = rng.choice(np.arange(4, vocabulary), period, replace=False)
        tokens = torch.from_numpy(np.concatenate([[2], np.tile(segment, 4)]))[None]
        attentions = model(tokens, output_attentions=True).attentions
        total = torch.zeros(len(attentions), attentions[0].shape[1])
        for back in range(1, 4):
            queries = torch.arange(back * period + 1 if back > 1 else period + 1, 4 * period + 1)
            keys = queries - back * period + 1
            for layer, pattern in enumerate(attentions):
                total[layer] += pattern[0][:, queries, keys].sum(-1)
        scores.append(total / (3 * period))
    return torch.stack(scores).mean(0)


def main() -> None:
    """Train, print what the heads do, and write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "lowmem_icl" / "demo")
    for name in ("repeat-steps", "mixture-steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name.replace("-", "_")))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(repeat_steps=arguments.repeat_steps, mixture_steps=arguments.mixture_steps)
    model, tokenizer = train(settings, arguments.seed)
    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "generation_config.json").unlink(missing_ok=True)
    scores = prefix_matching(model.float(), len(tokenizer))
    print(
        json.dumps(
            {
                "seed": arguments.seed,
                "prefix_matching": [[round(v, 3) for v in row] for row in scores.tolist()],
            }
        )
    )


if __name__ == "__main__":
    main()
