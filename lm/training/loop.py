"""The training loop: data -> step -> log -> evaluate -> save, until the last step or the end of patience."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lm.config import Config
from lm.data.batches import BatchSource
from lm.data.prefetch import prefetch
from lm.errors import Preempted
from lm.parallel import Placement
from lm.runs.checkpoint import Checkpoints
from lm.training import metrics
from lm.training.controls import decide, shown
from lm.training.progress import Progress
from lm.training.step import TrainState, empty_log, evaluation_params, parted


def run_loop(
    config: Config,
    state: TrainState,
    carry: Any,
    progress: Progress,
    *,
    step_fn: Callable,
    skip_fn: Callable,
    source: BatchSource,
    placement: Placement,
    evaluate: Callable[[Any], dict[str, float]],
    schedule: Callable[[int], float],
    checkpoints: Checkpoints,
    record: Callable[[dict[str, Any]], None],
    on_step: Callable[[int], None] = lambda step: None,
    is_asked_to_stop: Callable[[int], bool] = lambda step: False,
) -> Progress:
    """Trains to the end. A run that starts from another's parameters looks at valid before its first step.

    Args:
      state, carry: global, as they stand after `state.step` updates; carry None where segments start empty.
      step_fn: (state, carry, batch) -> (state, carry), compiled; donates its first two arguments.
      skip_fn: the same for a step that is left out.
      evaluate: placed parameters -> figures of the quick look at valid.
      schedule: step -> learning rate, before the plateau's factor.
      record, on_step: take a line of metrics; the number of a step that was dispatched.
      is_asked_to_stop: asked after each step; of several processes all must say the same.

    Raises:
      UserError: a bad step; the last checkpoint stays.
      RollBack: a bad step, where the config wants that.
      Preempted: it was asked to stop; the step is saved.
    """
    training, start, progress.finished = config.training, int(state.step), False  # also one that had ended, given more steps
    controls = {name: np.array(value) for name, value in state.controls.items()}
    state, carry = placement.put_state(state), placement.put_rows(carry)
    tokens_per_step, local_rows = source.tokens_per_step, placement.local_rows(config.data.batch_size)
    mark, logged = time.perf_counter(), (start, progress.seconds)

    def batch(step):
        return placement.put_local_rows(source.batch(step, local_rows))

    def learning_rate(step):
        return float(schedule(max(step, 1) - 1)) * float(controls["learning_rate_scale"])

    def place_in_run(step):
        at = {"step": step, "tokens": int(step * tokens_per_step), "epoch": source.epoch(max(step, 1) - 1)}
        return {**at, "seconds": round(progress.seconds, 3)}

    def look(step):
        nonlocal controls, state
        figures = evaluate(evaluation_params(state))
        metrics.stop_if_valid_is_not_finite(step, figures["loss"], learning_rate(step), checkpoints)
        record({**place_in_run(step), "split": "valid", **figures, **shown(controls)})
        progress.looked(step, figures["loss"])
        controls = decide(config, controls, progress)
        state = state.replace(controls=placement.put_state(controls))

    def save(step):
        params, rest = parted(placement.to_save(state))
        checkpoints.save(step, params, {"state": rest, "carry": placement.get_rows(carry)}, dataclasses.asdict(progress))

    # what it started from is kept if nothing gets better; and a run that was stopped may be asked to end there
    if (training.init_from and not start and not progress.losses) or start == training.num_steps:
        look(start)
        progress.finished = start == training.num_steps
        save(start)
        mark = time.perf_counter()
    for step, rows in enumerate(prefetch(batch, start, training.num_steps, config.data.prefetch), start + 1):
        state, carry = (skip_fn if step in progress.left_out else step_fn)(state, carry, rows)
        on_step(step)
        last, stops = step == training.num_steps, is_asked_to_stop(step)
        logs, looks = (last or step % every == 0 for every in (training.log_every_steps, training.evaluate_every_steps))
        saves = (training.checkpoint_every_steps and step % training.checkpoint_every_steps == 0) or looks or stops
        if not (looks or saves or logs):
            continue
        sums = placement.get_state(state.log_sums)  # waits for the device
        progress.seconds, mark = progress.seconds + time.perf_counter() - mark, time.perf_counter()
        metrics.act_on_bad_step(sums, training, learning_rate, checkpoints)
        if logs:
            rate = float((step - logged[0]) * tokens_per_step) / max(progress.seconds - logged[1], 1e-9)
            rates = {"learning_rate": learning_rate(step), "tokens_per_second": round(rate, 1)}
            record({**place_in_run(step), "split": "train", **metrics.train_figures(sums), **rates, **source.counts(step)})
            metrics.stop_if_all_are_skipped(sums, progress, learning_rate(step), checkpoints)
            state = state.replace(log_sums=placement.put_state(empty_log()))
            logged = (step, progress.seconds)
        if looks:
            look(step)
            progress.finished = last or progress.out_of_patience(training.early_stopping)
        if saves:
            save(step)
        if progress.finished:
            break
        if stops:
            checkpoints.wait()  # it says that the step is saved
            raise Preempted(step)
        mark = time.perf_counter()
    return progress
