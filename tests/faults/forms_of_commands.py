"""Generated command lines, told by what the whole command prints and by its exit code; names of files."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import typer
from commands import invoke
from forms_of_files import MACHINE, MASK
from forms_of_rows import PAIRS, ROWS, prepared
from forms_of_runs import small_run
from fuzzing import Form

from lowmem_icl import runner
from lowmem_icl.cli import convert as convert_command
from lowmem_icl.cli import measure as measure_command
from lowmem_icl.cli import plan as plan_command
from lowmem_icl.conversion import locate
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, MaskModel, read_mask, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import check_names, mask_name
from lowmem_icl.options import FLAGS, form_of, run_options
from lowmem_icl.report import files as report_files
from lowmem_icl.report.page import write as page_writing
from lowmem_icl.session.identity import run_folder
from lowmem_icl.session.prepare import ModelBasis
from lowmem_icl.system.files import write_text_atomic

CODES = (0, 2, 3, 75)
# Without "/", in which an administrator may write, and has then asked for it.
ODD_WORDS = (
    *(
        "",
        " ",
        "x",
        "0",
        "1",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e999",
        "9" * 5_000,
        "true",
        "None",
        "a,b",
        ",",
        ",,",
    ),
    *("0,1", "1,1", "recall", "demo", "lm-eval:", "lm-eval: ", "recall,", "pairs", "own.jsonl", "own.json"),
    *(
        "x" * 5_000,
        "x/" * 2_500,
        "~nosuch/x",
        "~",
        "~/x",
        "/proc/x/y",
        "/dev/null",
        ".",
        "..",
        "../",
        "/proc",
    ),
    *(
        "[x]",
        "[/b]",
        "rows [v2].jsonl",
        "[/b].jsonl",
        "run [x]",
        "g?",
        "g*",
        "a\nb",
        "a\tb",
        "\x1b[31m",
        "a\x7fb",
    ),
    *(
        "данные.jsonl",
        "数据.jsonl",
        "\udcff",
        "\udcff.jsonl",
        "\u202e",
        "😀",
        "a" * 197 + ".jsonl",
        "--",
        "-",
    ),
    *(
        "a/" * 129 + "a.jsonl",
        "{x}",
        "%s",
        "$HOME",
        "'",
        '"',
        "a b",
        "<b>",
        "&amp;",
        ":",
        "a:b",
        "C:\\x",
        "NUL",
    ),
    *(
        "mask.json",
        "machine.json",
        "options.toml",
        "run",
        "cuda:99",
        "6GB",
        "1B",
        "6",
        "1e3GB",
        "0.1",
        "8,,9",
    ),
)
# Of each command: arguments by how many, and flags of its own with what they take.
COMMANDS: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {
    ("run",): (0, ("--fresh", "--quiet", "--json", "--config=")),
    ("plan",): (0, ("--machine=", "--quiet", "--json", "--config=")),
    ("measure",): (0, ("--out=", "--quiet")),
    ("convert",): (2, ("--verify", "--repair", "--delete-shards", "--store-dir=", "--weights=")),
    ("evaluate",): (0, ("--mask=", "--mask=", "--fresh", "--out=", "--tasks=")),
    ("tasks",): (0, ("--data-dir=", "--json")),
    ("prompts",): (1, ("--shots=", "--labels=", "--count=", "--model=", "--json")),
    ("status",): (1, ("--json",)),
    ("report",): (2, ("--out=", "--figures=", "--figure-width=", "--task=")),
    ("masks", "list"): (1, ("--task=", "--shots=", "--method=", "--all", "--json")),
    ("masks", "show"): (1, ()),
    ("masks", "compare"): (3, ("--json",)),
    ("masks", "combine"): (3, ("--out=", "--operation=")),
    ("masks", "export"): (1, ("--format=", "--model=", "--revision=", "--out=", "--structural", "--json")),
    ("masks", "push"): (2, ("--private",)),
    ("masks", "pull"): (2, ("--revision=",)),
    ("masks",): (1, ()),
    (): (1, ("--version", "--help")),
}
GOOD: dict[tuple[str, ...], tuple[str, ...]] = {
    ("convert",): ("demo", "new"),
    ("prompts",): ("recall",),
    ("status",): ("run",),
    ("report",): ("run",),
    ("masks", "list"): ("run",),
    ("masks", "show"): ("mask.json",),
    ("evaluate",): ("--mask", "mask.json"),
    ("masks", "compare"): ("mask.json", "mask.json"),
    ("masks", "export"): ("mask.json",),
    ("masks", "combine"): ("mask.json", "--out", "both.json"),
}


def _reached(*arguments: Any, **named: Any) -> NoReturn:
    """Stand for the long work that a command has come to."""
    raise typer.Exit(0)


def _light_page(runs: Any, page: Path, images: Any = None) -> None:
    write_text_atomic(page, "page")


def _cut_off(*arguments: Any, **named: Any) -> NoReturn:
    raise ConnectionRefusedError("the network is cut off")


@contextmanager
def before_long_work() -> Iterator[None]:
    """Let commands end where their long work would begin; without a network."""
    with (
        patch.object(runner, "with_store", _reached),
        patch.object(plan_command, "make_plan", _reached),
        patch.object(measure_command, "measured_machine", _reached),
        patch.object(locate, "convert", _reached),
        patch.object(convert_command, "verify_store", _reached),
        patch.object(report_files, "write_report", _light_page),
        patch.object(page_writing, "write_report", _light_page),
        patch.object(report_files, "write_page_figures", lambda run: {}),
        patch("socket.socket.connect", _cut_off),
        patch("socket.getaddrinfo", _cut_off),
    ):
        yield


def words(rng: random.Random) -> list[str]:
    """Return a command line: a command, flags of its own and of others, and anything as their values."""
    command = rng.choice(list(COMMANDS))
    arguments, own = COMMANDS[command]
    found: list[str] = []
    if rng.random() < 0.5:
        found += GOOD.get(command, ())
    else:
        found += [rng.choice(ODD_WORDS) for _ in range(rng.choice((arguments, arguments, rng.randrange(4))))]
    takes_options = command in (("run",), ("plan",), ("evaluate",), ("measure",))
    for _ in range(rng.randrange(4)):
        if takes_options and rng.random() < 0.7:
            name = rng.choice(list(FLAGS))
            flag, choices = f"--{name.replace('_', '-')}=", form_of(name).choices
            flag = flag if form_of(name).placeholder else flag[:-1]
        else:
            rare = ("--help", "--nosuch", "--nosuch=", "-x", "--quiet")
            flag, choices = rng.choice(rare if rng.random() < 0.1 or not own else own), ()
        value = rng.choice((*choices, *choices, *ODD_WORDS)) if flag.endswith("=") else ""
        found += [flag[:-1], value] if flag.endswith("=") and rng.random() < 0.5 else [flag + value]
    if rng.random() < 0.03:
        found.insert(rng.randrange(len(found) + 1), rng.choice(ODD_WORDS))
    return [*command, *found]


def prepare_folder(folder: Path) -> None:
    """Put into a folder what command lines name, new where it was written to."""
    for each in folder.iterdir():
        if each.name not in ("run", "good"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    small_run(folder)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("own.jsonl", "rows [v2].jsonl", "данные.jsonl", "[/b].jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(rows, "utf-8")
    (folder / "own.json").write_text(json.dumps(PAIRS))
    (folder / "mask.json").write_text(json.dumps(MASK))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    (folder / "options.toml").write_text("limit = 4\n")


def command_form(store_dir: Path) -> Form:
    """Whole command lines; the file that is given holds one as JSON."""
    # What a command would do for minutes is no hang.
    small = {
        "STORE_DIR": store_dir,
        "TASKS": "recall",
        "SHOTS": 0,
        "LIMIT": 4,
        "TRAIN_LIMIT": 4,
        "CERTIFY_LIMIT": 4,
    }
    environment = {f"LOWMEM_ICL_{name}": str(value) for name, value in small.items()}

    def place(content: bytes, folder: Path) -> Path:
        work = folder / "work"
        work.mkdir(exist_ok=True)
        prepare_folder(work)
        (folder / "line.json").write_bytes(content)
        return folder / "line.json"

    def read(path: Path) -> None:
        line = json.loads(path.read_bytes())
        with chdir(path.parent / "work"), before_long_work(), patch.dict("os.environ", environment):
            done = invoke(*line)
        shown = f"{line!r:.2000} {done.exit_code} {done.exception!r:.300} {done.stderr[-2000:]}"
        assert done.exception is None or isinstance(done.exception, SystemExit), shown
        assert done.exit_code in CODES, shown
        assert "\x1b" not in done.output, shown
        if done.exit_code:
            told = [each for each in done.stderr.splitlines() if each.startswith("lowmem-icl: ")]
            assert len(told) == 1 or not line or line == ["masks"], shown
            raise InputError(f"{path.name}: {''.join(told)}"[:1_500])

    return Form(lambda rng, folder: place(json.dumps(words(rng)).encode(), folder), read, place)


def name_form(basis: ModelBasis) -> Form:
    """Names of files and folders: rows by that name, their masks, and a run's folder."""
    letters = (
        *"abz09._+- []?*{}()'\"&<>|;:,#%$@!~^`=",
        "данные",
        "数据",
        "😀",
        "ä",
        "a\u0308",
        "\n",
        "\x1b",
        "\u202e",
        "\udcff",
        "con",
        "..",
        " ",
        "xxxxxxxxxx" * 5,
        "clean",
        "aggregate",
    )

    def write(rng: random.Random, folder: Path) -> Path:
        name = "".join(rng.choice(letters) for _ in range(rng.choice((1, 2, 3, 5, 8, 40))))
        name = (
            name.encode("utf-8", "surrogateescape")[:240].decode("utf-8", "surrogateescape").strip("/") or "x"
        )
        return place(name.encode("utf-8", "surrogateescape"), folder)

    def place(content: bytes, folder: Path) -> Path:
        name = content.decode("utf-8", "surrogateescape")
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
        return path

    def read(path: Path) -> None:
        check_names([str(path)])
        prepared(basis, tasks=(str(path),), shots=(0,), experiments="evaluate")
        named = mask_name("greedy", str(path), 4)
        model = MaskModel(id=str(path), model_type="opt", layers=2, heads=2, digest="0")
        written = path.parent / "masks" / f"{named}.json"
        write_mask(written, MaskFile(named, Mask(), model, {"method": "greedy", "tasks": [str(path)]}))
        assert read_mask(written).made["tasks"] == [str(path)]
        assert run_folder(run_options({"model": str(path)})).parent.name == "runs"

    return Form(write, read, place, ("--tasks",))


def forms_of_commands(basis: ModelBasis, store_dir: Path) -> dict[str, Form]:
    """Return the forms by name."""
    return {"command line": command_form(store_dir), "name": name_form(basis)}
