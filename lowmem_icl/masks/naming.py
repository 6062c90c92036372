"""Names of masks and run folders: safe as file names, telling at a glance."""

import re


def slug(text: str) -> str:
    """Return text with everything but letters, digits, dot, plus and minus turned into single minuses."""
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", text).strip("-.") or "unnamed"


def mask_name(method: str, task: str, shots: int) -> str:
    """Return the name of a mask made by a method for a task at a shot count."""
    return f"{method}-{slug(task)}-{shots}shot"
