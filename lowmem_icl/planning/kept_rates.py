"""Rates of this machine, kept some minutes beside the stores, so that a plan that follows another is quick.

    <store dir>/texts/rates-<key>.json    when they were measured, and the rates

Only `plan` looks here, `run` measures anew. The key is a digest of all that rates depend on: the machine and
its threads, the model's shape and weights, how rows go through a layer, the disk. A file that is damaged is
made again; where the folder cannot be written to, nothing is kept.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError

from lowmem_icl import __version__
from lowmem_icl.engine.schedule import SweepLimits
from lowmem_icl.model.store import Store
from lowmem_icl.planning.measure import Rates
from lowmem_icl.system.files import write_text_atomic
from lowmem_icl.system.machine import describe_machine

logger = logging.getLogger(__name__)

KEPT_SECONDS = 600.0
KEY_DIGITS = 24

_FORM = TypeAdapter(dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]])
_MEASURED_AT = "measured_at"


class Measurement(NamedTuple):
    """Rates, and how many seconds ago they were measured: 0 where just now."""

    rates: Rates
    age_seconds: float


def kept_or_measured(
    folder: Path, key: str, measured: Callable[[], Rates], clock: Callable[[], float] = time.time
) -> Measurement:
    """Return the rates kept in a folder under a key, where they are not older than ten minutes, else measured
    now and kept.
    """
    path = folder / f"rates-{key}.json"
    found = _kept(path, clock())
    if found is not None:
        return found
    rates = measured()
    try:
        write_text_atomic(path, json.dumps({_MEASURED_AT: clock(), **asdict(rates)}))
    except OSError as error:
        logger.info("%s cannot be kept (%s)", path, error)
    return Measurement(rates, 0.0)


def _kept(path: Path, now: float) -> Measurement | None:
    try:
        values = _FORM.validate_json(path.read_bytes())
        age = now - values.pop(_MEASURED_AT)
        rates = Rates(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s) and is made again", path, error)
        return None
    # Where the clock was set back they may be of any age.
    return Measurement(rates, age) if 0 <= age <= KEPT_SECONDS else None


def rates_key(
    store: Store, row_tokens: int, limits: SweepLimits, device: torch.device, *, backward: bool
) -> str:
    """Return the key of what `measure` would find; rows count as those of about their length."""
    depends_on = {
        "version": __version__,
        "machine": describe_machine(device),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "config": store.manifest.config,
        "weights": store.manifest.weights,
        "disk": [str(store.folder), store.is_written],
        "row_tokens": round(math.log2(row_tokens)),
        "micro_batch_tokens": limits.micro_batch_tokens,
        "backward": backward,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
