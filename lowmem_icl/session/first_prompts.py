"""The first documents of tasks with their texts and tokens, for people to look at."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from lowmem_icl.conversion.locate import load_tokenizer, plan_store
from lowmem_icl.errors import InputError
from lowmem_icl.options import RunOptions
from lowmem_icl.protocols import Labels
from lowmem_icl.session.prepare import find_model, open_tasks
from lowmem_icl.session.task_texts import part_rows
from lowmem_icl.session.text_form import TextForm, packing_limits, text_form, text_tokeniser
from lowmem_icl.tasks.document_counts import DocumentLimit
from lowmem_icl.tasks.documents import TaskRows
from lowmem_icl.tasks.label_controls import NoLabelControl, with_other_labels
from lowmem_icl.tasks.loading import OpenTask
from lowmem_icl.tasks.packing import TaskOptions, fit_context, tokenised
from lowmem_icl.tasks.prompting import DirectPrompter


def first_prompts(
    options: RunOptions, count: int, labels: Labels = "right"
) -> Iterator[tuple[TextForm, TaskRows, TaskOptions]]:
    """Yield the first `count` evaluation documents of every task and shot count, with their texts and tokens.

    Raises InputError where their demonstrations cannot show such labels. No other document is prompted,
    unless demonstrations are shared: how many a set keeps depends on all documents of a run.
    """
    store = plan_store(find_model(options), options.weights)
    tokenizer = load_tokenizer(store.tokenizer_folder)
    form = text_form(options, store, tokenizer)
    limits, tokenise = packing_limits(form, store, tokenizer), text_tokeniser(tokenizer)
    prompter = DirectPrompter(partial(fit_context, tokenise=tokenise, limits=limits))
    most = None if options.demonstrations == "shared" else count
    limit = DocumentLimit(options.resolved_limit, most)
    for task in open_tasks(options):
        for shots in options.resolved_shots:
            rows = part_rows(options, task, shots, ("evaluate", limit), prompter)
            first = replace(rows, documents=rows.documents[:count])
            if labels != "right":
                first = _with_labels_asked_for(options, task, first, labels)
            yield form, first, tokenised(first, tokenise, limits)


def _with_labels_asked_for(options: RunOptions, task: OpenTask, rows: TaskRows, labels: Labels) -> TaskRows:
    try:
        return with_other_labels(task, rows, labels, options.protocol_flags, DirectPrompter())
    except NoLabelControl as error:
        raise InputError(
            f"--labels {labels}: task {task.name} has none at {rows.shots} shots: {error}; "
            "ask for right, or for other --shots"
        ) from error
