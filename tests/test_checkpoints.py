"""Checkpoint folders as they occur: tied tables, doubles, old pickles, several weight files in one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import invoke
from conftest import make_checkpoint, make_store, reference_model
from demo_scores import DEMO
from safetensors.torch import load_file, save_file, save_model
from test_store import as_pickle

from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.convert import _Steps, planned_store
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import NON_LAYER, Store, layer_file, open_store

EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "lm_head.weight"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def non_layer(store: Store) -> dict[str, torch.Tensor]:
    return load_file(store.folder / NON_LAYER)


def test_of_a_tied_pair_the_head_alone_serves(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    plain = make_store(folder, tmp_path / "plain", "float32")
    save_model(reference_model(folder), str(folder / SAFETENSORS))
    assert EMBEDDING not in load_file(folder / SAFETENSORS), "as safetensors' save_model writes it"
    again = make_store(folder, tmp_path / "again", "float32")
    assert torch.equal(non_layer(again)[EMBEDDING], non_layer(plain)[EMBEDDING])
    assert again.manifest.source.digest == plain.manifest.source.digest
    assert again.manifest.config == plain.manifest.config
    assert again.manifest.source.notes == [
        f"of the tied tables only {HEAD} is stored; it serves as {EMBEDDING} too"
    ]


def test_a_head_with_other_values_is_used_and_reported(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", vocab_size=528)
    weights = load_file(folder / SAFETENSORS)
    save_file(weights | {HEAD: weights[EMBEDDING] * 1.5}, folder / SAFETENSORS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    done = invoke("convert", folder, tmp_path / "store", "--weights", "float32")
    assert done.exit_code == 0, done.stderr
    assert "two are stored with different values" in " ".join(done.stderr.split())
    store, expected = open_store(tmp_path / "store"), reference_model(folder)
    assert store.manifest.config["tie_word_embeddings"] is False
    head, embedding = expected.get_output_embeddings().weight, expected.get_input_embeddings().weight
    assert not torch.equal(head, embedding), "Hugging Face does not tie them either"
    assert torch.equal(non_layer(store)[HEAD], head)
    assert torch.equal(non_layer(store)[EMBEDDING], embedding)


def test_a_head_with_the_same_values_stays_tied(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(folder / SAFETENSORS)
    save_file(weights | {HEAD: weights[EMBEDDING].clone()}, folder / SAFETENSORS)
    store = make_store(folder, tmp_path / "store", "float32")
    assert HEAD not in non_layer(store)
    assert store.manifest.source.notes == []


@pytest.mark.parametrize("weights", ["int8", "float32"])
def test_doubles_become_floats_that_can_be_read(tmp_path: Path, weights: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", dtype=torch.float64)
    expected = reference_model(folder)
    store = make_store(folder, tmp_path / "store", weights)
    outside = non_layer(store)
    assert {tensor.dtype for tensor in outside.values()} == {torch.float32}
    assert torch.equal(outside[EMBEDDING], expected.get_input_embeddings().weight)
    assert planned_store(open_checkpoint(folder), tmp_path / "nowhere", "float32").size_bytes > 0


def test_a_double_beyond_float_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", dtype=torch.float64)
    weights = load_file(folder / SAFETENSORS)
    weights[EMBEDDING][3, 4] = 1e300
    save_file(weights, folder / SAFETENSORS)
    with pytest.raises(InputError, match=f"'{EMBEDDING}' holds infinities"):
        make_store(folder, tmp_path / "store", "float32")


def test_a_store_that_cannot_be_read_back_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")

    def loses_a_row(steps: _Steps, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:-1]

    def forgets_the_bias(steps: _Steps, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {} if name == "fc1.bias" else {name: tensor.float()}

    for method, replacement, message in (
        ("_non_layer_form", loses_a_row, r"outside\.safetensors: parameter .* expected shape"),
        ("_stored_form", forgets_the_bias, r"000\.safetensors: parameter 'fc1\.bias' is missing"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_Steps, method, replacement)
            with pytest.raises(InputError, match=message):
                make_store(folder, tmp_path / method, "float32")
        assert not (tmp_path / method / "manifest.json").exists()


def test_pickles_in_torchs_old_form_are_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    plain = make_store(folder, tmp_path / "plain", "int8")
    weights = load_file(folder / SAFETENSORS)
    torch.save(weights, folder / PICKLE, _use_new_zipfile_serialization=False)
    (folder / SAFETENSORS).unlink()
    again = make_store(folder, tmp_path / "again", "int8")
    for name in [NON_LAYER, *map(layer_file, range(3))]:
        assert plain.manifest.files[name] == again.manifest.files[name]
    assert "torch's old form" in again.manifest.source.notes[0]


def test_a_pickle_that_holds_no_parameters_by_name_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / SAFETENSORS).unlink()
    torch.save([torch.zeros(2)], folder / PICKLE)
    with pytest.raises(InputError, match="expected parameters by name, got list"):
        open_checkpoint(folder)


def test_of_several_weight_files_hugging_face_s_first_is_taken(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    other = make_checkpoint(tmp_path / "other", seed=1)
    as_pickle(other, "model.")
    for path in other.glob("pytorch_model*"):
        (folder / path.name).write_bytes(path.read_bytes())
    store = make_store(folder, tmp_path / "store", "float32")
    expected = reference_model(folder).get_input_embeddings().weight
    assert torch.equal(non_layer(store)[EMBEDDING], expected)
    assert store.manifest.source.notes == []


def with_incomplete_index(folder: Path) -> None:
    index = {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index))
    torch.save(load_file(folder / SAFETENSORS), folder / PICKLE)
    (folder / SAFETENSORS).unlink()


def test_an_index_whose_shards_are_missing_falls_back_to_what_is_whole(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    plain = make_store(folder, tmp_path / "plain", "float32")
    with_incomplete_index(folder)
    opened = open_checkpoint(folder)
    assert list(opened.shards.sizes) == [PICKLE]
    assert "model-00001-of-00002.safetensors, which is missing" in opened.notes[0]
    assert opened.notes[0].endswith("pytorch_model.bin is used")
    again = make_store(folder, tmp_path / "again", "float32")
    assert again.manifest.source.digest == plain.manifest.source.digest


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / PICKLE).unlink(),
            "names model-00001-of-00002.safetensors, which is missing",
        ),
        (
            lambda folder: (folder / f"{SAFETENSORS}.index.json").write_text('{"weight_map": {}}'),
            "expected 'weight_map'",
        ),
    ],
)
def test_where_nothing_is_whole_the_missing_file_is_named(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    with_incomplete_index(folder)
    break_it(folder)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_manifests_of_before_keep_their_digest(float_store: Store) -> None:
    """A run folder is bound to its store by that digest."""
    written = json.loads((float_store.folder / "manifest.json").read_text())
    assert written["source"].keys() == {"id", "revision", "digest"}
    # What tells of a damaged manifest is no part of it.
    del written["digest"]
    content = json.dumps(written, sort_keys=True).encode()
    assert float_store.manifest.digest == hashlib.sha256(content).hexdigest()
    changed = float_store.manifest.model_copy(deep=True)
    changed.source.quantisation = "Q4_K_M"
    assert changed.digest != float_store.manifest.digest


@pytest.mark.parametrize("form", [SAFETENSORS, "pickle", "old pickle"])
def test_weights_of_more_layers_than_the_config_has_are_refused(form: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    whole = make_store(folder, tmp_path / "whole", "float32")
    first = "model.decoder.layers.2.fc1.bias"
    if form != SAFETENSORS:
        as_pickle(folder, "" if form == "old pickle" else "model.")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    named = first.removeprefix("model.") if form == "old pickle" else first
    with pytest.raises(InputError, match=f"expected 2 layers, as config.json says, .*'{named}'"):
        make_store(folder, tmp_path / "store", "float32")
    assert not (tmp_path / "store").exists()
    planned = invoke("plan", "--model", folder, "--tasks", "recall")
    assert planned.exit_code == 2
    assert named in "".join(planned.stderr.split())
    # What the config has no place for anywhere is ignored as ever.
    (folder / "config.json").write_text(json.dumps(config))
    if form == SAFETENSORS:
        more = {f"model.decoder.layers.{number}.rotary_emb.inv_freq": torch.ones(2) for number in (0, 3)}
        save_file(load_file(folder / form) | more, folder / form)
    assert make_store(folder, tmp_path / "again", "float32").manifest.files == whole.manifest.files
