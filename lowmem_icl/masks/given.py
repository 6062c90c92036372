"""Masks of files on a model: whether they fit it, and the tables of means that they bring."""

from collections.abc import Iterable

from lowmem_icl.masks.files import MaskFile, MaskModel, check_fits, check_means
from lowmem_icl.masks.means import UnitMeans


def misfits(mask_files: Iterable[MaskFile], model: MaskModel, widths: tuple[int, int]) -> list[str]:
    """Return a warning for every mask that was made on other weights of the same shape.

    widths: of the heads' outputs side by side, and of the residual. Raises InputError for a mask of another
    shape of model, or whose means have other widths.
    """
    found = []
    for mask_file in mask_files:
        warning = check_fits(mask_file, model)
        check_means(mask_file, *widths)
        found += [] if warning is None else [warning]
    return found


def tables_of(mask_files: Iterable[MaskFile]) -> dict[str, UnitMeans]:
    """Return the tables of means that masks bring, by the name by which they call them."""
    return {
        mask_file.mask.fill: mask_file.means
        for mask_file in mask_files
        if mask_file.mask.fill is not None and mask_file.means is not None
    }
