"""Texts of others as a terminal may show them: what would move the cursor stands as its code."""

import re

# Of C0 and C1 all but tab and newline; and what turns the direction of the texts around it.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def visible(text: str) -> str:
    r"""Return a text with every control character as `\u001b`, which JSON, too, takes for that character.

    Tabs and newlines stay.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def visible_line(text: str) -> str:
    """Return a text as `visible`, on one line."""
    return visible(text.replace("\r\n", " ").replace("\n", " "))
