"""How parts that patch prompts are done, or found where an earlier run did them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.passes import GradientJob, unit_gradients
from lowmem_icl.engine.patching import patch
from lowmem_icl.engine.setup import Lost
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.engine.written import written_by_heads
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.session.failures import Setting
from lowmem_icl.session.part_jobs import Source, means_name, prompts_job
from lowmem_icl.session.parts import Draft, by_job
from lowmem_icl.session.patch_parts import FROM_THE_OTHER, PatchEstimatesPart, PatchPart
from lowmem_icl.session.work import Made, Work


def patched(work: Work, part: PatchPart) -> list[Scores]:
    """Return the scores of a part's jobs under every change; raise OutOfTime between two blocks,
    SettingsFailed where some are not finite.
    """

    def make(draft: Draft, wanted: Sequence[int]) -> Made:
        asked = replace(part, jobs=tuple(part.jobs[index] for index in wanted))
        scores = [Scores.empty(len(job.changes), len(job.into.row.answered)) for job in asked.jobs]
        draft.resume(lambda: by_job(scores))
        cost = asked.cost(work.prepared, work.limits, ())
        with work.counted(part.label, cost, asked.ablations) as advance:
            setup = work.setup(advance, draft)
            patch(setup, asked.jobs, scores)
        return scores, setup.lost

    return [Scores(**fields) for fields in work.made(part.name, part.part_jobs, make)]


@dataclass(frozen=True, eq=False)
class _Vectors:
    """Vectors [F, D]."""

    vectors: NDArray[np.float32]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"vectors": self.vectors}


def written_vectors(
    work: Work, name: str, heads: Sequence[tuple[UnitMeans, Mask]]
) -> Sequence[NDArray[np.float32]]:
    """Return what the heads of each mask write into the residual at their means, [D] each; `name`: the file
    that keeps it. Raises SettingsFailed where that is not finite.
    """

    def make(draft: Draft, wanted: Sequence[int]) -> Made:
        vectors = written_by_heads(work.model, heads)
        is_lost = not np.isfinite(np.square(vectors).sum()).all()
        return [_Vectors(vectors)], [Lost(0, 0, "what heads write")] if is_lost else []

    content = [(means_name(means), sorted(mask.heads)) for means, mask in heads]
    job = prompts_job(content, [Source(Setting(), "function vectors")])
    return list(work.made(name, [job], make)[0]["vectors"])


def patch_estimates(work: Work, part: PatchEstimatesPart) -> UnitGradients:
    """Return the unit gradients of a part's rows, whose signed terms are of the other prompt's values; raise
    SettingsFailed where some are not finite.
    """

    def make(draft: Draft, wanted: Sequence[int]) -> Made:
        skeleton = work.prepared.skeleton
        owners = 1 + max(int(row.owners.max()) for row in part.rows)
        found = UnitGradients.empty(owners, len(part.rows), skeleton.layers, skeleton.heads)
        draft.resume(lambda: by_job([found]))
        job = GradientJob(part.rows, _every_option, Mask(fill=FROM_THE_OTHER), part.fills)
        cost = replace(part.cost(work.prepared, work.limits, ()), answers=0)
        with work.counted(part.label, cost) as advance:
            setup = work.setup(advance, draft)
            unit_gradients(setup, [job], [found])
        return [found], setup.lost

    return UnitGradients(**work.made(part.name, part.part_jobs, make)[0])


def _every_option(logprobs: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.ones(len(logprobs), dtype=np.bool_)
