"""`icl.Mask`: a set of removed units with its file, combined, saved, scored."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowmem_icl as icl
from lowmem_icl.masks.files import MaskFile, MaskModel, fill_of_table
from lowmem_icl.masks.means import UnitMeans

DEMO_MASK = Path(__file__).parents[1] / "masks" / "demo" / "greedy-recall-16shot.json"


@pytest.fixture(scope="module")
def model(stores: Path) -> Iterator[icl.OpenModel]:
    with icl.open_model(store_dir=stores, progress=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def task() -> icl.Task:
    return icl.load_task("recall", shots=4, limit=16)


units = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=6)


@given(units, units)
def test_masks_are_sets_that_parse_what_they_print(left: set[Any], right: set[Any]) -> None:
    def mask_of(pairs: set[tuple[int, int]]) -> icl.Mask:
        # The last head stands for the layer's FFN.
        return icl.Mask([pair for pair in pairs if pair[1] < 4], [layer for layer, at in pairs if at == 4])

    one, other = mask_of(left), mask_of(right)
    assert icl.Mask.parse(" ".join(one.removed)) == one
    assert len(one) == len(left)
    assert one | other == mask_of(left | right)
    assert one & other == mask_of(left & right)
    assert one - other == mask_of(left - right)
    assert hash(one) == hash(mask_of(set(left)))


def test_masks_are_saved_and_read_again(model: icl.OpenModel, tmp_path: Path) -> None:
    mask = icl.Mask.parse("L0H0,L3F")
    path = mask.save(tmp_path / "mine.json", model.mask_model)
    read = icl.Mask.read(path)
    assert read == mask
    assert read.name == "mine"
    assert len(read.kept) == 34
    both = read | icl.Mask.parse("L1H1")
    assert both.model == model.mask_model
    assert both.removed == ["L0H0", "L1H1", "L3F"]
    with pytest.raises(icl.InputError, match="expected the model that it is for"):
        mask.save(tmp_path / "other.json")
    with pytest.raises(icl.InputError, match="ask for removed"):
        _ = mask.kept


def means_mask(folder: Path, name: str, unit: str, value: float, **changes: Any) -> icl.Mask:
    """A mask of a file whose means are all one value."""
    means = UnitMeans(np.full((4, 128), value, np.float32), np.full((4, 128), value, np.float32))
    removed = icl.Mask.parse(unit).units.filled(fill_of_table(means))
    model = icl.Mask.read(DEMO_MASK).model
    assert model is not None
    return icl.Mask.of_file(MaskFile(name, removed, replace(model, **changes), {"method": "x"}, means=means))


def replace(model: MaskModel, **changes: Any) -> MaskModel:
    return model.model_copy(update=changes)


def test_masks_that_put_other_things_in_place_are_not_combined(tmp_path: Path) -> None:
    low, high = means_mask(tmp_path, "low", "L0H0", 0.1), means_mask(tmp_path, "high", "L1H0", 0.5)
    assert low != high
    assert means_mask(tmp_path, "a", "L0H0", 0.1) != means_mask(tmp_path, "b", "L0H0", 0.5)
    for left, right in ((low, high), (low, icl.Mask.parse("L2H0"))):
        with pytest.raises(icl.InputError, match="put other things in place of what they remove"):
            _ = left | right
    whole = icl.Mask() | low
    assert whole == low
    assert whole.units == low.units
    assert whole.origin is not None
    assert whole.origin.means is low.origin.means  # type: ignore[union-attr]
    same = low | means_mask(tmp_path, "more", "L1H1", 0.1)
    assert same.units.fill == low.units.fill
    other = means_mask(tmp_path, "other", "L1H1", 0.1, layers=5)
    with pytest.raises(icl.InputError, match="models of different shapes"):
        _ = low | other


def test_masks_of_one_size_have_names_of_their_own(model: icl.OpenModel, task: icl.Task) -> None:
    many = [icl.Mask([(layer, head) for layer in range(4) for head in range(at, at + 4)]) for at in (0, 4)]
    assert len({mask.name for mask in many}) == 2
    assert set(icl.score(model, task, many, progress=False)["mask"]) == {
        "clean",
        *(mask.name for mask in many),
    }


def test_a_mask_of_other_weights_is_scored_with_a_warning(model: icl.OpenModel, task: icl.Task) -> None:
    read = icl.Mask.read(DEMO_MASK)
    assert read.origin is not None
    other = icl.Mask.of_file(dataclasses.replace(read.origin, model=replace(read.origin.model, digest="0")))
    with pytest.warns(UserWarning, match="was made on other weights"):
        icl.score(model, task, [other], progress=False)


def test_saving_keeps_what_this_version_does_not_know(tmp_path: Path) -> None:
    read = icl.Mask.read(DEMO_MASK)
    assert read.origin is not None
    noted = icl.Mask.of_file(dataclasses.replace(read.origin, extra={"note": "mine"}))
    assert icl.Mask.read(noted.save(tmp_path / "noted.json")).origin.extra == {"note": "mine"}  # type: ignore[union-attr]
