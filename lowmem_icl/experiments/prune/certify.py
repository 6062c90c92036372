"""Certificates of greedy searches: how far along its path a search's masks keep the tolerance, shown on
training documents that chose nothing.

A search's masks are nested. A few of them, fixed beforehand, are tested in order of size until one fails; so
all that pass keep the tolerance together (statistics.certificate).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.evaluate.stage import CHUNK
from lowmem_icl.experiments.prune.search import SearchPlan
from lowmem_icl.experiments.prune.settings import Setting, settings_of
from lowmem_icl.masks.mask import Mask, Unit
from lowmem_icl.session.chunks import scores_by_task, sweep_in_chunks
from lowmem_icl.session.document_limits import BOUNDED_OBJECTIVES
from lowmem_icl.session.fills import clean_beside, fill_for_all
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.work import Part, SweepPart, Work
from lowmem_icl.statistics.certificate import (
    LEVEL,
    cluster_means,
    documents_needed,
    p_value_of_loss,
    passed_in_order,
)
from lowmem_icl.tasks.document_counts import limit_words
from lowmem_icl.tasks.scoring import document_scores

MOST_TESTED = 16
MASKS_PER_SWEEP = 4
PART = "prune-certify"
LABEL = "certify masks"

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """What testing a path came to: the masks that were tested, smallest first, their p-values, on how many
    independent documents (of each task).
    """

    masks: tuple[Mask, ...]
    p_values: tuple[float, ...]
    documents: int

    @property
    def mask(self) -> Mask:
        """The largest mask that is certified; the empty one where none is."""
        passed = passed_in_order(self.p_values)
        return self.masks[passed - 1] if passed else Mask()

    def as_record(self) -> dict[str, Any]:
        """Return plain values for run.json."""
        return {
            "units": [len(mask) for mask in self.masks],
            "p_values": list(self.p_values),
            "certified_units": len(self.mask),
            "documents": self.documents,
        }


def path_masks(removed: Sequence[Unit]) -> tuple[Mask, ...]:
    """Return the masks to test of the path on which units were removed one by one: at most MOST_TESTED, their
    sizes evenly spaced, the whole path being the last.
    """
    count = min(len(removed), MOST_TESTED)
    ends = [0, *(len(removed) * number // count for number in range(1, count + 1))]
    steps = (_mask_of(removed[start:end]) for start, end in pairwise(ends))
    return tuple(accumulate(steps, lambda mask, step: mask | step))


def _mask_of(units: Sequence[Unit]) -> Mask:
    masks = [unit.as_mask() for unit in units]
    return Mask(
        frozenset().union(*(mask.heads for mask in masks)), frozenset().union(*(mask.ffns for mask in masks))
    )


def certifiable(prepared: Prepared) -> list[Setting]:
    """Return the settings whose tasks all have as many further documents as a certificate needs."""
    if not prepared.certify:
        return []
    enough = _independent_documents(prepared)
    needed = documents_needed(prepared.options.tolerance)
    return [
        setting
        for setting in settings_of(prepared)
        if all(enough[index] >= needed for index in setting.tasks)
    ]


def _independent_documents(prepared: Prepared) -> list[int]:
    return [len(set(task.clusters)) for task in prepared.certify]


def notes(prepared: Prepared) -> tuple[str, ...]:
    """Return sentences on the certificates that a run cannot give, and what they would need."""
    options = prepared.options
    if options.certify_limit == 0 or "prune" not in options.experiments:
        return ()
    if options.objective not in BOUNDED_OBJECTIVES:
        return (
            f"prune: no certificate: how much {options.objective} a document can lose has no bound; "
            f"--objective {' or '.join(BOUNDED_OBJECTIVES)} has one",
        )
    needed = documents_needed(options.tolerance)
    lacking: dict[str, list[int]] = {}
    for task, count in zip(prepared.certify, _independent_documents(prepared), strict=True):
        if count < needed:
            lacking.setdefault(task.task, []).append(count)
    if not lacking:
        return ()
    counts = ", ".join(f"{task} {_range_text(counts)}" for task, counts in lacking.items())
    return (
        "prune: no certificate where the search leaves too few training documents (independent ones: "
        f"{counts}); a tolerance of {options.tolerance:g} needs {needed}, a larger --tolerance fewer",
    )


def _range_text(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def need(prepared: Prepared) -> str:
    """Return a sentence on how many documents a certificate takes; empty where none is asked for."""
    if not prepared.certify:
        return ""
    options = prepared.options
    return (
        f"prune: a certificate of tolerance {options.tolerance:g} needs at least "
        f"{documents_needed(options.tolerance)} training documents beyond the search's "
        f"{limit_words(options.resolved_train_limit)}; possible for {len(certifiable(prepared))} of "
        f"{len(settings_of(prepared))} searches"
    )


def parts(prepared: Prepared, plan: SearchPlan) -> Iterator[SweepPart]:
    """Yield the sweeps of certificates as if every search removed all units and no test failed."""
    masks = path_masks([unit for together in plan.visits() for unit in together])
    settings = {setting.mask_name("certified"): setting for setting in certifiable(prepared)}
    for start in range(0, len(masks) if settings else 0, MASKS_PER_SWEEP):
        asked = dict.fromkeys(settings, masks[start : start + MASKS_PER_SWEEP])
        for part in _Step(prepared, settings, asked, start).sweeps:
            # What is asked for is not known before, so finished parts are not these.
            yield replace(part, name="")


def is_part(part: Part) -> bool:
    """Tell whether a planned part is one of certificates."""
    return part.label.startswith(LABEL)


def certificates(
    work: Work, settings: Mapping[str, Setting], paths: Mapping[str, Sequence[Unit]]
) -> dict[str, Certificate]:
    """Test the paths of searches by name, all side by side, a few masks in each sweep.

    Those that lack documents, or removed nothing, are left out.
    """
    prepared = work.prepared
    possible = certifiable(prepared)
    tested = {name: path_masks(paths[name]) for name, setting in settings.items() if setting in possible}
    found = {name: Certificate((), (), 0) for name, masks in tested.items() if masks}
    for start in range(0, MOST_TESTED, MASKS_PER_SWEEP):
        asked = {
            name: tested[name][start : start + MASKS_PER_SWEEP]
            for name, certificate in found.items()
            if len(tested[name]) > start and passed_in_order(certificate.p_values) == start
        }
        if not asked:
            break
        step = _Step(prepared, settings, asked, start)
        for name, losses in step.losses(work).items():
            p_values = p_value_of_loss(losses, prepared.options.tolerance)
            before = found[name]
            found[name] = Certificate(
                before.masks + asked[name],
                before.p_values + tuple(float(p) for p in p_values),
                losses.shape[-1],
            )
    return found


class _Step:
    """A few masks of every path that is still tested, and the sweeps that score them."""

    def __init__(
        self,
        prepared: Prepared,
        settings: Mapping[str, Setting],
        asked: Mapping[str, tuple[Mask, ...]],
        start: int,
    ) -> None:
        self._prepared, self._settings = prepared, settings
        self._asked = {name: settings[name].filled(prepared.options, masks) for name, masks in asked.items()}
        clean = clean_beside(fill_for_all(prepared.options))
        self._masks: dict[int, dict[Mask, int]] = {}
        for name, masks in self._asked.items():
            for index in settings[name].tasks:
                numbers = self._masks.setdefault(index, {clean: 0})
                for mask in masks:
                    numbers.setdefault(mask, len(numbers))
        self._tasks = [prepared.certify[index] for index in self._masks]
        self.sweeps = sweep_in_chunks(
            f"{PART}-{start:02d}",
            f"{LABEL} {start + 1} to {start + MASKS_PER_SWEEP}",
            self._tasks,
            [tuple(masks) for masks in self._masks.values()],
            CHUNK,
        )

    def losses(self, work: Work) -> dict[str, Values]:
        """Return what every cluster of documents loses under the masks of each path, [M, G].

        Of all tasks together: the mean over tasks of their first clusters' losses, of their second, and so
        on, as many as the smallest has.
        """
        scores = scores_by_task(self._tasks, self.sweeps, [work.sweep(part) for part in self.sweeps])
        objective = self._prepared.options.objective
        lost: dict[int, Values] = {}
        for index, task, score in zip(self._masks, self._tasks, scores, strict=True):
            values = document_scores(task, score.logprobs, score.greedy)[objective]
            lost[index] = cluster_means(values[0] - values, task.clusters)
        return {name: self._of_path(name, lost) for name in self._asked}

    def _of_path(self, name: str, lost: Mapping[int, Values]) -> Values:
        members = [
            lost[index][[self._masks[index][mask] for mask in self._asked[name]]]
            for index in self._settings[name].tasks
        ]
        smallest = min(member.shape[-1] for member in members)
        return np.asarray(np.mean([member[:, :smallest] for member in members], axis=0))


def empty_note(found: Mapping[str, Certificate]) -> tuple[str, ...]:
    """Return a sentence on the searches none of whose masks is certified, where there are any."""
    empty = [name for name, certificate in found.items() if not certificate.mask]
    if not empty:
        return ()
    return (
        f"prune: on {len(empty)} of {len(found)} paths that were tested no mask is certified to keep the "
        f"tolerance ({100 * (1 - LEVEL):g} % confidence), so there is no such file: {', '.join(empty)}",
    )
