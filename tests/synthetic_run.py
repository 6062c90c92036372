"""A finished run's folder of any size, with numbers drawn at random: what pages and figures must hold.

`python tests/synthetic_run.py FOLDER` writes one of OPT-66B's size: 64 layers of 72 heads, 14 tasks, 3 shots.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lowmem_icl.masks.files import MaskFile, MaskModel, write_mask
from lowmem_icl.masks.mask import Mask, Unit, all_ffns, all_heads
from lowmem_icl.masks.naming import mask_name
from lowmem_icl.session.record import record_text
from lowmem_icl.tables import blocks
from lowmem_icl.tables.aggregate import over_tasks
from lowmem_icl.tables.schema import TABLES, empty_frame, write_table

PAPER_TASKS = (
    "hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq", "cb", "copa",
    "multirc", "record", "rte", "wic", "wsc",
)  # fmt: skip
PERCENTAGES = range(0, 100, 10)
DOCUMENTS = 200
Values = NDArray[np.float64]


@dataclass(frozen=True)
class SyntheticRun:
    """Sizes of a run, and whatever its names are."""

    layers: int = 64
    heads: int = 72
    tasks: Sequence[str] = PAPER_TASKS
    shots: Sequence[int] = (0, 1, 5)
    model: str = "facebook/opt-66b"

    @cached_property
    def units(self) -> list[Unit]:
        """All heads, then all FFNs."""
        return [*all_heads(self.layers, self.heads), *all_ffns(self.layers)]

    @property
    def settings(self) -> list[tuple[str, int]]:
        """Every task at every shot count."""
        return list(itertools.product(self.tasks, self.shots))

    def write(self, folder: Path) -> Path:
        """Write tables, masks and run.json; return the folder."""
        rng = np.random.default_rng(0)
        stamp = {"model": self.model, "weights": "int8", "protocol": "corrected", "exact": True, "seed": 42}
        experiments = {
            "evaluate": self._evaluate(rng), "importance": self._importance(rng), "ablate": self._ablate(rng),
            "prune": [*self._curves(rng), *self._greedy(rng)], "induction": self._induction(rng),
        }  # fmt: skip
        frames = []
        for experiment, found in experiments.items():
            own = blocks.frame("results", found, stamp | {"experiment": experiment})
            frames += [own, over_tasks(own)]
        frames.append(blocks.frame("results", self._overlap(rng), stamp | {"experiment": "overlap"}))
        write_table(pl.concat(frames), "results", folder / "results.parquet")
        for table in set(TABLES) & {"effects", "answers"}:
            write_table(empty_frame(table), table, folder / f"{table}.parquet")
        self._write_masks(folder / "masks")
        (folder / "run.json").write_text(record_text(self._record()), "utf-8")
        return folder

    @cached_property
    def kept(self) -> dict[tuple[str, int], NDArray[np.bool_]]:
        """Which units [U] each task needs: some that all need, some of its own."""
        rng = np.random.default_rng(1)
        found = {}
        for setting in self.settings:
            needed = rng.random(len(self.units)) < 4 / len(self.units)
            needed[:: max(2, len(self.units) // 12)] = True
            found[setting] = needed
        return found

    def _fields(self, setting: tuple[str, int], split: str) -> dict[str, Any]:
        return {"task": setting[0], "shots": setting[1], "split": split, "documents": DOCUMENTS}

    def _accuracy(self, setting: tuple[str, int]) -> float:
        return 0.45 + 0.4 * self.tasks.index(setting[0]) / len(self.tasks) + 0.02 * setting[1]

    def _evaluate(self, rng: np.random.Generator) -> list[blocks.Block]:
        found: list[blocks.Block] = []
        for setting in self.settings:
            base = self._fields(setting, "validation") | {"mask": "clean"}
            value = self._accuracy(setting)
            found.append(base | _around("acc", value, 0.05) | {"chance": 0.5})
            found.append(base | {"metric": "majority", "value": 0.52})
            found.append(base | _around("gold_logprob", -float(rng.gamma(2)), 0.1))
        return found

    def _importance(self, rng: np.random.Generator) -> list[blocks.Block]:
        found: list[blocks.Block] = []
        for setting in self.settings:
            base = self._fields(setting, "train")
            for metric in ("gradient", "attribution"):
                drawn = rng.lognormal(-5, 1.5, len(self.units))
                same = base | {"metric": metric, "method": metric}
                found += blocks.unit_blocks(self.units, {"value": drawn}, **same)
        return found

    def _ablate(self, rng: np.random.Generator) -> list[blocks.Block]:
        found: list[blocks.Block] = []
        for setting in self.settings:
            needed = self.kept[setting]
            drop = rng.normal(0, 0.01, len(self.units)) + needed * rng.lognormal(-1, 1, len(self.units))
            width = 0.01 + 0.2 * np.abs(drop)
            base = self._fields(setting, "train") | {"procedure": "single", "method": "ablation"}
            bounds = {"value": drop, "stderr": width / 2, "low": drop - width, "high": drop + width}
            columns: dict[str, dict[str, Values]] = {
                "gold_logprob_drop": bounds,
                "q_value": {"value": np.where(needed, 1e-4, 0.8)},
                "acc_drop": {name: value / 4 for name, value in bounds.items()},
                "gold_prob_drop": {name: value / 3 for name, value in bounds.items()},
                "margin_drop": {name: value * 2 for name, value in bounds.items()},
                "documents_hurt": {"value": np.where(needed, 60.0, 11.0)},
                "documents_helped": {"value": np.where(needed, 1.0, 10.0)},
            }
            if setting[1]:
                columns["icl_effect"] = {name: value * 0.8 for name, value in bounds.items()}
            for metric, values in columns.items():
                found += blocks.unit_blocks(self.units, values, **(base | {"metric": metric}))
        return found

    def _curves(self, rng: np.random.Generator) -> list[blocks.Block]:
        found: list[blocks.Block] = []
        kinds = {"head": (self.layers * self.heads, "gradient"), "ffn": (self.layers, "ablation")}
        for setting, (kind, (n_units, ranking)) in itertools.product(self.settings, kinds.items()):
            base = self._fields(setting, "validation") | {
                "kind": kind, "mask_task": setting[0], "mask_shots": setting[1]
            }  # fmt: skip
            for percent, method in itertools.product(PERCENTAGES, (ranking, "random")):
                removed = n_units * percent // 100
                point = base | {
                    "percent": percent, "method": method, "chance": 0.5,
                    "heads_removed": removed * (kind == "head"), "ffns_removed": removed * (kind == "ffn"),
                    "mask": None, "procedure": "random" if method == "random" else f"curve-{kind}s",
                }  # fmt: skip
                if method != "random":
                    point["mask"] = mask_name(f"{method}-{kind}s-{percent}", *setting)
                speed = 3 if method == "random" else 1
                value = 0.5 + (self._accuracy(setting) - 0.5) * (1 - percent / 100) ** speed
                found.append(point | _around("acc", value + float(rng.normal(0, 0.01)), 0.06))
            knee = base | {"procedure": f"curve-{kind}s", "method": ranking, "percent": 60, "mask": None}
            knee["heads_removed" if kind == "head" else "ffns_removed"] = n_units * 60 // 100
            found.append(knee | {"metric": "knee", "value": 60.0})
            found.append(knee | {"metric": "knee_certain", "value": 40.0})
            found.append(knee | _around("knee_acc_drop", 0.01, 0.02))
        return found

    def _greedy(self, rng: np.random.Generator) -> list[blocks.Block]:
        found: list[blocks.Block] = []
        for setting, method in itertools.product(self.settings, ("greedy", "gradient", "random")):
            removed = self.removed(setting)
            base = self._fields(setting, "validation") | {
                "procedure": "greedy", "method": method, "mask": mask_name(method, *setting),
                "mask_task": setting[0], "mask_shots": setting[1], "heads_removed": len(removed.heads),
                "ffns_removed": len(removed.ffns),
            }  # fmt: skip
            lost = {"greedy": 0.005, "gradient": 0.03, "random": 0.3}[method]
            value = self._accuracy(setting) - lost * float(rng.uniform(0.5, 1))
            found.append(base | _around("acc", value, 0.05) | {"chance": 0.5})
            found.append(base | _around("gold_prob_drop", lost, 0.02))
        return found

    def _induction(self, rng: np.random.Generator) -> list[blocks.Block]:
        heads = all_heads(self.layers, self.heads)
        found: list[blocks.Block] = []
        methods = {
            "prefix_matching": "exact", "previous_token": "exact", "copying": "output",
            "copying_eigenvalues": "weights",
        }  # fmt: skip
        for metric, method in methods.items():
            scores = rng.beta(0.3, 8, len(heads))
            same = {"procedure": "scores", "metric": metric, "method": method, "documents": 100}
            found += blocks.unit_blocks(heads, {"value": scores, "low": scores, "high": scores}, **same)
        for setting, percent in itertools.product(self.settings, range(0, 105, 5)):
            for method, capacity in itertools.product(("gradient", "random"), ("prefix_matching", "copying")):
                found.append({
                    "task": setting[0], "shots": setting[1], "procedure": "capacity", "method": method,
                    "kind": "head", "percent": percent, "heads_removed": len(heads) * percent // 100,
                    "other_method": capacity, "metric": "capacity_retained",
                    "value": 1 - (percent / 100) ** 2, "low": 1 - percent / 100, "high": 1.0,
                })  # fmt: skip
        for setting in self.settings:
            values: dict[str | None, float] = {None: 0.8, "induction": 0.55, "random-median": 0.79}
            for without, value in values.items():
                removed = 0 if without is None else max(1, len(heads) // 50)
                base: blocks.Block = self._fields(setting, "validation") | {
                    "procedure": "removal", "method": without, "heads_removed": removed,
                }  # fmt: skip
                found.append({**base, **_around("acc", value, 0.03), "chance": 0.5})
                if without is not None:
                    found.append({**base, **_around("acc_drop", 0.8 - value, 0.03)})
        return found

    def _overlap(self, rng: np.random.Generator) -> list[blocks.Block]:
        found: list[blocks.Block] = []
        for shots in self.shots:
            base = {"shots": shots, "method": "gradient", "kind": "head"}
            reliability = base | {"procedure": "reliability", "metric": "split_half", "value": 0.9}
            found += [reliability | {"task": task} for task in self.tasks]
            for left, right in itertools.combinations(self.tasks, 2):
                pair = base | {"procedure": "pair", "task": left, "other_task": right, "other_shots": shots,
                               "other_method": "gradient", "chance": 0.0}  # fmt: skip
                found.append(pair | _around("spearman", float(rng.uniform(0.1, 0.9)), 0.05))
                found.append(pair | {"metric": "kendall", "value": 0.4})
                found.append(pair | {"metric": "top_overlap", "percent": 30, "value": 0.5, "chance": 0.3})
        return found

    def removed(self, setting: tuple[str, int]) -> Mask:
        """Return what a greedy search removed."""
        units = list(itertools.compress(self.units, ~self.kept[setting]))
        return Mask(
            frozenset((unit.layer, unit.head) for unit in units if unit.head is not None),
            frozenset(unit.layer for unit in units if unit.head is None),
        )

    def _write_masks(self, folder: Path) -> None:
        model = MaskModel(
            id=self.model, model_type="opt", layers=self.layers, heads=self.heads, digest="0" * 64
        )
        for task, shots in self.settings:
            name = mask_name("greedy", task, shots)
            made = {"method": "greedy", "tasks": [task], "shots": [shots], "documents": 32}
            write_mask(folder / f"{name}.json", MaskFile(name, self.removed((task, shots)), model, made, {}))

    def _record(self) -> dict[str, Any]:
        """Return as much of a run.json as a run's record must hold."""
        stages = ("evaluate", "importance", "ablate", "prune", "induction", "overlap")
        taken = {"seconds": 60.0, "planned_seconds": 60.0, "read_bytes": 0, "planned_read_bytes": 0}
        actuals = {name: taken | {"finished": True} for name in stages}
        session = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T08:00:00+00:00",
                   "state": "finished", "stages": actuals}  # fmt: skip
        options = {
            "experiments": list(stages),
            "protocol": "corrected",
            "objective": "gold_prob",
            "tolerance": 0.01,
            "seed": 42,
        }
        return session | {
            "format": "lowmem-icl-run/2",
            "command": f"lowmem-icl run --model {self.model}",
            "options": options,
            "shots": list(self.shots),
            "train_limit": 32,
            "identity": {"options": options, "device": "cpu", "weights": "0" * 64, "tasks": "0" * 64,
                         "masks": "0" * 64, "version": "0.2.0"},
            "versions": {"torch": "2"},
            "model": {"id": self.model, "digest": "0" * 64, "weights": "int8", "layers": self.layers,
                      "heads": self.heads},
            "tasks": [{"task": task, "shots": shots} for task, shots in self.settings],
            "plan": {"stages": [{"experiment": name, "seconds": 60.0} for name in stages]},
            "machine": {"processor": "x86_64", "threads": 2, "cuda": None},
            "warnings": [],
            "sessions": [session],
        }  # fmt: skip


def _around(metric: str, value: float, width: float) -> dict[str, Any]:
    """Return a metric's record, with an interval."""
    return {
        "metric": metric,
        "value": value,
        "stderr": width / 2,
        "low": value - width,
        "high": value + width,
    }


if __name__ == "__main__":
    print(SyntheticRun().write(Path(sys.argv[1])))
