"""The form of run.json: the fields that are read back, by a later session or by the report, and their types.

Whatever else stands in the file is kept as it is. The top level tells of the newest session, except for
`started`, the first session's, and `stages`, the sum over all; `sessions` has a record per start, in order.
"""

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lowmem_icl.masks.mask import MOST_HEADS
from lowmem_icl.session.identity import Identity

RUN_FORMAT = "lowmem-icl-run/2"
State = Literal["running", "finished", "out of time", "stopped", "failed", "cut off"]
"""Of a session: at work; all done; --hours over; stopped by the user; ended by an error; killed at work."""


def _checked_time(text: str) -> str:
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("expected a time with its zone")
    return text


Time = Annotated[str, AfterValidator(_checked_time)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StageActuals(BaseModel):
    """What a stage took and what was planned for it, in one session or in all; whether it is finished."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    seconds: float
    planned_seconds: float
    read_bytes: int
    planned_read_bytes: int
    finished: bool

    def __add__(self, other: "StageActuals") -> "StageActuals":
        return StageActuals(
            seconds=round(self.seconds + other.seconds, 2),
            planned_seconds=round(self.planned_seconds + other.planned_seconds, 2),
            read_bytes=self.read_bytes + other.read_bytes,
            planned_read_bytes=self.planned_read_bytes + other.planned_read_bytes,
            finished=other.finished,
        )


class _Options(_Form):
    experiments: list[str]
    protocol: str
    objective: str
    tolerance: float
    seed: int


class _Model(_Form):
    id: str
    digest: str
    weights: str
    layers: Annotated[int, Field(gt=0, lt=10_000)]
    heads: Annotated[int, Field(gt=0, lt=10_000)]

    @model_validator(mode="after")
    def _has_heads_that_can_be_listed(self) -> "_Model":
        if self.layers * self.heads > MOST_HEADS:
            raise ValueError(f"expected at most {MOST_HEADS:,} heads, got {self.layers} times {self.heads}")
        return self


class _Task(_Form):
    task: str
    shots: int


class _PlannedStage(_Form):
    experiment: str
    seconds: float


class _Plan(_Form):
    stages: list[_PlannedStage]


class _Outlook(_Form):
    at: Time
    seconds_left: Annotated[float, Field(ge=0)]


class _Machine(_Form):
    processor: str
    threads: int
    cuda: str | None


class _GreedyCheck(_Form):
    task: str
    shots: int
    method: str
    check_loss: float


class _Certificate(_Form):
    task: str
    shots: int
    certified_units: Annotated[int, Field(ge=0)]


class _Sequences(_Form):
    sequences: int
    base_tokens: Annotated[list[int], Field(min_length=2, max_length=2)]
    base_tokens_wanted: Annotated[list[int], Field(min_length=2, max_length=2)]
    drawable_ids_ordered_by: str


class _Failure(_Form):
    stage: str
    task: str | None
    shots: int | None
    sentence: str


class _Session(_Form):
    started: Time
    finished: Time | None
    state: State
    stages: dict[str, StageActuals]


class _Tracked(_Form):
    id: str | None
    finished: bool


class RunRecord(_Form):
    """The content of run.json, as far as anything reads it."""

    format: Literal["lowmem-icl-run/2"]
    state: State
    started: Time
    finished: Time | None
    command: str
    options: _Options
    shots: list[int]
    train_limit: int | float
    identity: Identity
    versions: dict[str, str]
    model: _Model
    tasks: list[_Task]
    plan: _Plan
    outlook: _Outlook | None = None
    machine: _Machine
    stages: dict[str, StageActuals]
    warnings: list[str]
    sessions: Annotated[list[_Session], Field(min_length=1)]
    greedy: list[_GreedyCheck] = Field(default_factory=list)
    certificates: list[_Certificate] = Field(default_factory=list)
    induction: _Sequences | None = None
    failures: list[_Failure] = Field(default_factory=list)
    tracked: dict[str, _Tracked] = Field(default_factory=dict)
