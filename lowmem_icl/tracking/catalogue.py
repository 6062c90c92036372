"""The trackers that are known: how each is opened for a run, continued, given files and closed.

All come from accelerate, which has one interface for options and numbers; what it has none for is said here.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowmem_icl.errors import InputError
from lowmem_icl.session.run_form import State

PROJECT = "lowmem-icl"
"""What trackers keep runs under, where their own variables (WANDB_PROJECT, ...) do not say otherwise."""
PAGE = "report.html"


@dataclass(frozen=True)
class KnownTracker:
    """How one tracker is used; `tracker` is accelerate's object.

    keywords: what it is made with, from the run's folder and the id that an earlier session got from
    `identify`, None where there was none; note: keeps a text; save: keeps the run's files; end: closes it;
    where: what a person opens.
    """

    keywords: Callable[[Path, str | None], dict[str, Any]]
    identify: Callable[[Any], str]
    note: Callable[[Any, str, str, int], None]
    save: Callable[[Any, Path, int], None]
    end: Callable[[Any, State], None]
    where: Callable[[Any], str]


def is_installed(name: str) -> bool:
    """Tell whether a package is there; a folder of its name, as trackers leave behind, is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def check_installed(names: Sequence[str]) -> None:
    """Raise InputError naming the command that installs a tracker which is not."""
    for name in names:
        if not is_installed(name):
            raise InputError(f"--track {name}: it is not installed; pip install 'lowmem-icl[{name}]'")


def open_tracker(name: str, folder: Path, earlier: str | None) -> tuple[Any, str]:
    """Return accelerate's tracker for a run, started, and its id there; raises whatever it raises.

    A run that an earlier session opened is continued, unless that is gone.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # accelerate's loggers ask for it. It finds out about processes, of which there is one.
    PartialState()
    known = TRACKERS[name]
    for attempt in (earlier, None) if earlier is not None else (None,):
        tracker = LOGGER_TYPE_TO_CLASS[name](**known.keywords(folder, attempt))
        try:
            tracker.start()
        except Exception:
            if attempt is None:
                raise
            continue
        break
    return tracker, known.identify(tracker)


def _mask_files(folder: Path) -> list[Path]:
    return sorted((folder / "masks").glob("*.json"))


def _wandb_keywords(folder: Path, earlier: str | None) -> dict[str, Any]:
    import wandb

    return {
        "run_name": os.environ.get("WANDB_PROJECT", PROJECT),
        "name": folder.name,
        "id": earlier or uuid.uuid4().hex[:12],
        "resume": "allow",
        "dir": str(folder),
        "settings": wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    }


def _wandb_note(tracker: Any, name: str, text: str, step: int) -> None:
    tracker.tracker.summary[name] = text


def _wandb_save(tracker: Any, folder: Path, step: int) -> None:
    import wandb

    run = tracker.tracker
    artifact = wandb.Artifact(f"run-{run.id}", type="run")
    if (folder / PAGE).is_file():
        artifact.add_file(str(folder / PAGE))
    for path in _mask_files(folder):
        artifact.add_file(str(path), name=f"masks/{path.name}")
    run.log_artifact(artifact)


def _wandb_end(tracker: Any, state: State) -> None:
    tracker.tracker.finish(exit_code=1 if state == "failed" else 0)


def _wandb_where(tracker: Any) -> str:
    run = tracker.tracker
    return f"offline in {run.dir}" if run.offline else str(run.url)


def _mlflow_keywords(folder: Path, earlier: str | None) -> dict[str, Any]:
    return {"experiment_name": PROJECT, "run_name": folder.name, "run_id": earlier}


def _mlflow_note(tracker: Any, name: str, text: str, step: int) -> None:
    import mlflow

    mlflow.set_tag(name, text)


def _mlflow_save(tracker: Any, folder: Path, step: int) -> None:
    import mlflow

    if (folder / PAGE).is_file():
        mlflow.log_artifact(str(folder / PAGE))
    for path in _mask_files(folder):
        mlflow.log_artifact(str(path), "masks")


def _mlflow_end(tracker: Any, state: State) -> None:
    import mlflow

    status = {"finished": "FINISHED", "failed": "FAILED"}
    mlflow.end_run(status.get(state, "KILLED"))


def _mlflow_where(tracker: Any) -> str:
    import mlflow

    return f"run {tracker.tracker.info.run_id} at {mlflow.get_tracking_uri()}"


def _tensorboard_keywords(folder: Path, earlier: str | None) -> dict[str, Any]:
    return {"run_name": "tensorboard", "logging_dir": str(folder)}


def _tensorboard_note(tracker: Any, name: str, text: str, step: int) -> None:
    tracker.tracker.add_text(name, text, global_step=step)


def _tensorboard_save(tracker: Any, folder: Path, step: int) -> None:
    """Keep the answer and the masks as texts, which is what it shows; the page lies beside."""
    writer = tracker.tracker
    summary = folder / "summary.json"
    if summary.is_file():
        answer = json.loads(summary.read_text(encoding="utf-8"))["answer"]
        writer.add_text("answer", "\n\n".join([*answer["sentences"], *answer["notes"]]), global_step=step)
    for path in _mask_files(folder):
        text = path.read_text(encoding="utf-8").replace("\n", "\n    ")
        writer.add_text(f"masks/{path.stem}", f"    {text}", global_step=step)
    writer.flush()


def _trackio_keywords(folder: Path, earlier: str | None) -> dict[str, Any]:
    return {
        "run_name": PROJECT,
        "name": folder.name,
        "resume": "never" if earlier is None else "must",
        "embed": False,
        "auto_log_gpu": False,
        "auto_log_cpu": False,
    }


def _trackio_note(tracker: Any, name: str, text: str, step: int) -> None:
    tracker.tracker.log({name: text}, step=step)


def _trackio_save(tracker: Any, folder: Path, step: int) -> None:
    run = tracker.tracker
    for path in (folder / PAGE, folder / "masks"):
        if path.exists():
            run.log_artifact(str(path), name=f"{path.stem}-{run.id}", type="run")


def _ends_itself(tracker: Any, state: State) -> None:
    tracker.finish()


TRACKERS: Mapping[str, KnownTracker] = {
    "wandb": KnownTracker(
        _wandb_keywords,
        lambda tracker: str(tracker.tracker.id),
        _wandb_note,
        _wandb_save,
        _wandb_end,
        _wandb_where,
    ),
    "mlflow": KnownTracker(
        _mlflow_keywords,
        lambda tracker: str(tracker.tracker.info.run_id),
        _mlflow_note,
        _mlflow_save,
        _mlflow_end,
        _mlflow_where,
    ),
    "tensorboard": KnownTracker(
        _tensorboard_keywords,
        lambda tracker: "tensorboard",
        _tensorboard_note,
        _tensorboard_save,
        _ends_itself,
        lambda tracker: str(tracker.logging_dir),
    ),
    "trackio": KnownTracker(
        _trackio_keywords,
        lambda tracker: str(tracker.tracker.id),
        _trackio_note,
        _trackio_save,
        _ends_itself,
        lambda tracker: f"project {PROJECT}, run {tracker.tracker.name}",
    ),
}
