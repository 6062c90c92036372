"""What the demo model says of its tasks under masks, asked once and shared by the test files that need it."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from lowmem_icl.conversion.locate import ensure_store, locate
from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.passes import PassSetup, sweep
from lowmem_icl.engine.schedule import Job, SweepLimits
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.store import Store, Weights
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.tasks.loading import TaskRows, open_task
from lowmem_icl.tasks.packing import PackedTask, PackingLimits, pack
from lowmem_icl.tasks.scoring import document_scores

DEMO = Path(__file__).parents[1] / "lowmem_icl" / "demo"
PLENTY = SweepLimits.of(1 << 30)

Scores = dict[str, np.ndarray]


class DemoScores:
    """Scores of evaluation documents under masks; nothing is computed twice."""

    def __init__(self, stores: Path) -> None:
        self._folder = stores
        self._tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self._stores: dict[Weights, Store] = {}
        self._packed: dict[tuple[str, int, int | None], tuple[TaskRows, PackedTask]] = {}
        self._scores: dict[tuple[object, ...], Scores] = {}

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, without special ones."""
        tokens: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return tokens

    def store(self, weights: Weights = "int8") -> Store:
        """Return the demo's store, converted where it is not there yet."""
        if weights not in self._stores:
            self._stores[weights] = ensure_store(locate("demo", None, weights, self._folder), weights)
        return self._stores[weights]

    def scores(
        self, task: str, shots: int, *masks: Mask, weights: Weights = "int8", limit: int | None = None
    ) -> list[Scores]:
        """Return the documents' scores [N] by name, for each mask (for the clean run where none is given)."""
        wanted = masks or (Mask(),)
        new = [
            mask for mask in dict.fromkeys(wanted) if (task, shots, weights, limit, mask) not in self._scores
        ]
        if new:
            rows, packed = self._pack(task, shots, limit)
            job = Job(packed.packed, tuple(new))
            with StreamedModel(
                self.store(weights), device=torch.device("cpu"), resident_bytes=1 << 30
            ) as model:
                (swept,) = sweep(PassSetup(model, PLENTY, CleanCache(1 << 28)), [job])
            scores = document_scores(rows, swept.logprobs, swept.greedy)
            for number, mask in enumerate(new):
                of_mask = {name: values[number] for name, values in scores.items()}
                self._scores[task, shots, weights, limit, mask] = of_mask
        return [self._scores[task, shots, weights, limit, mask] for mask in wanted]

    def accuracy(self, task: str, shots: int, *masks: Mask, limit: int | None = None) -> list[float]:
        """Return the accuracy in int8 under each mask (of the clean run where none is given)."""
        return [float(scores["acc"].mean()) for scores in self.scores(task, shots, *masks, limit=limit)]

    def _pack(self, task: str, shots: int, limit: int | None) -> tuple[TaskRows, PackedTask]:
        if (task, shots, limit) not in self._packed:
            rows = open_task(task, None).rows(shots=shots, part="evaluate", limit=limit)
            self._packed[task, shots, limit] = rows, pack(rows, self.tokenise, PackingLimits(512, 128, 2))
        return self._packed[task, shots, limit]
