"""A checkpoint on the Hugging Face hub, whose weight files are fetched one by one as they are needed."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lowmem_icl.conversion.checkpoint import INDEX_FILES, TOKENIZER_FILES, Checkpoint, read_json, weight_files
from lowmem_icl.errors import InputError

# The hub's client has changed its HTTP library before; the base of its own error is that of the one in use.
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
_UNREACHABLE = (LocalEntryNotFoundError, _HTTP_ERROR, OSError)


@dataclass
class HubShards:
    """Weight files of one commit of a repository.

    Files go to the hub's own cache and stay there. With `delete_into` a file that is not in the cache yet is
    fetched into that folder instead and deleted when it is released: only what was fetched here is ever
    deleted.
    """

    repository: str
    commit: str
    sizes: dict[str, int]
    announce: Callable[[str], None] = lambda text: None
    delete_into: Path | None = None

    @property
    def deletes(self) -> bool:
        """Whether released files are deleted."""
        return self.delete_into is not None

    def local_path(self, name: str) -> Path | None:
        """Return a file that the hub's cache holds already, or that was fetched to be deleted."""
        if self.delete_into is not None and (self.delete_into / name).is_file():
            return self.delete_into / name
        found = try_to_load_from_cache(self.repository, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    @property
    def fetch_bytes(self) -> int:
        """Bytes of all files that are still to be fetched."""
        return sum(size for name, size in self.sizes.items() if self.local_path(name) is None)

    def path(self, name: str) -> Path:
        """Fetch a file where it is not here yet; raise InputError where that fails."""
        local = self.local_path(name)
        if local is not None:
            return local
        number = sorted(self.sizes).index(name) + 1
        self.announce(f"fetching {name} ({number} of {len(self.sizes)}, {self.sizes[name] / 1e9:.3g} GB)")
        try:
            return Path(
                hf_hub_download(self.repository, name, revision=self.commit, local_dir=self.delete_into)
            )
        except _UNREACHABLE as error:
            raise InputError(
                f"{self.repository}: {name} could not be fetched ({type(error).__name__}: {error}); "
                "check the network and run the same command again: it continues where it was"
            ) from error

    def release(self, name: str) -> None:
        """Delete a file that was fetched into `delete_into`."""
        if self.delete_into is not None:
            (self.delete_into / name).unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove the folder of fetched files."""
        if self.delete_into is not None:
            shutil.rmtree(self.delete_into, ignore_errors=True)


def open_hub_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Open a hub id: config, tokenizer and index are fetched, weights are not.

    Where the hub cannot be reached, what its cache holds is used. Raises InputError naming what failed.
    """
    try:
        commit, sizes = _listing(model, revision)
        names = {"config.json", *TOKENIZER_FILES, *INDEX_FILES} & sizes.keys()
        folders = {name: Path(hf_hub_download(model, name, revision=commit)).parent for name in sorted(names)}
    except (HFValidationError, UnicodeError, *_UNREACHABLE) as error:
        raise InputError(
            f"--model: '{model}' is not a local folder and could not be fetched from the hub "
            f"({type(error).__name__}); give a checkpoint folder or check the name, --revision and the "
            "network"
        ) from error
    if "config.json" not in folders:
        raise InputError(
            f"--model: the repository '{model}' has no config.json; give a model of transformers"
        )
    folder = folders["config.json"]
    files = weight_files(folder, sizes.keys())
    shards = HubShards(model, commit, {name: sizes[name] for name in files.names})
    return Checkpoint(folder, read_json(folder / "config.json"), shards, files.index, list(files.notes))


def _listing(model: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """Return a revision's commit and the sizes of its files, from the hub or else from its cache."""
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except HfHubHTTPError:
        raise
    except _UNREACHABLE:
        cached = Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=True)).parent
        return cached.name, {path.name: path.stat().st_size for path in cached.iterdir() if path.is_file()}
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise InputError(f"{model}: the hub names no commit for revision {revision or 'main'}")
    return commit, {file.rfilename: file.size or 0 for file in info.siblings or ()}
