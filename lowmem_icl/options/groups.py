"""What is said about options, and where they are listed."""

from dataclasses import dataclass
from enum import StrEnum


class Group(StrEnum):
    """Where `--help` lists an option."""

    MODEL = "Model"
    TASKS = "Tasks"
    EXPERIMENTS = "Experiments"
    RESOURCES = "Resources"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Flag:
    """What is said about an option, apart from its type and its check.

    default: the text of a default that its value does not say, such as one that depends on other options.
    changes_results: whether anything measured depends on it; those that do make up a run's identity.
    """

    group: Group
    help: str
    default: str = ""
    changes_results: bool = True
