"""Bits flipped in what a stopped conversion has finished: made again, none gives another store in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_checkpoint, make_store
from safetensors.torch import load_file, save_file

from lowmem_icl.conversion import claim as claim_module
from lowmem_icl.conversion import convert as convert_module
from lowmem_icl.conversion.claim import decided_from
from lowmem_icl.conversion.store_lock import making_store
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import NON_LAYER, Store, Weights, layer_file
from lowmem_icl.model.writing import save_one_by_one


def flip(path: Path, places: int = 40) -> None:
    """Flip the highest bits of numbers all over a file's second half, its size and time left as they are."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content), max(1, len(content) // 2 // places)):
        content[place | 3 if (place | 3) < len(content) else place] ^= 0x40
    path.write_bytes(content)


def stopped_after(folder: Path, store: Path, weights: Weights, layers: int) -> None:
    """Convert so many layers of a checkpoint, and stop."""
    made = convert_module._Steps.tensors

    def stops(steps: convert_module._Steps, layer: int) -> object:
        if layer == layers:
            raise KeyboardInterrupt
        return made(steps, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module._Steps, "tensors", stops)
        with pytest.raises(KeyboardInterrupt):
            make_store(folder, store, weights)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Weights, Store]:
    """The stores that come of it where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    forms: tuple[Weights, ...] = ("int8", "float32")
    return {weights: make_store(source, folder / weights, weights) for weights in forms}


@pytest.mark.parametrize("weights", ["int8", "float32"])
@pytest.mark.parametrize("name", [NON_LAYER, layer_file(0)])
def test_a_flipped_bit_in_a_kept_file_changes_nothing(
    name: str,
    weights: Weights,
    source: Path,
    whole: dict[Weights, Store],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped_after(source, tmp_path / "store", weights, 2)
    flip(tmp_path / "store" / name)
    again = make_store(source, tmp_path / "store", weights)
    assert again.manifest == whole[weights].manifest
    assert f"{tmp_path / 'store' / name} is damaged and is made again" in caplog.text


def test_what_was_decided_from_spoiled_bytes_is_decided_again(
    source: Path, whole: dict[Weights, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk spoils the tables right after they were written, so all outlier columns come of other ones."""

    def spoils(path: Path, *arguments: Any) -> tuple[int, str]:
        written = save_one_by_one(path, *arguments)
        flip(path)
        return written

    monkeypatch.setattr(claim_module, "save_one_by_one", spoils)
    with pytest.raises(InputError, match=r"outside\.safetensors does not hold what was written"):
        make_store(source, tmp_path / "store", "int8")
    assert not list((tmp_path / "store" / "layers").iterdir())
    monkeypatch.undo()
    assert make_store(source, tmp_path / "store", "int8").manifest == whole["int8"].manifest


@pytest.mark.parametrize("was_there", [True, False])
def test_what_is_abandoned_leaves_what_was_there(was_there: bool, tmp_path: Path) -> None:
    source, folder = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "new" / "store"
    weights = load_file(source / "model.safetensors")
    weights["model.decoder.embed_tokens.weight"][0, 0] = float("inf")
    save_file(weights, source / "model.safetensors")
    if was_there:
        folder.mkdir(parents=True)
    with pytest.raises(InputError, match="infinities or NaN"), making_store(folder, 3, print):
        make_store(source, folder, "float32")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == (["store"] if was_there else [])
    assert (tmp_path / "new").exists() == was_there


def test_what_comes_after_a_file_was_decided_from_it() -> None:
    names = [NON_LAYER, "tokenizer/config.json", *map(layer_file, (0, 1, 2, 999, 1000))]
    assert decided_from(NON_LAYER, names) == names[2:]
    assert decided_from(layer_file(1), names) == [*map(layer_file, (2, 999, 1000))]
    assert decided_from(layer_file(999), names) == [layer_file(1000)]
    assert decided_from("tokenizer/config.json", names) == []


def test_a_claim_of_others_deletes_nothing_elsewhere(
    source: Path, whole: dict[Weights, Store], tmp_path: Path
) -> None:
    stopped_after(source, tmp_path / "store", "int8", 1)
    claim = tmp_path / "store" / "converting.json"
    content = json.loads(claim.read_text())
    (tmp_path / "precious").write_text("mine")
    for name in ("../precious", str(tmp_path / "precious"), "layers/../../precious"):
        content["files"][name] = {"size_bytes": 4, "sha256": "0" * 64}
    claim.write_text(json.dumps(content))
    assert make_store(source, tmp_path / "store", "int8").manifest == whole["int8"].manifest
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("files", [[], {"a": 1}, {"a": {"size_bytes": "4"}}, None, 3])
def test_a_claim_of_another_form_is_one_line(files: object, source: Path, tmp_path: Path) -> None:
    stopped_after(source, tmp_path / "stopped", "float32", 0)
    shutil.move(tmp_path / "stopped", tmp_path / "store")
    claim = tmp_path / "store" / "converting.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"files": files}))
    with pytest.raises(InputError, match=r"converting\.json: expected files .*delete"):
        make_store(source, tmp_path / "store", "float32")
