"""The overlap stage: all rankings that the run has made, compared."""

from collections.abc import Iterator

from lowmem_icl.experiments.overlap import measure
from lowmem_icl.session.prepare import Prepared
from lowmem_icl.session.result import StageResult, rankings_of, stamp
from lowmem_icl.session.work import Part, Work
from lowmem_icl.tables import blocks


def parts(prepared: Prepared, importance: StageResult | None, ablate: StageResult | None) -> list[Part]:
    """Return nothing: rankings are compared without the model."""
    return []


def run(work: Work, importance: StageResult | None, ablate: StageResult | None) -> Iterator[StageResult]:
    """Compare every two rankings that differ in one thing only."""
    rankings, prepared = rankings_of(importance, ablate), work.prepared
    found = measure.overlap_records(rankings.heads, rankings.documents, prepared.options.seed)
    asked = {"importance", "ablate"} & set(prepared.options.experiments)
    missing = "overlap: no rankings to compare; run it with importance or ablate"
    yield StageResult(
        results=blocks.frame("results", found, stamp(prepared, "overlap")),
        warnings=() if rankings.heads or asked else (missing,),
    )
