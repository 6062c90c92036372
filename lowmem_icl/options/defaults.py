"""What a run takes where its options do not say: by model, and by preset."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEMO = "demo"
PACKAGED_MODEL_NAMES = ("gemma3-270m", "smollm2")
"""Real models that come from the package index, each by the name that `--model` takes."""


@dataclass(frozen=True)
class Defaults:
    """Limits count documents per task; None: all of them."""

    shots: tuple[int, ...] = (0, 1, 5)
    limit: int | None = None
    train_limit: int = 32
    curve_limit: int = 64


# On two cores.
_QUARTER_OF_AN_HOUR = Defaults(shots=(0, 5), limit=32, train_limit=12, curve_limit=16)
_BY_MODEL = {
    DEMO: Defaults(shots=(0, 4, 16)),
    **dict.fromkeys(PACKAGED_MODEL_NAMES, _QUARTER_OF_AN_HOUR),
}


def defaults_of(model: str) -> Defaults:
    """Return a model's defaults; every model without its own has the same."""
    return _BY_MODEL.get(model, Defaults())


# A clean pass of OPT-66B over 32 documents of the paper's 14 tasks at 0, 1 and 5 shots takes 0.04 E
# operations with shared demonstrations. A mask that removes units everywhere takes as much, one
# unit about half of it.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "night": {
        "demonstrations": "shared",
        "limit": 32,
        "train_limit": 32,
        "screen": "attribution",
        "exact": 28,
        "search": "nested",
        "certify_limit": 0,
        "curve_limit": 16,
        "curve_levels": "half",
    }
}
"""What options are by preset, where they are not given."""
