"""Weight files as Hugging Face writes them, opened without trust: safetensors, and pickles of tensors.

Files come from strangers. A safetensors header is held against the file before the library reads it; a pickle
is first read as a list of what it would call, and one that names anything but tensors is refused unrun.
"""

import io
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_icl.conversion.safetensors_header import check_safetensors_header
from lowmem_icl.errors import InputError

OpenShard = Callable[[Path], dict[str, Callable[[], Tensor]]]
"""From a weight file to functions that read its tensors one at a time."""

LARGEST_PICKLE_BYTES = 64 << 20
"""Of what a pickle says of its tensors, whose bytes lie elsewhere in the file."""
PICKLES_OF_OLD_FORM = 5
# What a state dict is made of; torch allows fewer of torch's own names.
_TENSOR_MODULES = ("torch",)
_PLAIN_NAMES = frozenset({"collections OrderedDict", "_codecs encode", "builtins set", "__builtin__ set"})
_READ_ERRORS = (
    SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    pickle.UnpicklingError, EOFError, MemoryError, OverflowError, AssertionError, RecursionError,
)  # fmt: skip
_AGAIN = "fetch the file again, or save the model anew with save_pretrained"
_SAFETENSORS = "take the model's safetensors files, or have its author save it with safetensors"


def open_weight_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    """Open a safetensors file or a pickle; raise InputError where it cannot be read, or would run code."""
    if path.suffix == ".safetensors":
        check_safetensors_header(path)
        try:
            opened = safe_open(path, framework="pt")
            names = list(opened.keys())  # type: ignore[no-untyped-call]
        except _READ_ERRORS as error:
            raise _unreadable(path, error) from error
        return {name: partial(_read, path, name, opened.get_tensor) for name in names}
    loaded = _load_pickle(path)
    return {
        name: partial(_checked, path, name, value)
        for name, value in loaded.items()
        if isinstance(value, Tensor)
    }


def has_old_form(path: Path) -> bool:
    """Tell whether a pickle is as torch saved it before 1.6: not a zip file."""
    return not zipfile.is_zipfile(path)


def _unreadable(path: Path, error: BaseException) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path}: cannot be read as weights ({reason}); {_AGAIN}")


def _read(path: Path, name: str, get: Callable[[str], Tensor]) -> Tensor:
    try:
        return get(name)
    except _READ_ERRORS as error:
        raise InputError(
            f"{path}: tensor '{name}' cannot be read ({' '.join(str(error).split())}); {_AGAIN}"
        ) from error


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a pickle; raise InputError where its values do not lie in the file one by one."""
    found = ""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        found = "a sparse, quantised or empty one"
    elif tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        found = f"{list(tensor.shape)} elements that repeat fewer"
    if found:
        raise InputError(f"{path}: tensor '{name}': expected all of its values, got {found}; {_AGAIN}")
    return tensor.detach()


def _load_pickle(path: Path) -> Mapping[str, Any]:
    """Return what a pickle holds by name, mapped into memory where its form allows that."""
    try:
        _refuse_code(path)
        with warnings.catch_warnings():
            # Of torch, on pickles of another protocol than its own.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, weights_only=True, mmap=not has_old_form(path), map_location="cpu")
    except pickle.UnpicklingError as error:
        # torch's own words advise to switch the guard off.
        raise InputError(
            f"{path}: holds more than tensors, which cannot be read without running code of the file, and "
            f"that is never done; {_SAFETENSORS}"
        ) from error
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{path}: expected parameters by name, got {type(loaded).__name__}; save the model anew with "
            "save_pretrained"
        )
    return loaded


def _refuse_code(path: Path) -> None:
    """Raise InputError for a pickle that names anything to call but what tensors are made by."""
    if has_old_form(path) and tarfile.is_tarfile(path):
        raise InputError(
            f"{path}: has the form of torch before 0.4 (a tar file), which cannot be read without running "
            f"code of the file, and that is never done; {_SAFETENSORS}"
        )
    for name in _named(path):
        module = name.split(" ")[0].split(".")[0]
        if module not in _TENSOR_MODULES and name not in _PLAIN_NAMES:
            raise InputError(
                f"{path}: would run code when it is read (it names {name.replace(' ', '.')}), and is "
                f"refused unread; {_SAFETENSORS}"
            )


def _named(path: Path) -> Iterator[str]:
    """Yield what a pickle names to call, as `module name`, in every of its streams."""
    if has_old_form(path):
        with path.open("rb") as opened:
            stream, count = io.BytesIO(opened.read(LARGEST_PICKLE_BYTES)), PICKLES_OF_OLD_FORM
    else:
        stream, count = io.BytesIO(_pickle_of_zip(path)), 1
    for _ in range(count):
        texts: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument)
            elif opcode.name == "STACK_GLOBAL":
                # Nothing that torch writes; the two texts before it name it, or hide what does.
                yield " ".join(texts[-2:]) or "?"
            elif isinstance(argument, str):
                texts.append(argument)


def _pickle_of_zip(path: Path) -> bytes:
    """Return the pickle in a file of torch; raise ValueError where it is packed otherwise than torch does."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                # Mapped, its packed bytes would be taken for numbers.
                raise ValueError(f"{entry.filename} is compressed, which torch never does")
        found = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"a zip file with {len(found)} data.pkl, which torch did not write")
        (described,) = found
        if described.file_size > LARGEST_PICKLE_BYTES:
            raise ValueError(f"{described.filename} has {described.file_size} bytes")
        return archive.read(described)
