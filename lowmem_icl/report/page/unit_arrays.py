"""What is known of every unit at every task and shot count, as arrays for the page's script.

A setting is a task at a shot count, which is None of prompts that were given; settings [S] go by task, then
by shots. Units [U] go by layer, its heads first, its FFN last: unit = layer · (heads + 1) + head, an FFN
standing where head `heads` would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.masks.files import MaskFile
from lowmem_icl.masks.mask import Mask
from lowmem_icl.report.numbers import SIGNIFICANT_Q
from lowmem_icl.report.page.encoding import encode_bits, encode_halves
from lowmem_icl.report.run_tables import Setting
from lowmem_icl.tables.schema import UNIT_COLUMNS, unit_columns
from lowmem_icl.tables.unit_table import HEAD_SCORES

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
    "restore_gold_logprob": UnitMetric("restored by the clean value", "nats", 6),
    "break_gold_logprob": UnitMetric("changed by the corrupted value", "nats", 6),
    "restore_normalised": UnitMetric("restored, normalised", "1: the clean run", 6),
    "function_vector": UnitMetric("function-vector score", "probability", 6),
}
"""What the maps can show, in the order of the menu."""
BOUND_BITS = 5


@dataclass(frozen=True)
class Grid:
    """The axes of all arrays of a run."""

    tasks: Sequence[str]
    shots: Sequence[int | None]
    layers: int
    heads: int

    @property
    def shape(self) -> tuple[int, int]:
        """Settings and units."""
        return len(self.tasks) * len(self.shots), self.layers * (self.heads + 1)

    @property
    def _settings(self) -> pl.DataFrame:
        """The index of every setting."""
        settings = [(*setting, index) for index, setting in enumerate(product(self.tasks, self.shots))]
        schema = {"task": pl.String(), "shots": pl.Int32(), "setting": pl.Int64()}
        return pl.DataFrame(settings, schema=schema, orient="row")

    def values(self, units: pl.DataFrame, column: str) -> Values:
        """Return a column of units.parquet as an array [S, U]; NaN where a unit or its value is not known."""
        known = units.join(self._settings, on=["task", "shots"], nulls_equal=True)
        found = np.full(self.shape, np.nan)
        found[known["setting"].to_numpy(), self._unit(known)] = known[column].cast(pl.Float64).to_numpy()
        return found

    def head_values(self, units: pl.DataFrame, column: str) -> Values:
        """Return a score of heads, the same for all tasks, as an array [U]; NaN for FFNs."""
        known = units.filter(pl.col(column).is_not_null())
        found = np.full(self.shape[1], np.nan)
        found[self._unit(known)] = known[column].to_numpy()
        return found

    def _unit(self, units: pl.DataFrame) -> NDArray[np.int64]:
        head = pl.col("head").cast(pl.Int64).fill_null(self.heads)
        place = units.select(pl.col("layer").cast(pl.Int64) * (self.heads + 1) + head)
        return place.to_series().to_numpy()

    def kept(self, mask: Mask) -> NDArray[np.bool_]:
        """Return which units [U] a mask leaves."""
        found = np.ones(self.shape[1], dtype=np.bool_)
        found[[layer * (self.heads + 1) + head for layer, head in mask.heads]] = False
        found[[layer * (self.heads + 1) + self.heads for layer in mask.ffns]] = False
        return found


def unit_arrays(units: pl.DataFrame, greedy: Mapping[Setting, MaskFile], grid: Grid) -> dict[str, Any]:
    """Return the arrays of all units as JSON: metrics, the drop's bounds and claims, scores of heads, and
    what greedy masks keep.

    units: units.parquet; greedy: the greedy mask of a task at a shot count, for those that have one.
    """
    metrics, significant = {}, {}
    for name, metric in METRICS.items():
        values = grid.values(units, unit_column(name))
        if not np.isfinite(values).any():
            continue
        metrics[name] = {
            "label": metric.label,
            "unit": metric.unit,
            "signed": metric.signed or bool((values < 0).any()),
            "linear": linear_range(values),
            "largest": float(np.nanmax(np.abs(values))),
            "values": encode_halves(values, metric.mantissa_bits).as_json(),
        }
        q_column = unit_columns(unit_column(name)).get("q_value")
        if q_column in units.columns:
            q_values = grid.values(units, q_column)
            if np.isfinite(q_values).any():
                significant[name] = encode_bits(is_significant(q_values)).as_json()
    scores = {name: grid.head_values(units, name) for name in HEAD_SCORES}
    return {
        "metrics": metrics,
        "significant": significant,
        "low": encode_halves(grid.values(units, "low"), BOUND_BITS).as_json(),
        "high": encode_halves(grid.values(units, "high"), BOUND_BITS).as_json(),
        "q": encode_halves(grid.values(units, "q_value"), BOUND_BITS).as_json(),
        "exact": encode_bits(grid.values(units, "exact") == 1).as_json(),
        "scores": {
            name: encode_halves(values, 7).as_json()
            for name, values in scores.items()
            if np.isfinite(values).any()
        },
        "kept": encode_bits(_kept(greedy, grid)).as_json(),
    }


def _kept(greedy: Mapping[Setting, MaskFile], grid: Grid) -> NDArray[np.bool_]:
    """Return which units greedy masks keep, [S, U]; none where there is no mask."""
    kept = np.zeros(grid.shape, dtype=np.bool_)
    for index, (task, shots) in enumerate(product(grid.tasks, grid.shots)):
        if shots is not None and (task, shots) in greedy:
            kept[index] = grid.kept(greedy[task, shots].mask)
    return kept


def unit_column(metric: str) -> str:
    """Return the column of units.parquet that holds a metric of METRICS."""
    return next((column for column, held in UNIT_COLUMNS.items() if held == metric), metric)


def is_significant(q_values: Values) -> NDArray[np.bool_]:
    """Return which q-values are claims; an unknown one is none."""
    return np.nan_to_num(q_values, nan=1) <= SIGNIFICANT_Q


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
