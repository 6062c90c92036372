"""The card of a repository of masks: front matter that the hub reads, and a table for people."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from lowmem_icl.masks.files import MaskFile

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""Ids of the hub with an owner; models of other places have no page there."""
COMMIT = re.compile("[0-9a-f]{40}")
TAGS = ("lowmem-icl", "pruning", "attention-heads", "interpretability")


def mask_card(masks: Sequence[MaskFile], repository: str) -> str:
    """Return the README.md of a repository that holds these masks."""
    models = sorted({mask_file.model.id for mask_file in masks})
    known = sorted({mask_file.model.id for mask_file in masks if _is_on_hub(mask_file)})
    front = {
        "library_name": "lowmem-icl",
        "tags": list(TAGS),
        **({"base_model": known if len(known) > 1 else known[0]} if known else {}),
    }
    shapes = sorted({mask_file.model.shape for mask_file in masks})
    of_shapes = "; ".join("{} of {} layers with {} heads".format(*shape) for shape in shapes)
    table = [
        "| mask | model | made by | tasks | shots | heads | FFNs | accuracy | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(mask_file) for mask_file in masks),
    ]
    name = masks[0].name
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# Masks for {_cell(', '.join(models))}",
            "",
            "Sets of attention heads and FFNs that can be removed, one file each, made by lowmem-icl. They",
            f"fit {_cell(of_shapes)}.",
            "",
            *table,
            "",
            "Heads and FFNs: how many are removed, of how many. Accuracy: of the clean model → under the",
            "mask, on documents that the mask was not chosen on; the files say more.",
            "",
            "```",
            "pip install lowmem-icl",
            f"lowmem-icl masks pull {repository} masks-of-others",
            f"lowmem-icl masks show masks-of-others/{name}.json",
            f"lowmem-icl masks export masks-of-others/{name}.json --format hf --model FOLDER --out without",
            "```",
            "",
        ]
    )  # fmt: skip


def _is_on_hub(mask_file: MaskFile) -> bool:
    """Tell whether a mask's model came from the hub: a folder of a user's may look like an id, but only what
    was fetched has a commit.
    """
    model = mask_file.model
    return bool(REPOSITORY.fullmatch(model.id) and COMMIT.fullmatch(model.revision or ""))


def _row(mask_file: MaskFile) -> str:
    model, mask, made = mask_file.model, mask_file.mask, mask_file.made
    cells = (
        mask_file.name,
        model.id,
        made.get("method", ""),
        ", ".join(map(str, made.get("tasks", []))),
        ", ".join(map(str, made.get("shots", []))),
        f"{len(mask.heads)} of {model.layers * model.heads}",
        f"{len(mask.ffns)} of {model.layers}",
        _accuracy(mask_file.scores),
        mask_file.scores.get("verdict") or "",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _accuracy(scores: dict[str, Any]) -> str:
    """Return accuracy before and after, empty where a file does not say."""
    told = []
    for side in ("before", "after"):
        metrics = scores.get(side)
        value = metrics.get("acc", metrics.get("em")) if isinstance(metrics, dict) else None
        if not isinstance(value, int | float):
            return ""
        told.append(f"{value:.3f}")
    return " → ".join(told)


def _cell(value: object) -> str:
    """Return a text that stays one cell of a table, whatever a file says."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(str(value).split()))
