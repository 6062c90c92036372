# %% [markdown]
# # Are the important heads induction heads?
#
# An induction head looks back to what followed the last occurrence of a token (prefix matching) and raises
# the probability of that (copying). The paper scores all heads on random sequences and asks how much of
# these abilities the pruned model keeps. Whether a task needs such heads is told by removing them, and as
# many random heads of the same layers.

# %%
import polars as pl

import lowmem_icl as icl

run = icl.run(
    model="demo",
    tasks=["recall", "category"],
    shots=16,
    limit=64,
    train_limit=16,
    experiments=["evaluate", "importance", "induction"],
)
scores = run.results.filter(
    pl.col("metric").is_in(["prefix_matching", "copying"]), pl.col("kind") == "head"
).pivot("metric", index=["layer", "head"], values="value")
print(scores.sort("prefix_matching", descending=True).head(4))

# %% [markdown]
# Accuracy without the induction heads, and without random ones.

# %%
print(
    run.results.filter(experiment="induction", metric="acc_drop")
    .filter(pl.col("method").is_in(["induction", "random-median"]), pl.col("task") != "aggregate")
    .select("task", "method", "heads_removed", "value", "low", "high")
    .sort("task", "method")
)

# %%
run.plot.induction()
