"""Where a model is no better than guessing, by hand."""

from typing import Any

from lowmem_icl.tables.blocks import frame
from lowmem_icl.tables.guessing import settings_at_chance


def task(
    name: str, low: float | None, chance: float, majority: float, shots: int = 0
) -> list[dict[str, Any]]:
    """A task's clean accuracy with its lower bound, and the accuracy of the best constant answer."""
    base = {"experiment": "evaluate", "task": name, "shots": shots, "mask": "clean"}
    metric = "em" if name == "record" else "acc"
    return [
        base | {"metric": metric, "value": 0.9, "low": low, "chance": chance},
        base | {"metric": "majority", "value": majority},
    ]


def test_guessing_is_to_draw_or_always_to_say_the_same() -> None:
    records = [
        *task("copa", 0.51, 0.5, 0.5),
        *task("piqa", 0.50, 0.5, 0.5),
        *task("boolq", 0.60, 0.5, 0.62),
        *task("boolq", 0.63, 0.5, 0.62, shots=1),
        *task("record", 0.1, 0.2, 0.05),
        *task("wic", None, 0.5, 0.5),
    ]
    found = settings_at_chance(frame("results", records))
    assert found == {("piqa", 0), ("boolq", 0), ("record", 0), ("wic", 0)}


def test_a_continuation_without_alternatives_is_never_at_chance() -> None:
    # Its only option is always right, so the best constant answer has 1.
    assert not settings_at_chance(frame("results", task("own", 0.0, 0.0, 1.0)))


def test_all_tasks_are_at_chance_by_the_mean_of_their_guesses() -> None:
    tasks = [*task("copa", 0.9, 0.5, 0.5), *task("boolq", 0.9, 0.5, 0.7), *task("mathqa", 0.9, 0.2, 1.0)]
    for low, is_at_chance in ((0.59, True), (0.61, False)):
        found = settings_at_chance(frame("results", [*tasks, task("aggregate", low, 0.5, 0.0)[0]]))
        assert (("aggregate", 0) in found) == is_at_chance
