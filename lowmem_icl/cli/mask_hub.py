"""`lowmem-icl masks push` and `pull`: masks to the hub and from it."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem_icl.cli.echo import echo
from lowmem_icl.cli.errors import reports_errors

Repository = Annotated[
    str, typer.Argument(help="Repository of the hub.", metavar="OWNER/NAME", show_default=False)
]


@reports_errors
def push(
    path: Annotated[
        Path, typer.Argument(help="Mask file, or a folder of them.", metavar="PATH", show_default=False)
    ],
    repository: Repository,
    private: Annotated[
        bool, typer.Option("--private", help="Where the repository is new: for its owner alone.")
    ] = False,
) -> None:
    """Put masks into a repository of the hub, with a card; it is made where there is none.

    lowmem-icl masks push masks/demo/greedy-recall-16shot.json someone/demo-masks
    """
    from lowmem_icl.export.hub import masks_to_push, push_masks

    masks = masks_to_push(path)
    echo(f"{push_masks(masks, repository, private=private)}: {len(masks)} masks and a card")


@reports_errors
def pull(
    repository: Repository,
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where they go; by default masks/NAME.", metavar="FOLDER", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit.", metavar="NAME", show_default=False)
    ] = None,
) -> None:
    """Fetch the masks of a repository of the hub; each is checked before it is kept.

    lowmem-icl masks pull someone/demo-masks
    """
    from lowmem_icl.cli.terminal import Terminal
    from lowmem_icl.export.hub import pull_masks

    target = folder or Path("masks") / repository.rpartition("/")[2].lstrip(".")
    pulled = pull_masks(repository, target, revision)
    for why in pulled.left_out:
        Terminal().say(f"left out: {why}")
    for path in pulled.kept:
        echo(str(path))
