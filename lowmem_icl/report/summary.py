"""The main numbers of a run as plain values: what `--json` prints and summary.json holds."""

from dataclasses import asdict
from typing import Any

from lowmem_icl.report.findings.above_chance import settings_of
from lowmem_icl.report.findings.answer import answer
from lowmem_icl.report.findings.headline import headline_units
from lowmem_icl.report.numbers import (
    accuracy,
    held_out_tops,
    induction_heads,
    pruned,
    top_units,
    total_seconds,
)
from lowmem_icl.report.patches import added_vectors, prompt_scores, top_patches, vector_heads
from lowmem_icl.report.run_tables import RunTables


def run_summary(tables: RunTables) -> dict[str, Any]:
    """Return the main numbers of a run."""
    record, results = tables.record, tables.results
    settings = settings_of(results, tables.masks)
    found = answer(results, tables.units, tables.masks, record)
    return {
        "folder": str(tables.folder),
        "model": record["model"]["id"],
        "weights": record["model"]["weights"],
        "answer": {
            "sentences": list(found.sentences),
            "chips": [asdict(chip) for chip in found.chips],
            "notes": list(found.notes),
        },
        "at_chance": [
            {"task": task, "shots": shots}
            for task, shots in settings.every
            if (task, shots) in settings.at_chance
        ],
        "headline_units": headline_units(tables.units, settings).to_dicts(),
        "accuracy": accuracy(results).to_dicts(),
        "pruned": pruned(results).to_dicts(),
        "top_units": top_units(results).to_dicts(),
        "top_units_held_out": held_out_tops(results).to_dicts(),
        "induction_heads": induction_heads(results).to_dicts(),
        "patched_prompts": prompt_scores(results).to_dicts(),
        "patched_units": top_patches(results).to_dicts(),
        "function_vector_heads": vector_heads(results).to_dicts(),
        "function_vectors_added": added_vectors(results).to_dicts(),
        "failures": record.get("failures", []),
        "warnings": record["warnings"],
        "seconds": total_seconds(record),
    }
