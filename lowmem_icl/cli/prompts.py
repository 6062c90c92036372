"""`lowmem-icl prompts`: the exact texts and tokens of a task's documents."""

from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_icl.conversion.locate import plan_store
from lowmem_icl.options import RunOptions
from lowmem_icl.session.prepare import documents, find_model, open_tasks, packing_limits
from lowmem_icl.tasks.packing import fit_context, tokenise_options


def prompt_entries(options: RunOptions) -> list[dict[str, Any]]:
    """Return each document's options: context, continuation, token ids, and whether tokens were lost on the left."""
    located = find_model(options)
    limits, tokenise = packing_limits(options, plan_store(located, options.weights))
    fits = partial(fit_context, tokenise=tokenise, limits=limits)
    (task,) = documents(options, open_tasks(options), "evaluate", options.limit, fits)
    entries = []
    tokenised = tokenise_options(task.documents, tokenise, limits, task.task)
    for document, options_tokens in zip(task.documents, tokenised, strict=True):
        listed = []
        for (context, continuation), tokens, gold in zip(
            document.options, options_tokens, document.gold, strict=True
        ):
            ids = [*tokens.path, tokens.continuation[-1]]
            listed.append(
                {
                    "context": context,
                    "continuation": continuation,
                    "gold": gold,
                    "context_ids": ids[: tokens.context_tokens],
                    "continuation_ids": list(tokens.continuation),
                    "truncated": tokens.truncated,
                }
            )
        entries.append(
            {
                "task": task.task,
                "shots": task.shots,
                "split": task.split,
                "document": document.index,
                "demonstrations": list(document.demonstrations),
                "options": listed,
            }
        )
    return entries


def show_prompts(entries: list[dict[str, Any]]) -> None:
    """Print prompts for reading: a context once, its options below, the right one marked."""
    console = Console()
    for entry in entries:
        console.rule(
            f"{entry['task']}, {entry['shots']} shots, {entry['split']} document {entry['document']}"
        )
        shown = None
        for option in entry["options"]:
            if option["context"] != shown:
                shown = option["context"]
                cut = " (tokens lost on the left)" if option["truncated"] else ""
                console.print(Text(shown))
                console.print(
                    Text(f"{len(option['context_ids'])} tokens{cut}: {option['context_ids']}", "dim")
                )
            mark = "→" if option["gold"] else " "
            line = Text(f"{mark} {option['continuation']!r} ", "bold" if option["gold"] else "")
            console.print(line.append(Text(str(option["continuation_ids"]), "dim")))
