"""Where the command begins: signals first, so that a stop while libraries are imported is a stop, too."""

from lowmem_icl.cli.stops import end_at_once


def main() -> None:
    """Run the command line."""
    end_at_once()
    from lowmem_icl.cli.app import app

    app()
