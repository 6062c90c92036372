"""What every pass over the layers works with."""

from collections.abc import Callable
from dataclasses import dataclass, field

from lowmem_icl.engine.cache import CleanCache
from lowmem_icl.engine.cost import SweepCost
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.masks.mask import Mask
from lowmem_icl.model.streamed import StreamedModel

Account = Callable[[SweepCost], None]
AfterStep = Callable[[], None]


def ignore_cost(cost: SweepCost) -> None:
    """Count nothing: where nobody asks, and where work is done again."""


def _go_on() -> None:
    """Never stop a pass."""


@dataclass(frozen=True)
class Lost:
    """Where a job met its first value that is not finite: the document, by its number among the job's, the
    part of the model in words, and what was removed; of patches `change` is the index of the change.
    """

    job: int
    document: int
    where: str
    mask: Mask = Mask()
    change: int | None = None


@dataclass(frozen=True)
class PassSetup:
    """The model, what a pass may use, and who hears of it.

    `cache` must hold as much as `limits` say: schedules rely on it. `account` hears of everything that is
    computed, `after_step` called when a wave (sweeps), a block (gradients) or a layer (scores of heads) is
    whole; an error that it raises stops the pass, and what is whole by then stays. `lost` gets
    jobs that met values which are not finite, once each; what these have is no result.
    """

    model: StreamedModel
    limits: SweepLimits
    cache: CleanCache
    account: Account = ignore_cost
    after_step: AfterStep = _go_on
    lost: list[Lost] = field(default_factory=list)

    def __post_init__(self) -> None:
        promised = (self.limits.cache_bytes, self.limits.disk_bytes)
        given = (self.cache.memory_bytes, self.cache.disk_bytes)
        if given[0] < promised[0] or given[1] < promised[1]:
            raise ValueError(
                f"cache: expected at least {promised} bytes of memory and disk as the limits say, got {given}"
            )
