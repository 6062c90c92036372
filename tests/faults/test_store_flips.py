"""Bits flipped in every file of a store: each is refused and named, none gives other results in silence."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commands import invoke
from safetensors.torch import load_file, save_file

from lowmem_icl.errors import InputError
from lowmem_icl.model.digests import stored_file
from lowmem_icl.model.nf4 import part_forms
from lowmem_icl.model.reading import read_header
from lowmem_icl.model.store import (
    NON_LAYER,
    Store,
    is_store,
    layer_file,
    open_store,
    write_manifest,
)
from lowmem_icl.model.streamed import StreamedModel
from lowmem_icl.model.writing import save_tensors, source_digests

TOKENS = torch.arange(5, 25)


def scores(folder: Path, *, in_memory: bool = True) -> torch.Tensor:
    """Read all of a store as runs do: every layer's tensors, and log-probabilities through its tables."""
    with StreamedModel(
        open_store(folder), device=torch.device("cpu"), resident_bytes=0, tables_in_memory=in_memory
    ) as model:
        residual = model.vocabulary.embed(TOKENS, torch.arange(len(TOKENS)))
        summed = [
            sum(float(value.double().sum()) for value in layer._module.state_dict().values())
            for _, layer in model.layers(range(model.skeleton.layers))
        ]
        found, _ = model.vocabulary.log_probabilities(residual, torch.arange(len(TOKENS)), TOKENS)
    return torch.cat([found.double(), torch.tensor(summed, dtype=torch.float64)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's store, converted here."""
    folder = tmp_path_factory.mktemp("flips") / "demo"
    assert invoke("convert", "demo", folder).exit_code == 0
    return folder


def flipped(path: Path, places: int, draws: Random) -> Iterator[int]:
    """Flip one bit of a file after the other, and put it back each time."""
    good = path.read_bytes()
    # The header, its length, and the last byte are always among them.
    fixed = [0, 9, len(good) - 1][:places]
    for place in [*fixed, *(draws.randrange(len(good)) for _ in range(places - len(fixed)))]:
        bad = bytearray(good)
        bad[place] ^= 1 << draws.randrange(8)
        path.write_bytes(bad)
        yield place
    path.write_bytes(good)


def flip_every_file(folder: Path, places: int, names: list[str]) -> None:
    """Flip bits of these files: each must be refused by name, unless it gives what the whole store does."""
    draws, expected = Random(20), scores(folder)
    for name in names:
        for place in flipped(folder / name, places, draws):
            found, refusal = None, ""
            try:
                found = scores(folder, in_memory=bool(place % 2))
            except InputError as error:
                refusal = str(error)
            if found is None:
                assert name in refusal, (name, place)
                assert f"lowmem-icl convert --repair {folder}" in refusal, (name, place)
            else:
                # White space, or the name of the digest's own field.
                assert name.startswith("manifest"), (name, place)
                assert torch.equal(found, expected)
    assert torch.equal(scores(folder), expected)


def test_one_flipped_bit_in_any_file_is_refused_by_name(tmp_path: Path, int8_store: Store) -> None:
    folder = tmp_path / "store"
    shutil.copytree(int8_store.folder, folder)
    flip_every_file(folder, 6, [*int8_store.manifest.files, "manifest.json"])


def test_one_flipped_bit_in_the_demos_files_is_refused_by_name(tmp_path: Path, demo: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(demo, folder)
    tokenizer = [name for name in open_store(folder).manifest.files if name.startswith("tokenizer/")]
    flip_every_file(folder, 3, [NON_LAYER, layer_file(0), *tokenizer, "manifest.json"])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "nf4", "float32", "demo"])
def test_twenty_places_of_every_file_are_refused_by_name(
    weights: str, tmp_path: Path, request: pytest.FixtureRequest, demo: Path
) -> None:
    named = {"int8": "int8_store", "nf4": "nf4_store", "float32": "float_store"}
    source = demo if weights == "demo" else request.getfixturevalue(named[weights]).folder
    folder = tmp_path / "store"
    shutil.copytree(source, folder)
    flip_every_file(folder, 20, [*open_store(folder).manifest.files, "manifest.json"])


def test_what_is_read_again_is_trusted_until_it_is_written_to(tmp_path: Path, int8_store: Store) -> None:
    folder = tmp_path / "store"
    shutil.copytree(int8_store.folder, folder)
    path = folder / layer_file(1)
    with StreamedModel(open_store(folder), device=torch.device("cpu"), resident_bytes=0) as model:
        for _ in model.layers(range(3)):
            pass
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"001\.safetensors: its bytes differ"):
            for _ in model.layers(range(3)):
                pass


def test_a_layers_file_in_anothers_place_is_refused(tmp_path: Path, float_store: Store) -> None:
    folder = tmp_path / "store"
    shutil.copytree(float_store.folder, folder)
    shutil.copyfile(folder / layer_file(0), folder / layer_file(2))
    with pytest.raises(InputError, match=r"002\.safetensors: "):
        scores(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": "lowmem-icl-store/1", "weights": 8}',
        b"[" * 10_000,
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"1" * 5_000,
        b'{"format": "\\ud83d"}',
    ],
)
def test_a_manifest_of_another_form_is_one_line(text: bytes, tmp_path: Path, int8_store: Store) -> None:
    folder = tmp_path / "store"
    shutil.copytree(int8_store.folder, folder)
    (folder / "manifest.json").write_bytes(text)
    assert is_store(folder)
    with pytest.raises(InputError, match=r"manifest\.json: .*convert --repair"):
        open_store(folder)


def test_a_manifest_of_a_billion_layers_is_refused_at_once(tmp_path: Path, int8_store: Store) -> None:
    folder = tmp_path / "store"
    shutil.copytree(int8_store.folder, folder)
    manifest = int8_store.manifest
    write_manifest(
        folder, manifest.model_copy(update={"config": manifest.config | {"num_hidden_layers": 10**9}})
    )
    with pytest.raises(InputError, match=r"manifest\.json: .*layers from 1 to 10,000, got 1000000000"):
        open_store(folder)


def with_header(path: Path, change: object) -> None:
    """Replace a file's header, its tensors left where they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + length]) if callable(change) else b""
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


HEADERS = {
    "empty": lambda text: b"",
    "not JSON": lambda text: b"{" + text,
    "not UTF-8": lambda text: b"\xff" * len(text),
    "deep": lambda text: b"[" * 10_000 + b"]" * 10_000,
    "a list": lambda text: b"[]",
    "extra": lambda text: json.dumps(
        json.loads(text) | {"extra": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode(),
    "renamed": lambda text: text.replace(b"fc1.bias", b"fc9.bias"),
    "another type": lambda text: text.replace(b'"I8"', b'"U8"').replace(b'"U8"', b'"I8"'),
}
STORES = {"int8": "int8_store", "nf4": "nf4_store"}


def change_file(store: Store, folder: Path, name: str, change: Callable[[Path], object]) -> None:
    """Copy a store, a file of it changed, and a manifest that agrees."""
    shutil.copytree(store.folder, folder)
    change(folder / name)
    listed = store.manifest.files | {name: stored_file(folder / name)}
    write_manifest(folder, store.manifest.model_copy(update={"files": listed}))


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("name", [NON_LAYER, layer_file(1)])
@pytest.mark.parametrize("weights", STORES)
def test_a_header_is_refused_even_where_the_manifest_agrees(
    weights: str, kind: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == NON_LAYER and kind in ("renamed", "another type"):
        pytest.skip("there is no such tensor")
    store = request.getfixturevalue(STORES[weights])
    change_file(store, tmp_path / "store", name, lambda path: with_header(path, HEADERS[kind]))
    with pytest.raises(InputError, match=f"{Path(name).name}: .*convert"):
        scores(tmp_path / "store")


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "missing": lambda entry: {},
    "empty": lambda entry: entry | {"shape": [0], "data_offsets": entry["data_offsets"][:1] * 2},
    "deeper": lambda entry: entry | {"shape": [*entry["shape"], 1]},
    "another type": lambda entry: (
        entry
        | {"dtype": "I8" if entry["dtype"] == "U8" else "U8"}
        | {"shape": [*entry["shape"][:-1], entry["data_offsets"][1] - entry["data_offsets"][0]]}
    ),
}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        *(("int8", part) for part in ("weight", "SCB", "weight_format", "outlier_columns")),
        *(("nf4", part) for part in ("weight", *(f"weight.{part}" for part in part_forms((64, 32))))),
        ("float32", "weight"),
        ("float32", "bias"),
    ],
)
def test_every_part_of_a_weight_has_its_shape_and_type(
    weights: str, part: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = request.getfixturevalue({"float32": "float_store", **STORES}[weights])
    locations, _ = read_header(store.folder / layer_file(1))
    any_length = part in ("outlier_columns", "weight.quant_state.bitsandbytes__nf4")
    for kind, change in CHANGES.items():
        if (kind == "empty" and any_length) or (kind == "another type" and part == "bias"):
            continue

        def changed(text: bytes, change: Callable[[dict[str, Any]], dict[str, Any]] = change) -> bytes:
            header = json.loads(text)
            header[f"fc1.{part}"] = change(header[f"fc1.{part}"])
            text = json.dumps({name: entry for name, entry in header.items() if entry}).encode()
            return text + b" " * (-len(text) % 8)

        folder = tmp_path / kind
        change_file(store, folder, layer_file(1), lambda path, changed=changed: with_header(path, changed))  # type: ignore[misc]
        with pytest.raises(InputError, match=rf"001\.safetensors: .*'fc1\.{part}'.*convert --repair"):
            scores(folder)
    assert f"fc1.{part}" in locations


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("fc1", [32], "expected columns below 32 in ascending order, found \\[32\\]"),
        ("fc1", [-1], "expected columns below 32"),
        ("fc1", [2**40], "expected columns below 32"),
        ("fc1", [3, 3], "in ascending order"),
        ("fc2", [64], "expected columns below 64"),
        ("self_attn.v_proj", [0], "those of the other linears that share its input"),
    ],
)
def test_outlier_columns_that_do_not_fit_are_refused(
    name: str, columns: list[int], message: str, tmp_path: Path, int8_store: Store
) -> None:
    def change(path: Path) -> None:
        tensors = load_file(path) | {f"{name}.outlier_columns": torch.tensor(columns)}
        save_tensors(path, tensors, source_digests(path))

    change_file(int8_store, tmp_path / "store", layer_file(1), change)
    with pytest.raises(InputError, match=rf"001\.safetensors: '{name}\.outlier_columns': .*{message}"):
        scores(tmp_path / "store")


def test_repair_makes_what_is_bad_again_and_leaves_the_rest(tmp_path: Path, demo: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(demo, folder)
    good = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tokenizer = next(name for name in open_store(folder).manifest.files if name.startswith("tokenizer/"))
    bad = [NON_LAYER, layer_file(1), tokenizer, "manifest.json"]
    for name in bad:
        content = bytearray(good[folder / name])
        content[len(content) // 2] ^= 16
        (folder / name).write_bytes(content)
    (folder / layer_file(2)).unlink()
    untouched = (folder / layer_file(0)).stat()
    done = invoke("convert", "--repair", folder)
    assert done.exit_code == 0, done.output
    for name in [*bad, layer_file(2)]:
        assert f"{folder / name}: made again" in done.stdout
    assert (folder / layer_file(0)).stat() == untouched
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == good
    assert "nothing to mend" in invoke("convert", "--repair", folder).stdout


@pytest.mark.parametrize("name", [NON_LAYER, layer_file(1), "tokenizer/tokenizer.json"])
def test_repair_from_another_source_replaces_nothing(name: str, tmp_path: Path, demo: Path) -> None:
    folder, source = tmp_path / "store", tmp_path / "source"
    shutil.copytree(demo, folder)
    shutil.copytree(Path(str(files("lowmem_icl").joinpath("demo"))), source)
    weights = load_file(source / "model.safetensors")
    for tensor in weights.values():
        tensor.mul_(2)
    save_file(weights, source / "model.safetensors")
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + " ")
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 2
    (folder / name).write_bytes(content)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = invoke("convert", source, folder, "--repair")
    assert done.exit_code == 2, done.output
    assert f"{folder / name}: made again from the source, it is not what it was" in done.stderr.replace(
        "\n", " "
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert invoke("convert", "demo", folder, "--repair").exit_code == 0


@pytest.mark.parametrize("name", [layer_file(1), "tokenizer/tokenizer.json"])
def test_repair_on_a_failing_disk_says_so(
    name: str, tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / "store", os.replace
    shutil.copytree(demo, folder)

    def spoils(temporary: Path, path: Path) -> None:
        replace(temporary, path)
        if Path(path) == folder / name:
            path.write_bytes(path.read_bytes()[:-1] + b"\x07")

    (folder / name).unlink()
    monkeypatch.setattr(os, "replace", spoils)
    done = invoke("convert", "--repair", folder)
    assert done.exit_code == 2
    assert f"{folder / name} does not hold what was written" in " ".join(done.stderr.split())
    monkeypatch.undo()
    assert f"{folder / name}: made again" in invoke("convert", "--repair", folder).stdout


def test_a_run_over_a_bad_layer_ends_with_one_line(tmp_path: Path, demo: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(demo, folder)
    path = folder / layer_file(3)
    content = bytearray(path.read_bytes())
    content[-5] ^= 2
    path.write_bytes(content)
    done = invoke("run", "--model", folder, "--out", tmp_path / "run", "--tasks", "antonym", "--limit", "4")
    assert done.exit_code == 2, done.output
    line = done.stderr.strip().splitlines()[-1]
    assert str(path) in line
    assert f"lowmem-icl convert --repair {folder}" in line
    assert "Traceback" not in done.output
    told = invoke("status", tmp_path / "run")
    assert "state: failed; run.log says why" in told.stdout
    assert str(path) in (tmp_path / "run" / "run.log").read_text()
