# %% [markdown]
# # How much of the model can go?
#
# The paper removes heads, least important first, and finds that OPT-66B keeps its accuracy without 70 % of
# them. A ranking by importance is not the best mask of its size: a greedy search finds smaller circuits. Both
# are judged on documents that chose nothing.

# %%
import polars as pl

import lowmem_icl as icl

run = icl.run(
    model="demo",
    tasks="recall",
    shots=16,
    limit=64,
    train_limit=16,
    experiments=["evaluate", "importance", "prune"],
    curves=["heads", "random"],
)

# %% [markdown]
# Accuracy as heads go, least important first, and at random.

# %%
curve = run.results.filter(procedure="curve-heads", metric="acc", mask_task="recall", task="recall")
print(curve.select("method", "percent", "value", "low", "high").sort("method", "percent"))

# %%
run.plot.head_curves("recall")

# %% [markdown]
# The greedy mask: what it keeps, and what it costs on new documents.

# %%
mask = run.mask("greedy", "recall", 16)
print(mask)
print("kept:", mask.kept)
judged = run.masks.filter((pl.col("mask") == mask.name) & (pl.col("task") == "recall"))
print(judged.select("value", "low", "high", "clean", "loss", "loss_high", "verdict"))
