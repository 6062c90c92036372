"""Weight files from anyone: each is read right or refused in one line, and nothing in it is ever run."""

import collections
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from conftest import make_checkpoint, make_store, reference_model
from safetensors.torch import load_file, save_file
from test_store import as_pickle

from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.weight_files import open_weight_file
from lowmem_icl.errors import InputError
from lowmem_icl.model.store import NON_LAYER

EMBEDDING = "model.decoder.embed_tokens.weight"
NORM = "model.decoder.final_layer_norm.weight"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = f"{SAFETENSORS}.index.json"


@contextmanager
def at_once(seconds: float = 5.0, megabytes: int = 200) -> Iterator[None]:
    """Fail where what is done takes longer, or more memory than any test before it."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10


def refused(path: Path, *words: str) -> str:
    """Check that a file is refused in a line that names it and holds these words; return the line."""
    with at_once(), pytest.raises(InputError) as caught:
        open_weight_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
    # torch's own advice.
    assert "weights_only" not in message
    return message


class Runs:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


class Calls:
    """Calls anything where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def save(value: Any, path: Path, form: str) -> None:
    if form == "pickle alone":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "old form", "pickle alone"])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path, form: str) -> None:
    path, mark = tmp_path / PICKLE, tmp_path / "mark"
    for value in (Runs(mark), {"a": Runs(mark)}, {"a": torch.zeros(2), "b": [Runs(mark)]}):
        save(value, path, form)
        refused(path, "would run code", "system", "safetensors")
    assert not mark.exists()


def test_through_the_command_it_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    folder, mark = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "mark"
    (folder / SAFETENSORS).unlink()
    torch.save({EMBEDDING: Runs(mark)}, folder / PICKLE)
    done = invoke("convert", folder, tmp_path / "store")
    assert done.exit_code == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("lowmem-icl: ")
    assert "would run code" in line
    assert "Traceback" not in done.stderr
    assert not mark.exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (bytearray, (10**12,)),
        (eval, ("1",)),
        (__import__, ("os",)),
        (collections.defaultdict, (eval,)),
        (torch.hub.load_state_dict_from_url, ("http://localhost/x",)),
        (torch.load, ("x",)),
    ],
)
def test_what_is_no_part_of_tensors_is_never_called(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...]
) -> None:
    torch.save({"a": Calls(function, *arguments)}, tmp_path / PICKLE)
    refused(tmp_path / PICKLE, "run")


def test_torchs_forms_of_before_get_the_right_advice(tmp_path: Path) -> None:
    path = tmp_path / PICKLE
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(1)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(path, "before 0.4", "tar", "safetensors")


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compression: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_zip_file_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    """Mapped into memory, packed bytes would be taken for numbers; and a small file unpacks to any size."""
    path = tmp_path / PICKLE
    torch.save({"a": torch.ones(1000)}, path)
    rezipped(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    refused(path, "compressed")
    torch.save({"a": torch.ones(1000)}, path)
    more = 300_000_000
    rezipped(path, lambda name, content: content.ljust(more * name.endswith(".pkl")), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    refused(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/y", "1")
    refused(path, "0 data.pkl")


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02X\xff\xff\xff\x7f", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PICKLE).write_bytes(content)
    refused(tmp_path / PICKLE, "cannot be read as weights")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**11),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["repeated", "sparse", "meta"],
)
def test_a_tensor_whose_values_are_not_in_the_file_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor, "b": torch.ones(2)}, tmp_path / PICKLE)
    opened = open_weight_file(tmp_path / PICKLE)
    assert torch.equal(opened["b"](), torch.ones(2))
    with pytest.raises(InputError, match="'a': expected all of its values"):
        opened["a"]()


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(content: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


TWO = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":'
HEADERS = {
    "nothing": (b"", "0 bytes"),
    "short": (b"\x05\x00", "5 bytes"),
    "empty": (header(b""), "0 bytes"),
    "beyond the file": (header({"a": entry(0, 8)}, bytes(8), 1 << 20), "1048576 bytes"),
    "2^62": (header({"a": entry(0, 8)}, bytes(8), 1 << 62), "4611686018427387904 bytes"),
    "2^64-1": (header({"a": entry(0, 8)}, bytes(8), (1 << 64) - 1), "18446744073709551615 bytes"),
    "overlap": (header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' overlaps another"),
    "the same bytes": (header({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps another"),
    "hole": (header({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "leaves 4 bytes before it"),
    "rest": (header({"a": entry(0, 8)}, bytes(16)), "byte 8 of 16"),
    "cut off": (header({"a": entry(0, 80)}, bytes(16)), "byte 80 of 16"),
    "product": (header({"a": entry(0, 8, [1 << 63, 1 << 63])}, bytes(8)), "beyond any file"),
    "product 2^64": (header({"a": entry(0, 0, [1 << 32, 1 << 32])}), "of its shape 73786976294838206464"),
    "nothing times 2^60": (header({"a": entry(0, 0, [0, 1 << 60])}), "beyond any file"),
    "disagree": (header({"a": entry(0, 8, [3])}, bytes(8)), "8 bytes, of its shape 12"),
    "negative": (header({"a": entry(0, 8, [-2])}, bytes(8)), "whole numbers"),
    "backwards": (header({"a": entry(8, 0, [2])}, bytes(8)), "-8 bytes"),
    "fraction": (header({"a": entry(0, 8, [2.0])}, bytes(8)), "whole numbers"),
    "truth": (header({"a": entry(0, 4, [True])}, bytes(4)), "whole numbers"),
    "text": (header({"a": "x"}), "whole numbers"),
    "null": (header(b"null"), "no JSON object"),
    "list": (header(b"[]"), "no JSON object"),
    "type": (header({"a": entry(0, 8, dtype="Q9")}, bytes(8)), "'Q9'"),
    "no type": (header({"a": entry(0, 8, dtype=None)}, bytes(8)), "'None'"),
    "long type": (header({"a": entry(0, 8, dtype="x" * 10**6)}, bytes(8)), "of which no weights are read"),
    "6 bits": (header({"a": entry(0, 24, [32], "F6_E2M3")}, bytes(24)), "F6_E2M3"),
    "twice": (header(TWO + b'{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', bytes(12)), "'a' is there"),
    "twice alike": (header(TWO + b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "twice"),
    "not UTF-8": (header(b'{"\xff":1}'), "utf-8"),
    "deep lists": (header(b"[" * 10_000 + b"]" * 10_000), "recursion"),
    "deep objects": (header(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), "recursion"),
    "digits": (header(b'{"a":' + b"9" * 5000 + b"}"), "digits"),
    "100 MB": (header(b" " * 100_000_000), "100000000 bytes"),
    "dimensions": (header({"a": entry(0, 0, [0] * 1000)}), "1000 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_an_absurd_safetensors_header_is_refused_at_once(tmp_path: Path, name: str) -> None:
    content, words = HEADERS[name]
    path = tmp_path / SAFETENSORS
    path.write_bytes(content)
    refused(path, words)


def test_a_header_of_many_equal_names_takes_no_time(tmp_path: Path) -> None:
    content = ",".join(f'"t{n}":1' for n in range(300_000)) + ',"t299999":1'
    (tmp_path / SAFETENSORS).write_bytes(header(f"{{{content}}}".encode()))
    refused(tmp_path / SAFETENSORS, "'t299999' is there twice")


def test_what_the_check_accepts_is_what_the_library_writes(tmp_path: Path) -> None:
    """Every type that both know, tensors without elements and of no dimensions among them."""
    tensors = {
        str(dtype): torch.zeros((2, 3), dtype=dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
        )
    }  # fmt: skip
    tensors |= {"none": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / SAFETENSORS, metadata={"a": "b"})
    opened = open_weight_file(tmp_path / SAFETENSORS)
    assert opened.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = opened[name]()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)


def with_index(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / SAFETENSORS).rename(folder / "shard.safetensors")
    return folder


@pytest.mark.parametrize(
    "shard",
    [
        "../shard.safetensors",
        "/etc/passwd",
        "a/../../x.bin",
        "sub/shard.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        3,
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, shard: Any) -> None:
    folder = with_index(make_checkpoint(tmp_path / "checkpoint"), {EMBEDDING: shard})
    (tmp_path / "shard.safetensors").write_bytes((folder / "shard.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"index\.json"):
        open_checkpoint(folder)


def test_a_link_that_its_owner_made_is_followed(tmp_path: Path) -> None:
    """The hub's own cache is made of them. An index names files, and makes no links."""
    folder = make_checkpoint(tmp_path / "checkpoint")
    plain = make_store(folder, tmp_path / "plain", "float32")
    names = dict.fromkeys(load_file(folder / SAFETENSORS), "shard.safetensors")
    with_index(folder, names)
    (folder / "shard.safetensors").rename(tmp_path / "blob")
    (folder / "shard.safetensors").symlink_to(tmp_path / "blob")
    linked = make_store(folder, tmp_path / "linked", "float32")
    assert linked.manifest.source.digest == plain.manifest.source.digest


def test_a_parameter_in_two_shards_is_taken_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    plain = make_store(folder, tmp_path / "plain", "float32")
    weights = load_file(folder / SAFETENSORS)
    with_index(folder, dict.fromkeys(weights, "shard.safetensors"))
    save_file({EMBEDDING: weights[EMBEDDING] + 1}, folder / "other.safetensors")
    again = make_store(folder, tmp_path / "again", "float32")
    assert again.manifest.source.digest == plain.manifest.source.digest
    names = dict.fromkeys(weights, "shard.safetensors") | {NORM: "other.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=f"other.safetensors: expected parameter '{NORM}'"):
        make_store(folder, tmp_path / "wrong", "float32")


def test_safetensors_beside_an_index_of_pickles_are_taken(tmp_path: Path) -> None:
    folder, other = make_checkpoint(tmp_path / "checkpoint"), make_checkpoint(tmp_path / "other", seed=1)
    as_pickle(other, "model.")
    shards = [path for path in other.glob("pytorch_model*") if path.suffix != ".json"]
    for path in other.glob("pytorch_model*"):
        (folder / path.name).write_bytes(path.read_bytes())
    expected = reference_model(folder).get_input_embeddings().weight
    store = make_store(folder, tmp_path / "store", "float32")
    assert torch.equal(load_file(store.folder / NON_LAYER)[EMBEDDING], expected)
    # Nor does it matter that these are not whole.
    (folder / shards[0].name).unlink()
    assert list(open_checkpoint(folder).shards.sizes) == [SAFETENSORS]


def test_one_double_outside_the_layers_is_read_back(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(folder / SAFETENSORS)
    doubled = weights | {NORM: weights[NORM].double()}
    save_file(doubled, folder / SAFETENSORS)
    store = make_store(folder, tmp_path / "store", "float32")
    outside = load_file(store.folder / NON_LAYER)
    assert torch.equal(outside[NORM], weights[NORM])
    assert outside[NORM].dtype == torch.float32


@pytest.mark.parametrize("field", ["auto_map", "custom_pipelines"])
def test_code_beside_a_checkpoint_is_not_imported(tmp_path: Path, field: str) -> None:
    folder, mark = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "mark"
    plain = make_store(folder, tmp_path / "plain", "float32")
    for module in ("modeling_x", "configuration_x", "tokenization_x"):
        (folder / f"{module}.py").write_text(
            f"import os\nos.system('touch {mark}')\nclass X: pass\n", encoding="utf-8"
        )
    config = json.loads((folder / "config.json").read_text())
    config[field] = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    done = invoke("convert", folder, tmp_path / "store", "--weights", "float32")
    assert done.exit_code in (0, 2), done.stderr
    again = make_store(folder, tmp_path / "again", "float32")
    assert again.manifest.source.digest == plain.manifest.source.digest
    assert not mark.exists()
    assert not [name for name in sys.modules if name.endswith(("modeling_x", "configuration_x"))]


def test_no_code_of_ours_trusts_others_code() -> None:
    """Pickles are only loaded in one place, and only so; transformers is never told to trust."""
    import lowmem_icl

    root = Path(lowmem_icl.__file__).parent
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")
    }
    loading = {name: text for name, text in texts.items() if "torch.load(" in text or "pickle.load" in text}
    assert list(loading) == ["conversion/weight_files.py"]
    assert loading["conversion/weight_files.py"].count("torch.load(path, weights_only=True, mmap=") == 1
    trusting = [name for name, text in texts.items() if "trust_remote_code" in text]
    # Where lm-eval's own argument of that name is refused.
    assert trusting == ["harness/arguments.py"]
    assert not [name for name, text in texts.items() if "allow_pickle=True" in text]
    unsafe = ("yaml.load(", "yaml.unsafe_load", "yaml.full_load", "jsonpickle", "marshal.load", "shelve.")
    found = {name for name, text in texts.items() if any(call in text for call in unsafe)}
    # With a loader of its own, of the definitions in the package.
    assert found == {"tasks/catalogue.py"}
