"""The page's section on the reference protocol: what the paper's code does, and what of it was done here."""

import polars as pl

from lowmem_icl.protocols import DIFFERENCES, REFERENCE
from lowmem_icl.report.section import Record, Section

TEXT = "The reference protocol does what the paper's code does, so that its numbers can be compared."
COLUMNS = ("what the code does", "plain bug", "done here")


def protocol_section(results: pl.DataFrame, record: Record) -> Section | None:
    """Return the differences between the protocols; None where the run is in the corrected one."""
    if record["options"]["protocol"] != REFERENCE.name:
        return None
    return Section(
        "Protocol",
        TEXT,
        columns=COLUMNS,
        rows=[
            [difference.sentence, _yes(difference.plain_bug), _yes(difference.imitated)]
            for difference in DIFFERENCES
        ],
    )


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
