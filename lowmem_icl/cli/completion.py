"""What a shell completes: the names that options take, without anything slow."""

from collections.abc import Callable, Sequence

from lowmem_icl.options import DEMO, PACKAGED_MODEL_NAMES, form_of


def completion_of(name: str) -> Callable[[str], list[str]] | None:
    """Return what completes an option's value from its beginning; None where a shell knows as much."""
    if name not in ("model", "tasks") and not form_of(name).choices:
        return None
    is_list = form_of(name).placeholder == "LIST"

    def complete(incomplete: str) -> list[str]:
        done, comma, begun = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        listed = done.split(",")
        return [
            f"{done}{comma}{each}" for each in _known(name) if each.startswith(begun) and each not in listed
        ]

    return complete


def _known(name: str) -> Sequence[str]:
    if name == "model":
        return (DEMO, *PACKAGED_MODEL_NAMES)
    if name == "tasks":
        # Reads YAML, which only a completed --tasks need wait for.
        from lowmem_icl.tasks.catalogue import COLLECTIONS, KNOWN_TASKS

        return (*KNOWN_TASKS, *COLLECTIONS)
    return form_of(name).choices
