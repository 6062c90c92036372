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


LONGEST_LINE = 2_000
"""Characters; of a longer line the middle is left out."""


def visible_line(text: str) -> str:
    """Return a text as `visible`, on one line that can be read: a stranger's value may be of any length."""
    line = visible(text.replace("\r\n", " ").replace("\n", " "))
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} [...] {line[-half:]}"
