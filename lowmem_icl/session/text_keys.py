"""Keys of texts that are kept: digests of all that prompts, tokens and rows depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowmem_icl import __version__
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import PromptForm
from lowmem_icl.session.document_limits import certify_limit, part_limits
from lowmem_icl.tasks.catalogue import is_file_name
from lowmem_icl.tasks.packing import PackingLimits

KEY_DIGITS = 24
# Packages that texts and tokens come from.
TEXT_PACKAGES = ("lm-eval", "datasets", "transformers", "tokenizers")
# Our own code and definitions that they come from, or that say what their files are.
TEXT_SOURCES = (
    "rows.py",
    "tasks",
    "demo/tasks",
    "session/text_form.py",
    "session/sampled_texts.py",
    "session/texts.py",
)


@dataclass(frozen=True)
class TableName:
    """Which texts of a run a table holds: a task's at a shot count, with whose answers shown or
    corrupted how.
    """

    task: str
    shots: int
    labels: PromptForm


def table_key(
    options: RunOptions,
    name: TableName,
    fields: Sequence[str],
    rows_digest: str,
    tokenizer: str,
    limits: PackingLimits,
) -> str:
    """Return the key of a table of texts.

    fields: of Prepared, whose documents it holds; rows_digest, tokenizer: digests of the task's rows and of
    the tokenizer.
    """
    depends_on = {
        **_inputs(options, tokenizer, limits),
        # Of a file of one's own its content counts, not where it lies.
        "task": "" if is_file_name(name.task) else name.task,
        "rows": rows_digest,
        "shots": name.shots,
        "labels": name.labels,
        "fields": list(fields),
    }
    return _digest(depends_on)


def sample_key(
    options: RunOptions, rows_digests: Mapping[str, str], tokenizer: str, limits: PackingLimits
) -> str:
    """Return the key of the sizes of all documents of a run; rows_digests: by task, in order."""
    depends_on = {
        **_inputs(options, tokenizer, limits),
        "tasks": list(rows_digests.items()),
        "shots": options.resolved_shots,
        "controls": [options.control_labels, options.label_drops],
        "corrupted": options.corrupt if options.makes_pairs else None,
        "fields": list(part_limits(options)),
    }
    return _digest(depends_on)


def _inputs(options: RunOptions, tokenizer: str, limits: PackingLimits) -> dict[str, Any]:
    """Return what all texts of a run depend on."""
    return {
        "version": __version__,
        "sources": _sources_digest(),
        "packages": {package: version(package) for package in TEXT_PACKAGES},
        "tokenizer": tokenizer,
        "limits": asdict(limits),
        "documents": [
            options.resolved_limit,
            options.resolved_train_limit,
            options.resolved_importance_limit,
            options.resolved_curve_limit,
            certify_limit(options),
        ],
        "demonstrations": [options.demonstrations, options.demonstration_sets],
        "protocol": asdict(options.protocol_flags),
    }


def _digest(depends_on: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of all that a tokenizer does to texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(f"{type(tokenizer).__name__} {description}".encode()).hexdigest()


@cache
def _sources_digest() -> str:
    """Return a digest of the code and definitions that texts come from: changed code finds no old texts."""
    package = Path(str(files("lowmem_icl")))
    summed = hashlib.sha256()
    for name in TEXT_SOURCES:
        at = package / name
        for path in [at] if at.is_file() else sorted((*at.rglob("*.py"), *at.rglob("*.yaml"))):
            summed.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return summed.hexdigest()
