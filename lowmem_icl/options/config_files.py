"""Options from a file: TOML, or YAML where its name ends in .yaml or .yml; keys with dashes or underscores.

YAML is read as a line per option: every value is the text that stands there, and means what it means on the
command line. So `no` is a name and `1:30` no number, whatever a version of YAML makes of them.
"""

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError
from lowmem_icl.options.fields import FLAGS
from lowmem_icl.options.flags import ALIASES, form_of
from lowmem_icl.options.forms import shortened
from lowmem_icl.options.hints import did_you_mean, lm_eval_remark

YAML_SUFFIXES = (".yaml", ".yml")
# What stands in YAML for an option that is not given.
NULLS = ("", "~", "null", "Null", "NULL")


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a TOML or YAML file by name.

    Raises InputError naming the file where it is neither, or where a key is no option or stands there twice.
    """
    form = "YAML" if path.suffix.lower() in YAML_SUFFIXES else "TOML"
    try:
        # Some editors begin a file with a byte-order mark.
        text = path.read_text(encoding="utf-8-sig")
        pairs = list(_yaml_pairs(text) if form == "YAML" else tomllib.loads(text).items())
    except OSError as error:
        raise InputError(
            f"--config {path}: cannot be read ({error.strerror}); give a TOML or YAML file"
        ) from error
    except RecursionError as error:
        raise InputError(
            f"--config {path}: cannot be read as {form} (nested too deep); expected a line per option"
        ) from error
    except ValueError as error:
        other = "" if form == "YAML" else ", or one that ends in .yaml"
        raise InputError(
            f"--config {path}: cannot be read as {form} ({error}); give another file{other}"
        ) from error
    try:
        return _options_of(pairs)
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from error


def _options_of(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in FLAGS:
            raise InputError(_unknown(key))
        if name in given:
            again = key if given[name] == key else f"{given[name]}' and '{key}"
            raise InputError(f"'{again}' give one option twice; leave one of them")
        given[name] = key
        options[name] = _as_on_command_line(name, value)
    return options


def _unknown(key: str) -> str:
    remark = lm_eval_remark(key)
    hint = remark or did_you_mean(key.replace("_", "-"), [name.replace("_", "-") for name in FLAGS])
    hint = hint or "; `lowmem-icl run --help` lists them"
    return f"'{shortened(key)}' is not an option of a run{hint}"


def _as_on_command_line(name: str, value: Any) -> Any:
    """Return a number of bytes as a text, which is refused where a unit seems to be missing, and true as one
    where a number is expected, which it is not.
    """
    form = form_of(name)
    if type(value) is int and form.placeholder == "SIZE":
        return str(value)
    return str(value).lower() if isinstance(value, bool) and form.placeholder else value


def _yaml_pairs(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a YAML file: texts, or lists of texts; null is an option not given.

    Raises ValueError saying in which line what was expected. Nothing is resolved, constructed or repeated, so
    no file means more than it says.
    """
    # Read only where there is such a file: `--help` stays quick.
    import yaml

    try:
        yield from _pairs_of(yaml, yaml.parse(text, Loader=yaml.BaseLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position + 1}: {error.reason}") from error


def _pairs_of(yaml: Any, events: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    next(events)
    first = next(events)
    if isinstance(first, yaml.StreamEndEvent):
        return
    top = next(events)
    if not (isinstance(top, yaml.ScalarEvent) and top.value == ""):
        _expect(isinstance(top, yaml.MappingStartEvent), top, "options, a line for each such as `limit: 16`")
        for key in events:
            if isinstance(key, yaml.MappingEndEvent):
                break
            _expect_plain(yaml, key, "the name of an option")
            value = _value(yaml, events, key.value)
            if value is not None:
                yield key.value, value
    next(events)
    last = next(events)
    _expect(isinstance(last, yaml.StreamEndEvent), last, "one document in the file")


def _value(yaml: Any, events: Iterator[Any], name: str) -> str | list[str] | None:
    wanted = f"a value after '{shortened(name)}', or a list of values"
    event = next(events)
    if isinstance(event, yaml.SequenceStartEvent):
        _expect(event.anchor is None and event.tag is None, event, wanted)
        items: list[str] = []
        for item in events:
            if isinstance(item, yaml.SequenceEndEvent):
                return items
            _expect_plain(yaml, item, f"values alone in the list after '{shortened(name)}'")
            items.append(item.value)
    _expect_plain(yaml, event, wanted)
    return None if event.style is None and event.value in NULLS else str(event.value)


def _expect_plain(yaml: Any, event: Any, wanted: str) -> None:
    """Raise ValueError unless an event is a value without anchor or tag."""
    is_plain = isinstance(event, yaml.ScalarEvent) and event.anchor is None and event.tag is None
    _expect(is_plain, event, wanted)


def _expect(is_so: bool, event: Any, wanted: str) -> None:
    if not is_so:
        raise ValueError(f"line {event.start_mark.line + 1}: expected {wanted}")
