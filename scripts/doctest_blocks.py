"""For the site: examples in docstrings become blocks of Python, as Markdown knows them (docs/mkdocs.yml)."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def fenced(text: str) -> str:
    """Return a docstring with its examples between fences; each ends with a blank line, as doctest has it."""
    return EXAMPLE.sub(lambda example: f"\n```pycon\n{example[0]}\n```", text)


class DoctestBlocks(Extension):  # type: ignore[misc]
    """What mkdocstrings calls for every object of the package."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Fence the examples of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
