"""What `--model_args` may say, checked before a model is opened."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem_icl.api.mask import Mask
from lowmem_icl.errors import InputError
from lowmem_icl.options import did_you_mean

logger = logging.getLogger("lowmem_icl")

MODEL_NAMES = ("model", "store", "pretrained")
BOS_NAMES = ("bos", "add_bos_token")
OPENED_BY = ("weights", "memory", "device", "device_memory", "revision", "store_dir")
OWN_NAMES = ("mask", "max_length")
UNUSED = ("batch_size", "max_batch_size")
"""The memory says how much is done at once."""
WITHOUT_EFFECT = (None, 1, "1", "auto")
KNOWN = (*MODEL_NAMES, *BOS_NAMES, *OPENED_BY, *OWN_NAMES, *UNUSED)
OF_HF = {
    "dtype": "weights=int8, bfloat16 or float32",
    "load_in_8bit": "weights=int8",
    "trust_remote_code": "a model of a known family, whose code comes with transformers",
    "tokenizer": "the tokenizer that comes with the model",
    "peft": "a checkpoint that the adapter is merged into",
    "parallelize": "memory and device_memory: layers are streamed",
}
"""What users of `hf` may be used to, and what stands in its place."""


@dataclass(frozen=True)
class ModelArguments:
    """Checked arguments: the model, how it is opened, whether texts begin with BOS, where the tokenizer does
    not decide, the most tokens seen at once, and what is removed.
    """

    model: str
    opening: Mapping[str, Any] = field(default_factory=dict)
    bos: bool | None = None
    max_length: int | None = None
    mask: Mask | None = None


def checked_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """Return the arguments of `--model_args`, `--device` and `--batch_size` together.

    Raises InputError naming an argument that is not known, missing, given twice or of another form.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in KNOWN and (name not in OF_HF or value):
            instead = f"; give {OF_HF[name]}" if name in OF_HF else did_you_mean(name, KNOWN)
            instead = instead or f"; it has {', '.join(KNOWN)}"
            raise InputError(f"--model_args {name}: lowmem-icl has no such argument{instead}")
    ignored = [name for name in UNUSED if given.get(name) not in WITHOUT_EFFECT]
    if ignored:
        logger.warning("%s is ignored: memory= says how much is done at once", ignored[0])
    return ModelArguments(
        model=str(
            _one_of(MODEL_NAMES, given, "demo, a store, a checkpoint folder, a .gguf file or a hub id")
        ),
        opening={name: given[name] for name in OPENED_BY if name in given},
        bos=_bos(given),
        max_length=_max_length(given),
        mask=None if "mask" not in given else _mask(str(given["mask"])),
    )


def check_alone() -> None:
    """Raise InputError where several processes would each do all of the work."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        raise InputError(
            f"WORLD_SIZE: expected one process, got {processes}; start lm-eval without accelerate or torchrun"
        )


def _one_of(names: tuple[str, ...], given: Mapping[str, Any], expected: str) -> Any:
    found = [name for name in names if name in given]
    if len(found) != 1:
        got = " and ".join(found) if found else "none"
        raise InputError(f"--model_args: expected one of {', '.join(names)} ({expected}), got {got}")
    return given[found[0]]


def _bos(given: Mapping[str, Any]) -> bool | None:
    if not any(name in given for name in BOS_NAMES):
        return None
    value = _one_of(BOS_NAMES, given, "whether texts begin with BOS")
    if not isinstance(value, bool):
        raise InputError(f"--model_args bos: expected True or False, got {value!r}")
    return value


def _max_length(given: Mapping[str, Any]) -> int | None:
    length = given.get("max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise InputError(f"--model_args max_length: expected a number of tokens, got {length!r}")
    return length


def _mask(path: str) -> Mask:
    mask = Mask.read(path)
    if mask.ablation == "resample":
        raise InputError(
            f"--model_args mask={path}: it puts values of a task's other documents in removed units' place, "
            "and lm-eval hands over texts alone; use lowmem-icl evaluate, or a mask of zeros or means"
        )
    return mask
