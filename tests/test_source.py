"""Stores made again, in another form, of what a store was made from."""

import shutil
from pathlib import Path

import pytest
from commands import invoke
from conftest import make_checkpoint
from demo_scores import DEMO
from gguf import GGMLQuantizationType
from gguf_files import random_model, write_gguf
from safetensors.torch import load_file, save_file

from lowmem_icl.model.store import Store, layer_file, open_store, write_manifest


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return with_tokenizer(make_checkpoint(tmp_path / "source", vocab_size=528))


def converted(*arguments: object) -> Store:
    done = invoke("convert", *arguments)
    assert done.exit_code == 0, done.output
    return open_store(Path(done.stdout.strip().splitlines()[-1]))


def refused(*arguments: object) -> str:
    done = invoke("convert", *arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def assert_equal(left: Store, right: Store) -> None:
    names = ["outside.safetensors", *(layer_file(layer) for layer in range(left.skeleton.layers))]
    assert [left.manifest.files[name] for name in names] == [right.manifest.files[name] for name in names]
    assert left.manifest.digest == right.manifest.digest


def test_a_store_of_every_form_comes_of_the_source_of_any(source: Path, tmp_path: Path) -> None:
    stores = {
        weights: converted(source, tmp_path / weights, "--weights", weights)
        for weights in ("int8", "nf4", "float32")
    }
    for given, made in (("int8", "nf4"), ("nf4", "float32"), ("nf4", "int8"), ("float32", "nf4")):
        again = converted(tmp_path / given, tmp_path / f"{given}-{made}", "--weights", made)
        assert_equal(again, stores[made])
        assert again.manifest.source == stores[made].manifest.source
    assert "all as written" in invoke("convert", "--verify", tmp_path / "int8-nf4").stdout
    assert_equal(converted(tmp_path / "nf4", tmp_path / "copy", "--weights", "nf4"), stores["nf4"])
    assert converted(tmp_path / "nf4", "--weights", "nf4").folder == tmp_path / "nf4", "it is there"


def test_without_a_folder_it_lies_where_runs_look_for_it(source: Path, tmp_path: Path) -> None:
    stores = ("--store-dir", tmp_path / "stores")
    first = converted(source, tmp_path / "first", "--weights", "int8")
    second = converted(first.folder, "--weights", "nf4", *stores)
    assert second.folder.parent == tmp_path / "stores"
    assert converted(source, "--weights", "nf4", *stores).folder == second.folder
    shutil.rmtree(source)
    assert converted(first.folder, "--weights", "nf4", *stores).folder == second.folder, "made before"


def test_a_source_that_moved_is_told_with_what_to_give(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = converted("source", tmp_path / "store", "--weights", "int8")
    assert store.manifest.source.id == "source"
    monkeypatch.chdir(Path(store.folder).parent.parent)
    converted(store.folder, tmp_path / "again", "--weights", "nf4")
    source.rename(tmp_path / "elsewhere")
    told = refused(store.folder, tmp_path / "third", "--weights", "nf4")
    assert f"its source {source} is not there any more; give it where it is now" in told
    assert "lowmem-icl convert SOURCE --weights nf4" in told
    pathless = store.manifest.source.model_copy(update={"path": None})
    write_manifest(store.folder, store.manifest.model_copy(update={"source": pathless}))
    told = refused(store.folder, tmp_path / "third", "--weights", "nf4")
    assert "made from source, which is not there from this folder" in told


@pytest.mark.parametrize(
    "changed", ["model.decoder.embed_tokens.weight", "model.decoder.layers.2.fc1.weight"]
)
def test_a_source_that_changed_is_told_by_the_first_tensor(
    source: Path, tmp_path: Path, changed: str
) -> None:
    store = converted(source, tmp_path / "store", "--weights", "int8")
    weights = load_file(source / "model.safetensors")
    weights[changed] = weights[changed] + 1
    save_file(weights, source / "model.safetensors")
    told = refused(store.folder, tmp_path / "other", "--weights", "nf4")
    assert f"parameter '{changed}' is not the one that {store.folder} was made from" in told
    assert f"lowmem-icl convert {source} --weights nf4" in told
    assert not (tmp_path / "other" / "manifest.json").exists()
    assert (tmp_path / "other").exists() == ("layers" in changed), "layers before it are kept"


def test_a_folder_with_another_store_is_refused(source: Path, tmp_path: Path) -> None:
    store = converted(source, tmp_path / "store", "--weights", "int8")
    told = refused(store.folder, store.folder, "--weights", "nf4")
    assert "holds a store of int8 of" in told
    assert "expected nf4" in told


def test_a_stopped_conversion_goes_on_from_the_store_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = converted(source, tmp_path / "store", "--weights", "int8")
    whole = converted(source, tmp_path / "whole", "--weights", "nf4")
    from lowmem_icl.conversion import convert as convert_module

    made, seen = convert_module._Steps.tensors, list[int]()

    def stops_at_one(steps: convert_module._Steps, layer: int) -> object:
        seen.append(layer)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return made(steps, layer)

    monkeypatch.setattr(convert_module._Steps, "tensors", stops_at_one)
    assert invoke("convert", store.folder, tmp_path / "again", "--weights", "nf4").exit_code == 130
    assert_equal(converted(store.folder, tmp_path / "again", "--weights", "nf4"), whole)
    assert seen == [0, 1, 1, 2]


def test_a_gguf_files_store(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), GGMLQuantizationType.Q8_0)
    stores = ("--store-dir", tmp_path / "stores")
    first = converted(path, "--weights", "int8", *stores)
    second = converted(first.folder, "--weights", "nf4", *stores)
    assert second.manifest.source == first.manifest.source
    assert second.manifest.source.path == str(path)
    path.unlink()
    assert f"its source {path} is not there" in refused(first.folder, "--weights", "float32", *stores)


def test_the_demos_store_needs_no_path(tmp_path: Path, stores: Path) -> None:
    demo = converted("demo", "--store-dir", stores)
    assert demo.manifest.source.path is None
    again = converted(demo.folder, tmp_path / "nf4", "--weights", "nf4")
    assert again.manifest.source == demo.manifest.source
