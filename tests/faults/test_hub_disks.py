"""Masks pushed and pulled where this machine's disk fails: told as what it is, not as the network's fault."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import invoke_wide
from failing_disk import FailingDisk, failing, points
from test_hub import Hub, served
from test_mask_hub import REPOSITORY, folder_of_masks


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("repository", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with served(Hub(tmp_path / "repository", REPOSITORY), tmp_path, monkeypatch) as hub:
        yield hub


def failures(folder: Path, how: str, *command: object) -> Iterator[str]:
    """Yield what a command says each time that something fails below a folder, and clear what it wrote."""
    others = folder.parent / "others"
    with failing(FailingDisk(folder)) as disk:
        assert invoke_wide(*command).exit_code == 0
    expected = sorted(path.name for path in others.glob("*"))
    shutil.rmtree(others, ignore_errors=True)
    # What fails once is met in the same places as what is full.
    for at in points(disk.asked)[:: 1 if how == "full" else 3]:
        with failing(FailingDisk(folder, at, how)):
            told = invoke_wide(*command)
        if how == "broken" and told.exit_code == 0:
            # The hub's client can do without its tags, and a folder that is there need not be made.
            assert sorted(path.name for path in others.glob("*")) == expected
        else:
            assert told.exit_code == (3 if how == "full" else 2), (disk.asked[at], told.output)
            yield told.stderr
        shutil.rmtree(others, ignore_errors=True)


@pytest.mark.parametrize("how", ["full", "broken"])
@pytest.mark.parametrize("where", ["temporary", "others"])
def test_pull(serving: Hub, tmp_path: Path, where: str, how: str) -> None:
    folder_of_masks(serving.folder)
    told = list(failures(tmp_path / where, how, "masks", "pull", REPOSITORY, tmp_path / "others"))
    assert told
    for line in told:
        assert "network" not in line
        assert str(tmp_path / where) in line
        assert len(line.splitlines()) == 1


def test_push(serving: Hub, tmp_path: Path) -> None:
    folder_of_masks(tmp_path / "own")
    told = list(failures(tmp_path / "temporary", "full", "masks", "push", tmp_path / "own", REPOSITORY))
    assert told
    for line in told:
        assert "No space left on device" in line
        assert "network" not in line
        assert str(tmp_path / "temporary") in line
