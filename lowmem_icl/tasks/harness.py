"""Tasks of lm-evaluation-harness by name: what its index says of them, before any of their rows is loaded.

A name stands for a task, or for a group or a tag, whose tasks are then taken one by one. What a group says of
a task of its own, or changes in another, is reached as GROUP::TASK, the name that the harness has for it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lowmem_icl.errors import InputError
from lowmem_icl.options import did_you_mean
from lowmem_icl.tasks.catalogue import HARNESS_PREFIX

SCORED_TYPES = ("multiple_choice", "loglikelihood")
DEFAULT_TYPE = "generate_until"
"""What a definition that does not say is scored by."""
NAMED_IN_MESSAGES = 3

Fields = Mapping[str, Any]

_GROUP_FIELDS = frozenset(GroupConfig.__dataclass_fields__)
# What says how a task is listed, or how many demonstrations it has, which --shots says.
_UNUSED = frozenset({"task", "task_alias", "tag", "num_fewshot"})


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness: its name in our tables, and the fields that its definition is overridden by,
    `task` among them; all of them where the definition stands in a group.

    output_type: what it is scored by, so far as the index says.
    """

    name: str
    fields: Fields
    output_type: str


@cache
def task_manager() -> TaskManager:
    """Return the index of the harness's own tasks, which takes seconds to make."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def harness_tasks(name: str) -> tuple[HarnessTask, ...]:
    """Return the tasks that `lm-eval:NAME` stands for: itself, or those of a group or a tag, each once.

    Raises InputError for a name that the harness does not know, and for tasks that are not scored by
    log-likelihoods.
    """
    wanted = name.removeprefix(HARNESS_PREFIX)
    if not wanted.strip():
        # Before the index is made, which takes seconds.
        raise InputError(f"--tasks: expected a task of lm-eval after '{HARNESS_PREFIX}', got none; name one")
    found = tuple(_tasks_of(wanted))
    refused = [task for task in found if task.output_type not in SCORED_TYPES]
    kinds = ", ".join(sorted({task.output_type for task in refused}))
    if refused and len(refused) == len(found):
        raise InputError(f"--tasks: {name} is scored by {kinds}; expected {' or '.join(SCORED_TYPES)}")
    if refused:
        raise InputError(
            f"--tasks: {len(refused)} of the {len(found)} tasks of {name} are scored by {kinds} "
            f"({_listed(refused)}); expected {' or '.join(SCORED_TYPES)}; name the others one by one"
        )
    return found


def harness_task(name: str) -> HarnessTask:
    """Return the task that `lm-eval:NAME` is; raise InputError where it stands for several."""
    found = harness_tasks(name)
    if len(found) > 1 or found[0].name != name:
        raise InputError(f"{name} stands for {len(found)} tasks of lm-eval; name one: {_listed(found)}")
    return found[0]


def expanded_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return tasks by name, with the tasks of the harness's groups and tags in their place.

    Raises InputError where a task is then listed twice.
    """
    if not any(name.startswith(HARNESS_PREFIX) for name in names):
        return tuple(names)
    owners: dict[str, str] = {}
    for name in names:
        of_harness = name.startswith(HARNESS_PREFIX)
        for task in [each.name for each in harness_tasks(name)] if of_harness else [name]:
            if task in owners:
                raise InputError(
                    f"--tasks: '{task}' is listed twice, by {owners[task]} and by {name}; name it once"
                )
            owners[task] = name
    return tuple(owners)


def _listed(tasks: Sequence[HarnessTask]) -> str:
    names = [task.name for task in tasks[:NAMED_IN_MESSAGES]]
    return ", ".join(names) + (", …" if len(tasks) > NAMED_IN_MESSAGES else "")


def _tasks_of(wanted: str) -> list[HarnessTask]:
    """Return what a name stands for, each task once."""
    index = task_manager().task_index
    # A task that a group defines is found by going through the group.
    entry = wanted if wanted in index else wanted.split("::")[0]
    if entry not in index:
        raise InputError(f"--tasks: lm-eval knows no task '{wanted}'{did_you_mean(wanted, list(index))}")
    tasks = {task.name: task for task in _of_entry(entry, {}, entry)}
    if entry != wanted:
        name = f"{HARNESS_PREFIX}{wanted}"
        tasks = {name: tasks[name]} if name in tasks else {}
    if not tasks:
        raise InputError(
            f"--tasks: lm-eval's group '{entry}' has no task for '{wanted}'; name one that it has"
        )
    return list(tasks.values())


def _of_entry(name: str, changes: Fields, owner: str) -> Iterator[HarnessTask]:
    """Yield the tasks of an entry of the index; `changes` to their definitions are those of group `owner`."""
    index = task_manager().task_index
    entry = index[name]
    fields = entry.cfg
    if fields is None:
        for member in sorted(entry.tags & index.keys()):
            yield from _of_entry(member, changes, owner)
    elif "group" in fields and "class" not in fields:
        # The index leaves functions unresolved.
        whole = load_yaml(entry.yaml_path, resolve_func=True) if entry.yaml_path else fields
        yield from _of_group(name, whole, changes, owner)
    else:
        own = f"{owner}::{name}" if changes else name
        output_type = str({**fields, **changes}.get("output_type", DEFAULT_TYPE))
        yield HarnessTask(f"{HARNESS_PREFIX}{own}", {"task": name, **changes}, output_type)


def _of_group(name: str, fields: Fields, changes: Fields, owner: str) -> Iterator[HarnessTask]:
    """Yield the tasks of a group in its order. What a group around it changes goes before what it says of all
    of its tasks itself, and what it says of one of them before both.
    """
    index = task_manager().task_index
    owner = owner if changes else name
    of_all = {**_without(fields, _GROUP_FIELDS | _UNUSED), **changes}
    members = fields.get("task")
    for member in members if isinstance(members, list) else []:
        own = {"task": member} if isinstance(member, str) else dict(member)
        inner, task = own.pop("group", None), own.get("task")
        of_member = {**of_all, **_without(own, _UNUSED)}
        if inner is not None and inner not in index:
            yield from _of_group(f"{owner}::{inner}", own, of_all, f"{owner}::{inner}")
        elif (known := str(task if inner is None else inner)) in index:
            yield from _of_entry(known, of_member, owner)
        else:
            output_type = str(of_member.get("output_type", DEFAULT_TYPE))
            inline = {"task": task, **of_member}
            yield HarnessTask(f"{HARNESS_PREFIX}{owner}::{task}", inline, output_type)


def _without(fields: Fields, names: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
