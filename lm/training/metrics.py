"""The metrics of training: figures from sums, the check that they are finite, metrics.jsonl and TensorBoard events."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from lm import processes
from lm.config import TrainingConfig
from lm.errors import UserError
from lm.evaluation.perplexity import perplexity
from lm.runs.checkpoint import Checkpoints
from lm.runs.folder import RunFolder
from lm.training.progress import Progress

MOST_LEFT_OUT = 10  # steps, without a line of metrics or a checkpoint in between that has a good one


def train_figures(sums: dict[str, Any]) -> dict[str, float]:
    """A line of metrics from the sums since the last one: means over tokens (loss) and over steps (the others), and the steps
    that were left out, if any."""
    steps, skipped = int(sums["steps"]), int(sums["skipped_steps"])
    left_out = {"skipped_steps": skipped} if skipped else {}
    if not steps:
        return left_out
    loss = float(sums["loss"]) / max(float(sums["weight"]), 1e-9)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "gradient_norm": float(sums["gradient_norm"]) / steps,
        "clipped_share": float(sums["clipped"]) / steps,
        "update_norm": float(sums["update_norm"]) / steps,
        **left_out,
    }


def act_on_bad_step(
    sums: dict[str, Any], training: TrainingConfig, learning_rate: Callable[[int], float], checkpoints: Checkpoints
) -> None:
    """Ends the run, or goes back, if a step since the last look was bad and not left out.

    Args:
      learning_rate: of a step, for the sentence.

    Raises:
      UserError: names the step.
      RollBack: the same, where the config wants that.
    """
    step = int(sums["bad_step"])
    if not step:
        return
    if training.on_bad_step == "rollback":
        raise RollBack(step)
    spike = f", or its loss lies {training.spike_nats} nats above the recent mean" if training.spike_nats is not None else ""
    _stop(f"the loss, gradient or update of step {step}", f"is not finite{spike}", learning_rate(step), checkpoints)


class RollBack(Exception):
    """Training is to go on from the last checkpoint, without the batch of a step.

    Attributes:
      step: the bad one.
    """

    def __init__(self, step: int):
        super().__init__(f"step {step} was bad")
        self.step = step


def stop_if_all_are_skipped(sums: dict[str, Any], progress: Progress, learning_rate: float, checkpoints: Checkpoints) -> None:
    """Notes in `progress` how many steps were left out since a good one; raises a UserError if they are too many."""
    progress.skipped_in_a_row = 0 if sums["steps"] else progress.skipped_in_a_row + int(sums["skipped_steps"])
    if progress.skipped_in_a_row >= MOST_LEFT_OUT:
        stop_for_many_bad_steps(progress.skipped_in_a_row, learning_rate, checkpoints)


def stop_for_many_bad_steps(number: int, learning_rate: float, checkpoints: Checkpoints) -> None:
    """Raises a UserError: leaving steps out does not help a run that brings forth nothing else."""
    _stop(f"the loss, gradient or update of {number} steps, one soon after the other,", "was bad", learning_rate, checkpoints)


def stop_if_valid_is_not_finite(step: int, loss: float, learning_rate: float, checkpoints: Checkpoints) -> None:
    """Raises a UserError if the model after `step` has no finite loss on valid: its parameters are not worth saving."""
    if not math.isfinite(loss):
        _stop(f"the loss on valid after step {step}", "is not finite", learning_rate, checkpoints)


def _stop(what, problem, learning_rate, checkpoints):
    checkpoints.wait()
    kept = checkpoints.steps()
    raise UserError(
        f"{what} {problem} (learning rate {float(learning_rate):.3g}); try a smaller config.optimizer.learning_rate, a "
        "smaller config.optimizer.clip_norm or more config.optimizer.warmup_steps; "
        + (f"the checkpoint of step {kept[-1]} is kept" if kept else "there was no checkpoint yet")
    )


@contextlib.contextmanager
def recording(
    folder: RunFolder, step: int | None, heard: Callable[[dict[str, Any]], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A context that gives a function which records a line of metrics; only in the first process does it do so.

    Args:
      step: of the checkpoint that training goes on from; what stood in the files behind it is cut off. None: there is none.
      heard: told of every line from there on.
    """
    if not processes.is_first():
        yield lambda line: None
        return
    with contextlib.closing(MetricsLog(folder, step, heard)) as log:
        yield log.record


class MetricsLog:
    """metrics.jsonl, and the same scalars as TensorBoard events, both cut back to the step that training goes on from."""

    def __init__(self, folder: RunFolder, step: int | None, heard: Callable[[dict[str, Any]], None]):
        """Takes the files back to `step`, or to nothing; `heard` is told of every line from there on."""
        self._folder, self._heard = folder, heard
        lines = folder.cut_metrics(-1 if step is None else step)
        shutil.rmtree(folder.tensorboard, ignore_errors=True)
        self._events = _Events(folder.tensorboard)
        for line in lines:
            self._events.add(line)

    def record(self, line: dict[str, Any]) -> None:
        """Adds a line to both."""
        self._folder.append_metrics(line)
        self._events.add(line)
        self._heard(line)

    def close(self) -> None:
        """Writes what is not yet on disk."""
        self._events.close()


class _Events:
    """A file of TensorBoard events, written here and now.

    tensorboardX's SummaryWriter has a thread write; where a full disk or a clock that jumps ends that thread, it lets a run
    wait for ever.
    """

    def __init__(self, folder):
        from tensorboardX.event_file_writer import EventsWriter

        self._folder = folder
        with self._refusals():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))

    def add(self, line):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        values = {f"{line['split']}/{name}": value for name, value in line.items() if name not in ("step", "split")}
        with self._refusals():
            for name, value in values.items():
                self._file.write_event(Event(wall_time=time.time(), step=line["step"], summary=scalar(name, value)))
            if line["split"] == "valid":
                self._file.flush()

    def close(self):
        with self._refusals():
            self._file.close()

    @contextlib.contextmanager
    def _refusals(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._folder} cannot be written: {error.strerror}") from None
