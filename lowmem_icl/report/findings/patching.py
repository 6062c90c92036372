"""Sentences on patched prompts: which units restore the right answer, and which it breaks without."""

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.findings.above_chance import Settings
from lowmem_icl.report.findings.wording import listed, units_text
from lowmem_icl.report.numbers import SIGNIFICANT_Q

MOST_NAMED = 3
MEANS = (
    "a unit restores, or breaks, where its value from the other prompt raises the right answer's "
    "log-probability in more pairs than it lowers it, or the reverse, at a false discovery rate of "
    f"{100 * SIGNIFICANT_Q:.0f} % over the units of a setting (exact sign test)"
)
"""What a unit is said to do."""


def patch_sentence(units: pl.DataFrame, settings: Settings) -> str:
    """Return which units restore and break the right answer in most settings above chance, files of given
    prompts among them; empty where nothing was patched.
    """
    patched = patched_units(units)
    above = [setting not in settings.at_chance for setting in patched.select("task", "shots").rows()]
    patched = patched.filter(pl.Series(above, dtype=pl.Boolean()))
    if patched.is_empty():
        return ""
    total = patched.select("task", "shots").n_unique()
    restored = _most(patched, (pl.col("restore_q_value") <= SIGNIFICANT_Q) & (pl.col("restore") > 0))
    broken = _most(patched, (pl.col("break_q_value") <= SIGNIFICANT_Q) & (pl.col("break") < 0))
    return (
        f"Put into corrupted prompts, {_values(restored, total, 'clean')} the right answer; put into clean "
        f"prompts, {_values(broken, total, 'corrupted')} it."
    )


def patched_units(units: pl.DataFrame) -> pl.DataFrame:
    """Return the records of units.parquet whose units were patched, without means over tasks."""
    return units.filter(pl.col("restore").is_not_null() & (pl.col("task") != AGGREGATE))


def _most(patched: pl.DataFrame, claimed: pl.Expr) -> list[tuple[str, int]]:
    """Return the units with most settings where something is claimed, with how many."""
    counts = patched.filter(claimed.fill_null(value=False)).group_by("unit", maintain_order=True).len()
    return counts.sort("len", descending=True, maintain_order=True).head(MOST_NAMED).rows()


def _values(units: list[tuple[str, int]], total: int, origin: str) -> str:
    verb = "restore" if origin == "clean" else "break"
    if not units:
        return f"no unit's {origin} value significantly {verb}s"
    (first, count), *others = ((units_text([unit]), count) for unit, count in units)
    where = "" if total == 1 else f" (in {count} of {total} settings)"
    named = [f"{first}{where}", *(f"{unit}{'' if total == 1 else f' ({more})'}" for unit, more in others)]
    return f"the {origin} {'value' if len(units) == 1 else 'values'} of {listed(named)} {verb}" + (
        "s" if len(units) == 1 else ""
    )
