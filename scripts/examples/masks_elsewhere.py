# %% [markdown]
# # A mask in code of one's own
#
# A mask is a file that others can use. On any plain transformers model of a known family it is applied by
# hooks, and taken off again.

# %%
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_icl as icl

mask = icl.Mask.read("masks/demo/greedy-recall-16shot.json")
folder = files("lowmem_icl") / "demo"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
mask

# %% [markdown]
# A prompt of the task, and what the model says to it: whole, under the mask that keeps what the task needs,
# and without what that keeps.

# %%
task = icl.load_task("recall", shots=16, limit=1)
document = task.documents[0]
context, right = next(option for option, gold in zip(document.options, document.gold, strict=True) if gold)
tokens = torch.tensor([tokenizer(context, add_special_tokens=False)["input_ids"]])


def answer() -> str:
    with torch.no_grad():
        return tokenizer.decode(model(tokens).logits[0, -1].argmax())


everything = icl.Mask([(layer, head) for layer in range(4) for head in range(8)], range(4))
print("right:            ", right)
print("whole:            ", answer())
with mask.applied(model):
    print("under the mask:   ", answer())
with (everything - mask).applied(model):
    print("without its units:", answer())
