"""How much of each unit's drop is about labels: a second pass with shuffled ones changes nothing else."""

from pathlib import Path

import numpy as np
import polars as pl
from commands import run_small

from lowmem_icl.options import RunOptions
from lowmem_icl.session.prepare import prepare
from lowmem_icl.tables.schema import read_table

CHUNKS = ("000000", "000001", "000002", "000004")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def test_label_effects_are_drops_with_right_labels_minus_those_with_shuffled_ones(
    small_run: Path, stores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run_small(out, stores, "--label-drops", "--experiments", "ablate", "--labels", "right")
    assert result.exit_code == 0, result.output
    ours, theirs = (
        read_table(folder / "results.parquet", "results").filter(pl.col("experiment") == "ablate")
        for folder in (out, small_run)
    )
    is_about_labels = pl.col("procedure") == "label-effect"
    assert ours.filter(~is_about_labels).equals(theirs), "all else is what it is without"
    effects = ours.filter(is_about_labels & (pl.col("metric") == "label_effect"))
    assert set(effects["shots"]) == {4}
    assert len(effects) == 3 * 36, "two tasks and their mean"
    options = RunOptions.model_validate(
        {"tasks": "recall,knowledge", "shots": "0,4", "limit": 16, "train_limit": 8, "label_drops": True}
    )
    controls = prepare(options).train_controls
    assert [control.task for control in controls] == ["recall", "knowledge"]
    drops = ours.filter(metric="gold_logprob_drop", shots=4)
    keys = ["kind", "layer", "head"]
    for number, control in enumerate(controls):
        parts = [read_arrays(out / "parts" / f"ablate-labels-{chunk}.npz") for chunk in CHUNKS]
        logprobs = np.concatenate([part[f"{number}.logprobs"] for part in parts], axis=1)
        golds = [document.gold for document in control.documents]
        assert all(sum(gold) == 1 for gold in golds)
        gold_scores = logprobs[:, np.concatenate(golds)]
        # In the table, heads come first, then FFNs, as in the masks of the sweep.
        shuffled = (gold_scores[0] - gold_scores[1:]).mean(1)
        right = drops.filter(task=control.task)
        found = effects.filter(task=control.task)
        assert found.select(keys).equals(right.select(keys))
        np.testing.assert_allclose(found["value"], right["value"] - shuffled, atol=1e-9)
        assert set(found["documents"]) == {8}
    assert '"label_effect"' in (out / "report.html").read_text()
