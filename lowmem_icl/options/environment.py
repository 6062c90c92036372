"""Options from the environment: LOWMEM_ICL_LIMIT is --limit."""

import os
import shlex
from collections.abc import Mapping

from lowmem_icl.errors import InputError
from lowmem_icl.options.fields import FLAGS
from lowmem_icl.options.hints import nearest

PREFIX = "LOWMEM_ICL_"
# Not options of a run: these are read by flags of commands.
COMMAND_VARIABLES = {"config": f"{PREFIX}CONFIG", "quiet": f"{PREFIX}QUIET"}


def variable_name(name: str) -> str:
    """Return the environment variable of an option."""
    return PREFIX + name.upper()


VARIABLES = {variable_name(name): name for name in FLAGS}


def environment_options(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the options that environment variables give; an empty variable gives none.

    Raises InputError for a variable that is nearly one of them, since it would be without effect.
    """
    given = os.environ if environment is None else environment
    known = (*VARIABLES, *COMMAND_VARIABLES.values())
    for name in given:
        if name.startswith(PREFIX) and name not in known:
            near = nearest(name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known])
            if near is not None:
                raise InputError(
                    f"environment variable {name}: not an option of a run; did you mean '{PREFIX}{near}'?"
                )
    return {option: given[name] for name, option in VARIABLES.items() if given.get(name)}


def shell_command(arguments: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Return a command as a shell takes it, with the variables that give it options before it."""
    given = environment_options(environment)
    variables = [f"{variable_name(name)}={shlex.quote(value)}" for name, value in given.items()]
    return " ".join([*variables, shlex.join(arguments)])
