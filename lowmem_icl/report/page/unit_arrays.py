"""What is known of every unit at every task and shot count, as arrays for the page's script.

A setting is a task at a shot count; settings [S] go by task, then by shots. Units [U] go by layer, its heads
first, its FFN last: unit = layer · (heads + 1) + head, an FFN standing where head `heads` would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.masks.files import MaskFile
from lowmem_icl.masks.mask import Mask
from lowmem_icl.report.numbers import SIGNIFICANT_Q
from lowmem_icl.report.page.encoding import encode_bits, encode_halves
from lowmem_icl.report.run_tables import Setting
from lowmem_icl.tables.unit_table import q_metric

Values = NDArray[np.float64]


@dataclass(frozen=True)
class UnitMetric:
    """A metric of single units: its name for people, its unit, and how exactly the page needs it."""

    label: str
    unit: str
    mantissa_bits: int = 7
    signed: bool = True


METRICS = {
    "gold_logprob_drop": UnitMetric("drop of gold log-probability", "nats", 10),
    "gold_prob_drop": UnitMetric("drop of gold probability", "probability"),
    "acc_drop": UnitMetric("drop of accuracy", "fraction"),
    "icl_effect": UnitMetric("in-context effect", "nats"),
    "label_effect": UnitMetric("label effect", "nats"),
    "attribution": UnitMetric("attribution, to first order", "nats", 6),
    "gradient": UnitMetric("gradient importance", "nats per token", 6, signed=False),
}
"""What the maps can show, in the order of the menu."""
DROP = "gold_logprob_drop"
BOUND_BITS = 5
HEAD_SCORES = ("prefix_matching", "copying", "previous_token")


@dataclass(frozen=True)
class Grid:
    """The axes of all arrays of a run."""

    tasks: Sequence[str]
    shots: Sequence[int]
    layers: int
    heads: int

    @property
    def shape(self) -> tuple[int, int]:
        """Settings and units."""
        return len(self.tasks) * len(self.shots), self.layers * (self.heads + 1)

    def values(self, records: pl.DataFrame, column: str = "value") -> Values:
        """Return a column of records of single units as an array [S, U]; NaN where there is no record."""
        found = np.full(self.shape, np.nan)
        known = records.filter(
            pl.col("task").is_in(list(self.tasks))
            & pl.col("shots").is_in(list(self.shots))
            & pl.col("layer").is_not_null()
        )
        places = known.select(
            setting=pl.col("task").replace_strict(_indices(self.tasks), return_dtype=pl.Int64)
            * len(self.shots)
            + pl.col("shots").replace_strict(_indices(self.shots), return_dtype=pl.Int64),
            unit=pl.col("layer").cast(pl.Int64) * (self.heads + 1)
            + pl.col("head").cast(pl.Int64).fill_null(self.heads),
            value=pl.col(column).cast(pl.Float64),
        )
        found[places["setting"].to_numpy(), places["unit"].to_numpy()] = places["value"].to_numpy()
        return found

    def head_values(self, records: pl.DataFrame) -> Values:
        """Return records of heads, whatever the task, as an array [U]; NaN for FFNs."""
        found = np.full(self.shape[1], np.nan)
        heads = records.filter(pl.col("layer").is_not_null() & pl.col("head").is_not_null())
        unit = heads["layer"].cast(pl.Int64).to_numpy() * (self.heads + 1) + heads["head"].to_numpy()
        found[unit] = heads["value"].to_numpy()
        return found

    def kept(self, mask: Mask) -> NDArray[np.bool_]:
        """Return which units [U] a mask leaves."""
        found = np.ones(self.shape[1], dtype=np.bool_)
        found[[layer * (self.heads + 1) + head for layer, head in mask.heads]] = False
        found[[layer * (self.heads + 1) + self.heads for layer in mask.ffns]] = False
        return found


def unit_arrays(results: pl.DataFrame, greedy: Mapping[Setting, MaskFile], grid: Grid) -> dict[str, Any]:
    """Return the arrays of all units as JSON: metrics, the drop's bounds and claims, scores of heads, and
    what greedy masks keep.

    greedy: the greedy mask of a task at a shot count, for those that have one.
    """
    single = results.filter(
        (pl.col("experiment") == "ablate") & (pl.col("procedure") != "top")
        | (pl.col("experiment") == "importance")
    )
    found: dict[str, Any] = {"metrics": {}}
    for name, metric in METRICS.items():
        values = grid.values(single.filter(pl.col("metric") == name))
        if np.isfinite(values).any():
            found["metrics"][name] = {
                "label": metric.label,
                "unit": metric.unit,
                "signed": metric.signed or bool((values < 0).any()),
                "linear": linear_range(values),
                "largest": float(np.nanmax(np.abs(values))),
                "values": encode_halves(values, metric.mantissa_bits).as_json(),
            }
    drops = single.filter(pl.col("metric") == DROP)
    for bound in ("low", "high"):
        found[bound] = encode_halves(grid.values(drops, bound), BOUND_BITS).as_json()
    q_values = grid.values(single.filter(pl.col("metric") == "q_value"))
    found["q"] = encode_halves(q_values, BOUND_BITS).as_json()
    found["significant"] = {
        name: encode_bits(np.nan_to_num(claims, nan=1) <= SIGNIFICANT_Q).as_json()
        for name in METRICS
        if np.isfinite(claims := grid.values(single.filter(pl.col("metric") == q_metric(name)))).any()
    }
    found["exact"] = encode_bits(grid.values(drops.filter(pl.col("exact")), "documents") > 0).as_json()
    return found | _scores_and_masks(results, greedy, grid)


def _scores_and_masks(
    results: pl.DataFrame, greedy: Mapping[Setting, MaskFile], grid: Grid
) -> dict[str, Any]:
    scores = results.filter((pl.col("experiment") == "induction") & (pl.col("procedure") == "scores"))
    of_heads = {name: grid.head_values(scores.filter(pl.col("metric") == name)) for name in HEAD_SCORES}
    kept = np.zeros(grid.shape, dtype=np.bool_)
    for index, setting in enumerate((task, shots) for task in grid.tasks for shots in grid.shots):
        if setting in greedy:
            kept[index] = grid.kept(greedy[setting].mask)
    return {
        "scores": {
            name: encode_halves(values, 7).as_json()
            for name, values in of_heads.items()
            if np.isfinite(values).any()
        },
        "kept": encode_bits(kept).as_json(),
    }


def linear_range(values: Values) -> float:
    """Return up to where a symmetric-log scale of these values is linear: their median size, rounded down to
    1, 2 or 5 times a power of ten, so that noise stays pale and what stands out does not saturate.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes):
        return 1.0
    middle = float(np.median(sizes))
    power = 10.0 ** np.floor(np.log10(middle))
    return float(power * max(step for step in (1, 2, 5) if step * power <= middle * (1 + 1e-9)))


def _indices(names: Sequence[Any]) -> dict[Any, int]:
    return {name: index for index, name in enumerate(names)}
