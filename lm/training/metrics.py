"""The metrics of training: figures from sums, the check that they are finite, metrics.jsonl and TensorBoard events."""

import math
import shutil
from collections.abc import Callable
from typing import Any

from lm.errors import UserError
from lm.evaluation.perplexity import perplexity
from lm.runs.checkpoint import Checkpoints
from lm.runs.folder import RunFolder


def train_figures(sums: dict[str, Any]) -> dict[str, float]:
    """A line of metrics from the sums since the last one: means over tokens (loss) and over steps (the others)."""
    steps, loss = max(int(sums["steps"]), 1), float(sums["loss"]) / max(float(sums["weight"]), 1e-9)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "gradient_norm": float(sums["gradient_norm"]) / steps,
        "clipped_share": float(sums["clipped"]) / steps,
        "update_norm": float(sums["update_norm"]) / steps,
    }


def stop_if_not_finite(sums: dict[str, Any], learning_rate: float, checkpoints: Checkpoints) -> None:
    """Raises a UserError that names the step, if a loss, gradient or update since the last look was not finite."""
    bad = int(sums["non_finite_step"])
    if bad:
        _stop(f"the loss, gradient or update of step {bad}", learning_rate, checkpoints)


def stop_if_valid_is_not_finite(step: int, loss: float, learning_rate: float, checkpoints: Checkpoints) -> None:
    """Raises a UserError if the model after `step` has no finite loss on valid: its parameters are not worth saving."""
    if not math.isfinite(loss):
        _stop(f"the loss on valid after step {step}", learning_rate, checkpoints)


def _stop(what, learning_rate, checkpoints):
    checkpoints.wait()
    kept = checkpoints.steps()
    raise UserError(
        f"{what} is not finite (learning rate {float(learning_rate):.3g}); try a smaller config.optimizer.learning_rate, a "
        "smaller config.optimizer.clip_norm or more config.optimizer.warmup_steps; "
        + (f"the checkpoint of step {kept[-1]} is kept" if kept else "there was no checkpoint yet")
    )


class MetricsLog:
    """metrics.jsonl, and the same scalars as TensorBoard events, both cut back to the step that training goes on from."""

    def __init__(self, folder: RunFolder, step: int, heard: Callable[[dict[str, Any]], None]):
        """Takes the files back to `step`; `heard` is told of every line from there on."""
        from tensorboardX import SummaryWriter

        self._folder, self._heard = folder, heard
        lines = folder.cut_metrics(step)
        shutil.rmtree(folder.tensorboard, ignore_errors=True)
        self._events = SummaryWriter(str(folder.tensorboard))
        for line in lines:
            self._event(line)

    def record(self, line: dict[str, Any]) -> None:
        """Adds a line to both."""
        self._folder.append_metrics(line)
        self._event(line)
        self._heard(line)

    def _event(self, line):
        for name, value in line.items():
            if name not in ("step", "split"):
                self._events.add_scalar(f"{line['split']}/{name}", value, line["step"])
        if line["split"] == "valid":
            self._events.flush()

    def close(self) -> None:
        """Writes what is not yet on disk."""
        self._events.close()
