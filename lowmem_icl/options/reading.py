"""From flags, the environment, a TOML file and the defaults to checked options, and from what is wrong to a
sentence.
"""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem_icl.errors import InputError
from lowmem_icl.options.environment import variable_name
from lowmem_icl.options.fields import FLAGS
from lowmem_icl.options.flags import default_text, flag_name, form_of
from lowmem_icl.options.forms import LEAST_WITHOUT_UNIT
from lowmem_icl.options.hints import did_you_mean
from lowmem_icl.options.run_options import RunOptions


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file, keys with dashes or underscores.

    Raises InputError naming the file where it is no TOML, or where a key is no option.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}); give a TOML file") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read as TOML ({error}); give another file") from error
    for key in content:
        if key.replace("-", "_") not in FLAGS:
            hint = did_you_mean(key.replace("_", "-"), [name.replace("_", "-") for name in FLAGS])
            hint = hint or "; `lowmem-icl run --help` lists them"
            raise InputError(f"--config {path}: '{key}' is not an option of a run{hint}")
    return {key.replace("-", "_"): _with_unit(key, value) for key, value in content.items()}


def _with_unit(key: str, value: Any) -> Any:
    """Return a number of bytes as a text, which is refused where a unit seems to be missing."""
    is_size = form_of(key.replace("-", "_")).placeholder == "SIZE"
    return str(value) if is_size and type(value) is int else value


def run_options(
    flags: Mapping[str, Any],
    config: Path | None = None,
    environment: Mapping[str, Any] | None = None,
    *,
    known: Collection[str] = tuple(FLAGS),
) -> RunOptions:
    """Return checked options: those of flags, else of the environment, else of a TOML file, else the
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
    try:
        return RunOptions.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise InputError(first["msg"].removeprefix("Value error, ")) from error
        name = str(first["loc"][0])
        where = flag_name(name)
        if name not in given and name in surrounding:
            where = variable_name(name)
        elif name not in given and name in configured:
            where = f"{flag_name(name)} in {config}"
        value = first["input"] if len(first["loc"]) > 1 else merged[name]
        raise InputError(f"{where}: {_refusal(name, value)}") from error


def _refusal(name: str, value: Any) -> str:
    """Return what an option expects, what it got, the item of a list where that is wrong, and what to do."""
    form = form_of(name)
    said = f"expected {form.expected}, got {value!r}"
    if form.placeholder == "SIZE" and _lacks_unit(value):
        return f"{said}; a unit is missing: did you mean {str(value).strip()}GB?"
    hint = did_you_mean(str(value), form.choices)
    default = f" (default: {default_text(name)})" if default_text(name) else ""
    return said + (hint or f"; correct it or leave it out{default}")


def _lacks_unit(value: Any) -> bool:
    try:
        return 0 < float(value) < LEAST_WITHOUT_UNIT
    except (TypeError, ValueError):
        return False
