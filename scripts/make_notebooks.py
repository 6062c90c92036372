"""Make the notebooks of docs/notebooks from scripts/examples, and run them: what they show is what they gave.

    pip install -e '.[docs]' && python scripts/make_notebooks.py [NAME ...]

A script is cut into cells at `# %%`, texts at `# %% [markdown]` (jupytext's percent form).
"""

import argparse
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

PROJECT = Path(__file__).parents[1]
EXAMPLES = PROJECT / "scripts" / "examples"
NOTEBOOKS = PROJECT / "docs" / "notebooks"


def notebook_of(script: Path) -> Any:
    """Return a script as a notebook that is not run, with ids that do not change."""
    notebook = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{script.stem}-{number}"
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def without_chatter(notebook: Any) -> Any:
    """Return a notebook with results only: no bars, no times."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and "widget" not in str(output.get("data", {}).keys())
            ]
    return notebook


def main() -> None:
    """Make the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="examples, without .py; all where none is named")
    names = parser.parse_args().names or sorted(path.stem for path in EXAMPLES.glob("*.py"))
    NOTEBOOKS.mkdir(exist_ok=True)
    for name in names:
        notebook = notebook_of(EXAMPLES / f"{name}.py")
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PROJECT)}}).execute()
        text = str(nbformat.writes(without_chatter(notebook)))
        (NOTEBOOKS / f"{name}.ipynb").write_text(f"{text}\n", encoding="utf-8")
        print(f"{NOTEBOOKS / name}.ipynb")


if __name__ == "__main__":
    main()
