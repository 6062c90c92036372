"""Build wheel and sdist, look into them, install the wheel in an empty environment, run the demo there.

    python scripts/try_wheel.py [--out FOLDER] [--borrow | --python PROGRAM] [--demo]

Needs `build` and `hatchling` (`pip install -e '.[test]'`) and a checkout by git, whose files say what belongs
there. The environment is new and the demo is started outside the repository, so nothing of it is imported by
accident. `--borrow` takes the packages that the wheel requires from this environment instead of the index,
which takes seconds instead of minutes; the wheel's own files still come from the wheel. `--python` makes the
environment of another Python. `--demo` runs the whole demo, else a small part of it.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lowmem_icl"
SMALL = shlex.split("--tasks recall --shots 16 --limit 16 --train-limit 8 --experiments evaluate,ablate")
WHERE = f"import {PACKAGE}; print({PACKAGE}.__file__)"


def tracked_files() -> set[str]:
    """Return the repository's files as git lists them, new ones that it does not ignore among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


def build(out: Path) -> tuple[Path, Path]:
    """Build both into a folder and return wheel and sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise typer.BadParameter(f"the build failed:\n{built.stdout}{built.stderr}")
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def wheel_files(wheel: Path) -> set[str]:
    """Return the files of a wheel but for those that describe it."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def sdist_files(sdist: Path) -> set[str]:
    """Return the files of an sdist, below its one folder, but for its description."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return names - {"PKG-INFO"}


def check_files(wheel: Path, sdist: Path) -> None:
    """Refuse a wheel that is not the package, or an sdist that is not the repository, file by file."""
    tracked = tracked_files()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    package = {name for name in tracked if name.partition("/")[0] in packages and "/" in name}
    for path, found, expected in ((wheel, wheel_files(wheel), package), (sdist, sdist_files(sdist), tracked)):
        if found != expected:
            raise typer.BadParameter(
                f"{path.name}: expected the files that git lists; it lacks {sorted(expected - found)[:5]} "
                f"and has {sorted(found - expected)[:5]} besides; mend pyproject.toml"
            )
        print(f"{path.name}: {len(found)} files, {path.stat().st_size / 1e6:.1f} MB, as in the repository")


def install(wheel: Path, environment: Path, python: str, borrow: bool) -> Path:
    """Install a wheel in a new environment of a Python and return its folder of programs."""
    subprocess.run([python, "-m", "venv", environment], check=True)
    programs = environment / "bin"
    command = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *(["--no-deps"] if borrow else []), str(wheel)], check=True)
    if borrow:
        (site,) = environment.glob("lib/python*/site-packages")
        # Behind the environment's own, so the wheel comes first.
        lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "lent.pth").write_text("\n".join(lent or [sysconfig.get_path("purelib")]) + "\n", "utf-8")
    return programs


def run_there(programs: Path, folder: Path, arguments: Sequence[str]) -> None:
    """Run the demo by the environment's own program, in a folder outside the repository."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    surroundings |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    python = [str(programs / "python"), "-c", WHERE]
    found = subprocess.run(
        python, cwd=folder, env=surroundings, check=True, capture_output=True, text=True
    ).stdout
    if not Path(found.strip()).is_relative_to(programs.parent):
        raise typer.BadParameter(f"imported {found.strip()} instead of the wheel's")
    command = [str(programs / "lowmem-icl"), "run", *arguments, "--out", str(folder / "run"), "--quiet"]
    subprocess.run(command, cwd=folder, env=surroundings, check=True)
    if not (folder / "run" / "report.html").is_file():
        raise typer.BadParameter("the demo left no page")


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for wheel and sdist; else they go.")] = None,
    borrow: Annotated[bool, typer.Option("--borrow", help="Take what is required from here.")] = False,
    python: Annotated[
        str, typer.Option(help="The environment's Python.", metavar="PROGRAM")
    ] = sys.executable,
    demo: Annotated[bool, typer.Option("--demo", help="Run the whole demo.")] = False,
) -> None:
    """Build, look, install, run."""
    if borrow and python != sys.executable:
        raise typer.BadParameter("--python: packages of this Python cannot be lent to another; leave one out")
    with tempfile.TemporaryDirectory(prefix="lowmem-icl-wheel-") as name:
        folder = Path(name)
        wheel, sdist = build(out or folder / "dist")
        check_files(wheel, sdist)
        programs = install(wheel, folder / "environment", python, borrow)
        run_there(programs, folder, [] if demo else SMALL)
    print("the wheel, installed by itself, runs the demo")


if __name__ == "__main__":
    typer.run(main)
