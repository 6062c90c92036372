"""The greedy searches of the prune stage: in lockstep, compared with masks of equal size, all judged on other
documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.experiments.importance.stage import ImportanceResult
from lowmem_icl.experiments.prune import certify, search
from lowmem_icl.experiments.prune.exact import greedy_search
from lowmem_icl.experiments.prune.expected import search_parts
from lowmem_icl.experiments.prune.judging import CleanEvaluation, judged, judging_parts
from lowmem_icl.experiments.prune.known import known_costs
from lowmem_icl.experiments.prune.nested import nested_search
from lowmem_icl.experiments.prune.settings import (
    CERTIFIED,
    METHODS,
    Setting,
    effort_of,
    search_plan,
    settings_of,
)
from lowmem_icl.experiments.prune.steps import StepScorer, half_of
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.rankings import RankingKey, lowest_ffns, lowest_heads, random_mask
from lowmem_icl.protocols import AGGREGATE
from lowmem_icl.session.fills import expected_mask
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import MaskResult, Rankings, StageResult, rankings_of
from lowmem_icl.session.work import Part, Work
from lowmem_icl.statistics.certificate import LEVEL
from lowmem_icl.statistics.intervals import MEAN, documents_for, mean_interval, mean_of_estimates
from lowmem_icl.tasks.documents import TaskRows

INSTEAD = "the gradient ranking's mask of equal size, which lost less on the checking half"

Values = NDArray[np.float64]


def parts(prepared: Prepared) -> Iterator[Part]:
    """Yield the work that searches are expected to ask for, and the judging of their masks."""
    plan = search_plan(prepared)
    yield from search_parts(prepared, plan)
    yield from certify.parts(prepared, plan)
    stand_in = expected_mask(prepared.options, Mask(ffns=frozenset([0])))
    certifiable = certify.certifiable(prepared)
    yield from judging_parts(
        prepared,
        [
            MaskResult(setting.mask_name(method), stand_in, method, setting.task, setting.shots, 0)
            for setting in settings_of(prepared)
            for method in (*METHODS, *([CERTIFIED] if setting in certifiable else []))
        ],
    )


def run(
    work: Work, importance: ImportanceResult | None, ablate: StageResult | None, clean: CleanEvaluation
) -> StageResult:
    """Search greedy masks on the training documents; report them, what of them is certified and others of
    equal size on the evaluation split.
    """
    found = search_masks(work, importance, ablate)
    results, masks = judged(work, found.masks, clean)
    record = {"greedy": found.checked, "certificates": found.certificates}
    return StageResult(results=results, masks=masks, warnings=found.warnings, record=record)


@dataclass(frozen=True)
class FoundMasks:
    """What searches end with: masks, those that are certified and others of equal size, what they lose on the
    checking half, what testing came to, and warnings.
    """

    masks: tuple[MaskResult, ...]
    checked: list[dict[str, Any]]
    certificates: list[dict[str, Any]]
    warnings: tuple[str, ...]


def search_masks(work: Work, importance: ImportanceResult | None, ablate: StageResult | None) -> FoundMasks:
    """Run the greedy searches of every task and shot count, and of all tasks together, in lockstep.

    Each mask is compared with one by the gradient ranking and one drawn at random of equal size; the largest
    mask on a search's path that is certified stands beside it. `checked`: for run.json, what they lose on the
    checking half (`check_loss`, in the objective's unit).
    """
    prepared, options = work.prepared, work.prepared.options
    settings = {setting.mask_name("greedy"): setting for setting in settings_of(prepared)}
    scorer = StepScorer(work, settings)
    found = search.in_lockstep(_searches(prepared, settings, importance, ablate), scorer.step)
    by_gradient = _gradient_masks(settings, found, rankings_of(importance, ablate))
    compared = scorer.compare(
        {name: search.Request("check", (Mask(), mask)) for name, mask in by_gradient.items()}
    )
    paths = {name: [unit for unit, _ in pruned.steps] for name, pruned in found.items()}
    certificates = certify.certificates(work, settings, paths)
    made: list[MaskResult] = []
    checked: list[dict[str, Any]] = []
    for name, setting in settings.items():
        result, returned, note = found[name], found[name].mask, ""
        check = _check_of(prepared, setting)
        checked.append(check("greedy", result.document_losses))
        if name in compared:
            checked.append(check("gradient", search.document_losses(*compared[name])))
            lost = checked[-1]["check_loss"]
            made.append(_made(prepared, setting, "gradient", by_gradient[name]))
            if lost < result.lost:
                returned, note = by_gradient[name], INSTEAD
        made.append(replace(_made(prepared, setting, "greedy", returned), note=note))
        made += _certified_mask(prepared, setting, certificates.get(name))
        made.append(_random_mask(prepared, setting, result.mask))
    return FoundMasks(
        tuple(made),
        checked,
        [_of_setting(settings[name]) | tested.as_record() for name, tested in certificates.items()],
        (
            *tolerance_note(checked, options.tolerance, max(len(task.documents) for task in prepared.train)),
            *certify.notes(prepared),
            *certify.empty_note(certificates),
        ),
    )


def _searches(
    prepared: Prepared,
    settings: Mapping[str, Setting],
    importance: ImportanceResult | None,
    ablate: StageResult | None,
) -> dict[str, search.Search]:
    """Return a search for every setting, by its mask's name, none of which has begun."""
    plan, tolerance = search_plan(prepared), prepared.options.tolerance
    effort = effort_of(prepared, plan)
    if effort is None:
        return {name: greedy_search(plan, tolerance) for name in settings}
    return {
        name: nested_search(plan, tolerance, effort, known_costs(prepared, setting, plan, importance, ablate))
        for name, setting in settings.items()
    }


def _made(prepared: Prepared, setting: Setting, method: str, mask: Mask) -> MaskResult:
    documents = _documents(prepared.train, setting)
    (mask,) = setting.filled(prepared.options, [mask])
    return MaskResult(setting.mask_name(method), mask, method, setting.task, setting.shots, documents)


def _random_mask(prepared: Prepared, setting: Setting, mask: Mask) -> MaskResult:
    """Return a mask drawn at random of another's size."""
    skeleton, seed = prepared.skeleton, prepared.options.seed
    drawn = random_mask(skeleton.layers, skeleton.heads, len(mask.heads), len(mask.ffns), seed)
    return replace(_made(prepared, setting, "random", drawn), seed=seed)


def _certified_mask(
    prepared: Prepared, setting: Setting, certificate: certify.Certificate | None
) -> Iterator[MaskResult]:
    """Yield the mask that is certified, unless it is empty."""
    if certificate is None or not certificate.mask:
        return
    documents = _documents(prepared.train, setting) + _documents(prepared.certify, setting)
    note = (
        f"loses at most {prepared.options.tolerance:g} of {prepared.options.objective}, certified with "
        f"{100 * (1 - LEVEL):g} % confidence on {certificate.documents} documents"
        f"{' of each task' if setting.task == AGGREGATE else ''} that the search did not see"
    )
    made = _made(prepared, setting, CERTIFIED, certificate.mask)
    yield replace(made, documents=documents, note=note)


def _documents(tasks: Sequence[TaskRows], setting: Setting) -> int:
    return sum(len(tasks[index].documents) for index in setting.tasks)


def _gradient_masks(
    settings: Mapping[str, Setting], found: Mapping[str, search.Pruned], rankings: Rankings
) -> dict[str, Mask]:
    """Return, for every search that has a gradient ranking, that ranking's mask of equal size."""
    masks = {}
    for name, setting in settings.items():
        key, mask = RankingKey(setting.task, setting.shots, "gradient"), found[name].mask
        if key in rankings.heads:
            heads = lowest_heads(rankings.heads[key], len(mask.heads))
            masks[name] = heads | lowest_ffns(rankings.ffns[key], len(mask.ffns))
    return masks


def _check_of(prepared: Prepared, setting: Setting) -> Callable[[str, search.Answer], dict[str, Any]]:
    """Return what turns the losses of the documents on the checking half, by method, into a record."""
    tasks = [prepared.train[index] for index in setting.tasks]
    clusters = [half_of(task, "check").clusters for task in tasks]
    documents = sum(len(of_task) for of_task in clusters)

    def checked(method: str, losses: search.Answer) -> dict[str, Any]:
        lost, stderr = mean_loss(losses, clusters)
        named = {"method": method, "mask": setting.mask_name(method)}
        return _of_setting(setting) | named | {"check_loss": lost, "stderr": stderr, "documents": documents}

    return checked


def mean_loss(losses: search.Answer, clusters: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Return the mean loss and its standard error of groups that weigh the same, from their documents' losses
    [N] each; NaN where no group has two clusters.
    """
    members = [mean_interval(*of_group, MEAN) for of_group in zip(losses, clusters, strict=True)]
    whole = mean_of_estimates(members)
    return whole.value, whole.stderr


def _of_setting(setting: Setting) -> dict[str, Any]:
    return {"task": setting.task, "shots": setting.shots}


def tolerance_note(checked: Sequence[Mapping[str, Any]], tolerance: float, training: int) -> list[str]:
    """Return a warning where the tolerance is finer than the documents can tell, with how many would.

    checked: the records of `_check_of`; training: how many training documents a task has at most, half of
    which check.
    """
    searched = [check for check in checked if check["method"] == "greedy"]
    coarse = [check for check in searched if not tolerance >= 2 * check["stderr"]]
    if not coarse:
        return []
    known = [check for check in coarse if np.isfinite(check["stderr"])]
    # Of a mean over tasks all tasks grow alike.
    needed = {
        check["mask"]: training
        * documents_for(check["stderr"], check["documents"], tolerance)
        / check["documents"]
        for check in known
    }
    text = (
        f"prune: a loss of {tolerance:g}, the tolerance, is less than the checking documents can see for "
        f"{len(coarse)} of {len(searched)} masks"
    )
    if needed:
        most = max(needed, key=lambda name: needed[name])
        half = f"{rounded_up(median(needed.values())):,} for half of these and " if len(needed) > 1 else ""
        text += (
            f"; to see it takes about {half}{rounded_up(needed[most]):,} training documents per task "
            f"(--train-limit; most for {most})"
        )
    if len(known) < len(coarse):
        text += (
            f"; for {len(coarse) - len(known)} nobody can say, since their documents share one prompt or one "
            "set of demonstrations"
        )
    return [text]


def rounded_up(number: float) -> int:
    """Return a number of documents with two digits, rounded up."""
    unit = 10 ** max(0, len(str(int(number))) - 2)
    return int(-(-number // unit) * unit)
