"""What greedy searches are for: every task at every shot count, and all tasks together."""

from dataclasses import dataclass

from lowmem_icl.masks.naming import mask_name
from lowmem_icl.protocols import AGGREGATE, in_domain
from lowmem_icl.session.prepare import Prepared

CERTIFIED = "certified"
"""The method of the part of a search's path that is certified."""
METHODS = ("greedy", "gradient", "random")
"""Of the mask that a search returns and those of its size that it is compared with."""


@dataclass(frozen=True)
class Setting:
    """What one search is for: a task, or all of them, at a shot count; `tasks` are the indices of the
    training tasks.
    """

    task: str
    shots: int
    tasks: tuple[int, ...]

    def mask_name(self, method: str) -> str:
        """Return the name of its mask by a method."""
        return mask_name(method, self.task, self.shots)


def settings_of(prepared: Prepared) -> list[Setting]:
    """Return every task at every shot count, and all tasks together where there are two."""
    tasks = prepared.train
    settings = [Setting(task.task, task.shots, (index,)) for index, task in enumerate(tasks)]
    for shots in prepared.options.resolved_shots:
        members = [index for index, task in enumerate(tasks) if task.shots == shots and in_domain(task.task)]
        if len(members) > 1:
            settings.append(Setting(AGGREGATE, shots, tuple(members)))
    return settings
