"""From flags, the environment, a file and the defaults to checked options, and from what is wrong to a
sentence.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem_icl.errors import InputError
from lowmem_icl.options.config_files import read_config
from lowmem_icl.options.environment import variable_name
from lowmem_icl.options.fields import FLAGS
from lowmem_icl.options.flags import default_text, flag_name, form_of
from lowmem_icl.options.forms import LEAST_WITHOUT_UNIT, shortened
from lowmem_icl.options.hints import did_you_mean
from lowmem_icl.options.run_options import RunOptions

# What messages about several options begin with.
_FIRST_FLAG = re.compile(r"^--([a-z-]+)")


def run_options(
    flags: Mapping[str, Any],
    config: Path | None = None,
    environment: Mapping[str, Any] | None = None,
    *,
    known: Collection[str] = tuple(FLAGS),
) -> RunOptions:
    """Return checked options: those of flags, else of the environment, else of a TOML or YAML file, else the
    defaults.

    Flags that are None were not given. known: the options that a command takes; others in the file or the
    environment are for other commands. Raises InputError naming the first bad option, where it stands, what
    was expected, what was got and what to do.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    configured = {} if config is None else read_config(config)
    surrounding = {} if environment is None else environment
    merged = {name: value for name, value in (configured | dict(surrounding)).items() if name in known}
    merged |= given

    def where(name: str) -> str:
        if name not in given and name in surrounding:
            return variable_name(name)
        in_file = name not in given and name in configured
        return f"{flag_name(name)} in {config}" if in_file else flag_name(name)

    try:
        return RunOptions.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            said = first["msg"].removeprefix("Value error, ")
            raise InputError(_FIRST_FLAG.sub(lambda flag: where(flag[1].replace("-", "_")), said)) from error
        name = str(first["loc"][0])
        value = first["input"] if len(first["loc"]) > 1 else merged[name]
        raise InputError(f"{where(name)}: {_refusal(name, value)}") from error


def _refusal(name: str, value: Any) -> str:
    """Return what an option expects, what it got, the item of a list where that is wrong, and what to do."""
    form = form_of(name)
    said = f"expected {form.expected}, got {_shown(value)}"
    if form.placeholder == "SIZE" and _lacks_unit(value):
        return f"{said}; a unit is missing: did you mean {str(value).strip()}GB?"
    hint = did_you_mean(value, form.choices) if isinstance(value, str) else ""
    default = f" (default: {default_text(name)})" if default_text(name) else ""
    return said + (hint or f"; correct it or leave it out{default}")


def _shown(value: Any) -> str:
    try:
        return shortened(repr(value))
    except ValueError:
        # Python writes no whole number of more than 4,300 digits.
        return "a number of thousands of digits"


def _lacks_unit(value: Any) -> bool:
    try:
        return 0 < float(value) < LEAST_WITHOUT_UNIT
    except (TypeError, ValueError):
        return False
