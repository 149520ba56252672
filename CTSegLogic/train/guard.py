"""Steps without a finite gradient are left out: one of them would turn every weight into no number for good.

They happen in half precision: a rare overflow, or a library's kernel at an odd size. A training in which they
do not end is stopped with its last good weights in `latest.pt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from CTSegLogic.values.errors import TaskInvalid

_PATIENCE = 20  # steps in a row


class Guard:
    """Counts the steps that are left out: `skipped` in this epoch, `row` without a good one between."""

    def __init__(self) -> None:
        self.skipped = self.row = 0

    def takes(self, norm: float) -> bool:
        """Whether a step with a gradient of that norm is to be made.

        Raises:
            TaskInvalid: too many in a row were not.
        """
        if math.isfinite(norm):
            self.row = 0
            return True
        self.skipped, self.row = self.skipped + 1, self.row + 1
        if self.row >= _PATIENCE:
            raise TaskInvalid(
                seen=f"The training diverged: {self.row} steps in a row had no finite gradient.",
                hint="Resume with --precision fp32, or train with a lower lr.",
            )
        return False

    def told(self, losses: Sequence[float]) -> dict[str, float]:
        """Of an epoch's steps the mean loss, and how many were left out when any were; counts anew."""
        good = [loss for loss in losses if math.isfinite(loss)]
        row = {"loss": sum(good) / len(good) if good else math.nan}
        if self.skipped:
            row["skipped"] = float(self.skipped)
        self.skipped = 0
        return row
