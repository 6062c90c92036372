"""The page's last section: how good estimates are, the protocol, versions, words, and how to cite."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from lowmem_icl.protocols import DIFFERENCES, REFERENCE
from lowmem_icl.report.numbers import compared_drops
from lowmem_icl.report.page.section import Record, Section, Table
from lowmem_icl.report.run_tables import RunTables
from lowmem_icl.statistics.agreement import spearman

TEXT = "The reference protocol does what the paper's code does, so that its numbers can be compared."
COLUMNS = ("what the code does", "plain bug", "done here")
ESTIMATES = "ablate-estimates"
WORDS = {
    "head, FFN": "A unit: an attention head, L3H7 in layer 3, or the feed-forward network of a layer, L3F.",
    "drop": "What the clean model has more than the model without a unit, on the same documents.",
    "q": "The false discovery rate at which an effect is claimed, over all units of a task and shot count.",
    "gradient": "The paper's first-order importance of a head or FFN.",
    "attribution": "A first-order estimate of the drop, with its sign.",
    "in-context effect": "The drop with demonstrations minus that without; near 0: for language in general.",
    "label effect": "The drop with right labels in the demonstrations minus that with shuffled ones.",
    "patch": "A unit's value from the run on another prompt in place of its own; a pair: two such prompts.",
    "restore, break": "What the clean value brings back in the corrupted prompt, and the reverse.",
    "function vector": "What heads write on average at the end of prompts that show a task.",
    "prefix matching": "How much attention goes to what followed the same token earlier: induction heads.",
    "kept": "What a mask does not remove. A kept unit may cost nothing alone: others can stand in for it.",
    "setting": "A task at a number of demonstrations. At chance: the clean model is no better than guessing.",
    "clean": "The whole model, nothing removed.",
    "gold_prob": "The probability of the right answer among a document's options.",
    "tolerance": "How much a greedy mask may lose; it holds where the whole interval of the loss is within.",
    "certified": "Shown to keep the tolerance on documents that the search did not see, at 95 %.",
    "int8": "Weights in 8 bits, multiplied as LLM.int8 does.",
    "nf4": "Weights in 4 bits, multiplied in float32.",
    "knee": "The last level of a pruning curve before the first that credibly costs more than one point.",
    "greedy mask": "What is left of units removed layer by layer while the loss keeps the tolerance.",
}
CITE = (
    "Bansal et al., Rethinking the Role of Scale for In-Context Learning: An Interpretability-based Case "
    "Study at 66 Billion Scale, ACL 2023 (the question and the scores)"
)


@dataclass(frozen=True)
class Method:
    """What the template of this section shows."""

    command: str
    origin: str
    cite: str
    words: Sequence[tuple[str, str]]
    estimates: str
    """The name of the figure of estimates against exact drops; empty where there is none."""


def method_section(run: RunTables) -> Section:
    """Return how the numbers were made."""
    record = run.record
    reference = record["options"]["protocol"] == REFERENCE.name
    rows = [
        [difference.sentence, _yes(difference.plain_bug), _yes(difference.imitated)]
        for difference in DIFFERENCES
    ]
    data = Method(
        record["command"],
        origin(record),
        f"lowmem-icl {record['versions'].get('lowmem_icl', '')}; {CITE}",
        list(WORDS.items()),
        ESTIMATES if len(compared_drops(run.results)) else "",
    )
    texts = [estimates_note(run.results), TEXT if reference else ""]
    table = Table(COLUMNS, rows, "the paper's code") if reference else None
    return Section("method", "Method", " ".join(text for text in texts if text), table=table, data=data)


def estimates_note(results: pl.DataFrame) -> str:
    """Return how far first-order estimates rank units as exact drops do, heads and FFNs apart."""
    both = compared_drops(results)
    found = []
    for kind, name in (("head", "heads"), ("ffn", "FFNs")):
        units = both.filter(pl.col("kind") == kind)
        if len(units) > 2:
            rank = spearman(units["value"].to_numpy(), units["exact"].to_numpy())
            found.append(f"{rank:.2f} for {name}")
    if not found:
        return ""
    return f"Rank correlation of attribution and the exact drop, all tasks together: {', '.join(found)}."


def origin(record: Record) -> str:
    """Return when, where and with what a run was made."""
    machine, options = record["machine"], record["options"]
    device = f", {machine['cuda']}" if machine["cuda"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{record['started']} on {machine['processor']}, {machine['threads']} threads{device}; {versions}; "
        f"{_prompts(record['model'])}"
        f"weights {record['model']['digest'][:12]}, protocol {options['protocol']}, seed {options['seed']}."
    )


def _prompts(model: Record) -> str:
    """Say what was done to prompts and weights; nothing for runs that did not record it."""
    said = [f"prompts: {model['prompts']['sentence']}"] if "prompts" in model else []
    said += [f"weights dequantised from {model['quantisation']}"] if model.get("quantisation") else []
    return "".join(f"{text}; " for text in said)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
