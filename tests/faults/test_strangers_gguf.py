"""GGUF headers from anyone: what does not fit the file is refused at once, in bounded memory."""

import resource
import struct
import time
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType
from gguf_files import BYTE_LEVEL_TOKENS, random_model, write_gguf

from lowmem_icl.conversion.gguf.header import read_gguf_header
from lowmem_icl.errors import InputError

SECONDS, MEGABYTES = 5.0, 100
ARRAY, STRING, UINT32, INT64, BOOL = 9, 8, 4, 11, 7
ARCHITECTURE = "general.architecture"


def text(value: bytes | str, length: int | None = None) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LLAMA = field(ARCHITECTURE, STRING, text("llama"))


def whole(
    *fields: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, version: int = 3,
    body: bytes = bytes(256),
) -> bytes:  # fmt: skip
    numbers = (len(tensors), len(fields) + 1) if counts is None else counts
    return b"GGUF" + struct.pack("<IQQ", version, *numbers) + LLAMA + b"".join(fields + tensors) + body


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty|GGUF"),
    "letters": (b"GGUF", "ends at byte 4"),
    "another": (b"GGML" + bytes(100), "begin with GGUF"),
    "version": (whole(version=4), "version is 4"),
    "other end first": (whole(version=3 << 24), "version is"),
    "tensors": (whole(counts=(1 << 62, 1)), "4611686018427387904 tensors"),
    "fields": (whole(counts=(0, (1 << 64) - 1)), "18446744073709551615 fields"),
    "more tensors": (whole(counts=(1000, 1)), "dimensions"),
    "name of 2^60": (whole(text(b"x", 1 << 60)), "1152921504606846976 bytes"),
    "text of 2^60": (whole(field("a", STRING, text(b"x", 1 << 60))), "1152921504606846976 bytes"),
    "text beyond": (whole(field("a", STRING, text(b"x", 5000))), "in the middle of its header"),
    "item of 2^60": (whole(field("a", ARRAY, array(STRING, 1, text(b"x", 1 << 60)))), "in the middle"),
    "array of 2^60": (whole(field("a", ARRAY, array(UINT32, 1 << 60))), "1152921504606846976 elements"),
    "array of 2^61 x 8": (whole(field("a", ARRAY, array(INT64, 1 << 61))), "elements of type INT64"),
    "array beyond": (whole(field("a", ARRAY, array(UINT32, 1 << 20))), "in the middle"),
    "texts beyond": (whole(field("a", ARRAY, array(STRING, 1 << 20))), "in the middle|1048576"),
    "nested": (whole(field("a", ARRAY, array(ARRAY, 1, array(ARRAY, 1)) * 10_000)), "type ARRAY"),
    "type": (whole(field("a", 13, bytes(8))), "13"),
    "type in array": (whole(field("a", ARRAY, array(99, 1))), "99"),
    "twice": (whole(field("a", BOOL, b"\1"), field("a", BOOL, b"\1")), "'a' is there twice"),
    "not UTF-8": (whole(field("a", STRING, text(b"\xff"))), "utf-8"),
    "alignment 0": (whole(field("general.alignment", UINT32, bytes(4))), "alignment is 0"),
    "alignment 3": (whole(field("general.alignment", UINT32, struct.pack("<I", 3))), "alignment is 3"),
    "alignment -8": (whole(field("general.alignment", INT64, struct.pack("<q", -8))), "alignment is -8"),
    "alignment text": (whole(field("general.alignment", STRING, text("x"))), "alignment is x"),
    "alignment 2^31": (
        whole(
            field("general.alignment", UINT32, struct.pack("<I", 1 << 31)), tensors=(tensor("t", (4,)),)
        ),
        "cut off",
    ),
    "no dimensions": (whole(tensors=(tensor("t", ()),)), "0 dimensions"),
    "dimensions": (whole(tensors=(tensor("t", (1,) * 5),)), "5 dimensions"),
    "negative": (whole(tensors=(text("t") + struct.pack("<IqIQ", 1, -1, 0, 0),)), "cut off"),
    "product": (whole(tensors=(tensor("t", (1 << 63,) * 4),)), "cut off"),
    "offset": (whole(tensors=(tensor("t", (4,), offset=1 << 63),)), "cut off"),
    "cut off": (whole(tensors=(tensor("t", (4,), offset=252),)), "cut off"),
    "form": (whole(tensors=(tensor("t", (4,), 999),)), "999"),
    "block": (whole(tensors=(tensor("t", (31,), 8),)), "31"),
    "tensor twice": (whole(tensors=(tensor("t", (4,)), tensor("t", (4,), offset=32))), "'t' is there twice"),
    "overlap": (whole(tensors=(tensor("s", (8,)), tensor("t", (8,), offset=16))), "overlaps another"),
    "the same bytes": (whole(tensors=(tensor("s", (8,)), tensor("t", (8,)))), "overlaps another"),
    "no architecture": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("a", BOOL, b"\1"), "names no architecture"
    ),
}  # fmt: skip


def refuse(path: Path, words: str) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match=words) as caught:
        read_gguf_header(path)
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_an_absurd_header_is_refused_at_once(tmp_path: Path, name: str) -> None:
    content, words = FILES[name]
    (tmp_path / "x.gguf").write_bytes(content)
    refuse(tmp_path / "x.gguf", words)


def sparse(path: Path, content: bytes, size: int) -> Path:
    """Write a file that is of any size, and takes no room on the disk."""
    path.write_bytes(content)
    with path.open("r+b") as opened:
        opened.truncate(size)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (whole(field("a", STRING, text(b"x", 8 << 30))), "8589934592 bytes"),
        (whole(text(b"x", 8 << 30)), "8589934592 bytes"),
        (whole(field("a", ARRAY, array(INT64, 1 << 30))), "1073741824 elements"),
        (whole(field("a", ARRAY, array(STRING, 1 << 21))), "2097152 elements, for 0 tokens"),
    ],
    ids=["text", "name", "numbers", "texts"],
)
def test_a_large_file_does_not_make_it_large_in_memory(tmp_path: Path, content: bytes, words: str) -> None:
    refuse(sparse(tmp_path / "x.gguf", content, 16 << 30), words)


def test_a_vocabulary_larger_than_its_embedding_is_not_given_to_libraries(tmp_path: Path) -> None:
    """They make objects of every element: 2 million took 40 s and 3 GB."""
    count = 100_000
    content = whole(
        field("tokenizer.ggml.tokens", ARRAY, array(STRING, count, text("ab") * count)),
        tensors=(tensor("token_embd.weight", (8, 4)),),
    )
    (tmp_path / "x.gguf").write_bytes(content)
    refuse(tmp_path / "x.gguf", "100000 elements, for 4 tokens")


def test_every_cut_of_a_whole_file_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "whole.gguf", "llama", random_model("llama")).read_bytes()
    read_gguf_header(tmp_path / "whole.gguf")
    path = tmp_path / "cut.gguf"
    for end in range(0, len(content) - 32, 997):
        path.write_bytes(content[:end])
        with pytest.raises(InputError):
            read_gguf_header(path)


def test_the_library_refuses_what_overlaps_or_reads_what_we_read(tmp_path: Path) -> None:
    """The gguf package's own reader, on a file that passes."""
    path = write_gguf(tmp_path / "whole.gguf", "qwen2", random_model("qwen2"), GGMLQuantizationType.Q8_0)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert [each.name for each in reader.tensors] == list(header.tensors)
    assert header.tensors["token_embd.weight"].shape[0] == len(BYTE_LEVEL_TOKENS)
