"""What a run could not do because values were not finite, by stage and setting, and what is left of it."""

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from typing import Any

from lowmem_icl.engine.places import of_unit
from lowmem_icl.engine.setup import Lost
from lowmem_icl.errors import NotFinite
from lowmem_icl.masks.mask import Mask
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.tasks.documents import TaskRows

MOST_NAMED = 3
REMEDY = (
    "other weights (--weights float32, or a file that was not damaged) may do; the same command tries again"
)


@dataclass(frozen=True)
class Setting:
    """What numbers are of: a task at a shot count and what its demonstrations show, or a file of the user's,
    whose shot count is None. Nothing of these: all of a stage.
    """

    task: str | None = None
    shots: int | None = None
    labels: str = "right"

    @classmethod
    def of(cls, task: TaskRows) -> "Setting":
        """Return the setting of a task's documents."""
        return cls(task.task, task.shots, task.labels)

    def __str__(self) -> str:
        if self.task is None:
            return "all of it"
        if self.shots is None:
            return self.task
        labels = "" if self.labels == "right" else f", {self.labels} prompts"
        return f"{self.task} at {self.shots} shot{'' if self.shots == 1 else 's'}{labels}"


@dataclass(frozen=True)
class Failure:
    """A setting that a stage could not do, and why, in a sentence."""

    setting: Setting
    reason: str
    stage: str = ""

    @property
    def sentence(self) -> str:
        """What is told of it."""
        stage = f"{self.stage}: " if self.stage else ""
        return f"{stage}{self.setting}: {self.reason}"

    def as_record(self) -> dict[str, Any]:
        """Return plain values for run.json."""
        return {
            "stage": self.stage,
            "task": self.setting.task,
            "shots": self.setting.shots,
            "labels": self.setting.labels,
            "sentence": self.sentence,
        }


class SettingsFailed(NotFinite):
    """Settings of a part met values that are not finite; what the part has of others is kept."""

    def __init__(self, failures: Iterable[Failure]) -> None:
        first: dict[Setting, Failure] = {}
        for failure in failures:
            first.setdefault(failure.setting, failure)
        self.failures = tuple(first.values())
        super().__init__("; ".join(failure.sentence for failure in self.failures) + f"; {REMEDY}")


def reason_of(lost: Lost, document: str) -> str:
    """Return what was met where, in words; document: which of the setting's it was."""
    removed = f" without {_units(lost.mask)}" if lost.mask else ""
    too_large = "values that are not finite, or too large for a norm in float32"
    return f"{document}: {lost.where}{removed} gives {too_large}"


def _units(mask: Mask) -> str:
    units = list(mask.units())
    if len(units) == 1:
        return of_unit(units[0])
    if len(units) > MOST_NAMED:
        return f"{len(units)} units"
    return ", ".join(map(str, units))


def without(prepared: Prepared, failed: Set[Setting]) -> Prepared:
    """Return a run without settings: their documents, or those of what the user gives."""
    if not failed:
        return prepared

    def left(rows: tuple[TaskRows, ...]) -> tuple[TaskRows, ...]:
        # Where right labels failed there is nothing that others could be compared with.
        return tuple(
            task for task in rows if failed.isdisjoint({Setting(task.task, task.shots), Setting.of(task)})
        )

    names = {setting.task for setting in failed if setting.shots is None}
    given, options = prepared.given, prepared.options
    if options.pairs is not None and options.pairs.stem in names:
        given = replace(given, pairs=())
    if options.clean is not None and options.clean.stem in names:
        given = replace(given, prompts=None)
    if TEXT.task in names:
        given = replace(given, text=None)
    return replace(
        prepared,
        given=given,
        evaluate=left(prepared.evaluate),
        train=left(prepared.train),
        importance=left(prepared.importance),
        curves=left(prepared.curves),
        certify=left(prepared.certify),
        label_controls=left(prepared.label_controls),
        train_controls=left(prepared.train_controls),
        corrupted=left(prepared.corrupted),
    )


TEXT = Setting("text", None)
"""What icl-heads removes heads from besides tasks' prompts."""
