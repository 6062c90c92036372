"""Digests of a store's files: SHA-256, and XXH3, which finds damage as surely, ten times as fast.

XXH3 (128 bits, https://github.com/Cyan4973/xxHash) is compared when a run first reads a file; SHA-256 is what
a store is told by, and what `convert --verify` and `--repair` compare.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import xxhash
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

READ_BYTES = 4 << 20


class Digest(NamedTuple):
    """A digest of a file's bytes, in hexadecimal digits."""

    kind: Literal["sha256", "xxh3"]
    value: str

    def summing(self) -> Any:
        """Return what sums bytes up to such a digest, as those of hashlib do."""
        return hashlib.sha256() if self.kind == "sha256" else xxhash.xxh3_128()


class StoredFile(BaseModel):
    """A file of the store: its size and digests; `xxh3` is None in stores of before."""

    model_config = ConfigDict(strict=True, extra="forbid")
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    xxh3: Annotated[str | None, Field(pattern="^[0-9a-f]{32}$")] = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def quickest(self) -> Digest:
        """The digest that is compared when the file is first read."""
        return Digest("sha256", self.sha256) if self.xxh3 is None else Digest("xxh3", self.xxh3)


class Summing:
    """All digests of a file, summed up as its bytes come."""

    def __init__(self) -> None:
        self._size, self._sha256, self._xxh3 = 0, hashlib.sha256(), xxhash.xxh3_128()

    def update(self, content: bytes | memoryview) -> None:
        """Append some bytes."""
        self._size += len(content)
        self._sha256.update(content)
        self._xxh3.update(content)

    def stored(self) -> StoredFile:
        """Return the file whose bytes came so far."""
        return StoredFile(size_bytes=self._size, sha256=self._sha256.hexdigest(), xxh3=self._xxh3.hexdigest())


def stored_file(path: Path) -> StoredFile:
    """Return a file's size and digests, from its bytes on disk."""
    summed = Summing()
    with path.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            summed.update(block)
    return summed.stored()


def digest_of_file(path: Path, like: Digest) -> Digest:
    """Return a file's digest, of the kind of another one."""
    summed = like.summing()
    with path.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            summed.update(block)
    return Digest(like.kind, summed.hexdigest())
