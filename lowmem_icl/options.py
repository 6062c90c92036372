"""The options of a run: checked once, from the command line, a TOML file and the defaults, in that order."""

import hashlib
import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lowmem_icl.errors import InputError
from lowmem_icl.protocols import PROTOCOLS, Protocol, ProtocolName

Experiment = Literal["evaluate", "importance", "ablate", "prune", "induction", "overlap"]
EXPERIMENTS: tuple[str, ...] = get_args(Experiment)
Curve = Literal["heads", "ffns", "combined", "transfer", "cross-shot", "random"]
CURVES: tuple[str, ...] = get_args(Curve)
DEFAULT_CURVES = ("heads", "ffns")
DEMO = "demo"
DEFAULT_TRAIN_LIMIT = 32
DEFAULT_EXACT = 500

SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
              "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(value: Any) -> Any:
    """Return bytes from a number or a text such as 6GB or 500MiB; other values pass on to be refused."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    digits = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(digits) :].strip()
    try:
        return int(float(digits) * SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError("expected a size such as 6GB or 500MiB") from None


def _split_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
CommaList = BeforeValidator(_split_list)


class RunOptions(BaseModel):
    """Every option of `lowmem-icl run`; names are the flags' names with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)] = DEMO
    """`demo`, a store, a checkpoint folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    weights: Literal["int8", "bfloat16", "float32"] = "int8"
    """Form in which linear weights are held."""
    store_dir: Path | None = None
    """Where converted checkpoints are kept; the user's cache folder if not given."""
    tasks: Annotated[tuple[str, ...] | None, CommaList] = None
    """Task names, `lm-eval:NAME`, or paths to JSON lines; the demo's tasks or the paper's 14 if not given."""
    data_dir: Path | None = None
    """Folder with <task>/{train,validation,test}.jsonl; the hub if not given."""
    shots: Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...] | None, CommaList] = None
    """Numbers of demonstrations; 0,1,5, for the demo 0,4,16."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Evaluation documents of a task; all if not given."""
    train_limit: Annotated[int, Field(ge=1)] | None = None
    """Training documents of a task; 32, or `limit` where that is given."""
    importance_limit: Annotated[int, Field(ge=1)] | None = None
    """Training documents of a task whose gradients are taken; `train_limit` if not given (the paper: 2,500)."""
    experiments: Annotated[tuple[Experiment, ...], CommaList, Field(min_length=1)] = EXPERIMENTS  # type: ignore[assignment]
    """Which experiments to run."""
    demonstrations: Literal["per-document", "shared"] = "per-document"
    """Whether every document draws its own demonstrations, or many share a few sets."""
    demonstration_sets: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many sets of shared demonstrations."""
    protocol: ProtocolName = "corrected"
    """Named set of choices where the paper's code and its text differ."""
    bos: bool | None = None
    """Put the beginning-of-sequence token before every context; by family if not given (OPT: no)."""
    objective: Literal["gold_prob", "gold_logprob", "acc"] = "gold_prob"
    """What the greedy pruner keeps."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """How much of the objective the greedy pruner may lose in all."""
    direction: Literal["down", "up"] = "down"
    """Whether the greedy pruner starts at the last layer or at the first."""
    order: Literal["heads-first", "joint"] = "heads-first"
    """Whether the greedy pruner removes heads and then FFNs, or both together by what a parameter costs."""
    curves: Annotated[tuple[Curve, ...], CommaList] = DEFAULT_CURVES  # type: ignore[assignment]
    """Which pruning curves to draw; none if empty."""
    curve_limit: Annotated[int, Field(ge=1)] = 64
    """Evaluation documents of a task that curves are judged on, at most `limit`."""
    random_draws: Annotated[int, Field(ge=1, le=1000)] = 10
    """Draws of the random curves."""
    rescore: bool = False
    """Also a curve whose importance is computed again on the pruned model at every level."""
    copying_with: Annotated[tuple[Literal["norm", "softmax", "bias"], ...], CommaList] = ()
    """What a head's output goes through before its copying is scored: final norm, softmax, the projection's bias."""
    screen: Literal["attribution"] | None = None
    """Ablate exactly only the units whose estimated effect is largest or least certain; all if not given."""
    exact: Annotated[int, Field(ge=1)] | None = None
    """How many units of each task and shot count are ablated exactly; 500 with --screen, else all."""
    hours: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """How long the run may take; ablations go on until then. No bound if not given."""
    memory: Size | None = None
    """Memory for weights, rows and caches; 80 % of what is free if not given."""
    device_memory: Size | None = None
    """CUDA memory for layers and rows; 80 % of what is free if not given."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of random controls and bootstraps; documents and demonstrations always follow Random(42)."""
    out: Path | None = None
    """Run folder; runs/<model>-<digest of the options> if not given."""
    masks_dir: Path | None = None
    """Folder that gets a copy of every mask."""

    @model_validator(mode="after")
    def _no_repeats(self) -> "RunOptions":
        for name in ("tasks", "shots", "experiments", "curves"):
            values = getattr(self, name)
            if values is not None and ((not values and name != "curves") or len(set(values)) < len(values)):
                raise ValueError(f"{name}: expected a list without repeats, at least one long")
        return self

    @model_validator(mode="after")
    def _screening_is_whole(self) -> "RunOptions":
        if self.exact is not None and self.screen is None:
            raise ValueError("exact: expected with --screen attribution, which says what is left out; add it")
        if self.screen is not None and "ablate" in self.experiments and "importance" not in self.experiments:
            raise ValueError("screen: its estimates come from importance; add that to --experiments")
        return self

    @model_validator(mode="after")
    def _rescoring_has_scores(self) -> "RunOptions":
        if self.rescore and not {"importance", "prune"} <= set(self.experiments):
            raise ValueError("rescore: expected importance and prune among --experiments; add them")
        return self

    @property
    def chosen_exact(self) -> int:
        """Units ablated exactly where ablations are screened."""
        return self.exact or DEFAULT_EXACT

    @property
    def choices(self) -> Protocol:
        """The protocol's choices."""
        return PROTOCOLS[self.protocol]

    @property
    def chosen_shots(self) -> tuple[int, ...]:
        """The shot counts, ascending."""
        default = (0, 4, 16) if self.model == DEMO else (0, 1, 5)
        return tuple(sorted(self.shots if self.shots is not None else default))

    @property
    def chosen_train_limit(self) -> int:
        """Training documents of a task."""
        return self.train_limit or self.limit or DEFAULT_TRAIN_LIMIT

    @property
    def chosen_importance_limit(self) -> int:
        """Training documents of a task whose gradients are taken."""
        return self.importance_limit or self.chosen_train_limit

    @property
    def chosen_curve_limit(self) -> int:
        """Evaluation documents of a task that curves are judged on."""
        return min(self.curve_limit, self.limit or self.curve_limit)

    @property
    def identity_values(self) -> dict[str, Any]:
        """The plain JSON values of all options that results depend on; the device is not among them."""
        values = self.model_dump(mode="json", exclude=set(WITHOUT_INFLUENCE))
        return values | {"shots": list(self.chosen_shots), "train_limit": self.chosen_train_limit}

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits over `identity_values`."""
        text = json.dumps(self.identity_values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def chosen_store_dir(self) -> Path:
        """Folder of converted checkpoints: --store-dir or the user's cache folder (XDG)."""
        if self.store_dir is not None:
            return self.store_dir
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "lowmem-icl" / "stores"


WITHOUT_INFLUENCE = ("device", "memory", "device_memory", "hours", "out", "masks_dir", "store_dir")


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file, flag names with dashes or underscores; raise InputError naming it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read as TOML ({error})") from error
    return {name.replace("-", "_"): value for name, value in content.items()}


def run_options(flags: dict[str, Any], config: Path | None = None) -> RunOptions:
    """Check and merge options; flags that are None were not given. Raises InputError naming the first bad one."""
    given = read_config(config) if config is not None else {}
    given |= {name: value for name, value in flags.items() if value is not None}
    try:
        return RunOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        flag = f"--{name.replace('_', '-')}: " if name else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(RunOptions.model_fields))
            raise InputError(f"{flag}no such option; expected one of {known}") from error
        message = first["msg"].removeprefix("Value error, ")
        got = f", got {first['input']!r}" if name else ""
        raise InputError(f"{flag}{message[0].lower() + message[1:]}{got}") from error
