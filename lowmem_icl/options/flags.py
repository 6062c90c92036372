"""How the options are called and described on the command line."""

from lowmem_icl.options.fields import FLAGS, RunFields
from lowmem_icl.options.forms import Form, describe_form
from lowmem_icl.options.groups import Group

ALIASES = {"num_fewshot": "shots", "output_path": "out"}
"""Names that lm-eval has for options, on the command line and in files."""


def names_of(*groups: Group) -> tuple[str, ...]:
    """Return the names of the options in some groups, in the order in which `--help` lists them."""
    return tuple(name for name, flag in FLAGS.items() if flag.group in groups)


def flag_name(name: str) -> str:
    """Return the flag of an option."""
    return f"--{name.replace('_', '-')}"


def default_text(name: str) -> str:
    """Return an option's default as a person reads it; empty for a switch that is off."""
    if FLAGS[name].default:
        return FLAGS[name].default
    value = RunFields.model_fields[name].default
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is False else str(value)


def form_of(name: str) -> Form:
    """Return what values an option takes, read from its type and its check."""
    field = RunFields.model_fields[name]
    return describe_form(field.annotation, field.metadata)
