"""The optimiser: one visible optax chain, and the schedules of its learning rate."""

import math
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config import Config
from lm.models.build import parameter_role

Schedule = Callable[[jax.Array | int], jax.Array | float]


def build(config: Config, steps_per_epoch: int | Fraction) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """Clipping -> update rule -> decay -> learning rate.

    Decay, of the matrices or of all parameters, is decoupled from the gradient (Loshchilov & Hutter 2019, arXiv:1711.05101)
    for every rule: what has no gradient shrinks by learning_rate * weight_decay a step.

    Args:
      config: a resolved config; `optimizer` and `training.num_steps` are read.
      steps_per_epoch: for schedules that count epochs.

    Returns:
      The transformation, whose update takes `gradient_norm` and `step` too, and the schedule (step -> learning rate, before
      the plateau's factor).
    """
    optimizer = config.optimizer
    schedule = learning_rate(config, steps_per_epoch)
    decayed = None if optimizer.decayed == "all" else _is_matrix
    return (
        optax.chain(
            _clip(optimizer),
            _RULES[optimizer.name](optimizer),
            optax.add_decayed_weights(optimizer.weight_decay, mask=decayed) if optimizer.weight_decay else optax.identity(),
            _scale_by_schedule(schedule),
        ),
        schedule,
    )


def _clip(optimizer):
    if optimizer.clip_norm is not None:
        return _clip_by_norm(optimizer.clip_norm)
    return optax.clip(optimizer.clip_value) if optimizer.clip_value is not None else optax.identity()


def _clip_by_norm(limit):
    """Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063), which is given to it and not computed again."""

    def update(updates, state, params=None, *, gradient_norm, **others):
        del params, others
        scale = jnp.minimum(1.0, limit / gradient_norm)
        return jax.tree.map(lambda u: u * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scale_by_schedule(schedule):
    """The learning rate of a step that is given to it: those that were left out count, as they do in what is logged."""

    def update(updates, state, params=None, *, step, **others):
        del params, others
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def is_clipped(optimizer, gradients, global_norm) -> jax.Array:
    """Whether clipping changes these gradients (bool)."""
    if optimizer.clip_norm is not None:
        return global_norm > optimizer.clip_norm
    limit = jnp.inf if optimizer.clip_value is None else optimizer.clip_value
    return jnp.any(jnp.stack([jnp.any(jnp.abs(gradient) > limit) for gradient in jax.tree.leaves(gradients)]))


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: parameter_role(tuple(k.key for k in path)) == "matrix", params)


def _muon(optimizer):
    """Muon (Jordan et al. 2024) on the matrices; Adam, at a learning rate of its own, on embeddings, outputs, norms, biases."""

    def labels(params):
        return jax.tree.map(lambda matrix: "muon" if matrix else "adam", _is_matrix(params))

    # The factor brings a Muon update's size to Adam's, so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=optimizer.momentum,
            weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * 0.2 * math.sqrt(max(u.shape)), updates)),
    )
    adam = optax.chain(
        optax.scale_by_adam(optimizer.b1, optimizer.b2), optax.scale(optimizer.adam_learning_rate / optimizer.learning_rate)
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


_RULES = {
    "sgd": lambda optimizer: optax.identity(),
    "momentum": lambda optimizer: optax.trace(optimizer.momentum),
    "rmsprop": lambda optimizer: optax.scale_by_rms(optimizer.momentum),
    "adam": lambda optimizer: optax.scale_by_adam(optimizer.b1, optimizer.b2),
    "adamw": lambda optimizer: optax.scale_by_adam(optimizer.b1, optimizer.b2),
    "adafactor": lambda optimizer: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "lion": lambda optimizer: optax.scale_by_lion(optimizer.b1, optimizer.b2),
    "muon": _muon,
}


def learning_rate(config: Config, steps_per_epoch: int | Fraction) -> Schedule:
    """The learning rate by step (from 0), after a linear warm-up from learning_rate / warmup_steps.

    cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, down to final_fraction at num_steps; inverse_sqrt: Vaswani et al.
    2017, proportional to 1 / sqrt(step + 1) after warm-up; step: times decay_factor each epoch after decay_start_epoch
    (Zaremba et al. 2014, arXiv:1409.2329); plateau: constant here, its factor is kept in the state's controls.
    """
    optimizer, warmup = config.optimizer, config.optimizer.warmup_steps
    peak = optimizer.learning_rate
    # exact, from fractions: a quotient in float32 can fall short of a whole epoch at the step where it begins
    num_epochs = math.ceil(config.training.num_steps / steps_per_epoch)
    epoch_starts = np.array([math.ceil(epoch * steps_per_epoch) for epoch in range(1, num_epochs + 1)])

    def after_warmup(step):
        if optimizer.schedule == "cosine":
            done = jnp.clip((step - warmup) / max(config.training.num_steps - warmup, 1), 0, 1)
            return optimizer.final_fraction + (1 - optimizer.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        if optimizer.schedule == "inverse_sqrt":
            return jnp.sqrt(max(warmup, 1) / jnp.maximum(step + 1, max(warmup, 1)))
        if optimizer.schedule == "step":
            epoch = jnp.searchsorted(epoch_starts, step, side="right")
            return optimizer.decay_factor ** jnp.maximum(epoch + 1 - optimizer.decay_start_epoch, 0)
        return jnp.ones_like(step, jnp.float32)

    def schedule(step):
        step = jnp.asarray(step)
        return peak * jnp.where(step < warmup, (step + 1) / max(warmup, 1), after_warmup(step))

    return schedule
