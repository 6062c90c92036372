"""Masks outside the engine against the engine: every family, every way to apply one.

`python tests/mask_equalities.py` prints the table of docs/masks-elsewhere.md: the largest differences of an
option's summed log-probability, in nats; where TransformerLens and nnsight are installed (the extra `bench`),
of these too.
"""

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from conftest import make_store
from demo_scores import DEMO
from family_models import CASES, HEADS, LAYERS, FamilyCase
from numpy.typing import NDArray
from test_engine import packed_task, swept
from torch import Tensor
from transformers import AutoTokenizer

from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.engine.schedule import Job
from lowmem_icl.errors import InputError
from lowmem_icl.export import formats
from lowmem_icl.export.applied import applied
from lowmem_icl.export.folder import ExportedFolder, export_folder
from lowmem_icl.masks.files import MaskFile, MaskModel, fill_of_table
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.store import Store

ALL = frozenset(range(HEADS))


def heads_of(**layers: Sequence[int]) -> frozenset[tuple[int, int]]:
    """Heads by layer: l0=(1, 2)."""
    return frozenset((int(name[1:]), head) for name, heads in layers.items() for head in heads)


MASKS = {
    "scattered": Mask(heads_of(l0=(1,), l1=(0, 5), l2=(3,)), frozenset({1})),
    # A whole layer, and in the others a whole group of keys and values.
    "layer": Mask(heads_of(l0=(3, 4, 5), l1=tuple(ALL), l2=(3, 4, 5)), frozenset({1})),
    # An FFN and the attention after it: what stands around them makes one layer.
    "across": Mask(heads_of(l0=(0, 3), l1=tuple(ALL), l2=(0, 3)), frozenset({0})),
}
WAYS = ("applied", "hf", "structural", "applied, means", "hf, means")
LIBRARIES = {"transformerlens": "transformer_lens", "nnsight": "nnsight"}
"""Formats of `masks export` that are run in a library, and its module."""


def ways_here() -> tuple[str, ...]:
    """All ways that can be measured here, those of installed libraries last."""
    there = [way for way, module in LIBRARIES.items() if importlib.util.find_spec(module) is not None]
    return (*WAYS, *(f"{way}{means}" for way in there for means in ("", ", means")))


def loaded(path: Path) -> ModuleType:
    """Import a written file as a user would."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_logprobs(model: Any, options: Sequence[Any]) -> NDArray[np.float64]:
    """Summed log-probabilities of options, [O], each by one run of a model as it is."""
    found = []
    with torch.no_grad():
        for option in options:
            path, continuation = list(option.path), list(option.continuation)
            logprobs = model(torch.tensor([path])).logits[0].float().log_softmax(-1).double()
            first = len(path) - len(continuation)
            found.append(float(sum(logprobs[first + at, token] for at, token in enumerate(continuation))))
    return np.array(found)


@dataclass(frozen=True)
class Comparison:
    """A family's small model as a checkpoint, and its scores under masks by the engine."""

    case: FamilyCase
    folder: Path
    made: dict[Path, ExportedFolder] = field(default_factory=dict)

    @cached_property
    def checkpoint(self) -> Path:
        return self.case.save(self.folder / "checkpoint")

    @cached_property
    def model(self) -> Any:
        return self.case.reloaded(self.checkpoint)

    @cached_property
    def store(self) -> Store:
        return make_store(self.checkpoint, self.folder / "store", "float32")

    @cached_property
    def means(self) -> UnitMeans:
        rng, skeleton = np.random.default_rng(5), self.store.skeleton
        heads, ffns = (
            rng.normal(0, 0.5, (LAYERS, width)).astype(np.float32)
            for width in (skeleton.attention_width, skeleton.width)
        )
        return UnitMeans(heads, ffns)

    @cached_property
    def model_facts(self) -> MaskModel:
        return MaskModel(
            id="small", model_type=self.case.model_type, layers=LAYERS, heads=HEADS, digest="none"
        )

    def mask_file(self, name: str, *, means: bool = False) -> MaskFile:
        mask = MASKS[name]
        table = self.means if means else None
        filled = mask if table is None else mask.filled(fill_of_table(table))
        return MaskFile(name, filled, self.model_facts, {"method": "made"}, means=table)

    @cached_property
    def by_engine(self) -> dict[tuple[str, bool], NDArray[np.float64]]:
        """Scores [O] under every mask, with zeros and with means."""
        asked = [(name, means) for means in (False, True) for name in MASKS]
        masks = tuple(self.mask_file(name, means=means).mask for name, means in asked)
        fills = {fill_of_table(self.means): self.means}
        (scores,) = swept(self.store, [Job(self.task.packed, masks, fills)])
        return dict(zip(asked, scores.logprobs, strict=True))

    @cached_property
    def task(self) -> Any:
        return packed_task(2)

    def exported(self, name: str, *, structural: bool = False, means: bool = False) -> ExportedFolder:
        folder = self.folder / f"{name}-{structural}-{means}"
        if folder not in self.made:
            mask_file, source = self.mask_file(name, means=means), open_checkpoint(self.checkpoint)
            self.made[folder] = export_folder(mask_file, source, folder, structural=structural)
        return self.made[folder]

    @cached_property
    def bridge(self) -> Any:
        """The model in TransformerLens; raises whatever that says where it does not know the architecture."""
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            str(self.checkpoint),
            hf_model=self.case.reloaded(self.checkpoint),
            tokenizer=AutoTokenizer.from_pretrained(DEMO),
            device="cpu",
            dtype=torch.float32,
        )

    def in_library(self, way: str, mask_file: MaskFile) -> Callable[[Tensor], Tensor]:
        """From tokens [R, T] to logits [R, T, V] without a mask's units, in another library."""
        path = self.folder / f"{way}_{mask_file.name}_{mask_file.mask.ablation}.py"
        if way == "transformerlens":
            formats.write_transformer_lens(mask_file, path)
            hooks = loaded(path).fwd_hooks()
            return lambda tokens: self.bridge.run_with_hooks(tokens, prepend_bos=False, fwd_hooks=hooks)
        import nnsight

        formats.write_nnsight(mask_file, path)
        made, wrapped = loaded(path), nnsight.NNsight(self.model)

        def traced(tokens: Tensor) -> Tensor:
            with wrapped.trace(tokens):
                made.remove(wrapped)
                logits = wrapped.output.logits.save()
            return logits

        return traced

    def difference(self, way: str, name: str) -> float:
        """The largest difference from the engine; raises InputError where a way is refused."""
        way, _, means = way.partition(", ")
        mask_file = self.mask_file(name, means=bool(means))
        if way == "applied":
            with applied(mask_file.mask, self.model, mask_file.means, mask_file.model):
                found = plain_logprobs(self.model, self.task.options)
        elif way in LIBRARIES:
            run = self.in_library(way, mask_file)
            found = plain_logprobs(lambda tokens: SimpleNamespace(logits=run(tokens)), self.task.options)
        else:
            made = self.exported(name, structural=way == "structural", means=bool(means))
            found = plain_logprobs(self.case.reloaded(made.folder), self.task.options)
        return float(np.abs(found - self.by_engine[name, bool(means)]).max())

    def largest(self, way: str, names: Sequence[str] = tuple(MASKS)) -> float | None:
        """The largest difference over masks that a way takes; None where it takes none."""
        found = []
        for name in names:
            try:
                found.append(self.difference(way, name))
            except InputError:
                continue
        return max(found, default=None)


def is_same_in(comparison: Comparison, way: str) -> bool:
    """Whether a library gives a model's scores when nothing is removed; what it does else goes to stderr."""
    if way.partition(",")[0] != "transformerlens":
        return True
    options, name = comparison.task.options, comparison.case.model_type
    try:
        found = plain_logprobs(
            lambda tokens: SimpleNamespace(logits=comparison.bridge(tokens, prepend_bos=False)), options
        )
    except Exception as error:
        # Whatever the library says of architectures that it does not know.
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    different = float(np.abs(found - plain_logprobs(comparison.model, options)).max())
    if different > 1e-4:
        print(f"{name}: without a mask {different:.1e} from transformers", file=sys.stderr)
    return different <= 1e-4


def table() -> str:
    """The table as Markdown: a line per family."""
    ways = ways_here()
    lines = [f"| model | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            comparison = Comparison(case, Path(folder))
            cells = [comparison.largest(way) if is_same_in(comparison, way) else None for way in ways]
        print(name, cells, file=sys.stderr, flush=True)
        lines.append(f"| {name} | {' | '.join('—' if c is None else f'{c:.1e}' for c in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
