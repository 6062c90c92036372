"""The tensors of a GGUF file under Hugging Face's names, dequantised one at a time.

Names, and how each architecture's tensors were changed on the way into the file (rows of q and k permuted, 1
added to norms), are transformers'; the arithmetic of the quantisations is the `gguf` package's.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lowmem_icl.conversion.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from lowmem_icl.conversion.gguf.rotary import DIVISORS
from lowmem_icl.errors import InputError

BLOCK_ELEMENTS = 1 << 22
"""Dequantised at once: the package makes several copies of what it is given."""


def open_gguf_tensors(path: Path, config: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Return functions that read a file's tensors, by Hugging Face's names; `config` as in config.json.

    Raises InputError for a tensor that belongs to no parameter: the numbers would be wrong without it.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    header = read_gguf_header(path)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config)
    parameters = _parameter_names(path, header, config, processor)
    # These went into the config.
    tensors = {name: tensor for name, tensor in header.tensors.items() if name != DIVISORS}
    unknown = [name for name in tensors if name not in parameters]
    if unknown:
        raise InputError(
            f"{path}: tensor '{unknown[0]}' belongs to no parameter of transformers' "
            f"{config['architectures'][0]} ({len(unknown)} such tensors): the numbers would be wrong without "
            "it; give the original checkpoint"
        )
    mapped = np.memmap(path, mode="r")
    return {
        parameters[name]: partial(_tensor, path, mapped, tensor, processor)
        for name, tensor in tensors.items()
    }


def _parameter_names(
    path: Path, header: GgufHeader, config: dict[str, Any], processor: Any
) -> dict[str, str]:
    """Return Hugging Face's name of every tensor that a file of this architecture may have."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    fields = copy.deepcopy(config)
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    except Exception as error:
        # Third parties' code over a stranger's sizes raises anything.
        raise InputError(
            f"{path}: architecture '{header.architecture}' is not supported by transformers' reader of GGUF "
            f"files ({error}); give the original checkpoint"
        ) from error
    return names


def _tensor(path: Path, mapped: Any, tensor: GgufTensor, processor: Any) -> Tensor:
    values = _dequantised(path, mapped, tensor)
    # Some architectures hand a tensor back this way instead of returning it.
    aside: dict[str, Tensor] = {}
    processed = processor.process(
        weights=values, name=tensor.name, tensor_key_mapping={}, parsed_parameters={"tensors": aside}
    )
    if processed.name is None:
        return aside.popitem()[1]
    return torch.from_numpy(np.ascontiguousarray(processed.weights))


def _dequantised(path: Path, mapped: Any, tensor: GgufTensor) -> Any:
    """Return a tensor's values in float32, as an array of its own, some rows after others."""
    *rows, row_bytes = tensor.byte_shape
    count = int(np.prod(rows, dtype=np.int64))
    stored = mapped[tensor.offset : tensor.offset + count * row_bytes].reshape(count, row_bytes)
    values = np.empty((count, tensor.shape[-1]), dtype=np.float32)
    step = max(1, BLOCK_ELEMENTS // max(1, tensor.shape[-1]))
    try:
        for start in range(0, count, step):
            values[start : start + step] = gguf.dequantize(stored[start : start + step], tensor.form)
    except NotImplementedError as error:
        raise InputError(
            f"{path}: tensor '{tensor.name}' has the form {tensor.form.name}, which the gguf package cannot "
            "dequantise; give a file of another quantisation"
        ) from error
    return values.reshape(tensor.shape)
