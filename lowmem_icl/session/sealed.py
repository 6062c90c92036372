"""Arrays in files that say by themselves whether they are whole, and whether they are what is asked for.

A file is an .npz of plain arrays, read without pickle, with one array more: the SHA-256 of what it is of and
of all its arrays. A flipped bit shows, and so does a file that stands in another's place.
"""

import errno
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_icl.system.files import atomic_path

Arrays = Mapping[str, NDArray[Any]]
SEAL = "seal"


class Damaged(Exception):
    """A file is not what was written, or stands in another's place; the message says which."""


def digest_of(arrays: Arrays) -> str:
    """Return the hexadecimal SHA-256 of arrays: their names, types, shapes and content."""
    summed = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        summed.update(f"{name} {array.dtype.str} {array.shape}".encode())
        summed.update(array.reshape(-1).view(np.uint8).data)
    return summed.hexdigest()


def write_sealed(path: Path, arrays: Arrays, of: str, *, sync: bool = True) -> None:
    """Write arrays, whole or not at all; `of`: what they are of, without which they are not read again."""
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("expected plain arrays, got objects, which would be pickled")
    with atomic_path(path, sync=sync) as temporary, temporary.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **arrays, **{SEAL: _seal(arrays, of)})


def read_sealed(path: Path, of: str) -> dict[str, NDArray[Any]]:
    """Read arrays that were written as being of this; raise Damaged where they are not, OSError where the
    file cannot be read at all.
    """
    try:
        with path.open("rb") as opened:
            with zipfile.ZipFile(opened) as members:
                if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                    # Ours never are; a stranger's may unpack to whatever it likes.
                    raise Damaged("its arrays are compressed")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
    except Damaged:
        raise
    except OSError as error:
        # A place before the file's beginning is no fault of the disk.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise Damaged(str(error)) from error
    except Exception as error:
        # Bits can flip anywhere: in zip's fields, in a header's Python, in a shape that no memory holds.
        raise Damaged(str(error) or type(error).__name__) from error
    seal = arrays.pop(SEAL, None)
    if seal is None or not np.array_equal(seal, _seal(arrays, of)):
        raise Damaged("its digest does not match")
    return arrays


def _seal(arrays: Arrays, of: str) -> NDArray[np.uint8]:
    text = f"{of} {digest_of(arrays)}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8)
