"""The rotary scaling of Llama 3.1 and later, which a GGUF file holds as one divisor per frequency.

transformers' reader drops it. The parameters behind the divisors are found again, and kept only where they
give the very divisors back.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_icl.conversion.gguf.header import GgufHeader
from lowmem_icl.errors import InputError

DIVISORS = "rope_freqs.weight"
LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all of Meta's have in common; the factor is 8 in 3.1 and 32 in the small ones of 3.2."""
TOLERANCE = 1e-4


def rotary_parameters(path: Path, header: GgufHeader, built: Any) -> dict[str, Any] | None:
    """Return the `rope_parameters` of a file with divisors, None where it has none.

    `built` is the config without them. Raises InputError where the divisors are not those of Llama 3.
    """
    stored = header.tensors.get(DIVISORS)
    if stored is None:
        return None
    parameters = None
    if header.architecture == "llama":
        values = np.fromfile(path, dtype=np.float32, count=stored.shape[-1], offset=stored.offset)
        divisors = torch.from_numpy(values)
        theta = built.rope_parameters["rope_theta"]
        parameters = LLAMA_3 | {"rope_theta": theta, "factor": float(divisors.max())}
    if parameters is None or not _agree(divisors, _divisors(built, parameters)):
        raise InputError(
            f"{path}: tensor '{DIVISORS}' scales rotary frequencies in another way than Llama 3: the numbers "
            "would be wrong without it; give the original checkpoint"
        )
    return parameters


def _divisors(built: Any, parameters: dict[str, Any]) -> Tensor:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = built.to_dict() | {"rope_parameters": parameters}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(fields.pop("model_type"), **fields))
    width = 2 * len(scaled)
    return 1 / (parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)) / scaled


def _agree(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=TOLERANCE, atol=0)
