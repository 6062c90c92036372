"""The options of a run: every option once, checked in one way, whether given by a flag, in the environment or
in a TOML or YAML file.

`fields` holds the options, `choices` the names they choose among, `run_options` checks them together and
fills in what is not given, `defaults` has what some are by model, `groups` what is said of them, `flags` how
they are called and described, `forms` what values they take, in checks and in words, `hints` what a wrong
name may have meant; `environment` reads variables, `config_files` files, `reading` merges and checks what was
given.
"""

from lowmem_icl.options.choices import (
    CURVES,
    DEFAULT_CURVES,
    DEFAULT_EXPERIMENTS,
    EXPERIMENTS,
    Curve,
    Experiment,
)
from lowmem_icl.options.config_files import read_config
from lowmem_icl.options.defaults import DEMO, PACKAGED_MODEL_NAMES
from lowmem_icl.options.environment import (
    COMMAND_VARIABLES,
    environment_options,
    shell_command,
    variable_name,
)
from lowmem_icl.options.fields import DEFAULT_EXACT, FLAGS
from lowmem_icl.options.flags import ALIASES, default_text, flag_name, form_of, names_of
from lowmem_icl.options.forms import Form, parse_path, parse_size, shortened
from lowmem_icl.options.groups import Flag, Group
from lowmem_icl.options.hints import did_you_mean, lm_eval_remark, nearest
from lowmem_icl.options.reading import run_options
from lowmem_icl.options.run_options import RunOptions

__all__ = [
    "ALIASES",
    "COMMAND_VARIABLES",
    "CURVES",
    "DEFAULT_CURVES",
    "DEFAULT_EXACT",
    "DEFAULT_EXPERIMENTS",
    "DEMO",
    "EXPERIMENTS",
    "FLAGS",
    "PACKAGED_MODEL_NAMES",
    "Curve",
    "Experiment",
    "Flag",
    "Form",
    "Group",
    "RunOptions",
    "default_text",
    "did_you_mean",
    "environment_options",
    "flag_name",
    "form_of",
    "lm_eval_remark",
    "names_of",
    "nearest",
    "parse_path",
    "parse_size",
    "read_config",
    "run_options",
    "shell_command",
    "shortened",
    "variable_name",
]
