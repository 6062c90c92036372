"""What a run's results depend on, and the folder that is named after it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lowmem_icl import __version__
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.naming import readable_slug
from lowmem_icl.options import RunOptions
from lowmem_icl.system.machine import device_type

RUNS_FOLDER = Path("runs")
SHOWN_DIGITS = 12


class Identity(BaseModel):
    """All that results depend on: the parts in a run folder belong to one identity, never to two.

    options: plain values by name, defaults filled in; device: its type, such as `cpu`; weights, tasks, masks,
    prompts (those given in files; empty where there are none): digests.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    options: dict[str, Any]
    device: str
    weights: str
    tasks: str
    masks: str
    version: str
    prompts: str = ""

    def differences(self, earlier: "Identity") -> list[str]:
        """Name everything that differs from the identity of a folder, with both values."""
        digests = {
            name: tuple(f"digest {getattr(identity, name)[:SHOWN_DIGITS]}" for identity in (earlier, self))
            for name in ("weights", "tasks", "masks", "prompts")
        }
        return option_differences(self.options, earlier.options) + [
            f"{name}: {there} in the folder, {here} asked for"
            for name, (there, here) in {
                "--device": (earlier.device, self.device),
                "the model's weights": digests["weights"],
                "the tasks' rows": digests["tasks"],
                "the masks given": digests["masks"],
                "the prompts given": digests["prompts"],
                "lowmem-icl's version": (earlier.version, self.version),
            }.items()
            if there != here
        ]


def option_differences(asked: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Name every option whose value is another than that of a folder's run, with both values."""
    return [
        f"--{name.replace('_', '-')}: {_shown(there)} in the folder, {_shown(here)} asked for"
        for name in dict.fromkeys([*asked, *earlier])
        if (there := earlier.get(name)) != (here := asked.get(name))
    ]


def _shown(value: Any) -> str:
    """Return an option's value as the command line takes it."""
    if value is None:
        return "the default"
    if isinstance(value, list):
        return ",".join(str(item) for item in value) or "none"
    return str(value)


def identity_of(
    options: RunOptions,
    device: str,
    weights_digest: str,
    tasks_digest: str,
    masks: Mapping[str, Mask],
    prompts_digest: str = "",
) -> Identity:
    """Return a run's identity; device: the resolved one's type; masks: those given to `evaluate`, by name."""
    return Identity(
        options=options.identity_values,
        device=device,
        weights=weights_digest,
        tasks=tasks_digest,
        masks=masks_digest(masks),
        version=__version__,
        prompts=prompts_digest,
    )


def masks_digest(masks: Mapping[str, Mask]) -> str:
    """Return SHA-256 over masks, by name."""
    units = {
        name: [str(unit) for unit in mask.units()] + ([] if mask.fill is None else [mask.fill])
        for name, mask in masks.items()
    }
    return hashlib.sha256(json.dumps(units).encode()).hexdigest()


def run_folder(options: RunOptions) -> Path:
    """Return where a run's files go: --out, or the default folder."""
    return options.out if options.out is not None else default_folder(options)


def folder_beside(folder: Path) -> Path:
    """Return a folder's own name where it is free, else the first with a number after it that is."""
    beside, number = folder, 1
    while beside.exists():
        number += 1
        beside = folder.with_name(f"{folder.name}-{number}")
    return beside


def default_folder(options: RunOptions, *, prefix: str = "", suffix: str = "") -> Path:
    """Return runs/<model>-<digest>: a folder per model, set of options and type of device.

    The digest tells folders apart, so the model's name may be cut to what is legal and short. Raises
    InputError where the device is absent.
    """
    text = json.dumps([options.digest, device_type(options.device)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:SHOWN_DIGITS]
    model = readable_slug(options.model.rstrip("/").rpartition("/")[2])
    return RUNS_FOLDER / f"{prefix}{model}-{digest}{suffix}"
