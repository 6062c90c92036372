"""Tables that scripts make, put into Markdown files.

They stand between `<!-- NAME: scripts/SCRIPT.py -->` and `<!-- /NAME -->`.
"""

from pathlib import Path

import typer


def put_table(path: Path, name: str, script: str, table: str) -> None:
    """Replace what stands between the marks of a name; raise BadParameter where the file lacks them."""
    begin, end = f"<!-- {name}: scripts/{script} -->", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8")
    before, opened, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise typer.BadParameter(f"{path} has no table between {begin} and {end}")
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
