"""A mask is a set of removed units, and a file that a person can read, diff and reuse.

The file's form is described in masks/README.md and by the JSON Schema `MASK_SCHEMA`.
"""

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowmem_icl.errors import InputError
from lowmem_icl.masks.mask import MOST_HEADS, Mask, resampling, resampling_seed
from lowmem_icl.protocols import Ablation
from lowmem_icl.system.files import write_text_atomic

if TYPE_CHECKING:
    # Imports numpy, which `--help` need not wait for.
    from lowmem_icl.masks.means import UnitMeans

MASK_FORMAT = "lowmem-icl-mask/1"
# JSON that stands beside masks.
NO_MASKS = ("schema.json", "run.json", "summary.json")
LARGEST_FILE_BYTES = 16 << 20
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$"


Index = Annotated[int, Field(ge=0, lt=10_000)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class MaskModel(_File):
    """The model a mask was made on; `digest` is over its source tensors."""

    id: str
    revision: str | None = None
    model_type: str
    layers: Annotated[int, Field(gt=0, lt=10_000)]
    heads: Annotated[int, Field(gt=0, lt=10_000)]
    digest: str

    @model_validator(mode="after")
    def _has_heads_that_can_be_listed(self) -> "MaskModel":
        if self.layers * self.heads > MOST_HEADS:
            raise ValueError(f"expected at most {MOST_HEADS:,} heads, got {self.layers} times {self.heads}")
        return self

    @property
    def shape(self) -> tuple[str, int, int]:
        """What must agree for a mask to make sense on a model."""
        return self.model_type, self.layers, self.heads


class _Removed(_File):
    heads: dict[Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,3})$")], list[Index]] = Field(
        default_factory=dict
    )
    ffns: list[Index] = Field(default_factory=list)


class _Made(_File):
    method: str
    tasks: list[str] = Field(default_factory=list)
    shots: list[int] = Field(default_factory=list)
    documents: int | None = None
    seed: int | None = None
    protocol: str | None = None
    version: str | None = None
    date: str | None = None


class _Resample(_File):
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    rule: Literal["another document of the task, shot count and split; tokens aligned from the context's end"]


class _Content(_File):
    format: Literal["lowmem-icl-mask/1"]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    ablation: Ablation
    means: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    resample: _Resample | None = None
    model: MaskModel
    removed: _Removed
    made: _Made
    scores: dict[str, Any] = Field(default_factory=dict)


(RESAMPLING_RULE,) = get_args(_Resample.model_fields["rule"].annotation)
MASK_SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _Content.model_json_schema()


@dataclass(frozen=True)
class MaskFile:
    """A mask with its name, the model it was made on, how it was made and what it scored.

    `made` and `scores` are plain JSON; `extra` holds fields this version does not know, which are kept.
    `means`: the table that stands in removed units' place, which the mask's fill names by its digest; None
    unless that is by means.
    """

    name: str
    mask: Mask
    model: MaskModel
    made: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    means: "UnitMeans | None" = field(default=None, compare=False, repr=False)

    def to_json(self) -> str:
        """Return the file's text: a layer's heads on a line, keys in a fixed order."""
        heads: dict[str, list[int]] = {}
        seed = resampling_seed(self.mask.fill)
        for layer, head in sorted(self.mask.heads):
            heads.setdefault(str(layer), []).append(head)
        content = {
            "format": MASK_FORMAT,
            "name": self.name,
            "ablation": self.mask.ablation,
            **({} if self.means is None else {"means": self.means.digest}),
            **({} if seed is None else {"resample": {"seed": seed, "rule": RESAMPLING_RULE}}),
            "model": self.model.model_dump(),
            "removed": {"heads": heads, "ffns": sorted(self.mask.ffns)},
            "made": self.made,
            "scores": self.scores,
        } | self.extra
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # Lists of numbers on one line: a diff then shows layers.
        return (
            re.sub(r"\[\s*([-\d.,\s]*?)\s*\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"
        )


def write_mask(path: Path, mask_file: MaskFile) -> None:
    """Write a mask file, whole or not at all, and the table of means that it needs beside it."""
    if mask_file.means is not None:
        from lowmem_icl.masks.means import write_means

        write_means(path.parent, mask_file.means)
    write_text_atomic(path, mask_file.to_json())


def _read_content(path: Path) -> _Content:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise InputError(f"mask {path}: larger than {LARGEST_FILE_BYTES >> 20} MB; not a mask file")
        return _Content.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"mask {path}: cannot be read ({error.strerror}); give a mask file") from error
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "content"
        raise InputError(
            f"mask {path}: {field_name}: {first['msg']}; see masks/README.md for the form"
        ) from error


def table_of(path: Path) -> str | None:
    """Return the digest of the table of means that a mask file names, which need not be there; None where it
    needs none. Raises InputError as `read_mask`.
    """
    return _read_content(path).means


def read_mask(path: Path) -> MaskFile:
    """Read and check a mask file and the table of means it names; raise InputError naming the file and the
    field that is wrong.
    """
    content = _read_content(path)
    heads = [(int(layer), head) for layer, listed in content.removed.heads.items() for head in listed]
    ffns = content.removed.ffns
    if len(set(heads)) < len(heads) or len(set(ffns)) < len(ffns):
        raise InputError(f"mask {path}: removed: a unit is listed twice")
    if any(layer >= content.model.layers for layer in [*ffns, *(layer for layer, _ in heads)]) or any(
        head >= content.model.heads for _, head in heads
    ):
        raise InputError(
            f"mask {path}: removed: a unit lies outside the model's {content.model.layers} layers "
            f"of {content.model.heads} heads"
        )
    means = _read_table(path, content)
    fill = _read_seed(path, content) if means is None else fill_of_table(means)
    return MaskFile(
        name=content.name,
        mask=Mask(frozenset(heads), frozenset(ffns), fill),
        model=content.model,
        made=content.made.model_dump(exclude_unset=True),
        scores=content.scores,
        extra=dict(content.model_extra or {}),
        means=means,
    )


def fill_of_table(means: "UnitMeans") -> str:
    """Return the name by which masks of files call a table."""
    return f"mean:{means.digest}"


def _read_seed(path: Path, content: _Content) -> str | None:
    """Return the name of other documents' values by the seed that a mask file gives; None where it needs
    none.
    """
    if (content.resample is None) != (content.ablation != "resample"):
        raise InputError(
            f"mask {path}: resample: expected seed and rule with ablation resample, and only there, got "
            f"{content.resample} with ablation {content.ablation}; see masks/README.md for the form"
        )
    return None if content.resample is None else resampling(content.resample.seed)


def _read_table(path: Path, content: _Content) -> "UnitMeans | None":
    """Return the table of means that stands beside a mask file; None where it needs none."""
    if (content.means is None) != (content.ablation != "mean"):
        raise InputError(
            f"mask {path}: means: expected the digest of a table with ablation mean, and only there, got "
            f"{content.means} with ablation {content.ablation}; see masks/README.md for the form"
        )
    if content.means is None:
        return None
    from lowmem_icl.masks.means import means_file, read_means

    means = read_means(path.parent / means_file(content.means), content.means)
    layers, heads = content.model.layers, content.model.heads
    if len(means.heads) != layers or means.heads.shape[1] % heads or not means.heads.size:
        raise InputError(
            f"mask {path}: its means have {len(means.heads)} layers of {means.heads.shape[1]} numbers for "
            f"heads, the model {layers} layers of {heads} heads; copy the table that the mask was made with"
        )
    return means


def masks_in(folder: Path) -> list[Path]:
    """Return the mask files of a folder in the order of their names; where it holds none itself, those of its
    folder `masks` (it may be a run's), and else those of its folders.
    """

    def directly(place: Path) -> list[Path]:
        return sorted(path for path in place.glob("*.json") if path.name not in NO_MASKS)

    below = sorted(path for path in folder.iterdir() if path.is_dir())
    return (
        directly(folder)
        or directly(folder / "masks")
        or list(itertools.chain.from_iterable(map(directly, below)))
    )


def check_means(mask_file: MaskFile, attention_width: int, width: int) -> None:
    """Raise InputError where a mask's means are of other widths than the model's: of the heads' outputs side
    by side, and of the residual.
    """
    means = mask_file.means
    if means is not None and (means.heads.shape[1], means.ffns.shape[1]) != (attention_width, width):
        got = f"{means.heads.shape[1]} and {means.ffns.shape[1]}"
        raise InputError(
            f"mask {mask_file.name}: its means have {got} numbers per layer, this model "
            f"{attention_width} and {width}; choose another mask"
        )


def check_fits(mask_file: MaskFile, model: MaskModel) -> str | None:
    """Return a warning where a mask was made on other weights of the same shape, None where on the same.

    Raises InputError where the model's shape is another.
    """
    if mask_file.model.shape != model.shape:
        expected, got = (
            "{} of {} layers with {} heads".format(*shape) for shape in (model.shape, mask_file.model.shape)
        )
        raise InputError(
            f"mask {mask_file.name}: made for {got}, this model is {expected}; choose another mask"
        )
    if mask_file.model.digest != model.digest:
        return f"mask {mask_file.name} was made on other weights ({mask_file.model.id}) of the same shape"
    return None
