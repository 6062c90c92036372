"""Masks to the hub and from it: small repositories of mask files, their tables of means, and a card.

What is fetched was written by strangers: only files with the names of masks, at the top of the repository,
and the tables that they name; each is checked as any mask file before it is kept.
"""

import errno
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lowmem_icl.errors import FULL, InputError
from lowmem_icl.export.card import mask_card
from lowmem_icl.masks import files, means
from lowmem_icl.masks.files import NAME_PATTERN, MaskFile, masks_in, read_mask, write_mask
from lowmem_icl.masks.means import means_file
from lowmem_icl.system.files import NotWritten, writes

CARD = "README.md"
MOST_FILES = 1_000
MOST_BYTES = 1 << 30
# The hub's client has changed its HTTP library before; the base of its own error is that of the one in use.
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
_FAILURES = (UnicodeError, HFValidationError, LocalEntryNotFoundError, _HTTP_ERROR, OSError)
_OF_A_DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What no network fails with, as far as it is not asked for a file."""


@dataclass(frozen=True)
class PulledMasks:
    """What was fetched: files of masks that are kept, and why others are not."""

    kept: tuple[Path, ...]
    left_out: tuple[str, ...]


def masks_to_push(path: Path) -> list[MaskFile]:
    """Read a mask file, or all of a folder; raise InputError where there is none, or two of one name."""
    paths = masks_in(path) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path} holds no mask files; give a mask file, a run's folder or one of mask files")
    masks = [read_mask(each) for each in paths]
    names = [mask_file.name for mask_file in masks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two masks are called {name}; push one of their folders")
    return masks


def push_masks(masks: Sequence[MaskFile], repository: str, *, private: bool = False) -> str:
    """Put masks and a card into a repository of the hub, made where there is none; return its address.

    The token is the one that the hub's client finds (`hf auth login`, HF_TOKEN). Raises InputError where the
    hub refuses.
    """
    if len(masks) > MOST_FILES:
        raise InputError(
            f"masks push: expected at most {MOST_FILES} masks, got {len(masks)}; push a folder of fewer"
        )
    api = HfApi()
    try:
        with TemporaryDirectory() as folder:
            for mask_file in masks:
                write_mask(Path(folder) / f"{mask_file.name}.json", mask_file)
            (Path(folder) / CARD).write_text(mask_card(masks, repository), encoding="utf-8")
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"{len(masks)} masks by lowmem-icl"
            )
    except _FAILURES as error:
        _raise_of_disk(error)
        raise InputError(
            f"masks push: {repository} could not be written ({_said(error)}); check the name (OWNER/NAME), "
            "the network, and that `hf auth whoami` names an account that may write there"
        ) from error
    return str(address)


def pull_masks(repository: str, folder: Path, revision: str | None = None) -> PulledMasks:
    """Fetch a repository's masks and the tables of means that they name into a folder.

    A file that is there already must be the same. Raises InputError where the repository cannot be read, is
    too large or holds no mask.
    """
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except _FAILURES as error:
        raise InputError(
            f"masks pull: {repository} could not be read ({_said(error)}); check the name (OWNER/NAME), "
            "--revision and the network"
        ) from error
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise InputError(f"masks pull: the hub names no commit for {repository}")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = {name: sizes[name] for name in sorted(sizes) if is_mask_name(name)}
    if len(wanted) > MOST_FILES or sum(wanted.values()) > MOST_BYTES:
        raise InputError(
            f"masks pull: {repository} has {len(wanted)} files of {sum(wanted.values()):,} bytes that may be "
            f"masks, expected at most {MOST_FILES} of {MOST_BYTES >> 20} MB; fetch the ones you want yourself"
        )
    with writes(Path(gettempdir())), TemporaryDirectory() as draft:
        pulled, left_out = _fetched(_Repository(repository, commit, sizes), Path(draft), wanted)
        if not pulled:
            why = f" ({left_out[0]})" if left_out else ""
            raise InputError(f"masks pull: {repository} holds no mask files{why}; choose another")
        with writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
        targets = {folder / f"{mask_file.name}.json": mask_file for mask_file in pulled}
        for target, mask_file in targets.items():
            if target.exists() and read_mask(target).to_json() != mask_file.to_json():
                raise InputError(f"{target} exists and is another mask; give another folder")
        for target, mask_file in targets.items():
            write_mask(target, mask_file)
    return PulledMasks(tuple(targets), tuple(left_out))


def is_mask_name(name: str) -> bool:
    """Tell whether a file of a repository may be a mask: NAME.json at its top, but not what models have."""
    stem, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix == "json" and name not in NOT_MASKS and bool(re.fullmatch(NAME_PATTERN, stem))


NOT_MASKS = (
    *files.NO_MASKS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)  # fmt: skip


@dataclass
class _Repository:
    """One commit of a repository, and how many bytes may still be fetched of it."""

    name: str
    commit: str
    sizes: dict[str, int]
    left_bytes: int = MOST_BYTES

    def fetch(self, file: str, folder: Path, most_bytes: int) -> Path | None:
        """Fetch a file of at most so many bytes, once; None where the repository has none such."""
        size = self.sizes.get(file, 0)
        if not 0 < size <= min(most_bytes, self.left_bytes):
            return None
        if (folder / file).is_file():
            return folder / file
        self.left_bytes -= size
        try:
            return Path(hf_hub_download(self.name, file, revision=self.commit, local_dir=folder))
        except _FAILURES as error:
            _raise_of_disk(error)
            raise InputError(
                f"masks pull: {file} of {self.name} could not be fetched ({_said(error)}); check the network "
                "and run the same command again"
            ) from error


def _fetched(repository: _Repository, draft: Path, wanted: Iterable[str]) -> tuple[list[MaskFile], list[str]]:
    """Return the masks among files of a repository, fetched into a folder, and why the others are none."""
    pulled, left_out = [], []
    for name in wanted:
        path = repository.fetch(name, draft, files.LARGEST_FILE_BYTES)
        if path is None:
            left_out.append(f"{name}: empty, or larger than {files.LARGEST_FILE_BYTES >> 20} MB")
            continue
        try:
            digest = files.table_of(path)
            if digest is not None:
                repository.fetch(means_file(digest), draft, means.LARGEST_FILE_BYTES)
            mask_file = read_mask(path)
            if f"{mask_file.name}.json" != name:
                raise InputError(f"mask {path}: is called {mask_file.name}; a file is called like its mask")
        except InputError as error:
            left_out.append(str(error).replace(f"{draft}/", ""))
            continue
        pulled.append(mask_file)
    return pulled, left_out


def _raise_of_disk(error: Exception) -> None:
    """Raise an error of this machine's disk as one, naming the folder for temporary files."""
    if isinstance(error, OSError) and error.errno in _OF_A_DISK:
        raise NotWritten(error.errno, error.strerror, gettempdir()) from error


def _said(error: Exception) -> str:
    """Return the first line of an error, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
