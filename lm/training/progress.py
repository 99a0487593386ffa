"""What a run knows besides its arrays: the best look at valid so far, its patience, the time it took."""

import dataclasses
import math
from typing import Any

from lm.errors import UserError


@dataclasses.dataclass
class Progress:
    """Saved with every checkpoint, as plain values.

    Attributes:
      best_step, best_loss: of valid so far (nats per token).
      stalled: looks since the best one.
      stalled_since_decay: looks since the best one or the last decay of the learning rate.
      seconds: spent on training steps so far.
      finished: whether training is over.
      left_out: steps (from 1) whose batches are not trained on, since that went wrong once.
      skipped_in_a_row: steps that were left out since the last line of metrics with a good one.
      losses: of all looks at valid, in order.
    """

    best_step: int | None = None
    best_loss: float = math.inf
    stalled: int = 0
    stalled_since_decay: int = 0
    seconds: float = 0.0
    finished: bool = False
    left_out: list[int] = dataclasses.field(default_factory=list)
    skipped_in_a_row: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """That of a checkpoint; what it does not tell, since it is older, is as at the start.

        Raises:
          UserError: it tells something that this version of the code does not know.
        """
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise UserError(
                f"the checkpoint's progress.json has {unknown[0]}, which is not known here: it is of another version of the "
                "code, with which the run can go on"
            )
        return cls(**values)

    def looked(self, step: int, loss: float) -> None:
        """Notes a look at valid."""
        self.losses.append(loss)
        if loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            self.stalled = self.stalled_since_decay = 0
        else:
            self.stalled += 1
            self.stalled_since_decay += 1

    def is_worse_than_before(self, patience: int) -> bool:
        """Whether the last look is worse than the best of those that at least `patience` others lie behind."""
        *before, last = self.losses
        return any(loss < last for loss in before[: max(len(before) - patience, 0)])

    def out_of_patience(self, early_stopping: int | None) -> bool:
        """Whether as many looks in a row as `early_stopping` brought nothing better."""
        return early_stopping is not None and self.stalled >= early_stopping
