"""Conversion and stores: what is written, what is refused, and that a stopped conversion goes on."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import bitsandbytes  # noqa: F401  # whose operators the tests ask for
import pytest
import torch
from conftest import byte_tokens, make_checkpoint, make_store, reference_model
from safetensors.torch import load_file, save_file

from lowmem_icl.conversion import claim as claim_module
from lowmem_icl.conversion import convert as convert_module
from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.convert import check_room, planned_store
from lowmem_icl.conversion.locate import ensure_store, locate
from lowmem_icl.errors import DoesNotFit, InputError
from lowmem_icl.model.reading import LayerReader, read_header
from lowmem_icl.model.skeleton import Skeleton
from lowmem_icl.model.store import Store, Weights, layer_file, open_store, verify_store
from lowmem_icl.model.tables import VocabularyTable
from lowmem_icl.model.writing import save_one_by_one, save_tensors, source_digests
from lowmem_icl.system.files import sha256_of_file


def test_int8_layers_have_bitsandbytes_names_and_values(checkpoint: Path, int8_store: Store) -> None:
    tensors = load_file(int8_store.layer_paths[1])
    weight = reference_model(checkpoint).model.decoder.layers[1].fc1.weight.detach()
    expected, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight, 0.0)
    assert torch.equal(tensors["fc1.weight"], expected)
    assert torch.equal(tensors["fc1.SCB"], scales)
    assert tensors["fc1.weight_format"].dtype == torch.uint8


def test_float_layers_are_the_source_unchanged(checkpoint: Path, float_store: Store) -> None:
    source = dict(reference_model(checkpoint).model.decoder.layers[2].named_parameters())
    stored = load_file(float_store.layer_paths[2])
    assert stored.keys() == source.keys()
    assert all(torch.equal(stored[name], value) for name, value in source.items())


def as_pickle(folder: Path, prefix: str) -> None:
    """Rewrite a checkpoint as two pickled shards with an index, names as older OPT files have them."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {
        "pytorch_model-00001.bin": names[: len(names) // 2],
        "pytorch_model-00002.bin": names[len(names) // 2 :],
    }
    weight_map: dict[str, str] = {}
    for shard, members in shards.items():
        renamed = {
            name.removeprefix("model.") if prefix == "" else name: weights[name].clone() for name in members
        }
        torch.save(renamed, folder / shard)
        weight_map |= dict.fromkeys(renamed, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_pickled_shards_give_the_same_store(tmp_path: Path, prefix: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    plain = make_store(folder, tmp_path / "plain", "int8")
    as_pickle(folder, prefix)
    again = make_store(folder, tmp_path / "again", "int8")
    for name in map(layer_file, range(3)):
        assert plain.manifest.files[name].sha256 == again.manifest.files[name].sha256
    assert plain.manifest.source.digest == again.manifest.source.digest


def test_checkpoints_without_final_norm_and_in_half_precision_are_read(tmp_path: Path) -> None:
    """As OPT-IML and early fine-tunes may come."""
    folder = make_checkpoint(tmp_path / "checkpoint", dtype=torch.float16, _remove_final_layer_norm=True)
    store = make_store(folder, tmp_path / "store", "float32")
    outside = load_file(store.folder / "outside.safetensors")
    assert not any("final_layer_norm" in name for name in outside)
    assert all(value.dtype == torch.float16 for value in outside.values())
    expected = reference_model(folder).model.decoder.layers[0].fc2.weight
    assert torch.equal(load_file(store.layer_paths[0])["fc2.weight"], expected)


def test_the_source_digest_is_the_same_in_every_form(int8_store: Store, float_store: Store) -> None:
    assert int8_store.manifest.source.digest == float_store.manifest.source.digest
    assert int8_store.manifest.digest != float_store.manifest.digest


def test_a_stopped_conversion_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    whole = make_store(folder, tmp_path / "whole", "int8")
    made = convert_module._Steps.tensors
    converted: list[int] = []

    def stops_at_two(steps: convert_module._Steps, layer: int) -> object:
        converted.append(layer)
        if converted == [0, 1, 2]:
            raise KeyboardInterrupt
        return made(steps, layer)

    monkeypatch.setattr(convert_module._Steps, "tensors", stops_at_two)
    with pytest.raises(KeyboardInterrupt):
        make_store(folder, tmp_path / "again", "int8")
    with pytest.raises(InputError, match="not a finished store"):
        open_store(tmp_path / "again")
    again = make_store(folder, tmp_path / "again", "int8")
    assert converted == [0, 1, 2, 2]
    assert again.manifest == whole.manifest


def test_what_the_disk_spoils_is_named_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    whole = make_store(folder, tmp_path / "whole", "int8")

    def spoils_the_second(path: Path, *arguments: Any) -> tuple[int, str]:
        written = save_tensors(path, *arguments)
        if path.name == "001.safetensors":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return written

    monkeypatch.setattr(claim_module, "save_tensors", spoils_the_second)
    with pytest.raises(InputError, match=r"001\.safetensors does not hold what was written"):
        make_store(folder, tmp_path / "again", "int8")
    monkeypatch.undo()
    assert make_store(folder, tmp_path / "again", "int8").manifest == whole.manifest


def test_a_planned_store_has_the_sizes_of_the_store(tmp_path: Path) -> None:
    for dtype, weights in itertools.product((torch.float32, torch.float16), get_args(Weights)):
        wide = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "vocab_size": 2000}
        folder = make_checkpoint(tmp_path / f"{dtype}-{weights}", dtype=dtype, **wide)
        planned = planned_store(open_checkpoint(folder), tmp_path / "nowhere", weights)
        made = make_store(folder, folder / "store", weights)
        assert not planned.is_written
        assert planned.layer_bytes == pytest.approx(made.layer_bytes, rel=0.03)
        assert planned.size_bytes == pytest.approx(made.size_bytes, rel=0.03)


def test_a_folder_of_another_conversion_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty and holds no unfinished conversion"):
        make_store(checkpoint, tmp_path / "store", "int8")
    assert (tmp_path / "store" / "mine.txt").read_text() == "keep me"


def copied(store: Store, folder: Path) -> Path:
    for name in [*store.manifest.files, "manifest.json"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((store.folder / name).read_bytes())
    return folder


def test_truncated_altered_and_foreign_files_are_named(tmp_path: Path, int8_store: Store) -> None:
    folder = copied(int8_store, tmp_path / "store")
    verify_store(open_store(folder))
    path = folder / "layers" / "001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(InputError, match=r"001\.safetensors: expected \d+ bytes"):
        open_store(folder)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InputError, match=r"001\.safetensors: its bytes differ"):
        verify_store(open_store(folder))
    path.unlink()
    with pytest.raises(InputError, match=r"001\.safetensors is missing"):
        open_store(folder)
    (folder / "manifest.json").write_text('{"format": "something/2"}')
    with pytest.raises(InputError, match="field 'format'"):
        open_store(folder)


def test_a_manifest_cannot_point_outside_its_store(tmp_path: Path, int8_store: Store) -> None:
    folder = copied(int8_store, tmp_path / "store")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = {"size_bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="lies outside the store"):
        open_store(folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (os.mkdir, (str(tmp_path / "was-run"),))

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="would run code when it is read"):
        open_checkpoint(folder)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 40),
            "cannot be read as safetensors",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_broken_checkpoints_are_named(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    break_it(folder)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder).check_weights()


def test_missing_misshapen_and_infinite_parameters_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.1.fc1.weight"
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, "is missing"),
        (weights | {name: weights[name][:3].clone()}, "expected floating point of shape"),
        (weights | {name: torch.full_like(weights[name], float("inf"))}, "infinities or NaN"),
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(InputError, match=message):
            make_store(folder, tmp_path / message.replace(" ", ""), "int8")


def test_no_room_on_the_disk_is_told_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="--store-dir"):
        check_room(tmp_path / "store", 1 << 60)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="model type 'bert' is not supported"):
        Skeleton.from_dict({"model_type": "bert"})


def test_a_store_of_another_form_is_refused(tmp_path: Path, int8_store: Store) -> None:
    with pytest.raises(InputError, match=r"--weights float32: the store .* holds int8"):
        locate(str(int8_store.folder), None, "float32", tmp_path)
    assert (
        ensure_store(locate(str(int8_store.folder), None, "int8", tmp_path), "int8").manifest
        == int8_store.manifest
    )


def test_the_reader_gives_the_files_in_any_order(float_store: Store) -> None:
    expected = [load_file(path) for path in float_store.layer_paths]
    for resident in (frozenset(), frozenset({1}), frozenset({0, 1, 2})):
        reader = LayerReader(float_store.layer_paths, resident)
        orders = ([0, 1, 2], [2, 1, 0], [1], [0, 2, 0, 2])
        for order in orders:
            for layer, tensors in reader.layers(order):
                assert tensors.keys() == expected[layer].keys()
                assert all(torch.equal(tensors[name], value) for name, value in expected[layer].items())
        streamed = sum(layer not in resident for order in orders for layer in order)
        assert reader.read_bytes == (streamed + len(resident)) * float_store.layer_bytes
        reader.close()


def test_a_file_system_without_direct_reads_gives_the_same(
    float_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, refused = os.open, list[Path]()

    def refuses_direct(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "no direct reads here")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuses_direct)
    reader = LayerReader(float_store.layer_paths)
    for layer, tensors in reader.layers([0, 1, 2]):
        expected = load_file(float_store.layer_paths[layer])
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    reader.close()
    assert len(refused) == 3


def test_the_fixed_text_is_long_enough_to_decide_and_to_measure(int8_store: Store) -> None:
    assert int8_store.manifest.outliers is not None
    assert int8_store.manifest.outliers.activations > 100_000
    assert len(byte_tokens("é")) == 2


def test_tensors_written_one_by_one_are_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.randn(3, 5),
        "half": torch.randn(7, 2).half(),
        "table": torch.randn(9, 4).bfloat16(),
    }
    digests: dict[str, str] = {}

    def come() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            digests[name] = f"digest of {name}"
            yield name, tensor

    size, summed = save_one_by_one(tmp_path / "file", come(), digests)
    assert (tmp_path / "file").stat().st_size == size
    assert sha256_of_file(tmp_path / "file") == summed
    content = (tmp_path / "file").read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    # By these bytes repairs recognise files of stores that are there.
    assert header.rstrip(b" ") == json.dumps(json.loads(header)).encode()
    assert len(header) % 8 == 0
    read = load_file(tmp_path / "file")
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
    assert source_digests(tmp_path / "file") == digests
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_config_without_weights_is_planned_with_and_not_run(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    planned = planned_store(open_checkpoint(folder), tmp_path / "store", "float32")
    half = planned_store(open_checkpoint(checkpoint), tmp_path / "store", "float32")
    assert planned.layer_bytes == half.layer_bytes
    located = locate(str(folder), None, "float32", tmp_path)
    with pytest.raises(InputError, match="has no weights"):
        ensure_store(located, "float32")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_table_gives_its_rows_wherever_it_is(tmp_path: Path, in_memory: bool) -> None:
    values = torch.randn(5000, 8).half()
    save_tensors(tmp_path / "file", {"before": torch.ones(3), "table": values}, {})
    location = read_header(tmp_path / "file")[0]["table"]
    table = VocabularyTable(tmp_path / "file", location, torch.device("cpu"), in_memory=in_memory)
    ids = torch.tensor([4999, 0, 17, 17])
    assert torch.equal(table.rows(ids), values[ids].float())
    blocks = list(table.blocks())
    assert [start for start, _ in blocks] == [0, 2048, 4096]
    assert torch.equal(torch.cat([block for _, block in blocks]), values.float())
    assert table.read_bytes == (0 if in_memory else (3 + 5000) * 8 * 2)
    table.close()
