"""Sessions of a run's folder without any work: its options, what was prepared, and how they end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskModel
from lowmem_icl.options import RunOptions
from lowmem_icl.session.folder import RunFolder, open_folder
from lowmem_icl.session.identity import Identity, identity_of
from lowmem_icl.session.run_form import StageActuals
from lowmem_icl.session.text_form import TextForm

PLAN = {"stages": [{"experiment": name, "seconds": 2.0} for name in ("evaluate", "ablate")]}


STAGE = StageActuals(seconds=1.5, planned_seconds=2.0, read_bytes=100, planned_read_bytes=90, finished=True)


TASK = SimpleNamespace(
    task="recall", shots=4, split="validation", documents=[0, 1], metric="acc", chance=0.1, majority=0.2
)


PREPARED: Any = SimpleNamespace(
    store=SimpleNamespace(
        manifest=SimpleNamespace(
            weights="int8", outliers=None, source=SimpleNamespace(quantisation=None, notes=[])
        ),
        skeleton=SimpleNamespace(width=32),
        folder=Path("store"),
    ),
    mask_model=MaskModel(id="made", model_type="opt", layers=4, heads=8, digest="d" * 64),
    text_form=TextForm(bos=None, bos_by="family", chat_template=False),
    evaluate=(TASK,),
    train=(TASK,),
)


def options_of(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions.model_validate({"out": folder, "device": "cpu"} | changes)


def identity(options: RunOptions, **changes: Any) -> Identity:
    fields = {"device": "cpu", "weights_digest": "w" * 64, "tasks_digest": "t" * 64, "masks": {}} | changes
    return identity_of(options, **fields)


def session(folder: Path, *stages: str, work: Callable[[RunFolder], None] = lambda opened: None) -> None:
    """Go through a session that finishes some stages and then does its work."""
    options = options_of(folder)
    with open_folder(folder, identity(options)) as opened:
        opened.begin(options, PREPARED, PLAN)
        for name in stages:
            opened.add_stage(name, STAGE)
            opened.write_record()
        work(opened)


def stop(opened: RunFolder) -> None:
    raise KeyboardInterrupt


def fail(opened: RunFolder) -> None:
    raise InputError("a part cannot be read")
