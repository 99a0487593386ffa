"""The training step: (state, carry, batch) -> (state, carry), pure, the same function on one device and on many."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lm.config import Config, OptimizerConfig, TrainingConfig
from lm.objectives import Objective, reset_rows
from lm.parallel import join_rows, split_rows
from lm.training.controls import initial_controls
from lm.training.optimizer import is_clipped

Array = jax.Array

_MEMORY = 0.98  # of the running mean of the loss, per step
_SPIKES_AFTER = 50  # steps, in which the loss falls too fast for a mean to mean much


@struct.dataclass
class TrainState:
    """All of a training run that holds no rows.

    Attributes:
      step: int32, steps done, those that were left out too.
      params: float32 parameters.
      opt_state: optax's.
      controls: scalars that the loop decides, see lm.training.controls.
      log_sums: sums since the last line of metrics, see `empty_log`.
      recent_loss: running mean of the loss of good steps, nats per token; None where no spike is looked for.
      averaged_params: mean of the parameters since `controls` says so, until then those of the last step; None where the
        config wants no mean.
      averaged_steps: int32, how many parameters the mean is of; 0 before it begins.
    """

    step: Array
    params: Any
    opt_state: Any
    controls: Mapping[str, Array]
    log_sums: Mapping[str, Array]
    recent_loss: Array | None = None
    averaged_params: Any = None
    averaged_steps: Array | None = None


def empty_log() -> dict[str, Array]:
    """Sums that a line of metrics is made of: loss (nats) and weight (tokens); over steps the gradient's norm before
    clipping, clipped steps, the update's norm; steps left out, which count in nothing else; and the first bad step (from 1) that
    was not left out, or 0."""
    zeros = {name: jnp.zeros(()) for name in ("loss", "weight", "gradient_norm", "clipped", "update_norm")}
    return {**zeros, **{name: jnp.zeros((), jnp.int32) for name in ("steps", "skipped_steps", "bad_step")}}


def initial_state(params, optimizer: optax.GradientTransformation, training: TrainingConfig | None = None) -> TrainState:
    """The state before the first step."""
    averaging = training is not None and training.averaging
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        controls=jax.tree.map(jnp.asarray, initial_controls(averaging or None)),
        log_sums=empty_log(),
        recent_loss=jnp.zeros(()) if training is not None and training.spike_nats is not None else None,
        averaged_params=jax.tree.map(jnp.copy, params) if averaging else None,
        averaged_steps=jnp.zeros((), jnp.int32) if averaging else None,
    )


def evaluation_params(state: TrainState):
    """The parameters that evaluation sees: the mean where there is one."""
    return state.params if state.averaged_params is None else state.averaged_params


def parted(state: TrainState) -> tuple[Any, TrainState]:
    """The parameters that evaluation sees, and all the rest: how a checkpoint keeps them."""
    if state.averaged_params is None:
        return state.params, state.replace(params=None)
    return state.averaged_params, state.replace(averaged_params=None)


def joined(params, rest: TrainState) -> TrainState:
    """The inverse of `parted`."""
    return rest.replace(params=params) if rest.params is None else rest.replace(averaged_params=params)


def skip_step(state: TrainState) -> TrainState:
    """The state after a step that was left out."""
    log = state.log_sums
    return state.replace(step=state.step + 1, log_sums={**log, "skipped_steps": log["skipped_steps"] + 1})


def dropout_key(config: Config) -> Array:
    """The key that every dropout mask of a run goes back to.

    threefry makes a mask from the step, the place in the model and the global row alone. The generator of XLA, "rbg", makes
    all rows of a device from the key of its first: its masks depend on how many rows a device has, and so on the devices.
    """
    implementation = {"threefry": "threefry2x32", "rbg": "rbg"}[config.dropout_generator]
    return jax.random.fold_in(jax.random.key(config.seed, impl=implementation), 1)


def train_step(
    state: TrainState,
    carry,
    batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    settings: OptimizerConfig,
    total: Callable,
    dropout_key: Array,
    num_micro_batches: int = 1,
    on_bad_step: str = "stop",
    spike_nats: float | None = None,
    averaging_decay: float | None = None,
    full_weight: float | None = None,
) -> tuple[TrainState, Any]:
    """One update.

    Local *sums* are differentiated; `total` adds gradients and denominators over devices once; only then is divided, so
    that rows with uneven weights count the same wherever they are. Clipping and update follow, on equal values everywhere.

    Args:
      state: replicated.
      carry: local rows; None: every segment starts empty.
      batch: local rows.
      objective: what is learnt.
      optimizer: as lm.training.optimizer builds it; `settings` is what it was built from.
      total: sum over devices.
      dropout_key: of the run; see `dropout_key`.
      num_micro_batches: parts the local rows are cut into, one after the other; the gradients are the same.
      on_bad_step: "skip" leaves a bad step out here; otherwise it is noted.
      spike_nats: see TrainingConfig; needs a state with `recent_loss`.
      averaging_decay: see TrainingConfig; of a state with `averaged_params`.
      full_weight: weight of a whole batch over all devices, where steps differ in length: an update counts as much as its
        share of that; None: all updates count the same.
    """
    key = jax.random.fold_in(dropout_key, state.step)
    carry = reset_rows(carry, batch.reset_B)
    skipped = skip_step(state), carry
    gradients_of = jax.grad(functools.partial(_objective_and_sums, objective, key), has_aux=True)

    gradients, (sums, carry) = _in_parts(gradients_of, state.params, carry, batch, num_micro_batches)
    gradients, sums = total((gradients, sums))
    weight = jnp.maximum(sums["weight"], 1e-9)  # a batch of padding alone has no gradient, and must not divide by zero
    gradient_norm = optax.global_norm(gradients) / weight  # handed on, so that nothing needs the divided gradients but the update
    gradients = jax.tree.map(lambda g: g / weight, gradients)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, gradient_norm=gradient_norm, step=state.step)
    scale = state.controls["learning_rate_scale"]
    if full_weight is not None:
        scale *= sums["weight"] / full_weight
    updates = jax.tree.map(lambda u: u * scale, updates)
    update_norm = optax.global_norm(updates)
    good = jnp.isfinite(sums["loss"]) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
    if spike_nats is not None:
        loss, recent = sums["loss"] / weight, state.recent_loss
        good &= (state.step < _SPIKES_AFTER) | (loss < recent + spike_nats)
        # a plain mean at first, so that it does not start at zero, also where the first steps were left out
        share = jnp.where(recent == 0, 1.0, jnp.maximum(1 - _MEMORY, 1 / (state.step + 1.0)))
        state = state.replace(recent_loss=recent + share * (loss - recent))  # that of a bad step is not kept, nor is the rest
    step = state.step + 1
    log = state.log_sums
    already = log["bad_step"]
    log_sums = {
        "loss": log["loss"] + sums["loss"],
        "weight": log["weight"] + sums["weight"],
        "gradient_norm": log["gradient_norm"] + gradient_norm,
        "clipped": log["clipped"] + is_clipped(settings, gradients, gradient_norm),
        "update_norm": log["update_norm"] + update_norm,
        "steps": log["steps"] + 1,
        "skipped_steps": log["skipped_steps"],
        "bad_step": jnp.where((already == 0) & ~good, step, already),
    }
    state = state.replace(step=step, params=optax.apply_updates(state.params, updates), opt_state=opt_state, log_sums=log_sums)
    if state.averaged_params is not None:
        state = _average(state, averaging_decay)
    if on_bad_step == "skip":
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), (state, carry), skipped)
    return state, carry


def _average(state, decay):
    """Takes the parameters of a step into their mean (Polyak & Juditsky 1992), all alike or the past with weight `decay`."""
    steps = jnp.where(state.controls["averaging"] > 0, state.averaged_steps + 1, 0)
    share = 1 / jnp.maximum(steps, 1)
    if decay is not None:
        share = jnp.where(steps > 0, jnp.maximum(share, 1 - decay), 1.0)
    mean = jax.tree.map(lambda mean, new: (1 - share) * mean + share * new, state.averaged_params, state.params)
    return state.replace(averaged_params=mean, averaged_steps=steps)


def _in_parts(gradients_of, params, carry, batch, num_parts):
    """What `gradients_of` makes of rows that it gets a part at a time; the same as of all at once."""
    if num_parts == 1:
        return gradients_of(params, carry, batch)

    def add(accumulated, rows):
        gradients, (sums, carry) = gradients_of(params, *rows)
        return jax.tree.map(jnp.add, accumulated, (gradients, sums)), carry

    parts = split_rows((carry, batch), num_parts)
    shapes = jax.eval_shape(gradients_of, params, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    (gradients, sums), carry = jax.lax.scan(add, zeros, parts)
    return gradients, (sums, join_rows(carry))


def _objective_and_sums(objective, key, params, carry, batch):
    sums, carry = objective(params, carry, batch, key, True)
    return sums["objective"], (sums, carry)
