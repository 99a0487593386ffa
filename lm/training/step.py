"""The training step: (state, carry, batch) -> (state, carry), pure, the same function on one device and on many."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lm.config import Config, OptimizerConfig
from lm.objectives import Objective, reset_rows
from lm.parallel import join_rows, split_rows
from lm.training.optimizer import is_clipped

Array = jax.Array


@struct.dataclass
class TrainState:
    """All of a training run that holds no rows.

    Attributes:
      step: int32, updates done.
      params: float32 parameters.
      opt_state: optax's.
      controls: scalars that the loop decides, so that a change never retraces: `learning_rate_scale`.
      log_sums: sums since the last line of metrics, see `empty_log`.
    """

    step: Array
    params: Any
    opt_state: Any
    controls: Mapping[str, Array]
    log_sums: Mapping[str, Array]


def empty_log() -> dict[str, Array]:
    """Sums that a line of metrics is made of: loss (nats) and weight (tokens); over steps the gradient's norm before
    clipping, clipped steps, the update's norm; and the first step (from 1) with a non-finite loss, gradient or update, or 0."""
    zeros = {name: jnp.zeros(()) for name in ("loss", "weight", "gradient_norm", "clipped", "update_norm")}
    return {**zeros, "steps": jnp.zeros((), jnp.int32), "non_finite_step": jnp.zeros((), jnp.int32)}


def initial_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        controls={"learning_rate_scale": jnp.ones(())},
        log_sums=empty_log(),
    )


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
    """
    key = jax.random.fold_in(dropout_key, state.step)
    carry = reset_rows(carry, batch.reset_B)
    gradients_of = jax.grad(functools.partial(_objective_and_sums, objective, key), has_aux=True)

    if num_micro_batches == 1:
        gradients, (sums, carry) = gradients_of(state.params, carry, batch)
    else:

        def add(accumulated, rows):
            gradients, (sums, carry) = gradients_of(state.params, *rows)
            return jax.tree.map(jnp.add, accumulated, (gradients, sums)), carry

        parts = split_rows((carry, batch), num_micro_batches)
        shapes = jax.eval_shape(gradients_of, state.params, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
        (gradients, sums), carry = jax.lax.scan(add, zeros, parts)
        carry = join_rows(carry)

    gradients, sums = total((gradients, sums))
    weight = jnp.maximum(sums["weight"], 1e-9)  # a batch of padding alone has no gradient, and must not divide by zero
    gradient_norm = optax.global_norm(gradients) / weight  # handed on, so that nothing needs the divided gradients but the update
    gradients = jax.tree.map(lambda g: g / weight, gradients)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, gradient_norm=gradient_norm)
    updates = jax.tree.map(lambda u: u * state.controls["learning_rate_scale"], updates)
    update_norm = optax.global_norm(updates)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
    step = state.step + 1
    log = state.log_sums
    already = log["non_finite_step"]
    log_sums = {
        "loss": log["loss"] + sums["loss"],
        "weight": log["weight"] + sums["weight"],
        "gradient_norm": log["gradient_norm"] + gradient_norm,
        "clipped": log["clipped"] + is_clipped(settings, gradients, gradient_norm),
        "update_norm": log["update_norm"] + update_norm,
        "steps": log["steps"] + 1,
        "non_finite_step": jnp.where((already == 0) & ~finite, step, already),
    }
    state = state.replace(step=step, params=optax.apply_updates(state.params, updates), opt_state=opt_state, log_sums=log_sums)
    return state, carry


def _objective_and_sums(objective, key, params, carry, batch):
    sums, carry = objective(params, carry, batch, key, True)
    return sums["objective"], (sums, carry)
