"""The rows of a pass that scores heads, saved on their way through the layers."""

from collections.abc import Callable

import numpy as np

from lowmem_icl.engine.head_scores import PassCheckpoint
from lowmem_icl.session.parts import SECONDS_BETWEEN_DRAFTS, Draft


class RowsOnTheWay:
    """Saves the residuals of a pass that scores heads beside its scores, so that a stop loses a layer and not
    a pass.

    `keeps_rows`: whether the rows are where they can be saved, which on another device they are only at the
    end. `check_time` raises where the time is over.
    """

    def __init__(
        self,
        scores: Draft,
        rows: Draft,
        *,
        keeps_rows: bool,
        check_time: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._scores, self._rows, self._keeps_rows = scores, rows, keeps_rows
        self._check_time, self._clock = check_time, clock
        self._saved = clock()

    def begin(self, checkpoint: PassCheckpoint) -> None:
        """Put what an earlier run left in place of a block's rows, where it is of the same rows."""
        expected = checkpoint.row_indices.copy()
        if self._keeps_rows:
            self._rows.resume(checkpoint.arrays)
        if not np.array_equal(checkpoint.row_indices, expected):
            # Other rows of the same length: these start from the first layer.
            checkpoint.row_indices[:], checkpoint.next_layer[:] = expected, 0

    def after_layer(self) -> None:
        """Save from time to time, and when the time is over."""
        try:
            self._check_time()
        except Exception:
            self._save()
            raise
        if self._clock() - self._saved >= SECONDS_BETWEEN_DRAFTS:
            self._save()

    def discard(self) -> None:
        """Delete what was saved of the rows."""
        self._rows.discard()

    def _save(self) -> None:
        # Scores first: rows say how far they are, and must not be ahead.
        self._scores.save()
        self._rows.save()
        self._saved = self._clock()
