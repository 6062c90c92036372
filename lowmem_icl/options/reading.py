"""From flags, a TOML file and the defaults to checked options, and from what is wrong to a sentence."""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem_icl.errors import InputError
from lowmem_icl.options.fields import FLAGS
from lowmem_icl.options.flags import default_text, flag_name, form_of
from lowmem_icl.options.run_options import RunOptions


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file, keys with dashes or underscores.

    Raises InputError naming the file where it is no TOML, or where a key is no option.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read as TOML ({error}); give another file") from error
    for key in content:
        if key.replace("-", "_") not in FLAGS:
            near = difflib.get_close_matches(
                key.replace("_", "-"), [name.replace("_", "-") for name in FLAGS], 1
            )
            hint = f"; did you mean '{near[0]}'?" if near else "; `lowmem-icl run --help` lists them"
            raise InputError(f"--config {path}: '{key}' is not an option of a run{hint}")
    return {key.replace("-", "_"): value for key, value in content.items()}


def run_options(
    flags: Mapping[str, Any], config: Path | None = None, *, known: Collection[str] = tuple(FLAGS)
) -> RunOptions:
    """Return checked options: those of flags, else of a TOML file, else the defaults.

    Flags that are None were not given. known: the options that a command takes; others in the file are for
    other commands. Raises InputError naming the first bad option, what was expected, what was got and what
    to do.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    configured = {} if config is None else read_config(config)
    merged = {name: value for name, value in configured.items() if name in known} | given
    try:
        return RunOptions.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise InputError(first["msg"].removeprefix("Value error, ")) from error
        name = str(first["loc"][0])
        source = "" if name in given else f" in {config}"
        default = f" (default: {default_text(name)})" if default_text(name) else ""
        raise InputError(
            f"{flag_name(name)}{source}: expected {form_of(name).expected}, got {merged[name]!r}; "
            f"correct it or leave it out{default}"
        ) from error
