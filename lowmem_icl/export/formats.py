"""A mask in the forms that other libraries use: keep tensors, hooks of TransformerLens, edits of nnsight.

Axis letters: L layers, H heads.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lowmem_icl.errors import InputError
from lowmem_icl.export.applied import check_table
from lowmem_icl.masks.files import MaskFile
from lowmem_icl.masks.means import means_file, write_means
from lowmem_icl.model.families.catalogue import family_of
from lowmem_icl.system.files import atomic_path, write_text_atomic

FORMS = Path(__file__).with_name("forms")
KEEP_FORMAT = "lowmem-icl-keep/1"


def write_keep_tensors(mask_file: MaskFile, path: Path) -> None:
    """Write a safetensors file: `keep_heads` [L, H] and `keep_ffns` [L], 1 for what is there and 0 for what
    is removed, in float32; with ablation mean, `head_means` [L, H, d] and `ffn_means` [L, D] as well.

    Its metadata are texts: format, name, ablation, model and its type.
    """
    check_table(mask_file.mask, mask_file.means)
    model, mask, means = mask_file.model, mask_file.mask, mask_file.means
    heads = np.ones((model.layers, model.heads), dtype=np.float32)
    ffns = np.ones(model.layers, dtype=np.float32)
    for layer, head in mask.heads:
        heads[layer, head] = 0
    ffns[sorted(mask.ffns)] = 0
    tensors = {"keep_heads": heads, "keep_ffns": ffns}
    if means is not None:
        by_head = means.heads.reshape(model.layers, model.heads, -1)
        tensors |= {
            "head_means": np.ascontiguousarray(by_head), "ffn_means": np.ascontiguousarray(means.ffns)
        }  # fmt: skip
    metadata = {
        "format": KEEP_FORMAT, "name": mask_file.name, "ablation": mask.ablation, "model": model.id,
        "model_type": model.model_type,
    }  # fmt: skip
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=metadata))


def write_transformer_lens(mask_file: MaskFile, path: Path) -> None:
    """Write a Python file whose `fwd_hooks()` TransformerLens takes, and the table of means beside it."""
    family = family_of(mask_file.model.model_type)
    if family.scales_written and mask_file.means is not None and mask_file.mask.ffns:
        raise InputError(
            f"--format transformerlens: TransformerLens hooks FFNs of {mask_file.model.model_type} behind a "
            "scale that the table of means stands before; use --format nnsight, or a mask of ablation zero"
        )
    _write_form("transformer_lens_hooks.py", mask_file, path, {})


def write_nnsight(mask_file: MaskFile, path: Path) -> None:
    """Write a Python file whose `remove(model)` works within a trace of nnsight, and the table of means
    beside it.
    """
    family = family_of(mask_file.model.model_type)
    names = {
        "BLOCKS": family.blocks,
        "ATTENTION_OUTPUT": family.attention_output,
        "FFN_WRITES": family.ffn_norm or family.ffn_output,
    }
    _write_form("nnsight_edits.py", mask_file, path, names)


def _write_form(form: str, mask_file: MaskFile, path: Path, names: Mapping[str, str]) -> None:
    """Write a form with a mask's numbers in place of its empty constants.

    Nothing that a stranger's file says gets into the code but whole numbers, and the name of a table that is
    made of its digest.
    """
    check_table(mask_file.mask, mask_file.means)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise InputError(
            f"--out {path}: expected NAME.py, NAME of letters, digits and _ so that it can be imported, got "
            f"'{path.name}'; choose another name"
        )
    mask, means = mask_file.mask, mask_file.means
    values: dict[str, Any] = {
        "LAYERS": int(mask_file.model.layers),
        "HEADS": int(mask_file.model.heads),
        "REMOVED_HEADS": {
            int(layer): [int(head) for head in mask.heads_in(layer)]
            for layer in sorted({layer for layer, _ in mask.heads})
        },
        "REMOVED_FFNS": [int(layer) for layer in sorted(mask.ffns)],
        "MEANS": None if means is None else means_file(means.digest),
        **names,
    }
    text = (FORMS / form).read_text(encoding="utf-8")
    for name, value in values.items():
        pattern = re.compile(rf"^({name}(?:: [^=]+)?) = .*$", flags=re.MULTILINE)
        text, count = pattern.subn(lambda found, value=value: f"{found[1]} = {value!r}", text)  # type: ignore[misc]
        assert count == 1, f"the form has one line for {name}"
    if means is not None:
        write_means(path.parent, means)
    write_text_atomic(path, text)
