"""Real models from the package index: stand-ins of their packages, whose code must never run."""

import hashlib
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from commands import invoke
from gguf_files import random_model, write_gguf

from lowmem_icl.conversion import packaged
from lowmem_icl.conversion.packaged import PACKAGED_MODELS
from lowmem_icl.model.store import open_store
from lowmem_icl.options import PACKAGED_MODEL_NAMES

PROJECT = Path(__file__).parents[1]
GEMMA, SMOLLM2 = "gemma3-270m", "smollm2"


def install(site: Path, package: str, path: str, content: bytes) -> Path:
    """Lay out a package as pip would, with one file besides code that fails when it is run."""
    module = site / path.split("/", maxsplit=1)[0]
    information = site / f"{package.replace('-', '_')}-1.0.0.dist-info"
    for folder in (module, information, (site / path).parent):
        folder.mkdir(parents=True, exist_ok=True)
    (module / "__init__.py").write_text("raise AssertionError('code of a package was run')\n")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n")
    (site / path).write_bytes(content)
    return site / path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages, the first where Python looks for them."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def gemma(site: Path, tmp_path: Path) -> bytes:
    """The content of a small model that is installed as Gemma's packages are."""
    content = write_gguf(tmp_path / "small.gguf", "gemma3", random_model("gemma3")).read_bytes()
    model = PACKAGED_MODELS[GEMMA]
    quarter = len(content) // 4 + 1
    for index, (package, path) in enumerate(model.parts):
        install(site, package, path, content[quarter * index : quarter * (index + 1)])
    assert model.sums is not None
    sums = f"{hashlib.sha256(content).hexdigest()}  gemma-3-270m-q4_k_m.gguf\n"
    install(site, model.package, model.sums, sums.encode())
    return content


def test_names_that_options_know_are_those_that_are_packaged() -> None:
    assert set(PACKAGED_MODEL_NAMES) == set(PACKAGED_MODELS)


def test_gemmas_parts_are_joined_checked_and_converted(
    gemma: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("convert", GEMMA, "--store-dir", tmp_path / "stores", "--weights", "float32")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "stores" / "models" / f"{GEMMA}.gguf").read_bytes() == gemma
    assert done.stderr.count("ai.google.dev/gemma/terms") == 1
    source = open_store(Path(done.stdout.strip())).manifest.source
    assert source.id == GEMMA
    assert source.notes[0] == PACKAGED_MODELS[GEMMA].terms
    monkeypatch.setattr(packaged, "distribution", not_installed)
    again = invoke(*arguments)
    assert again.stdout == done.stdout, "the store that is there needs no package"
    assert again.stderr == f"converting {GEMMA} in float32 …\n"


def test_a_joined_file_is_kept_if_right_and_made_anew_if_not(gemma: bytes, tmp_path: Path) -> None:
    joined = tmp_path / "joined.gguf"
    model = PACKAGED_MODELS[GEMMA]
    packaged.packaged_file(model, joined)
    first = joined.stat().st_ino
    packaged.packaged_file(model, joined)
    assert joined.stat().st_ino == first
    joined.write_bytes(gemma[:-1] + bytes([gemma[-1] ^ 1]))
    packaged.packaged_file(model, joined)
    assert joined.read_bytes() == gemma


def test_a_part_that_is_not_what_the_sum_says_is_refused(gemma: bytes, site: Path, tmp_path: Path) -> None:
    (site / PACKAGED_MODELS[GEMMA].parts[2][1]).write_bytes(b"another")
    refused = invoke("convert", GEMMA, "--store-dir", tmp_path / "stores")
    assert refused.exit_code == 2
    assert "--force-reinstall 'lowmem-icl[gemma]'" in " ".join(refused.stderr.split())
    assert not list((tmp_path / "stores" / "models").iterdir())


def test_smollm2_is_read_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    ((package, path),) = PACKAGED_MODELS[SMOLLM2].parts
    content = write_gguf(tmp_path / "small.gguf", "llama", random_model("llama")).read_bytes()
    install(site, package, path, content)
    done = invoke("convert", SMOLLM2, tmp_path / "store", "--store-dir", tmp_path / "stores")
    assert done.exit_code == 0, done.stderr
    assert "Apache-2.0" in done.stderr
    assert not list((tmp_path / "stores" / "models").glob("*.gguf"))
    assert open_store(tmp_path / "store").manifest.source.id == SMOLLM2


def test_a_package_that_lacks_its_file_is_named(gemma: bytes, site: Path, tmp_path: Path) -> None:
    missing = site / PACKAGED_MODELS[GEMMA].parts[1][1]
    missing.unlink()
    refused = invoke("convert", GEMMA, "--store-dir", tmp_path / "stores")
    assert refused.exit_code == 2
    assert missing.name in refused.stderr


def not_installed(package: str) -> None:
    raise PackageNotFoundError(package)


@pytest.mark.parametrize(("name", "extra"), [(GEMMA, "gemma"), (SMOLLM2, "smollm2")])
def test_what_is_not_installed_is_told_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(packaged, "distribution", not_installed)
    refused = invoke("plan", "--model", name, "--store-dir", tmp_path / "stores")
    assert refused.exit_code == 2
    assert f"pip install 'lowmem-icl[{extra}]'" in " ".join(refused.stderr.split())


def test_the_extras_bring_the_packages() -> None:
    with (PROJECT / "pyproject.toml").open("rb") as opened:
        extras = tomllib.load(opened)["project"]["optional-dependencies"]
    for model in PACKAGED_MODELS.values():
        (requirement,) = extras[model.extra]
        assert requirement.startswith(f"{model.package}==")
    assert extras["real"] == [f"lowmem-icl[{','.join(model.extra for model in PACKAGED_MODELS.values())}]"]


def test_another_models_store_of_the_same_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / f"{SMOLLM2}.gguf", "llama", random_model("llama"))
    assert invoke("convert", path, "--store-dir", tmp_path / "stores").exit_code == 0
    monkeypatch.setattr(packaged, "distribution", not_installed)
    assert invoke("convert", SMOLLM2, "--store-dir", tmp_path / "stores").exit_code == 2
