"""Models, checkpoints and rows that several tests share; all small, all made here."""

import atexit
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The tests have a cache of their own. Set here, above the imports that read it, and so for every child
# process too.
# Not within the cache of the process that started this one: Chromium wants short paths.
CACHE = Path(tempfile.mkdtemp(prefix="lowmem-icl-tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
for variable in (
    "HF_HUB_CACHE",
    "HF_ASSETS_CACHE",
    "HF_XET_CACHE",
    "HF_DATASETS_CACHE",
    "HF_TOKEN",
    "HF_ENDPOINT",
):
    os.environ.pop(variable, None)
# Options of the user's own.
for variable in [name for name in os.environ if name.startswith("LOWMEM_ICL_")]:
    if variable != "LOWMEM_ICL_SHARED":
        del os.environ[variable]
# pytest's own folders stay where it looks for them the next time.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
for variable, folder in {
    "XDG_CACHE_HOME": CACHE,
    "HF_HOME": CACHE / "huggingface",
    "MPLCONFIGDIR": CACHE / "matplotlib",
    "TMPDIR": CACHE / "tmp",
}.items():
    folder.mkdir(exist_ok=True)
    os.environ[variable] = str(folder)
tempfile.tempdir = None
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several of them share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import pytest
import torch
from commands import invoke, run_small
from demo_scores import DemoScores
from hypothesis import settings
from synthetic_run import SyntheticRun
from transformers import OPTConfig, OPTForCausalLM

from lowmem_icl import runner
from lowmem_icl.conversion.calibration import CalibrationText, fixed_text
from lowmem_icl.conversion.checkpoint import open_checkpoint
from lowmem_icl.conversion.claim import Conversion
from lowmem_icl.conversion.convert import convert
from lowmem_icl.model.store import Store
from lowmem_icl.options import RunOptions
from lowmem_icl.planning import measure
from lowmem_icl.report.files import publish_run
from lowmem_icl.session.run_form import State

# Machines are noisy: a slow example is no failure. CI draws the same examples every time.
settings.register_profile("unhurried", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("unhurried")

SHARED = Path(os.environ.get("LOWMEM_ICL_SHARED", Path(__file__).parents[2] / "shared"))
VOCABULARY = 300
# As a run ends where no test asks for less.
WRITE_PAGE = runner._write_page


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows of the paper's tasks, beside the project."""
    folder = SHARED / "data"
    if not (folder / "piqa").is_dir():
        pytest.skip(f"real rows of the paper's tasks are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def opt_tokenizer() -> Path:
    """Folder of OPT's real tokenizer, beside the project."""
    folder = SHARED / "tokenizer" / "opt"
    if not (folder / "vocab.json").is_file():
        pytest.skip(f"OPT's tokenizer is not at {folder}")
    return folder


def byte_tokens(text: str) -> list[int]:
    """Tokenise by bytes: enough for models without a tokenizer."""
    return [byte % VOCABULARY for byte in text.encode()]


def small_config(**changes: object) -> OPTConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 96,
        "init_std": 0.3,
    }
    return OPTConfig(**(fields | changes))


def make_checkpoint(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """Save a random OPT whose biases are not zero, so that a lost bias shows."""
    torch.manual_seed(seed)
    model = OPTForCausalLM(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def hasty_measurements() -> Iterator[None]:
    """Runs of this process measure the machine for a moment, not for two seconds: no result depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LAYER_SECONDS", "OTHER_SECONDS"):
            patch.setattr(measure, name, 0.02)
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn_runs() -> Iterator[None]:
    """Runs of this process end with a page without figures, which take as long as all else;
    `small_run` has them, as the command `report` and processes of their own do.
    """

    def write_page(folder: Path, ends_as: State | None) -> None:
        publish_run(folder, ends_as=ends_as, with_figures=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_write_page", write_page)
        yield


@pytest.fixture(scope="session")
def stores() -> Path:
    """Folder of stores that all tests share, so that the demo is converted once;
    the one `run` takes by itself.
    """
    return CACHE / "lowmem-icl" / "stores"


@pytest.fixture(scope="session")
def made(stores: Path) -> Path:
    """Folder of stores, that of the demo among them."""
    if not list(stores.glob("demo-*-int8/manifest.json")):
        assert invoke("convert", "demo", "--store-dir", stores, "--quiet").exit_code == 0
    return stores


@pytest.fixture(scope="session")
def demo_scores(stores: Path) -> DemoScores:
    """What the demo answers under masks, for all tests that ask."""
    return DemoScores(stores)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a new folder with what `make` writes there: one for all of pytest's workers, by the first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    finished = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a finished run of every experiment, as `run_small` starts it; copied, never written to,
    by tests.
    """

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "_write_page", WRITE_PAGE)
            result = run_small(folder / "demo", stores, "--masks-dir", folder / "masks")
        assert result.exit_code == 0, result.output
        assert "accuracy by demonstrations" in result.stdout

    return made_once(tmp_path_factory, "runs", make) / "demo"


@pytest.fixture(scope="session")
def given_run(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a finished run that patches prompts given in files, without any task; read by tests."""
    return made_once(tmp_path_factory, "given", lambda folder: patch_given(folder, stores)) / "out"


def patch_given(folder: Path, stores: Path) -> None:
    """Patch prompts that are given in files."""
    clean, corrupted = "Q: lusa\nA: tiro\n\nQ: lusa\nA:", "Q: lusa\nA: mepi\n\nQ: lusa\nA:"
    pair = {"context": clean, "corrupted": corrupted, "options": [" mepi", " tiro"], "gold": 1}
    files: dict[str, list[dict[str, Any]]] = {
        "pairs": [pair, pair | {"context": corrupted, "corrupted": clean, "gold": 0}],
        "clean": [{"context": clean, "target": " tiro"}],
        "corrupted": [{"context": corrupted, "target": " tiro"}] * 2,
    }
    flags: list[object] = []
    for name, lines in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        flags += [f"--{name}", path]
    run = invoke("run", "--experiments", "patch", "--store-dir", stores, "--out", folder / "out", *flags)
    assert run.exit_code == 0, run.output


@pytest.fixture(scope="session")
def opt66b_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a synthetic run of OPT-66B's size; read, never written to, by tests."""
    return made_once(tmp_path_factory, "opt66b", lambda folder: _write_large(folder / "run")) / "run"


def _write_large(folder: Path) -> None:
    SyntheticRun().write(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def reference_model(folder: Path) -> OPTForCausalLM:
    """Hugging Face's own model of a checkpoint, in float32 with sdpa attention."""
    return OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def make_store(checkpoint_folder: Path, folder: Path, weights: str) -> Store:
    return convert(
        Conversion(open_checkpoint(checkpoint_folder), folder, weights, str(checkpoint_folder)),  # type: ignore[arg-type]
        CalibrationText(byte_tokens(fixed_text())),
    )


def without_documents(store: Store, options: RunOptions) -> Any:
    """What the planner of memory asks of a prepared run: options and store, no documents and no masks."""
    return SimpleNamespace(options=options, store=store, skeleton=store.skeleton, masks={})


@pytest.fixture(scope="session")
def float_store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(checkpoint, tmp_path_factory.mktemp("stores") / "float32", "float32")


@pytest.fixture(scope="session")
def int8_store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(checkpoint, tmp_path_factory.mktemp("stores") / "int8", "int8")


@pytest.fixture(scope="session")
def nf4_store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(checkpoint, tmp_path_factory.mktemp("stores") / "nf4", "nf4")
