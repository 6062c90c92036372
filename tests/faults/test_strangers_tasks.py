"""Tasks from anyone: YAML with functions of its own has no way in."""

from pathlib import Path

import pytest
from commands import invoke

from lowmem_icl.tasks import harness, sources

YAML = """task: stranger
output_type: multiple_choice
dataset_path: json
doc_to_text: !function code.text
doc_to_choice: !function code.text
doc_to_target: !function code.text
validation_split: train
"""


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "stranger.yaml").write_text(YAML)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\ntext = str\n"
    (folder / "code.py").write_text(code)
    return folder


def test_no_option_gives_the_harness_yaml(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stranger)
    path = stranger / "stranger.yaml"
    for name in (
        path,
        f"lm-eval:{path}",
        "lm-eval:stranger",
        "lm-eval:./stranger.yaml",
        f"lm-eval:{stranger}",
    ):
        done = invoke("prompts", name, "--shots", "0")
        assert done.exit_code == 2, done.output
    for flag in ("--include_path", "--include-path", "--allow-task-code"):
        assert invoke("prompts", "recall", flag, stranger).exit_code == 2
    done = invoke("prompts", "recall", "--data-dir", stranger, "--shots", "0")
    assert done.exit_code in (0, 2)
    assert not (stranger.parent / "mark").exists()


def test_the_harness_looks_at_installed_folders_alone() -> None:
    manager = harness.task_manager()
    import lm_eval

    import lowmem_icl

    installed = [
        Path(module.__file__).resolve().parent for module in (lm_eval, lowmem_icl) if module.__file__
    ]
    for index in (manager.task_index, sources._own_manager().task_index):
        paths = [Path(entry.yaml_path).resolve() for entry in index.values() if entry.yaml_path]
        assert paths
        assert all(any(path.is_relative_to(root) for root in installed) for path in paths)
