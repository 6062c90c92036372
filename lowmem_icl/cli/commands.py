"""What all commands have in common: their help, how flags are spelled, one line for what is called wrongly.

`_` does for `-` in flags; lm-eval's names do for ours; a list may be several words: `--tasks a b`.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowmem_icl.cli.echo import complain, show_help
from lowmem_icl.cli.help import help_text
from lowmem_icl.options import ALIASES, did_you_mean, lm_eval_remark, nearest

PROGRAM = "lowmem-icl"
OTHER_NAMES = {alias.replace("_", "-"): name.replace("_", "-") for alias, name in ALIASES.items()}


def own_name(name: str) -> str:
    """Return what a flag is called here, without its first dashes."""
    dashed = name.replace("_", "-")
    return OTHER_NAMES.get(dashed, dashed)


CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": own_name}


class Command(TyperCommand):
    """A command whose help is plain text, and whose lists may be several words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the words after an option that takes a list, unless a word could be an argument."""
        if all(param.param_type_name == "option" for param in self.params):
            lists = {param.opts[0] for param in self.params if param.metavar == "LIST"}
            args = list(_with_lists_joined(args, lists))
        return list(super().parse_args(ctx, args))

    def get_help(self, ctx: Any) -> str:
        """Return the help."""
        return help_text(self, ctx)


def _with_lists_joined(args: list[str], lists: set[str]) -> Iterator[str]:
    """Yield words as they are, those between the flag of a list and the next flag as one, comma-separated."""
    words = iter(args)
    word = next(words, None)
    while word is not None:
        yield word
        is_list = word.startswith("--") and f"--{own_name(word[2:])}" in lists
        items: list[str] = []
        word = next(words, None)
        while is_list and word is not None and (not items or word == "" or word[0] != "-"):
            items.append(word)
            word = next(words, None)
        if items:
            yield ",".join(items)


class Group(TyperGroup):
    """A group of commands whose help is plain text, and which says in one line how it was called wrongly."""

    def get_help(self, ctx: Any) -> str:
        """Return the help."""
        return help_text(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show the help where nothing is asked for."""
        if not args and not ctx.resilient_parsing:
            show_help(ctx.get_help())
            raise typer.Exit(2)
        return list(super().parse_args(ctx, args))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command that is asked for and exit with its code."""
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except Exception as error:
            # The class of usage errors depends on typer's version.
            if not hasattr(error, "format_message"):
                raise
            complain(usage_message(error))
            code = 2
        if extra.get("standalone_mode", True):
            sys.exit(code or 0)
        return code


def usage_message(error: Any) -> str:
    """Return in one line what was called wrongly and what to do."""
    context = getattr(error, "ctx", None)
    command = None if context is None else context.command
    called = "" if context is None else context.command_path.partition(" ")[2]
    help_command = f"; `{' '.join([PROGRAM, called]).strip()} --help` lists what it takes"
    where = f"{called}: " if called else ""
    name = getattr(error, "option_name", None)
    param = getattr(error, "param", None)
    if name and hasattr(error, "possibilities"):
        params = [] if command is None else [*command.params, command.get_help_option(context)]
        known = [flag for each in params for flag in (*each.opts, *each.secondary_opts) if flag[:2] == "--"]
        hint = lm_eval_remark(name) or did_you_mean(name, known) or help_command
        return f"{where}there is no option {name}{hint}"
    if name:
        return f"{name}: expected a value after it{help_command}"
    if hasattr(error, "param_type") and param is not None:
        is_argument = param.param_type_name == "argument"
        wanted = param.metavar if is_argument else f"{param.opts[0]} {param.metavar}"
        return f"{where}expected {wanted} ({str(param.help).rstrip('.')}){help_command}"
    if param is not None:
        flag = param.opts[0] if param.param_type_name == "option" else param.metavar
        return f"{flag}: {error.message.removeprefix('Value error, ').rstrip('.')}{help_command}"
    # Some versions of typer suggest commands, others do not.
    said = " ".join(error.format_message().split()).partition(". Did you mean ")[0].rstrip(".")
    commands = getattr(command, "commands", {})
    near = nearest(said.split("'")[1], commands, least_like=0.6) if commands and "'" in said else None
    hint = f"; did you mean '{near}'?" if near else help_command
    return f"{where}{said[:1].lower()}{said[1:]}{hint}"


def command_of(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that makes a function a command of an app."""
    return app.command(name, cls=Command)
