"""How sentences name units, settings and numbers."""

from collections.abc import Callable, Sequence

from lowmem_icl.protocols import AGGREGATE

MOST_NAMED = 12
"""Of more units than these a sentence gives the number, and names the first."""
FIRST_NAMED = 5


def units_text(units: Sequence[str]) -> str:
    """Return units by name, heads before FFNs: "L0H0 L1H0 and FFN 0"; "no unit" of none."""
    heads = [unit for unit in units if not unit.endswith("F")]
    ffns = [unit.removeprefix("L").removesuffix("F") for unit in units if unit.endswith("F")]
    named = [" ".join(heads)] if heads else []
    named += [f"{'FFN' if len(ffns) == 1 else 'FFNs'} {' '.join(ffns)}"] if ffns else []
    return " and ".join(named) or "no unit"


def counts_text(heads: int, ffns: int) -> str:
    """Return numbers of heads and FFNs: "12 heads and 1 FFN"."""
    return f"{heads:,} {'head' if heads == 1 else 'heads'} and {ffns:,} {'FFN' if ffns == 1 else 'FFNs'}"


def task_text(task: str) -> str:
    """Return a task as people read it: `aggregate` is the mean over tasks."""
    return "mean over tasks" if task == AGGREGATE else task


def setting_text(task: str, shots: int | None) -> str:
    """Return a task at a shot count: "recall, 16 shots"; of prompts that were given, their file's name."""
    return task if shots is None else f"{task_text(task)}, {shots} {'shot' if shots == 1 else 'shots'}"


def decimal_text(value: float) -> str:
    """Return a number with two decimals; what rounds to 0 has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def span_text(values: Sequence[float], form: Callable[[float], str] = "{:.0f}".format) -> str:
    """Return the lowest and the highest of some numbers: "66 to 100", or the only one."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def bounds_text(low: float | None, high: float | None) -> str:
    """Return the bounds of an interval in brackets after a space; nothing where there is none."""
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def listed(parts: Sequence[str]) -> str:
    """Return words in a row: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1])] * bool(parts[:-1]) + list(parts[-1:]))


def share_of_settings(count: int, total: int) -> str:
    """Return in how many of the settings above chance something is so."""
    if total == 1:
        return f"{'' if count else 'not '}in the only setting above chance"
    return f"in {count} of {total} settings above chance"
