"""The config.json of a GGUF file: as transformers reads it, and complete.

transformers passes over metadata that it does not know. What of it changes the numbers is read here or
refused by name.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from lowmem_icl.conversion.gguf.header import GgufHeader
from lowmem_icl.conversion.gguf.rotary import DIVISORS, rotary_parameters
from lowmem_icl.errors import InputError

SAME_NAME_FIELDS = ("attn_logit_softcapping", "final_logit_softcapping")
UNREAD_FIELDS = ("logit_scale", "attention.scale", "residual_scale", "embedding_scale", "expert_count")
SCALING_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
LARGEST_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Of the 27B models, whose attention is scaled by another rule than that of all others."""


def gguf_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Return the content of a config.json; raise InputError for a file that would be read wrongly.

    Every field of the model's config class is there, so that a later default changes nothing.
    """
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _refuse_unread_fields(path, header)
    _check_layers(path, header)
    try:
        fields = load_gguf_checkpoint(path, return_tensors=False)["config"]
        model_type = fields.pop("model_type")
        fields.pop("_model_name_or_path", None)
        # `use_diff=False`: with the defaults.
        built = AutoConfig.for_model(model_type, **fields | _fields_passed_over(header))
        config: dict[str, Any] = json.loads(built.to_json_string(use_diff=False))
    except Exception as error:
        # Third parties' code over a stranger's metadata raises anything.
        raise InputError(
            f"{path}: architecture '{header.architecture}': transformers reads no config from it ({error}); "
            "give the original checkpoint"
        ) from error
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{path}: architecture '{header.architecture}' is no causal language model; give another file"
        )
    scaled = rotary_parameters(path, header, built)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return config if scaled is None else config | {"rope_parameters": scaled}


def _fields_passed_over(header: GgufHeader) -> dict[str, Any]:
    """Return fields that the file states and transformers' reader leaves to the config class's defaults."""
    fields = {name: header.field(name) for name in SAME_NAME_FIELDS if header.field(name) is not None}
    head_width = header.field("attention.key_length")
    if head_width is not None:
        fields["head_dim"] = head_width
    window = header.field("attention.sliding_window")
    if window is not None:
        fields["sliding_window"] = window or None
    if header.architecture in LARGEST_GEMMA_LAYERS and head_width is not None:
        # The file does not hold the scale; the rule is llama.cpp's (src/models/gemma3.cpp).
        largest = header.field("block_count") == LARGEST_GEMMA_LAYERS[header.architecture]
        per_head = header.field("embedding_length") // header.field("attention.head_count")
        fields["query_pre_attn_scalar"] = per_head if largest else head_width
    return fields


def _refuse_unread_fields(path: Path, header: GgufHeader) -> None:
    count = header.metadata.get("split.count", 1)
    if count not in (0, 1):
        raise InputError(
            f"{path}: one of {count} parts of a model; join them with llama-gguf-split --merge and give the "
            "file that it writes"
        )
    found = [name for name in UNREAD_FIELDS if header.field(name) not in (None, 0)]
    if header.field("rope.scaling.type") not in (None, "none"):
        found.append("rope.scaling.type")
    found += [name for name in SCALING_FACTORS if header.field(name) not in (None, 0, 1)]
    rotated = header.field("rope.dimension_count")
    if None not in (rotated, _head_width(header)) and rotated != _head_width(header):
        found.append("rope.dimension_count")
    if found:
        name = f"{header.architecture}.{found[0]}"
        raise InputError(
            f"{path}: {name} is {header.metadata[name]}, which transformers' reader of GGUF files passes "
            "over: the numbers would be wrong; give the original checkpoint"
        )


def _head_width(header: GgufHeader) -> int | None:
    """Return the width of a head: as stated, or else the model's width by heads."""
    stated = header.field("attention.key_length")
    width, heads = header.field("embedding_length"), header.field("attention.head_count")
    if stated is not None or not isinstance(width, int) or not isinstance(heads, int) or not heads:
        return stated
    return width // heads


def _check_layers(path: Path, header: GgufHeader) -> None:
    """Refuse a number of layers that the tensors do not bear out: libraries would build without end."""
    matches = (re.match(r"blk\.(\d+)\.", name) for name in header.tensors)
    found = len({match[1] for match in matches if match is not None})
    stated = header.field("block_count")
    if stated is not None and stated != found:
        raise InputError(
            f"{path}: {header.architecture}.block_count is {stated}, but there are tensors of {found} "
            "layers; fetch the file again"
        )


def quantisation(header: GgufHeader) -> str:
    """Return the name of the file's quantisation, such as Q4_K_M; without one, the most frequent form's."""
    try:
        return LlamaFileType(header.metadata["general.file_type"]).name.removeprefix("MOSTLY_")
    except (KeyError, ValueError):
        elements = elements_by_form(header)
        return max(elements, key=lambda form: elements[form])


def elements_by_form(header: GgufHeader) -> dict[str, int]:
    """Return how many elements of the file's tensors have which form."""
    elements: dict[str, int] = {}
    for tensor in header.tensors.values():
        elements[tensor.form.name] = elements.get(tensor.form.name, 0) + math.prod(tensor.shape)
    return elements


def notes_on_config(header: GgufHeader, config: dict[str, Any]) -> list[str]:
    """Return what a user should know of how a file was read."""
    elements = elements_by_form(header)
    whole = sum(elements.values())
    shares = [
        f"{100 * count / whole:.3g} % {form}"
        for form, count in sorted(elements.items(), key=lambda item: -item[1])
    ]
    notes = [f"dequantised from GGUF {quantisation(header)}: of its elements {', '.join(shares)}"]
    if header.architecture == "gemma3":
        local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
        full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        notes.append(
            f"not in the file and taken from transformers' defaults: rotary base {local:g} of local layers, "
            f"full attention in layers {', '.join(map(str, full))}"
        )
    if DIVISORS in header.tensors:
        factor = config["rope_parameters"]["factor"]
        notes.append(
            f"rotary frequencies are scaled as in Llama 3.1, by {factor:g}: restored from the file, as "
            "transformers' reader drops it"
        )
    if not config.get("tie_word_embeddings", True):
        notes.append("the file holds an unembedding of its own: it is used, and not tied to the embedding")
    return notes
