"""From the fields of `RunOptions` to the flags of commands: typer reads signatures, written here."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_icl.cli.completion import completion_of
from lowmem_icl.options import (
    COMMAND_VARIABLES,
    FLAGS,
    Group,
    RunOptions,
    default_text,
    environment_options,
    flag_name,
    form_of,
    names_of,
    run_options,
)

ALL_OPTIONS = tuple(FLAGS)
EVALUATE_OPTIONS = (
    *names_of(Group.MODEL),
    *(name for name in names_of(Group.TASKS) if name not in ("train_limit", "importance_limit", "labels")),
    *("seed", "memory", "device_memory", "device", "out", "track", "no_wait"),
)
MEASURE_OPTIONS = (*names_of(Group.MODEL), "memory", "device_memory", "device")
PROMPT_OPTIONS = (
    *names_of(Group.MODEL),
    *("data_dir", "limit", "demonstrations", "demonstration_sets", "protocol", "bos"),
)

VerifyOption = Annotated[
    bool, typer.Option("--verify", help="SOURCE is a store: compare every byte with its digest.")
]
RepairOption = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="SOURCE is a store: make its damaged and missing files again from what it was made of; with a "
        "STORE, mend that from SOURCE.",
    ),
]
DeleteShardsOption = Annotated[
    bool,
    typer.Option(
        "--delete-shards",
        help="Fetch a hub model's weight files one by one and delete each once it is converted.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="No progress and no messages on stderr.",
        envvar=COMMAND_VARIABLES["quiet"],
        rich_help_panel=Group.OUTPUT,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=Group.OUTPUT)
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Begin anew, in a folder beside the one that these options have, which stays as it is.",
        rich_help_panel=Group.OUTPUT,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="TOML or YAML file with any of a run's options; the environment (LOWMEM_ICL_LIMIT for --limit) "
        "and the command line win.",
        metavar="FILE",
        envvar=COMMAND_VARIABLES["config"],
        rich_help_panel=Group.OUTPUT,
    ),
]


@dataclass(frozen=True)
class GivenOptions:
    """What a command was given of a run's options: its flags, None where one was left out, and --config."""

    flags: Mapping[str, Any]
    config: Path | None

    def checked(self, **settled: Any) -> RunOptions:
        """Return the options, checked and completed; `settled` are those that the command itself decides."""
        return run_options(
            {**self.flags, **settled}, self.config, environment_options(), known=tuple(self.flags)
        )


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these options, and --config; its first parameter receives GivenOptions."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        flags = [_parameter(name) for name in names]
        config = inspect.Parameter("config", _KEYWORD, default=None, annotation=ConfigOption)

        @wraps(command)
        def wrapped(**given: Any) -> None:
            options = GivenOptions({name: given.pop(name) for name in names}, given.pop("config"))
            command(options, **given)

        signature = inspect.Signature(
            [*flags, config, *(parameter.replace(kind=_KEYWORD) for parameter in own)]
        )
        wrapped.__signature__ = signature  # type: ignore[attr-defined]
        wrapped.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
        return wrapped

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _parameter(name: str) -> inspect.Parameter:
    """Return the parameter of an option: a text, or a switch and its opposite; None where not given."""
    form = form_of(name)
    switch = not form.placeholder
    declared = flag_name(name)
    if switch and not name.startswith("no_"):
        declared += f"/--no-{declared.removeprefix('--')}"
    option = typer.Option(
        declared,
        help=_help(name),
        metavar=form.placeholder or None,
        show_default=False,
        autocompletion=None if switch else completion_of(name),
        rich_help_panel=FLAGS[name].group,
    )
    kind = bool if switch else str
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=Annotated[kind | None, option])


def _help(name: str) -> str:
    """Return an option's help with its choices and its default."""
    form, text, default = form_of(name), FLAGS[name].help, default_text(name)
    if len(form.choices) > 1 and form.placeholder in ("LIST", "NAME"):
        choices = f"{', '.join(form.choices[:-1])} or {form.choices[-1]}"
        text += f" {'Any of' if form.placeholder == 'LIST' else 'One of'} {choices}."
    return text + (f" [default: {default}]" if default else "")
