"""Imports go downward, files and functions stay small, and looking at the help stays quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "lowmem_icl"
OWN = "lowmem_icl"

# The rooms from the ground up. A room imports itself and what stands below it; rooms of one floor not each
# other.
FLOORS = (
    {"errors", "protocols", "rows"},
    {"system"},
    {"options", "masks", "statistics"},
    {"tables", "tasks", "model"},
    {"conversion", "engine"},
    {"session", "export"},
    {"experiments", "report"},
    {"planning", "tracking"},
    {"runner"},
    {"api"},
    {"harness"},
    {"cli"},
)
# What a room must not import of others' packages: so each can be used, and tested, without them.
FORBIDDEN = {
    "model": {"polars", "lm_eval"},
    "engine": {"polars", "lm_eval"},
    "conversion": {"polars", "lm_eval"},
    "tasks": {"torch", "transformers"},
    "masks": {"torch", "polars"},
    "statistics": {"torch", "polars"},
    "tables": {"torch"},
    "report": {"torch"},
    "tracking": {"torch"},
    "experiments": {"torch", "transformers", "bitsandbytes"},
    "planning": {"transformers", "bitsandbytes"},
    "cli": {"torch", "transformers", "bitsandbytes"},
}
LONGEST_FILE_LINES = 400
LONGEST_FUNCTION_LINES = 50
MOST_PARAMETERS = 6


def trees(part: str = "") -> dict[Path, ast.Module]:
    """Return the syntax trees of the package's files, or of one room's."""
    alone = PACKAGE / f"{part}.py"
    paths = [alone] if alone.is_file() else sorted((PACKAGE / part).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(tree: ast.Module) -> set[str]:
    """Names of imported packages; of our own, the rooms with a dot in front."""
    names = set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == OWN:
                modules = [f"{OWN}.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            names.add(f".{parts[1]}" if parts[0] == OWN and len(parts) > 1 else parts[0])
    return names


def rooms() -> list[str]:
    listed = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    return sorted(listed - {"__init__"})


def test_every_room_has_its_floor() -> None:
    assert set(rooms()) == set.union(*FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_downward(floor: int) -> None:
    below = set.union(set(), *FLOORS[:floor])
    for room in FLOORS[floor]:
        for path, tree in trees(room).items():
            own = {name[1:] for name in imported(tree) if name.startswith(".") and name != ".__version__"}
            assert own <= below | {room}, path


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_do_without_what_they_do_not_need(room: str) -> None:
    for path, tree in trees(room).items():
        top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        assert not imported(top if room == "cli" else tree) & FORBIDDEN[room], path


def test_no_experiment_measures_by_another_and_none_touches_a_file() -> None:
    for path, tree in trees("experiments").items():
        assert not imported(tree) & {"pathlib", "os", "shutil", "tempfile", "json"}, path
        if path.name != "measure.py":
            continue
        text = path.read_text(encoding="utf-8")
        others = {folder.name for folder in (PACKAGE / "experiments").iterdir()} - {path.parent.name}
        assert not [name for name in others if f"experiments.{name}." in text], path


def test_only_families_names_the_fields_of_an_architecture() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "families" not in path.as_posix():
            text = path.read_text(encoding="utf-8")
            for word in ("self_attn", "out_proj", "fc1", "fc2", "embed_positions", "project_in"):
                assert word not in text, f"{path} names {word}"


def test_only_the_command_line_prints() -> None:
    for path, tree in trees().items():
        if "cli" in path.relative_to(PACKAGE).parts:
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], path
        assert not imported(tree) & {"rich", "typer"}, path


def test_files_stay_small() -> None:
    for path in trees():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE_LINES, path


def is_counted(parameter: ast.arg) -> bool:
    """Flags of a command are not counted: typer reads them from the signature, nobody passes them."""
    annotation = "" if parameter.annotation is None else ast.unparse(parameter.annotation)
    is_flag = "typer.Option(" in annotation or annotation.endswith("Option")
    return parameter.arg not in ("self", "cls") and not is_flag


@pytest.mark.parametrize("folder", ["lowmem_icl", "scripts", "tests"])
def test_functions_stay_small(folder: str) -> None:
    paths = sorted((PROJECT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(map(is_counted, parameters))
                assert count <= MOST_PARAMETERS, f"{path}: {node.name} has {count} parameters"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import lowmem_icl.cli.app; "
        "heavy = 'torch transformers lm_eval polars numpy scipy datasets'; "
        "print(sorted(set(heavy.split()) & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
