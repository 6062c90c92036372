"""`--help` as plain text: where to start, usage, two columns per group; examples stand as written."""

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from lowmem_icl.options import ALIASES

NARROWEST, WIDEST = 60, 100
NAMES_WIDTH = 25
INDENT = "  "
EXAMPLE = "lowmem-icl "


def help_text(command: Any, context: Any) -> str:
    """Return the help of a command or a group of commands, as wide as the terminal.

    Of a group, what stands before its first blank line comes before the usage.
    """
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns))
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    commands = getattr(command, "commands", {})
    blocks = [f"{_heading('Usage:')} {usage_line(command, context)}"]
    start, told = (paragraphs[:1], paragraphs[1:]) if commands else ([], paragraphs)
    blocks += [_paragraph(text, width) for text in told]
    if start:
        blocks.insert(0, _heading(start[0]))
    if commands:
        rows = [(name, _first_paragraph(each)) for name, each in commands.items()]
        blocks.append(_section("Commands", rows, width, max(map(len, commands))))
    groups = _groups(command, context)
    longest = max(len(names) for rows in groups.values() for names, _ in rows)
    blocks += [_section(title, rows, width, longest) for title, rows in groups.items()]
    if not commands and any(param.metavar == "LIST" for param in command.params):
        blocks.append(_paragraph(_spellings(command), width))
    return "\n\n".join(blocks)


def _spellings(command: Any) -> str:
    """Return how options may be spelled besides, in one sentence for all of them."""
    flags = {flag for param in command.params for flag in param.opts}
    own = {alias: flag for alias, flag in ALIASES.items() if f"--{flag}" in flags}
    names = [f"--{alias} for --{flag}" for alias, flag in own.items()]
    told = ["_ for - in options", *names]
    if all(param.param_type_name == "option" for param in command.params):
        told.append("several words for a list (--tasks a b)")
    return f"Also taken: {', '.join(told)}."


def usage_line(command: Any, context: Any) -> str:
    """Return how a command is called, in one line."""
    arguments = [_argument(param) for param in command.params if param.param_type_name == "argument"]
    required = [
        f"{param.opts[0]} {param.metavar}"
        for param in command.params
        if param.param_type_name == "option" and param.required
    ]
    last = ["COMMAND [ARGUMENTS]"] if getattr(command, "commands", None) else []
    return " ".join([context.command_path, "[OPTIONS]", *required, *arguments, *last])


def _argument(param: Any) -> str:
    name = str(param.metavar or param.name.upper()) + ("..." if param.nargs != 1 else "")
    return name if param.required else f"[{name}]"


def _heading(text: str) -> str:
    return str(typer.style(text, bold=True))


def _first_paragraph(command: Any) -> str:
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return " ".join(paragraphs[0].split())


def _paragraph(text: str, width: int) -> str:
    lines = text.splitlines()
    if all(line.startswith(EXAMPLE) for line in lines):
        return textwrap.indent(text, INDENT)
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=INDENT, subsequent_indent=INDENT, **_WHOLE_WORDS
    )


# Names of options and paths are not broken at their dashes.
_WHOLE_WORDS: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}


def _groups(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Return names and descriptions of arguments and options by the heading they stand under."""
    groups: dict[str, list[tuple[str, str]]] = {}
    params = [*command.params, command.get_help_option(context)]
    for param in params:
        if getattr(param, "hidden", False):
            continue
        is_argument = param.param_type_name == "argument"
        title = "Arguments" if is_argument else str(getattr(param, "rich_help_panel", None) or "Other")
        names = _argument(param) if is_argument else _option_names(param)
        groups.setdefault(title, []).append((names, _description(param)))
    order = ["Arguments", *(title for title in groups if title not in ("Arguments", "Other")), "Other"]
    return {title: groups[title] for title in order if title in groups}


def _option_names(param: Any) -> str:
    names = sorted(param.opts, key=len)
    if param.secondary_opts:
        names += param.secondary_opts
    return ", ".join(names) + (f" {param.metavar}" if param.metavar and not param.is_flag else "")


def _description(param: Any) -> str:
    text = " ".join(str(param.help or "").split())
    shown = param.show_default if isinstance(param.show_default, str) else ""
    if not shown and param.show_default and param.default not in (None, False, (), []):
        shown = str(param.default)
    required = " [required]" if param.required and param.param_type_name == "option" else ""
    return text + (f" [default: {shown}]" if shown else "") + required


def _section(title: str, rows: Sequence[tuple[str, str]], width: int, longest: int) -> str:
    column = min(longest, NAMES_WIDTH) + len(INDENT)
    return "\n".join([_heading(title), *(line for row in rows for line in _row(*row, column, width))])


def _row(names: str, text: str, column: int, width: int) -> Iterator[str]:
    described = textwrap.wrap(text, width - column - len(INDENT), **_WHOLE_WORDS) or [""]
    if len(names) + len(INDENT) > column:
        yield INDENT + names
    else:
        yield f"{INDENT}{names:<{column}}{described.pop(0)}".rstrip()
    for line in described:
        yield INDENT + " " * column + line
