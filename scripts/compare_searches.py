"""Cheaper programmes beside full ones: what their searches remove, what is left, and what they cost.

    python scripts/compare_searches.py EXACT,NESTED [EXACT,NESTED …] [--docs docs/pruning.md] [--json FILE]
    python scripts/compare_searches.py FULL,NIGHT --rankings

Each pair names two run folders of the same options, but for --search (and --screen, --exact where the cheaper
search is to be compared as well). Per pair it tells the units that all searches removed together; how many
searches leave an accuracy on the evaluation split more than one standard error below the exact one's; how
many leave less than the gradient ranking's mask of equal size; and the operations planned for all that
`prune` does. With --docs the table goes where the file marks it. With --rankings it tells instead how far the
rankings of heads agree (Spearman's correlation of their ablation drops and of their gradient scores), and how
many per cent knees are apart at most.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from doc_tables import put_table

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import read_mask
from lowmem_icl.session.record import run_record
from lowmem_icl.statistics.agreement import spearman
from lowmem_icl.tables.schema import read_table

HEADER = (
    "| model, tasks, shots | searches | removed: exact | nested | more than one error below "
    "| below the gradient mask (exact) | operations of `prune`: exact | nested |\n"
    "|---|---|---|---|---|---|---|---|"
)


def accuracies(folder: Path, method: str) -> dict[tuple[str, int], tuple[float, float]]:
    """Return what the masks by a method leave of what they were made for, with its standard error."""
    results = read_table(folder / "results.parquet", "results").filter(
        pl.col("experiment") == "prune",
        pl.col("procedure") == "greedy",
        pl.col("method") == method,
        pl.col("metric").is_in(["acc", "em"]),
        pl.col("task") == pl.col("mask_task"),
        pl.col("shots") == pl.col("mask_shots"),
    )
    return {
        (task, shots): (value, stderr or 0.0)
        for task, shots, value, stderr in results.select("task", "shots", "value", "stderr").iter_rows()
    }


def removed(folder: Path) -> int:
    """Return how many units all greedy masks of a run remove."""
    return sum(len(read_mask(path).mask) for path in (folder / "masks").glob("greedy-*.json"))


def operations(record: dict[str, Any]) -> float:
    """Return the operations planned for `prune`."""
    return float(next(s["operations"] for s in record["plan"]["stages"] if s["experiment"] == "prune"))


def compared(exact: Path, nested: Path) -> dict[str, Any]:
    """Return what a pair of runs comes to."""
    records = [run_record(folder) for folder in (exact, nested)]
    greedy = [accuracies(folder, "greedy") for folder in (exact, nested)]
    gradient = [accuracies(folder, "gradient") for folder in (exact, nested)]
    if greedy[0].keys() != greedy[1].keys():
        raise InputError(f"{exact},{nested}: expected runs of the same tasks and shots; give such")
    below_gradient = [
        sum(of_greedy[key][0] < of_gradient[key][0] - 1e-9 for key in of_greedy)
        for of_greedy, of_gradient in zip(greedy, gradient, strict=True)
    ]
    options = records[1]["options"]
    screened = f", --exact {options['exact']}" if options.get("exact") else ""
    return {
        "model": records[0]["model"]["id"] + screened,
        "settings": sorted({f"{task} {shots}" for task, shots in greedy[0]}),
        "searches": len(greedy[0]),
        "removed": [removed(exact), removed(nested)],
        "below": sum(
            greedy[1][key][0] < value - max(stderr, greedy[1][key][1]) - 1e-9
            for key, (value, stderr) in greedy[0].items()
        ),
        "below_gradient": below_gradient,
        "operations": [operations(record) for record in records],
    }


def row(pair: dict[str, Any]) -> str:
    """Return a pair's row of the table."""
    tasks = sorted({setting.rsplit(" ", 1)[0] for setting in pair["settings"]} - {"aggregate"})
    shots = sorted({int(setting.rsplit(" ", 1)[1]) for setting in pair["settings"]})
    exact, nested = pair["removed"]
    costs = [f"{value / 1e12:.3g} T" for value in pair["operations"]]
    return (
        f"| {Path(pair['model']).name}: {', '.join(tasks)}; {', '.join(map(str, shots))} "
        f"| {pair['searches']} | "
        f"{exact} | {nested} ({nested / exact:.2f}) | {pair['below']} | "
        f"{pair['below_gradient'][1]} ({pair['below_gradient'][0]}) | {costs[0]} | {costs[1]} |"
    )


def agreement(full: Path, cheap: Path) -> list[dict[str, Any]]:
    """Return by task and shot count how far rankings of heads and knees of two runs agree."""
    results = [read_table(folder / "results.parquet", "results") for folder in (full, cheap)]
    heads = pl.col("kind").eq("head") & pl.col("task").ne("aggregate")
    wanted = {
        "drops": (pl.col("procedure") == "single") & (pl.col("metric") == "gold_logprob_drop") & heads,
        "gradients": (pl.col("experiment") == "importance") & (pl.col("metric") == "gradient") & heads,
    }
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, chosen in wanted.items():
        unit = ["task", "shots", "layer", "head"]
        one, other = (frame.filter(chosen).select(*unit, "value", "exact") for frame in results)
        for (task, shots), both in one.join(other, on=unit).group_by("task", "shots", maintain_order=True):
            entry = found.setdefault((task, shots), {"task": task, "shots": shots})
            entry[name] = spearman(both["value"].to_numpy(), both["value_right"].to_numpy())
            if name == "drops":
                entry["exact"] = int(both["exact_right"].sum())
    curve = ["procedure", "task", "shots", "method", "kind", "other_task", "other_shots"]
    one, other = (frame.filter(pl.col("metric") == "knee").select(*curve, "value") for frame in results)
    # FFNs are ranked by their exact drops or, where these are not known, by gradients.
    same = [name for name in curve if name != "method"]
    knees = one.join(other, on=same, nulls_equal=True)
    for task, shots, apart in (
        knees.group_by("task", "shots").agg((pl.col("value") - pl.col("value_right")).abs().max()).iter_rows()
    ):
        if (task, shots) in found:
            found[task, shots]["knees_apart"] = apart
    return list(found.values())


def main(
    pairs: Annotated[list[str], typer.Argument(help="Two run folders each, with a comma between.")],
    docs: Annotated[Path | None, typer.Option(help="A file that marks where the table goes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    rankings: Annotated[bool, typer.Option("--rankings", help="Tell how far rankings agree.")] = False,
) -> None:
    """Print the table."""
    if rankings:
        for pair in pairs:
            full, _, cheap = pair.partition(",")
            typer.echo("\n".join(map(json.dumps, agreement(Path(full), Path(cheap)))))
        return
    found = []
    for pair in pairs:
        exact, _, nested = pair.partition(",")
        found.append(compared(Path(exact), Path(nested)))
    table = "\n".join([HEADER, *map(row, found)])
    typer.echo(table)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if docs is not None:
        put_table(docs, "searches", Path(__file__).name, table)


if __name__ == "__main__":
    typer.run(main)
