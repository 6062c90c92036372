"""The fenced blocks of README and docs, and the commands in them, as a reader would type them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "masks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\S*)(?: +title=\"(.+)\")?\n((?:(?!```).*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: where its fence stands, its language, the file that it shows, if any."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        """Return page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a console block: its words, variables set before it left out."""

    block: Block
    text: str

    @property
    def words(self) -> list[str]:
        """The words that a shell makes of it."""
        words = shlex.split(self.text.partition("\n")[0], comments=True)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        return words


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order; every fence belongs to one."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text[: match.start()].count("\n") + 1, *(group or "" for group in match.groups()))
        for match in _FENCE.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), f"{page}: a fence is not closed"
    return found


def inline_commands(page: Path) -> list[str]:
    """Return the commands of ours that stand within a page's sentences."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in re.findall(r"`(lowmem-icl\s[^`]+)`", text)]


def commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a console block: a line each, unless `\\` continues it, a document follows or
    `&&` joins two.
    """
    lines = iter(block.text.replace("\\\n", " ").splitlines())
    for line in lines:
        ended = re.search(r"<<'(\w+)'$", line)
        if ended is not None:
            document = itertools.takewhile(lambda text, end=ended[1]: text != end, lines)  # type: ignore[misc]
            yield Command(block, "\n".join([line, *document, ended[1]]))
            continue
        for text in line.split(" && "):
            if shlex.split(text, comments=True):
                yield Command(block, text.strip())
