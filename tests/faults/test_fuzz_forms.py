"""Every form of input, generated: taken or refused in a line that names it, in seconds.

`pytest -m slow` tries 100,000 inputs over all forms; FUZZ_INPUTS says another number.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from all_forms import NAMES, SHARES, all_forms
from commands import invoke
from corpus import CORPUS, REFUSED
from fuzzing import Form, is_taken, tried

ALL_INPUTS = int(os.environ.get("FUZZ_INPUTS", "100_000"))
FEW = 1_500
"""Inputs over all forms, in the suite."""
SHARE_OF_EACH = 0.02
"""Of inputs at least so many are taken, and as many refused: the grammar reaches past the first check."""


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Iterator[dict[str, Form]]:
    """All forms, with a store of the demo."""
    demo = tmp_path_factory.mktemp("forms") / "demo"
    assert invoke("convert", "demo", demo).exit_code == 0
    stores.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    yield all_forms(demo, stores)
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is a place that may be written to, and no other's."""
    monkeypatch.setenv("HOME", str(tmp_path))


def fuzz(form: Form, name: str, seeds: range, folders: tuple[Path, Path]) -> None:
    found = tried(form, name, seeds, folders[0], folders[1], Path(tempfile.gettempdir()))
    print(f"{name}: {len(seeds)} tried, {dict(found.counts)}, longest {found.longest:.2f} s")
    # A part that is none is made again, not refused.
    if len(seeds) >= 200 and name != "part":
        assert min(found.counts["taken"], found.counts["refused"]) > SHARE_OF_EACH * len(seeds)


@pytest.mark.parametrize("name", NAMES)
def test_generated_inputs(
    name: str, forms: dict[str, Form], tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(forms[name], name, range(max(2, int(SHARES[name] * FEW))), (tmp_path, stores))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_100_000_generated_inputs(
    name: str, forms: dict[str, Form], tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seeds = range(1_000_000, 1_000_000 + int(SHARES[name] * ALL_INPUTS))
    fuzz(forms[name], name, seeds, (tmp_path, stores))


@pytest.mark.parametrize("name", CORPUS)
def test_what_once_failed(
    name: str, forms: dict[str, Form], tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    form = forms[name]
    assert form.place is not None
    for content in CORPUS[name]:
        path = form.place(content, tmp_path)
        taken = is_taken(form, path, stores, Path(tempfile.gettempdir()))
        assert taken == (content not in REFUSED.get(name, ())), f"{name}: {content[:200]!r}"


def test_shares_are_of_all_forms(forms: dict[str, Form]) -> None:
    assert set(forms) == set(NAMES)
    assert sum(SHARES.values()) == pytest.approx(1)
