"""The line that stands there at once, before libraries are imported, which takes seconds."""

from lowmem_icl.options import RunOptions, environment_options, variable_name


def first_line(doing: str, options: RunOptions) -> str:
    """Return what is about to be done, with which model, and which options the environment gave."""
    given = environment_options()
    named = ", ".join(f"{variable_name(name)}={value}" for name, value in given.items())
    return f"{doing} {options.model} in {options.weights}" + (f" ({named})" if named else "") + " …"
