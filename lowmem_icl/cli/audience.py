"""What a run tells the terminal: its messages, progress, plan and stages."""

from lowmem_icl.cli.display import RunDisplay
from lowmem_icl.cli.plan import show_plan
from lowmem_icl.cli.terminal import Terminal
from lowmem_icl.runner import Audience


def audience_of(terminal: Terminal) -> Audience:
    """Return the terminal as whom a run tells what it does."""
    return Audience(
        terminal.say,
        terminal.progress,
        lambda plan: show_plan(plan, terminal.err),
        lambda outlook, experiments: RunDisplay(terminal.err, outlook, experiments),
        terminal.waiting,
    )
