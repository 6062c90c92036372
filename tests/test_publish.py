"""When pages are written: whatever was found is shown two minutes later at the latest, while work goes on."""

import time
from typing import Any

import pytest

from lowmem_icl.session.publish import SECONDS_BETWEEN_PAGES, SECONDS_BETWEEN_RECORDS, Publisher
from lowmem_icl.session.result import StageResult
from lowmem_icl.session.run_form import State


class Counted(Publisher):
    """Counts its pages instead of writing them."""

    pages = records = 0
    seconds = 0.0

    def write_record(self) -> None:
        self.records += 1
        self._is_recorded()

    def publish(self, ends_as: State | None = None) -> None:
        self.pages += 1
        self._is_published(time.monotonic() - self.seconds)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that a test sets."""
    now = [0.0]
    monkeypatch.setattr("lowmem_icl.session.publish.time.monotonic", lambda: now[0])
    return now


def test_what_was_found_early_is_shown_while_a_long_stage_goes_on(seconds: list[float]) -> None:
    nothing: Any = None
    publisher = Counted(nothing, nothing, [], lambda folder, ends_as: None)
    seconds[0] = SECONDS_BETWEEN_PAGES + 1
    publisher.publish_if_due()
    assert publisher.pages == 0, "there is nothing to show"
    publisher.fold("prune", StageResult())
    publisher.publish_if_due()
    assert publisher.pages == 1
    seconds[0] += 10
    publisher.fold("prune", StageResult())
    publisher.publish_if_due()
    assert publisher.pages == 1, "the last page is ten seconds old"
    seconds[0] += SECONDS_BETWEEN_PAGES
    publisher.publish_if_due()
    assert publisher.pages == 2, "a part was made meanwhile"
    seconds[0] += SECONDS_BETWEEN_PAGES
    publisher.publish_if_due()
    assert publisher.pages == 2, "nothing new"


def test_pages_that_take_long_are_written_less_often(seconds: list[float]) -> None:
    nothing: Any = None
    publisher = Counted(nothing, nothing, [], lambda folder, ends_as: None)
    publisher.seconds = SECONDS_BETWEEN_PAGES / 10
    publisher.publish()
    for times, pages in ((1.0, 1), (0.9, 1), (1.0, 2)):
        seconds[0] += times * SECONDS_BETWEEN_PAGES
        publisher.fold("prune", StageResult())
        publisher.publish_if_due()
        assert publisher.pages == pages


def test_the_record_tells_the_time_left_now_and_then_though_nothing_is_found(seconds: list[float]) -> None:
    nothing: Any = None
    publisher = Counted(nothing, nothing, [], lambda folder, ends_as: None)
    for wait, records in ((1.0, 0), (SECONDS_BETWEEN_RECORDS, 1), (1.0, 1), (SECONDS_BETWEEN_RECORDS, 2)):
        seconds[0] += wait
        publisher.publish_if_due()
        assert (publisher.records, publisher.pages) == (records, 0)
