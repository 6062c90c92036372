"""What a run takes where its options do not say, by model."""

from dataclasses import dataclass

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
