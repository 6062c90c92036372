"""`lowmem-icl prompts`: the exact texts and tokens of a task's documents."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import Labels
from lowmem_icl.session.first_prompts import first_prompts
from lowmem_icl.tasks.documents import Document, TaskRows
from lowmem_icl.tasks.packing import OptionTokens, first_options


def prompt_entries(options: RunOptions, count: int, labels: Labels) -> list[dict[str, Any]]:
    """Return the first `count` documents of every task and shot count, with what the model gets where their
    demonstrations have such labels.

    Of every option: context, continuation, token ids, and whether tokens were lost on the left. Where
    demonstrations are shared, how many a set keeps depends on all of the run's documents, so all are read.
    """
    entries = []
    for form, task, tokenised in first_prompts(options, count, labels):
        starts = first_options(task.documents).tolist()
        for document, start in zip(task.documents, starts, strict=True):
            entry = _entry(task, document, tokenised[start : start + len(document.gold)])
            entries.append(entry | {"prompts": form.as_record()})
    return entries


def _entry(task: TaskRows, document: Document, tokenised: Sequence[OptionTokens]) -> dict[str, Any]:
    return {
        "task": task.task,
        "shots": task.shots,
        "split": task.split,
        "labels": task.labels if task.shots else None,
        "document": document.index,
        "demonstrations": list(document.demonstrations),
        "options": [
            {
                "context": context,
                "continuation": continuation,
                "gold": gold,
                "context_ids": [*tokens.path, tokens.continuation[-1]][: tokens.context_tokens],
                "continuation_ids": list(tokens.continuation),
                "truncated": tokens.truncated,
            }
            for (context, continuation), tokens, gold in zip(
                document.options, tokenised, document.gold, strict=True
            )
        ],
    }


def show_prompts(entries: list[dict[str, Any]], console: Console) -> None:
    """Print prompts for reading: a context once, its options below, the right one marked."""
    if entries:
        form = entries[0]["prompts"]
        for line in (form["sentence"], *form["notes"]):
            console.print(Text(line, "dim"))
    for entry in entries:
        console.rule(f"{entry['task']}, {entry['shots']}-shot, {entry['split']} document {entry['document']}")
        last_context = None
        for option in entry["options"]:
            if option["context"] != last_context:
                last_context = option["context"]
                cut = " (tokens lost on the left)" if option["truncated"] else ""
                console.print(Text(last_context))
                console.print(
                    Text(f"{len(option['context_ids'])} tokens{cut}: {option['context_ids']}", "dim")
                )
            mark = "→" if option["gold"] else " "
            line = Text(f"{mark} {option['continuation']!r} ", "bold" if option["gold"] else "")
            console.print(line.append(Text(str(option["continuation_ids"]), "dim")))
