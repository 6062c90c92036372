"""The page's section on pruning: accuracy at each level of removed heads or FFNs, and the knees."""

import polars as pl

from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.report.page.plots.lines import curves_plot
from lowmem_icl.report.page.plots.matrices import matrix_plot
from lowmem_icl.report.page.section import Section, Table
from lowmem_icl.report.run_tables import RunTables

TEXT = (
    "By one ranking of the intact model, more and more of the least important units are removed; judged on "
    "the first evaluation documents. A knee is the last level before the first that credibly costs more than "
    "one point of accuracy: the whole 95 % interval of its drop on training documents is above. Up to the "
    "certain knee every level credibly costs at most one point. The last level that truly does lies between "
    "the two; more training documents bring them together. What the knee costs is measured on evaluation "
    "documents. The grey band holds the next random mask in 95 % of cases."
)
KNEE_COLUMNS = (
    "task",
    "shots",
    "removed",
    "ranking",
    "knee",
    "certain knee",
    "accuracy drop at the knee, points",
)
CAPTION = (
    "The chosen task in front, the others behind; grey band: random masks; diamond: the knee; dotted: "
    "chance. Levels that remove the same are one point."
)
GRID_CAPTION = "Accuracy of the chosen task with heads and FFNs removed together."
KINDS = {"head": "heads", "ffn": "FFNs"}


def pruning_section(run: RunTables) -> Section | None:
    """Return the pruning curves and their knees; None where there are none."""
    points = curve_records(run.results)
    if points.is_empty():
        return None
    plots = [
        curves_plot(f"prune-{kind}s", f"{name} removed", "accuracy", CAPTION, (f"prune-{kind}s",))
        for kind, name in KINDS.items()
        if (points["kind"] == kind).any()
    ]
    if (points["procedure"] == "curve-combined").any():
        n_levels = points.filter(pl.col("procedure") == "curve-combined")["heads_removed"].n_unique()
        plots.append(
            matrix_plot("grid", n_levels, GRID_CAPTION, ("prune-grid",), ("FFNs removed", "heads removed"))
        )
    table = Table(KNEE_COLUMNS, knee_rows(points), "knees")
    return Section("pruning", "Pruning curves", TEXT, plots, table)


def curve_records(results: pl.DataFrame) -> pl.DataFrame:
    """Return the records of pruning curves: those of the prune experiment at a percentage."""
    return results.filter((pl.col("experiment") == "prune") & pl.col("percent").is_not_null())


def knee_rows(points: pl.DataFrame) -> list[list[str]]:
    """Return formatted rows of KNEE_COLUMNS: every curve's knee and what it costs on evaluation documents."""
    keys = ["task", "shots", "procedure", "method", "kind", "other_task", "other_shots"]
    knees = points.filter(pl.col("metric") == "knee").select(*keys, "percent")
    certain = points.filter(pl.col("metric") == "knee_certain").select(
        *keys, pl.col("value").alias("certain")
    )
    costs = points.filter(pl.col("metric") == "knee_acc_drop").select(*keys, "value", "low", "high")
    both = knees.join(certain, on=keys, how="left", nulls_equal=True, maintain_order="left").join(
        costs, on=keys, how="left", nulls_equal=True, maintain_order="left"
    )
    return [
        [
            row["task"],
            str(row["shots"]),
            "heads" if row["kind"] == "head" else "FFNs",
            "of all tasks" if row["other_task"] == AGGREGATE else "own",
            f"{row['percent']} %",
            "" if row["certain"] is None else f"{row['certain']:g} %",
            _points_text(row["value"], row["low"], row["high"]),
        ]
        for row in both.iter_rows(named=True)
    ]


def _points_text(value: float | None, low: float | None, high: float | None) -> str:
    """Return a drop of accuracy in points, with its interval where there is one."""
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * value:+.1f}{interval}"
