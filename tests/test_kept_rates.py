"""Rates that a plan finds again: only while they are fresh, and only where nothing is damaged."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from lowmem_icl.planning.kept_rates import KEPT_SECONDS, Measurement, kept_or_measured
from lowmem_icl.planning.measure import Rates

FIRST = Rates(0.001, 1e-4, 2e-4, 3e-4, 0.0, 1e-3, 2e9)
SECOND = Rates(0.002, 1e-4, 2e-4, 3e-4, 0.0, 1e-3, 1e9)


def at(folder: Path, now: float, rates: Rates) -> Measurement:
    return kept_or_measured(folder, "key", lambda: rates, lambda: now)


def test_rates_are_found_with_their_age_for_ten_minutes_and_then_measured_anew(tmp_path: Path) -> None:
    assert at(tmp_path, 1000.0, FIRST) == Measurement(FIRST, 0.0)
    assert at(tmp_path, 1000.0 + KEPT_SECONDS, SECOND) == Measurement(FIRST, KEPT_SECONDS)
    assert at(tmp_path, 1001.0 + KEPT_SECONDS, SECOND) == Measurement(SECOND, 0.0)


def test_rates_from_a_later_time_by_the_clock_are_of_unknown_age(tmp_path: Path) -> None:
    at(tmp_path, 1000.0, FIRST)
    assert at(tmp_path, 999.0, SECOND) == Measurement(SECOND, 0.0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        json.dumps({"measured_at": 1000.0, **asdict(FIRST), "call_seconds": -1.0}),
        json.dumps({"measured_at": 1000.0, **asdict(FIRST), "more": 1.0}),
    ],
)
def test_damaged_rates_are_measured_anew_and_said(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rates-key.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert at(tmp_path, 1000.0, SECOND) == Measurement(SECOND, 0.0)
    assert "is damaged" in caplog.text
    assert at(tmp_path, 1001.0, FIRST) == Measurement(SECOND, 1.0)


def test_where_nothing_can_be_kept_rates_are_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert at(tmp_path / "file", 1000.0, FIRST) == Measurement(FIRST, 0.0)
