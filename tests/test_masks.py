"""Masks as sets and as files; files of strangers are checked."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MASK_SCHEMA, MaskFile, MaskModel, check_fits, read_mask, write_mask
from lowmem_icl.masks.mask import Mask, Unit, all_ffns, all_heads, jaccard

MODEL = MaskModel(id="made", revision=None, model_type="opt", layers=4, heads=8, digest="d" * 64)
masks = st.builds(
    Mask,
    st.frozensets(st.tuples(st.integers(0, 3), st.integers(0, 7))),
    st.frozensets(st.integers(0, 3)),
)


def a_file(mask: Mask = Mask(frozenset([(2, 3), (2, 1)]), frozenset([0])), **changes: object) -> MaskFile:
    fields = {
        "name": "some-mask",
        "mask": mask,
        "model": MODEL,
        "made": {"method": "greedy", "tasks": ["recall"]},
    }
    return MaskFile(**(fields | changes))  # type: ignore[arg-type]


@given(one=masks, other=masks)
def test_masks_are_an_algebra_of_sets(one: Mask, other: Mask) -> None:
    assert len(one | other) == len(one) + len(other) - len(one & other)
    assert (one - other) & other == Mask()
    assert (one - other) | (one & other) == one
    assert {str(unit) for unit in (one | other).units()} == {str(u) for m in (one, other) for u in m.units()}
    assert jaccard(one, other) == jaccard(other, one)
    assert jaccard(one, one) == 1


@given(mask=masks)
def test_the_first_layer_is_the_lowest_removed(mask: Mask) -> None:
    layers = [unit.layer for unit in mask.units()]
    assert mask.first_layer == (min(layers) if layers else None)
    rebuilt = Mask()
    for unit in mask.units():
        rebuilt = rebuilt | Unit.parse(str(unit)).as_mask()
    assert rebuilt == mask


@pytest.mark.parametrize("text", ["", "L1", "H3", "L1H", "l1h2", "L1H2F", "L-1H2", "L1H2 "])
def test_what_is_no_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a form such as L12H3"):
        Unit.parse(text)


def test_all_units_are_listed_in_order() -> None:
    assert [str(unit) for unit in all_heads(2, 2)] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert [str(unit) for unit in all_ffns(2)] == ["L0F", "L1F"]


@given(mask=masks)
def test_a_file_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, mask: Mask) -> None:
    path = tmp_path_factory.mktemp("masks") / "mask.json"
    written = a_file(mask, scores={"after": {"acc": 0.5}}, extra={"note": "kept"})
    write_mask(path, written)
    assert read_mask(path) == written
    jsonschema.validate(json.loads(path.read_text()), MASK_SCHEMA)


def test_a_file_reads_well(tmp_path: Path) -> None:
    write_mask(tmp_path / "mask.json", a_file())
    text = (tmp_path / "mask.json").read_text()
    assert '"2": [1, 3]' in text
    assert '"ffns": [0]' in text
    assert text.index('"format"') < text.index('"removed"') < text.index('"made": {')


def spoiled(change: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(a_file().to_json())
    for dotted, value in change.items():
        target = content
        *path, last = dotted.split(".")
        for step in path:
            target = target[step]
        target[last] = value
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "lowmem-icl-mask/9"}, "format"),
        ({"name": "../../etc/passwd"}, "name"),
        ({"name": "<script>"}, "name"),
        ({"ablation": "median"}, "ablation"),
        ({"ablation": "mean"}, "means: expected the digest of a table"),
        ({"means": "d" * 64}, "means: expected the digest of a table with ablation mean, and only there"),
        ({"ablation": "mean", "means": "../etc"}, "means"),
        ({"removed.heads": {"2": [True]}}, "removed.heads.2.0"),
        ({"removed.heads": {"2": [-1]}}, "removed.heads.2.0"),
        ({"removed.heads": {"02": [1]}}, "removed.heads"),
        ({"removed.heads": {"2": [8]}}, "outside the model's 4 layers of 8 heads"),
        ({"removed.ffns": [4]}, "outside the model"),
        ({"removed.ffns": [1, 1]}, "listed twice"),
        ({"removed.ffns": [1e3]}, "removed.ffns.0"),
        ({"model.layers": 10**12}, "model.layers"),
        ({"made": {}}, "made.method"),
    ],
)
def test_files_that_are_wrong_are_named_with_the_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "mask.json").write_text(json.dumps(spoiled(change)))
    with pytest.raises(InputError, match=rf"mask .*mask\.json: .*{message}"):
        read_mask(tmp_path / "mask.json")


def test_what_is_no_json_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "mask.json").write_text("{")
    with pytest.raises(InputError, match="Invalid JSON"):
        read_mask(tmp_path / "mask.json")
    with pytest.raises(InputError, match="No such file"):
        read_mask(tmp_path / "nowhere.json")


def test_a_mask_for_another_shape_is_refused_and_for_other_weights_warned_about() -> None:
    assert check_fits(a_file(), MODEL) is None
    assert "made on other weights" in str(check_fits(a_file(), MODEL.model_copy(update={"digest": "e" * 64})))
    with pytest.raises(
        InputError, match="made for opt of 4 layers with 8 heads, this model is opt of 5 layers"
    ):
        check_fits(a_file(), MODEL.model_copy(update={"layers": 5}))


def test_the_published_schema_is_the_one_in_use() -> None:
    published = Path(__file__).parents[1] / "masks" / "schema.json"
    assert json.loads(published.read_text()) == MASK_SCHEMA
