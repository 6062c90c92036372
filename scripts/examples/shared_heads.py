# %% [markdown]
# # Do tasks share their heads?
#
# The paper compares the rankings of heads between tasks and numbers of demonstrations, and prunes one task
# by another's ranking. Rankings of few documents are noisy: `ceiling` is the most that two rankings as noisy
# as these could agree.

# %%
import polars as pl

import lowmem_icl as icl

run = icl.run(
    model="demo",
    tasks=["recall", "category", "repeat"],
    shots=16,
    limit=16,
    train_limit=16,
    experiments=["importance", "overlap"],
)
agreement = run.results.filter(
    pl.col("metric") == "spearman",
    pl.col("method") == "gradient",
    pl.col("other_method") == "gradient",
    pl.col("task") < pl.col("other_task"),
    pl.col("task") != "aggregate",
)
print(agreement.select("task", "other_task", "value", "low", "high"))

# %%
run.plot.agreement()
