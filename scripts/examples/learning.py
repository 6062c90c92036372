# %% [markdown]
# # Does the model learn from demonstrations?
#
# The paper scores every task with 0, 1 and 5 demonstrations. Rising accuracy alone does not say that a model
# learns what the labels say: it may only learn what an answer looks like. So every setting is scored again
# with the answers of the demonstrations shuffled among them.

# %%
import polars as pl

import lowmem_icl as icl

run = icl.run(
    model="demo",
    tasks=["recall", "category", "knowledge"],
    shots=[0, 4, 16],
    limit=64,
    experiments="evaluate",
)
run

# %% [markdown]
# Accuracy by number of demonstrations, with 95 % intervals and chance. `recall` and `category` are at chance
# without demonstrations; `knowledge` needs none.

# %%
accuracy = run.results.filter(pl.col("metric") == "acc", pl.col("task") != "aggregate")
print(
    accuracy.filter(pl.col("labels").is_null() | (pl.col("labels") == "right")).select(
        "task", "shots", "value", "low", "high", "chance"
    )
)

# %% [markdown]
# What right labels give beyond shuffled ones, of the same documents.

# %%
print(
    run.results.filter(metric="acc_label_effect", labels="shuffled")
    .filter(pl.col("task") != "aggregate")
    .select("task", "shots", "value", "low", "high")
)

# %%
run.plot.accuracy()
