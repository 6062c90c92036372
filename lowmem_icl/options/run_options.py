"""The options of a run: its fields, checked together, and what they come to where one is not given."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import model_validator

from lowmem_icl.options.choices import EXPERIMENTS, ON_REQUEST, Experiment
from lowmem_icl.options.defaults import PRESETS, Defaults, defaults_of
from lowmem_icl.options.fields import DEFAULT_EXACT, FLAGS, RunFields
from lowmem_icl.protocols import PROTOCOLS, Labels, Protocol

PATCHING_OPTIONS = ("corrupt", "at", "pairs", "clean", "corrupted")


class RunOptions(RunFields):
    """Every option of a run, checked."""

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fill in what a preset says and the options do not."""
        preset = given.get("preset")
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given

    @model_validator(mode="after")
    def _fit_together(self) -> "RunOptions":
        experiments = set(self.experiments)
        if "right" not in self.labels:
            raise ValueError(
                "--labels: expected right among them, which the controls are compared with; add it"
            )
        if self.exact is not None and self.screen is None:
            raise ValueError(
                "--exact: expected with --screen attribution, which says what is left out; add it"
            )
        if self.screen is not None and "ablate" in experiments and "importance" not in experiments:
            # By the option that was given.
            screen = f"--preset {self.preset}: the screen's" if self.preset else "--screen: its"
            raise ValueError(f"{screen} estimates come from importance; add that to --experiments")
        if self.rescore and not {"importance", "prune"} <= experiments:
            raise ValueError("--rescore: expected importance and prune among --experiments; add them")
        if self.label_drops and "ablate" not in experiments:
            raise ValueError("--label-drops: expected ablate among --experiments; add it")
        self._check_patching()
        return self

    def _check_patching(self) -> None:
        given = [name for name in PATCHING_OPTIONS if name in self.model_fields_set]
        if given and not self.patches:
            wanted = "patch or icl-heads" if given[0] == "corrupt" else "patch"
            raise ValueError(f"--{given[0]}: expected {wanted} among --experiments; add it")
        if "patch" not in self.experiments and (only := [name for name in given if name != "corrupt"]):
            raise ValueError(f"--{only[0]}: expected patch among --experiments; add it")
        if self.text is not None and "icl-heads" not in self.experiments:
            raise ValueError("--text: expected icl-heads among --experiments; add it")
        if self.corrupt == "queries" and "icl-heads" in self.experiments:
            raise ValueError(
                "--corrupt queries: icl-heads scores heads where answers of demonstrations are corrupted; "
                "expected shuffled or wrong"
            )
        if (self.clean is None) != (self.corrupted is None):
            there, lacking = ("clean", "corrupted") if self.corrupted is None else ("corrupted", "clean")
            raise ValueError(f"--{there}: expected --{lacking} with it, got only one of the two; give both")
        if self.makes_pairs:
            self._check_few_shot()
        elif self.patches and "corrupt" in given:
            raise ValueError("--corrupt: only given prompts are patched; name --tasks, or leave it out")

    def _check_few_shot(self) -> None:
        (name, *_) = [name for name in ON_REQUEST if name in self.experiments]
        most = max(self.resolved_shots)
        if most == 0:
            or_files = ", or --pairs, or --clean and --corrupted" if name == "patch" else ""
            raise ValueError(
                f"--experiments {name}: expected demonstrations to corrupt, got --shots 0; add other "
                f"--shots{or_files}"
            )
        if most == 1 and self.corrupt == "shuffled":
            raise ValueError(
                "--corrupt shuffled: expected --shots of at least 2, since one demonstration has no other "
                "answer to show; add one, or corrupt by wrong or queries"
            )

    @property
    def defaults(self) -> Defaults:
        """What its model's runs take where the options do not say."""
        return defaults_of(self.model)

    @property
    def experiments_in_order(self) -> tuple[Experiment, ...]:
        """The experiments asked for, in the order in which they are done."""
        return tuple(name for name in EXPERIMENTS if name in self.experiments)

    @property
    def resolved_exact(self) -> int:
        """Units ablated exactly where ablations are screened."""
        return self.exact or DEFAULT_EXACT

    @property
    def takes_gradients(self) -> bool:
        """Whether a run may go back through the layers: for importance, for what a search estimates, and
        for attribution patching.
        """
        experiments = set(self.experiments)
        searches = "prune" in experiments and self.screen is not None
        return searches or not experiments.isdisjoint(("importance", "patch"))

    @property
    def patches(self) -> bool:
        """Whether units' outputs are put into other prompts: for patch, or to find heads by it."""
        return not set(ON_REQUEST).isdisjoint(self.experiments)

    @property
    def has_given_prompts(self) -> bool:
        """Whether prompts are given in files."""
        return self.pairs is not None or self.clean is not None

    @property
    def makes_pairs(self) -> bool:
        """Whether pairs of prompts are made of tasks' documents: not where patch has only given ones."""
        only_given = self.has_given_prompts and self.tasks is None
        return "icl-heads" in self.experiments or ("patch" in self.experiments and not only_given)

    @property
    def takes_tasks(self) -> bool:
        """Whether there are tasks in a run: not where it only patches prompts that are given."""
        return self.makes_pairs or set(self.experiments) != {"patch"}

    @property
    def protocol_flags(self) -> Protocol:
        """Which of its steps the protocol does in the reference's way."""
        return PROTOCOLS[self.protocol]

    @property
    def control_labels(self) -> tuple[Labels, ...]:
        """Whose answers demonstrations show besides the right ones, where tasks are evaluated."""
        controls = tuple(name for name in self.labels if name != "right")
        return controls if "evaluate" in self.experiments else ()

    @property
    def resolved_shots(self) -> tuple[int, ...]:
        """The shot counts, ascending."""
        return tuple(sorted(self.shots if self.shots is not None else self.defaults.shots))

    @property
    def resolved_limit(self) -> int | float | None:
        """Evaluation documents per task, below 1 a fraction of them; None: all."""
        return self.limit or self.defaults.limit

    @property
    def resolved_train_limit(self) -> int | float:
        """Training documents per task, below 1 a fraction of them."""
        # A tenth of the evaluation split says nothing of a training split of 100,000 rows.
        limit = None if self.limit is None or self.limit < 1 else self.limit
        return self.train_limit or limit or self.defaults.train_limit

    @property
    def resolved_importance_limit(self) -> int | float:
        """Training documents per task whose gradients are taken, below 1 a fraction of them."""
        return self.importance_limit or self.resolved_train_limit

    @property
    def resolved_curve_limit(self) -> int:
        """Evaluation documents per task that curves are judged on; where --limit is a fraction, at most."""
        wanted, limit = self.curve_limit or self.defaults.curve_limit, self.resolved_limit
        return wanted if limit is None or limit < 1 else min(wanted, int(limit))

    @property
    def resolved_store_dir(self) -> Path:
        """Folder of converted checkpoints: --store-dir, or one in the user's cache folder (XDG)."""
        if self.store_dir is not None:
            return self.store_dir
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "lowmem-icl" / "stores"

    @property
    def identity_values(self) -> dict[str, Any]:
        """The plain JSON values of all options that results depend on; the device is not among them."""
        values = self.model_dump(mode="json", include={name for name in FLAGS if FLAGS[name].changes_results})
        resolved = {
            "limit": self.resolved_limit,
            "train_limit": self.resolved_train_limit,
            "curve_limit": self.curve_limit or self.defaults.curve_limit,
        }
        if self.ablation == "zero":
            # As it was before there were others.
            del values["ablation"]
        if not self.patches:
            for name in PATCHING_OPTIONS:
                del values[name]
        if "icl-heads" not in self.experiments:
            del values["text"]
        return values | {"shots": list(self.resolved_shots), **resolved}

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits over `identity_values`."""
        text = json.dumps(self.identity_values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
