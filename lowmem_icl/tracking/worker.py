"""The calls of one tracker, in a thread of their own: a network that is slow or gone holds up no run."""

import contextlib
import logging
import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

from lowmem_icl.session.run_form import State
from lowmem_icl.tracking.catalogue import KnownTracker
from lowmem_icl.tracking.muted import this_thread_muted

logger = logging.getLogger("lowmem_icl")

Call = Callable[[KnownTracker, Any], None]
"""What is asked of a tracker: its entry in the catalogue, and accelerate's object."""


class TrackerWorker:
    """Opens a tracker, does what it is asked in order, and ends it.

    identity: the run's id there once it is open; error: what went wrong, after which nothing is asked any
    more; is_open: set once it is open, or cannot be; has_ended: whether all was done.
    """

    def __init__(self, name: str, known: KnownTracker, opened: Callable[[], tuple[Any, str]]) -> None:
        self.name = name
        self.identity: str | None = None
        self.where = ""
        self.error: Exception | None = None
        self.has_ended = False
        self.is_open = threading.Event()
        self._known, self._opened = known, opened
        self._calls: queue.SimpleQueue[Call | State] = queue.SimpleQueue()
        # It must not keep a process alive whose run is over.
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def ask(self, call: Call) -> None:
        """Have something done after all that was asked before."""
        self._calls.put(call)

    def end(self, state: State) -> None:
        """Have the tracker ended after all that was asked before; state: of the run."""
        self._calls.put(state)

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended or failed, for so long at most; return whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with this_thread_muted(), warnings.catch_warnings():
            # Of other libraries; nothing here may fail by them.
            warnings.simplefilter("ignore")
            try:
                self._follow()
            # A tracker may raise whatever it likes, even SystemExit: the run goes on.
            except BaseException as error:
                self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
                logger.info("tracking with %s failed", self.name, exc_info=True)
            finally:
                self.is_open.set()

    def _follow(self) -> None:
        tracker, self.identity = self._opened()
        try:
            self.where = self._known.where(tracker)
            self.is_open.set()
            while not isinstance(call := self._calls.get(), str):
                call(self._known, tracker)
        except BaseException:
            # Else the tracker would show a run that is at work for ever.
            with contextlib.suppress(Exception):
                self._known.end(tracker, "failed")
            raise
        self._known.end(tracker, call)
        self.has_ended = True
