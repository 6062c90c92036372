"""Where the clean model is no better than guessing: the one place that says so."""

import polars as pl

from lowmem_icl.masks.naming import CLEAN
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.tables.schema import ACCURACIES


def settings_at_chance(clean: pl.DataFrame) -> frozenset[tuple[str, int]]:
    """Return the tasks and shot counts where the clean accuracy is not credibly above that of guessing.

    clean: records of the clean model's evaluation with right labels. To guess is to draw an option or, where
    that is right more often, always to give the same (`majority`); of the mean over tasks, the mean of these.
    Tasks without alternatives, whose chance is 0, are never at chance, and have no part in that mean. An
    accuracy without an interval is at chance.
    """
    accuracy = clean.filter(pl.col("metric").is_in(ACCURACIES) & (pl.col("task") != AGGREGATE))
    majority = clean.filter(pl.col("metric") == "majority")
    constant = {(row["task"], row["shots"]): row["value"] for row in majority.iter_rows(named=True)}
    guesses = {
        (row["task"], row["shots"]): max(row["chance"], constant.get((row["task"], row["shots"]), 0.0))
        for row in accuracy.iter_rows(named=True)
        if row["chance"]
    }
    for shots in {count for _, count in guesses}:
        members = [guess for (task, count), guess in guesses.items() if count == shots and in_domain(task)]
        if members:
            guesses[AGGREGATE, shots] = sum(members) / len(members)
    return frozenset(
        (row["task"], row["shots"])
        for row in clean.filter(pl.col("metric").is_in(ACCURACIES)).iter_rows(named=True)
        if (guess := guesses.get((row["task"], row["shots"]))) is not None
        and (row["low"] is None or row["low"] <= guess)
    )


def clean_records(results: pl.DataFrame) -> pl.DataFrame:
    """Return what `settings_at_chance` needs of results.parquet: the clean model's accuracies and best
    constant answers, as the evaluation has them; where nothing was evaluated, as other experiments do.
    """
    clean = results.filter(
        (pl.col("mask") == CLEAN)
        & pl.col("metric").is_in([*ACCURACIES, "majority"])
        & (pl.col("labels").fill_null("right") == "right")
    )
    # Other experiments judge some of the documents, or all of them.
    is_evaluated = pl.col("experiment") == "evaluate"
    return clean.sort(~is_evaluated, -pl.col("documents"), maintain_order=True).unique(
        ["task", "shots", "metric"], keep="first", maintain_order=True
    )
