"""Names made from what users type, tasks and models: legal in any file system, bounded, readable, one to one.

A task's name may be a path of any length in any script. Where its slug would say less than the name does, a
short digest of the whole name follows: no two tasks share a slug, and plain names (recall, arc_easy) stay.
"""

import hashlib
import re
from collections.abc import Iterable

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import AGGREGATE

CLEAN = "clean"
"""The mask of the run that removes nothing."""

LONGEST_NAME = 200
"""Characters of a mask's name; with `.json` and what a temporary file adds, under a file name's 255 bytes."""
LONGEST_SLUG = 96
DIGEST_DIGITS = 8

# No minus: it joins the pieces of a mask's name. No capitals: some file systems ignore case.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._+]*")
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_DIGITS}}}")
_ILLEGAL = re.compile(r"[^A-Za-z0-9._+]+")


def readable_slug(text: str) -> str:
    """Return the letters, digits, dots, plus signs and underscores of a text, all else as single minuses.

    At most `LONGEST_SLUG` less a digest long: of a longer text the end, where paths differ. Not one to one.
    """
    slug = _ILLEGAL.sub("-", text).strip("-.")
    return slug[-(LONGEST_SLUG - DIGEST_DIGITS - 1) :].strip("-.") or "unnamed"


def task_slug(task: str) -> str:
    """Return a task's name for use in a file's: itself where plain, else its slug and a digest of it."""
    if _PLAIN.fullmatch(task) and len(task) <= LONGEST_SLUG and not _DIGEST.fullmatch(task):
        return task
    digest = hashlib.sha256(task.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable_slug(task)}-{digest[:DIGEST_DIGITS]}"


def mask_name(method: str, task: str, shots: int) -> str:
    """Return the name of a mask made by a method for a task at a shot count; of its file, without `.json`."""
    name = f"{method}-{task_slug(task)}-{shots}shot"
    assert len(name) <= LONGEST_NAME, f"a mask's name of {len(name)} characters: {name}"
    return name


def check_names(tasks: Iterable[str], masks: Iterable[str] = ()) -> None:
    """Check that a run's files and tables will tell its tasks and masks apart; raise InputError where not.

    masks: names of mask files that are evaluated. To be called before the first sweep.
    """
    slugs: dict[str, str] = {}
    for task in tasks:
        try:
            task.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"--tasks {task!r}: not UTF-8, so no table can hold it; rename the file"
            ) from error
        if task == AGGREGATE:
            raise InputError(f"--tasks {task}: that is what the mean over tasks is called; rename the file")
        other = slugs.setdefault(task_slug(task).casefold(), task)
        if other != task:
            raise InputError(
                f"--tasks: the masks of {other!r} and {task!r} would get one name; rename a file"
            )
    if CLEAN in masks:
        raise InputError(f"--mask: '{CLEAN}' is what the run without a mask is called; rename the mask")
