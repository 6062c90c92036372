"""Lines of text on stdout and stderr; nothing that a name holds reaches the terminal as a command to it."""

import typer

from lowmem_icl.system.visible import visible, visible_line


def echo(text: str) -> None:
    """Print a result on stdout."""
    typer.echo(visible(text))


def show_help(text: str) -> None:
    """Print our own words on stdout, with their styles."""
    typer.echo(text)


def complain(text: str) -> None:
    """Print an error on stderr, in one line after the program's name."""
    typer.echo(f"lowmem-icl: {visible_line(text)}", err=True)
