"""Options as a Python user gives them: parameters with Python's own values."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError
from lowmem_icl.options import ALIASES, FLAGS, RunOptions, did_you_mean, form_of, run_options


def checked_options(given: Mapping[str, Any], config: str | Path | None = None) -> RunOptions:
    """Return checked options from parameters; those that are None were not given.

    Lists may be given as such, as one value, or as texts with commas; sizes as bytes or as texts such as
    6GB. Raises InputError naming a parameter that is no option, or whose value is not what was expected.
    """
    for name in given:
        if name in ALIASES:
            raise InputError(f"{name}: that is what lm-eval calls it; here it is {ALIASES[name]}")
        if name not in FLAGS:
            hint = did_you_mean(name, FLAGS) or f"; expected any of {', '.join(FLAGS)}"
            raise InputError(f"{name} is not an option of a run{hint}")
    values = {name: _plain(name, value) for name, value in given.items() if value is not None}
    return run_options(values, None if config is None else Path(config))


def check_only(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InputError naming an option that a function does not take."""
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"; expected any of {', '.join(known)}"
            raise InputError(f"{name} is not an option of this{hint}")


def _plain(name: str, value: Any) -> Any:
    """Return a value as options take it: one item of a list as a list of one, a path as a text."""
    if isinstance(value, Path):
        value = str(value)
    if form_of(name).placeholder != "LIST" or isinstance(value, str):
        return value
    items = value if isinstance(value, Iterable) else (value,)
    return tuple(str(item) if isinstance(item, Path) else item for item in items)
