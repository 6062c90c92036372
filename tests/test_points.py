"""Points of curves: each set of removed units once, at what it removes."""

from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.masks.rankings import removed_count
from lowmem_icl.report.points import curve_points
from lowmem_icl.tables.blocks import frame

Row = dict[str, Any]
MODEL = {"layers": 4, "heads": 3}
LEVELS = range(0, 100, 10)


def curve(kind: str, **more: Any) -> list[Row]:
    """A curve's levels; its value is the level."""
    base = {
        "experiment": "prune", "procedure": f"curve-{kind}s", "task": "piqa", "shots": 1,
        "method": "gradient", "kind": kind, "metric": "acc", "mask": "any",
    }  # fmt: skip
    units, column = (12, "heads_removed") if kind == "head" else (4, "ffns_removed")
    other = "ffns_removed" if kind == "head" else "heads_removed"
    return [
        base | {"percent": level, column: removed_count(level, units), other: 0, "value": float(level)} | more
        for level in LEVELS
    ]


def test_levels_that_remove_the_same_are_one_point_at_what_they_remove() -> None:
    points = curve_points(frame("results", curve("ffn")), MODEL)
    assert points.select("percent", "ffns_removed", "share").rows() == [
        (0, 0, 0.0), (30, 1, 25.0), (50, 2, 50.0), (80, 3, 75.0),
    ]  # fmt: skip


def test_other_curves_draws_and_metrics_keep_their_points() -> None:
    draws = [curve("ffn", method="random", seed=seed) for seed in (1, 2)]
    mean = curve("ffn", method="random", mask=None)
    other = curve("ffn", metric="acc_drop")
    shared = curve("ffn", other_task="aggregate")
    rows = [row for rows in (*draws, mean, other, shared, curve("head")) for row in rows]
    knee = {"metric": "knee", "percent": 70, "kind": "ffn", "experiment": "prune", "ffns_removed": 2}
    points = curve_points(frame("results", [*rows, knee]), MODEL)
    # Of twelve heads no two levels of ten per cent are the same number.
    assert len(points) == 5 * 4 + 10
    assert "knee" not in set(points["metric"])


def test_heads_and_ffns_together_have_a_share_of_each() -> None:
    row = curve("head", ffns_removed=1)[5] | {"kind": None}
    (point,) = curve_points(frame("results", [row]), MODEL).to_dicts()
    assert (point["heads_share"], point["ffns_share"], point["share"]) == (50.0, 25.0, None)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 9)), max_size=30))
def test_every_set_stays_once_and_doing_it_again_changes_nothing(points: list[tuple[int, int, int]]) -> None:
    rows = [
        curve("head")[0] | {"heads_removed": heads, "ffns_removed": ffns, "percent": 10 * level}
        for heads, ffns, level in points
    ]
    results = frame("results", rows)
    found = curve_points(results, MODEL)
    removed = found.select("heads_removed", "ffns_removed").rows()
    assert len(removed) == len(set(removed))
    assert set(removed) == {(heads, ffns) for heads, ffns, _ in points}
    for heads, ffns, percent in found.select("heads_removed", "ffns_removed", "percent").iter_rows():
        levels = [10 * level for h, f, level in points if (h, f) == (heads, ffns)]
        assert percent == min(levels)
    again = curve_points(found.select(results.columns), MODEL)
    assert again.equals(found, null_equal=True)
    assert isinstance(found, pl.DataFrame)
