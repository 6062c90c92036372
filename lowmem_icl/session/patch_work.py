"""How parts that patch prompts are done, or found where an earlier run did them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.engine.answers import Scores
from lowmem_icl.engine.passes import GradientJob, unit_gradients
from lowmem_icl.engine.patching import patch
from lowmem_icl.engine.unit_gradients import UnitGradients
from lowmem_icl.engine.written import written_by_heads
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.session.parts import Draft, by_job, of_jobs
from lowmem_icl.session.patch_parts import FROM_THE_OTHER, PatchEstimatesPart, PatchPart
from lowmem_icl.session.work import Work


def patched(work: Work, part: PatchPart) -> list[Scores]:
    """Return the scores of a part's jobs under every change; raise OutOfTime between two blocks."""

    def make(draft: Draft) -> dict[str, NDArray[Any]]:
        work.check_time()
        scores = [Scores.empty(len(job.changes), len(job.into.row.answered)) for job in part.jobs]
        draft.resume(lambda: by_job(scores))
        cost = part.cost(work.prepared, work.limits, ())
        with work.counted(part.label, cost, part.ablations) as advance:
            patch(work.setup(advance, draft), part.jobs, scores)
        return by_job(scores)

    return [Scores(**fields) for fields in of_jobs(work.made(part.name, make))]


def written_vectors(
    work: Work, name: str, heads: Sequence[tuple[UnitMeans, Mask]]
) -> Sequence[NDArray[np.float32]]:
    """Return what the heads of each mask write into the residual at their means, [D] each; `name`: the file
    that keeps it.
    """

    def make(draft: Draft) -> dict[str, NDArray[Any]]:
        work.check_time()
        return {"vectors": written_by_heads(work.model, heads)}

    return list(work.made(name, make)["vectors"])


def patch_estimates(work: Work, part: PatchEstimatesPart) -> UnitGradients:
    """Return the unit gradients of a part's rows, whose signed terms are of the other prompt's values."""

    def make(draft: Draft) -> dict[str, NDArray[Any]]:
        work.check_time()
        skeleton = work.prepared.skeleton
        owners = 1 + max(int(row.owners.max()) for row in part.rows)
        found = UnitGradients.empty(owners, len(part.rows), skeleton.layers, skeleton.heads)
        draft.resume(found.arrays)
        job = GradientJob(part.rows, _every_option, Mask(fill=FROM_THE_OTHER), part.fills)
        cost = replace(part.cost(work.prepared, work.limits, ()), answers=0)
        with work.counted(part.label, cost) as advance:
            unit_gradients(work.setup(advance, draft), [job], [found])
        return found.arrays()

    return UnitGradients(**work.made(part.name, make))


def _every_option(logprobs: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.ones(len(logprobs), dtype=np.bool_)
