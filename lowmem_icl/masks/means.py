"""Means of units' outputs, which mean ablation puts in their place: arrays, and a small file of them.

The file is safetensors: `heads` [L, Z] and `ffns` [L, D], float32; it is named by its digest.
Axis letters: L layers, H heads, Z the heads' outputs side by side, D width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lowmem_icl.errors import InputError
from lowmem_icl.system.files import atomic_path

Means = NDArray[np.float32]

LARGEST_FILE_BYTES = 256 << 20
DIGEST_DIGITS = 16
NAMES = ("heads", "ffns")


@dataclass(frozen=True, eq=False)
class UnitMeans:
    """One vector per unit, the same at all tokens.

    heads [L, Z]: of every head its slice of the output projection's input; ffns [L, D]: what an FFN writes
    into the residual, after the norm of a family that norms it.
    """

    heads: Means
    ffns: Means

    @cached_property
    def digest(self) -> str:
        """SHA-256 over both arrays and their shapes."""
        summed = hashlib.sha256()
        for array in (self.heads, self.ffns):
            summed.update(repr(array.shape).encode())
            summed.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return summed.hexdigest()


def mean_of_tables(tables: Sequence[UnitMeans]) -> UnitMeans:
    """Return the plain mean of tables, each counting the same."""

    def mean(arrays: Sequence[Means]) -> Means:
        return np.asarray(np.mean(arrays, axis=0, dtype=np.float64), dtype=np.float32)

    return UnitMeans(mean([table.heads for table in tables]), mean([table.ffns for table in tables]))


def means_file(digest: str) -> str:
    """Return the name of the file of a table with this digest."""
    return f"means-{digest[:DIGEST_DIGITS]}.safetensors"


def write_means(folder: Path, means: UnitMeans) -> None:
    """Write a table into a folder, whole or not at all, unless it is there."""
    path = folder / means_file(means.digest)
    if not path.is_file():
        content = save({"heads": np.ascontiguousarray(means.heads), "ffns": np.ascontiguousarray(means.ffns)})
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


@lru_cache(maxsize=64)
def read_means(path: Path, digest: str) -> UnitMeans:
    """Read a table and check that it is the one with this digest; raise InputError where it is not.

    Many masks share one, which is read once.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise InputError(f"means {path}: larger than {LARGEST_FILE_BYTES >> 20} MB; not a table of means")
        arrays = load(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"means {path}: cannot be read ({error.strerror}); a mask with ablation mean needs its table "
            "beside it, copy both"
        ) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"means {path}: no safetensors file ({error}); copy it again") from error
    if set(arrays) != set(NAMES) or any(array.dtype != np.float32 for array in arrays.values()):
        found = {name: str(array.dtype) for name, array in arrays.items()}
        raise InputError(f"means {path}: expected heads and ffns of float32, got {found}; copy it again")
    means = UnitMeans(arrays["heads"], arrays["ffns"])
    if {array.ndim for array in arrays.values()} != {2} or len(means.heads) != len(means.ffns):
        shapes = f"{means.heads.shape} and {means.ffns.shape}"
        raise InputError(f"means {path}: expected a row per layer, got {shapes}; copy it again")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InputError(f"means {path}: not all numbers are finite; make it again")
    if means.digest != digest:
        raise InputError(
            f"means {path}: its digest is {means.digest[:DIGEST_DIGITS]}, the mask names "
            f"{digest[:DIGEST_DIGITS]}; copy the table that the mask was made with"
        )
    return means
