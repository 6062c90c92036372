# %% [markdown]
# # Which heads does a task need?
#
# The paper ranks heads by a gradient score, since removing each of 4,608 heads alone was too dear. Here every
# head is removed alone, exactly, and the gradient's ranking is held against that.

# %%
import lowmem_icl as icl

with icl.open_model("demo") as model:
    task = icl.load_task("recall", shots=16, limit=32, part="train")
    drops = icl.ablate(model, task, units="heads")
drops.select("unit", "drop", "low", "high", "q_value").head(6)

# %% [markdown]
# `drop` is the mean loss of the gold answer's log-probability in nats, `q_value` the rate of false claims
# among the heads up to this one. A few heads carry the task. Do estimates find them?

# %%
run = icl.run(
    model="demo", tasks="recall", shots=16, limit=32, train_limit=32, experiments=["importance", "ablate"]
)
units = run.units("recall", shots=16).filter(kind="head")
by_gradient = units.sort("gradient", descending=True)["unit"].head(4).to_list()
by_attribution = units.sort("attribution", descending=True)["unit"].head(4).to_list()
print("removed alone: ", drops["unit"].head(4).to_list())
print("by gradient:   ", by_gradient)
print("by attribution:", by_attribution)

# %%
run.plot.heads("recall", shots=16)
