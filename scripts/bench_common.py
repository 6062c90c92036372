"""What the benchmarks share: models of OPT's exact shapes with random weights, real rows,
and honest measuring.

Weights are random because no benchmark here depends on what they say; sizes, file forms and outlier columns
are those of the real checkpoints.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OPTConfig

from lowmem_icl.conversion.calibration import CalibrationText, fixed_text
from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.claim import Conversion
from lowmem_icl.conversion.convert import convert
from lowmem_icl.conversion.locate import load_tokenizer, tokeniser
from lowmem_icl.model.digests import stored_file
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import (
    NON_LAYER,
    STORE_FORMAT,
    Manifest,
    Source,
    Store,
    is_store,
    layer_file,
    open_store,
    write_manifest,
)
from lowmem_icl.rows import Row
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.tasks.demonstrations import PER_DOCUMENT, Demonstrations
from lowmem_icl.tasks.loading import open_task
from lowmem_icl.tasks.packing import PackedTask, PackingLimits, pack

SHARED = Path(os.environ.get("LOWMEM_ICL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
OUTLIER_SHARE = 0.001
# Uniform int8 values times this scale have the spread of OPT's initial weights, 0.02.
WEIGHT_SCALE = 0.035


def opt_config(layers: int, heads: int, width: int) -> OPTConfig:
    """Return the config of an OPT of this shape, with OPT's own vocabulary and context."""
    return OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        vocab_size=50272,
        max_position_embeddings=2048,
    )


OPT_125M = opt_config(12, 12, 768)
OPT_1_3B = opt_config(24, 32, 2048)
OPT_66B = opt_config(64, 72, 9216)


def random_store(
    folder: Path, config: OPTConfig, tokenizer: Path, distinct_layers: int, say: Callable[[str], None]
) -> Store:
    """Return an int8 store of a shape with random weights; made once, used again where it is there already.

    With fewer distinct layers than the model has, the others are hard links to them.
    """
    if is_store(folder):
        return open_store(folder)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "layers").mkdir(parents=True)
    shutil.copytree(tokenizer, folder / "tokenizer")
    write_text_atomic(folder / "tokenizer" / "config.json", json.dumps(config.to_dict()))
    skeleton = Skeleton(config)
    generator = torch.Generator().manual_seed(0)
    non_layer = {
        name: torch.empty(shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        for name, shape in skeleton.non_layer_parameters().items()
    }
    save_file(non_layer, folder / NON_LAYER)
    files = {NON_LAYER: stored_file(folder / NON_LAYER)}
    for layer in range(skeleton.layers):
        path = folder / layer_file(layer)
        if layer < distinct_layers:
            save_file(_random_layer(skeleton, generator), path)
            files[layer_file(layer)] = stored_file(path)
            say(f"layer {layer + 1} of {distinct_layers} written")
        else:
            os.link(folder / layer_file(layer % distinct_layers), path)
            files[layer_file(layer)] = files[layer_file(layer % distinct_layers)]
    for path in sorted((folder / "tokenizer").iterdir()):
        files[f"tokenizer/{path.name}"] = stored_file(path)
    manifest = Manifest(
        format=STORE_FORMAT,
        weights="int8",
        config=config.to_dict() | {"model_type": config.model_type},
        source=Source(id="random", revision=None, digest=hashlib.sha256(b"random").hexdigest()),
        files=files,
        outliers=None,
    )
    write_manifest(folder, manifest)
    return open_store(folder)


def _random_layer(skeleton: Skeleton, generator: torch.Generator) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    linears = set(skeleton.linear_names())
    for name, shape in skeleton.layer_parameters().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in linears or leaf == "bias":
            value = 1.0 if leaf == "weight" else 0.0
            tensors[name] = torch.full(shape, value)
            continue
        outputs, inputs = shape
        tensors[name] = torch.empty(shape, dtype=torch.int8).random_(-127, 128, generator=generator)
        tensors[f"{owner}.SCB"] = torch.full((outputs,), WEIGHT_SCALE)
        tensors[f"{owner}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        chosen = torch.randperm(inputs, generator=generator)[: max(1, round(OUTLIER_SHARE * inputs))]
        tensors[f"{owner}.outlier_columns"] = chosen.sort().values
    return tensors


def random_checkpoint(folder: Path, config: OPTConfig, tokenizer: Path, dtype: torch.dtype) -> Path:
    """Return a Hugging Face checkpoint of a shape with random weights; made once,
    used again where it is there.
    """
    from transformers import OPTForCausalLM

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        OPTForCausalLM._from_config(config, dtype=dtype).save_pretrained(folder)
        for path in tokenizer.iterdir():
            shutil.copyfile(path, folder / path.name)
    return folder


def converted(checkpoint: Path, folder: Path, weights: str) -> Store:
    """Return the store of a checkpoint, converted now where it is not there."""
    if is_store(folder):
        return open_store(folder)
    return convert(
        Conversion(open_checkpoint(checkpoint), folder, weights, "random"),  # type: ignore[arg-type]
        CalibrationText(tokeniser(load_tokenizer(checkpoint))(fixed_text())),
    )


def offloaded(checkpoint: Path, folder: Path) -> Path:
    """Return the folder from which accelerate's `disk_offload` reads a checkpoint; made once."""
    from accelerate.utils import offload_state_dict
    from transformers import OPTForCausalLM

    if not (folder / "index.json").is_file():
        model = OPTForCausalLM.from_pretrained(checkpoint, dtype="auto")
        offload_state_dict(folder, model.state_dict())
    return folder


def real_task(
    task: str,
    data_dir: Path,
    tokenizer: Path,
    width: int,
    *,
    documents: int,
    shots: int = 0,
) -> PackedTask:
    """Return a task's first documents as `lowmem-icl run` packs them for a model of this width.

    With `shots` they all share one set of demonstrations.
    """
    loaded = load_tokenizer(tokenizer)
    limits = PackingLimits(2048, PackingLimits.row_tokens_for(width), loaded.eos_token_id)
    how = Demonstrations("shared", 1) if shots else PER_DOCUMENT
    rows = open_task(task, data_dir).rows(shots=shots, part="evaluate", limit=documents, demonstrations=how)
    return pack(rows, lambda texts: loaded(texts, add_special_tokens=False)["input_ids"], limits)


def plain_row(data_dir: Path, tokenizer: Path, length: int, answers: int) -> Row:
    """Return so many real tokens as one plain row, the last ones of which are predicted, an option each."""
    rows = real_task("hellaswag", data_dir, tokenizer, 2048, documents=16).packed.rows
    tokens = np.concatenate([row.tokens for row in rows])[: length + 1]
    return Row(
        tokens=tokens[:-1],
        positions=np.arange(length),
        ends=np.full(length, length),
        owners=np.zeros(length, np.int64),
        read_at=np.arange(length - answers, length),
        targets=tokens[-answers:],
        options=np.arange(answers),
    )


class Products:
    """The bare integer products of one decoder layer for so many tokens, and what they took."""

    def __init__(self, store: Store, tokens: int) -> None:
        shapes = store.skeleton.layer_parameters()
        self._shapes = [shapes[f"{name}.weight"] for name in store.skeleton.linear_names()]
        largest = max(outputs * inputs for outputs, inputs in self._shapes)
        widest = max(inputs for _, inputs in self._shapes)
        self._weight = torch.empty(largest, dtype=torch.int8).random_(-127, 128)
        self._values = torch.empty(tokens * widest, dtype=torch.int8).random_(-127, 128)
        self._tokens = tokens
        self.seconds: list[float] = []
        self._once()

    def _once(self) -> None:
        for outputs, inputs in self._shapes:
            weight = self._weight[: outputs * inputs].view(outputs, inputs)
            torch._int_mm(self._values[: self._tokens * inputs].view(self._tokens, inputs), weight.t())

    def measure(self) -> float:
        """Run a layer's products and return the seconds they took."""
        start = time.perf_counter()
        self._once()
        self.seconds.append(time.perf_counter() - start)
        return self.seconds[-1]

    @property
    def operations(self) -> int:
        """Multiplications and additions of one layer."""
        return sum(2 * outputs * inputs * self._tokens for outputs, inputs in self._shapes)


def drop_from_cache(folder: Path) -> None:
    """Make the kernel forget the pages of all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bytes_from_disk() -> int:
    """Return how many bytes this process has had read from storage, as the kernel counts them."""
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["read_bytes"])


class Side:
    """One side of a comparison: a process of its own that lives as long as the comparison."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, function: Any, *arguments: Any) -> Any:
        """Return what a function gives there."""
        return self._pool.submit(function, *arguments).result()


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function gives in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
