"""The training loop: data -> step -> log -> evaluate -> save, until the last step or the end of patience."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lm.config import Config
from lm.data.batches import BatchSource, prefetch
from lm.errors import UserError
from lm.parallel import Placement
from lm.runs.checkpoint import Checkpoints
from lm.training.step import TrainState, empty_log


@dataclasses.dataclass
class Progress:
    """What a run knows besides its arrays; saved with every checkpoint.

    Attributes:
      best_step, best_loss: of valid so far (nats per token).
      stalled: evaluations since the best one.
      stalled_since_decay: evaluations since the best one or the last decay of the learning rate.
      seconds: spent on training steps so far.
      finished: whether training is over.
    """

    best_step: int | None = None
    best_loss: float = math.inf
    stalled: int = 0
    stalled_since_decay: int = 0
    seconds: float = 0.0
    finished: bool = False


def run_loop(
    config: Config,
    state: TrainState,
    carry: Any,
    progress: Progress,
    *,
    step_fn: Callable,
    source: BatchSource,
    placement: Placement,
    evaluate: Callable[[Any], dict[str, float]],
    schedule: Callable[[int], float],
    checkpoints: Checkpoints,
    record: Callable[[dict[str, Any]], None],
    on_step: Callable[[int], None] = lambda step: None,
) -> Progress:
    """Trains to the end.

    Args:
      state, carry: global, as they stand after `state.step` updates; carry None where segments start empty.
      step_fn: (state, carry, batch) -> (state, carry), compiled; donates its first two arguments.
      evaluate: placed parameters -> figures of the quick look at valid.
      schedule: step -> learning rate, before the plateau's factor.
      record: takes a line of metrics.
      on_step: called after each step was dispatched.

    Raises:
      UserError: a non-finite loss or gradient; the last checkpoint stays.
    """
    training, optimizer, start = config.training, config.optimizer, int(state.step)
    scale = float(state.controls["learning_rate_scale"])
    state, carry = placement.put_state(state), placement.put_rows(carry)
    tokens_per_step = config.data.batch_size * config.data.seq_len
    mark, logged = time.perf_counter(), (start // training.log_every_steps * training.log_every_steps, progress.seconds)

    def batch(step):
        return placement.put_rows(source.batch(step, slice(None)))

    for step, rows in enumerate(prefetch(batch, start, training.num_steps, config.data.prefetch), start + 1):
        state, carry = step_fn(state, carry, rows)
        on_step(step)
        last = step == training.num_steps
        looks = last or step % training.evaluate_every_steps == 0
        saves = looks or (training.checkpoint_every_steps and step % training.checkpoint_every_steps == 0)
        logs = last or step % training.log_every_steps == 0
        if not (looks or saves or logs):
            continue
        sums = placement.get_state(state.log_sums)  # waits for the device
        progress.seconds, mark = progress.seconds + time.perf_counter() - mark, time.perf_counter()
        stop_if_not_finite(sums, schedule(step - 1) * scale, checkpoints)
        where = {
            "step": step,
            "tokens": step * tokens_per_step,
            "epoch": source.epoch(step - 1),
            "seconds": round(progress.seconds, 3),
        }
        if logs:
            rate = (step - logged[0]) * tokens_per_step / max(progress.seconds - logged[1], 1e-9)
            line = {
                **train_figures(sums),
                "learning_rate": float(schedule(step - 1)) * scale,
                "tokens_per_second": round(rate, 1),
            }
            record({**where, "split": "train", **line})
            state = state.replace(log_sums=placement.put_state(empty_log()))
            logged = (step, progress.seconds)
        if looks:
            figures = evaluate(state.params)
            record({**where, "split": "valid", **figures})
            if figures["loss"] < progress.best_loss:
                progress.best_step, progress.best_loss = step, figures["loss"]
                progress.stalled = progress.stalled_since_decay = 0
            else:
                progress.stalled, progress.stalled_since_decay = progress.stalled + 1, progress.stalled_since_decay + 1
            if optimizer.schedule == "plateau" and progress.stalled_since_decay > optimizer.plateau_patience:
                scale, progress.stalled_since_decay = scale * optimizer.decay_factor, 0
                controls = {"learning_rate_scale": np.float32(scale)}
                state = state.replace(controls=placement.put_state(controls))
            out_of_patience = training.early_stopping is not None and progress.stalled >= training.early_stopping
            progress.finished = last or out_of_patience
        if saves:
            host = placement.get_state(state)
            rest = {"state": host.replace(params=None), "carry": placement.get_rows(carry)}
            checkpoints.save(step, host.params, rest, dataclasses.asdict(progress))
        if progress.finished:
            break
        mark = time.perf_counter()
    return progress


def train_figures(sums: dict[str, Any]) -> dict[str, float]:
    """A line of metrics from the sums since the last one: means over tokens (loss) and over steps (the others)."""
    steps, loss = max(int(sums["steps"]), 1), float(sums["loss"]) / max(float(sums["weight"]), 1e-9)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "gradient_norm": float(sums["gradient_norm"]) / steps,
        "clipped_share": float(sums["clipped"]) / steps,
        "update_norm": float(sums["update_norm"]) / steps,
    }


def stop_if_not_finite(sums: dict[str, Any], learning_rate: float, checkpoints: Checkpoints) -> None:
    """Raises a UserError that names the step, if a loss or gradient since the last look was not finite."""
    bad = int(sums["non_finite_step"])
    if bad:
        checkpoints.wait()
        kept = checkpoints.steps()
        raise UserError(
            f"the loss or gradient of step {bad} is not finite (learning rate {float(learning_rate):.3g}); try a smaller "
            "config.optimizer.learning_rate, a smaller config.optimizer.clip_norm or more config.optimizer.warmup_steps; "
            + (f"the checkpoint of step {kept[-1]} is kept" if kept else "there was no checkpoint yet")
        )
