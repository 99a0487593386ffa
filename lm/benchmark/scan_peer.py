"""Our recurrent models by a plain lax.scan: each step multiplies its input and its state, and the scan is differentiated.

What our recurrences are measured against where no library has them faster. Mathematics, starting point, optimiser and batches
are ours; the loss is taken from all logits at once.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.benchmark.peer_side import Start
from lm.benchmark.refusals import refuse_extras
from lm.benchmark.units import run_on
from lm.config import Config, dropout_rates, layer_dims
from lm.data.prefetch import prefetch
from lm.errors import UserError
from lm.parallel import Placement, peak_bytes
from lm.training import optimizer as optimizers

_CELLS = ("rnn", "gru", "lstm")


def check(draft: Config, config: Config, mode: str) -> None:
    """Raises a UserError, with what to set, where the peer cannot do what the config asks for.

    Args:
      draft: as given; only what was set there is named.
      config: the draft, resolved.
      mode: what is measured.
    """
    model, kept = config.model, ("state_dropout_rate",)
    if mode != "train":
        raise UserError(f"--against=scan measures training, not --mode={mode}; leave that open")
    if model.architecture not in _CELLS:
        raise UserError(
            f"config.model.architecture is {model.architecture!r}, which is no plain recurrence; --against=scan takes "
            f"{', '.join(_CELLS)}"
        )
    further = {
        **{f"config.model.{name}": name not in kept for name in dropout_rates(draft.model)},
        "config.data.order": config.data.order in ("packed", "padded"),
        "config.training.label_smoothing": config.training.label_smoothing,
        "config.training.num_micro_batches": config.training.num_micro_batches != 1,
    }
    refuse_extras("scan", config, mode, further)


class ScanPeer:
    """Trains on the batches that ours trains on, from given parameters."""

    def __init__(self, config: Config, params: Any, source: Any):
        """Prepares the step; nothing is compiled yet.

        Args:
          source: of batches: a BatchSource, or `lm.benchmark.peer_side.Batches`.
        """
        self._config, self._source = config, source
        self.params = jax.device_put(params)
        self._optimizer, _ = optimizers.build(config, source.steps_per_epoch)
        self._opt_state, self._num_steps, self._state = self._optimizer.init(self.params), 0, None
        self._key = jax.random.key(config.seed)
        self._step = jax.jit(self._update, donate_argnums=(0, 1))
        self._batches = prefetch(self._batch, 0, sys.maxsize, config.data.prefetch)
        self.versions = {"library": f"a plain lax.scan, jax {jax.__version__}"}

    def _batch(self, step):
        batch = self._source.batch(step, slice(None))
        return *jax.device_put((batch.inputs_BT, batch.targets_BT)), bool(batch.reset_B.all())

    def device_peak_bytes(self) -> int | None:
        """Most memory so far of the accelerator; None where the platform does not tell."""
        return peak_bytes(Placement(1))

    def first_loss(self) -> float:
        """Nats per token of the first batch, without a step and without dropout."""
        inputs_BT, targets_BT, _ = self._batch(0)
        return float(jax.jit(self._loss)(self.params, self._empty(), inputs_BT, targets_BT, None)[0])

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        return run_on(self._batches, num_units, self._train)

    def _train(self, batches):
        for inputs_BT, targets_BT, starts in batches:
            state = self._empty() if starts or self._state is None else self._state
            key = jax.random.fold_in(self._key, self._num_steps)
            self.params, self._opt_state, self._state = self._step(
                self.params, self._opt_state, state, inputs_BT, targets_BT, key, self._num_steps
            )
            self._num_steps += 1
        jax.block_until_ready((self.params, self._state))

    def _empty(self):
        model, rows = self._config.model, self._config.data.batch_size
        return [[jnp.zeros((rows, width))] * (2 if model.architecture == "lstm" else 1) for width in layer_dims(model)]

    def _update(self, params, opt_state, state, inputs_BT, targets_BT, key, step):
        (_, after), gradients = jax.value_and_grad(self._loss, has_aux=True)(params, state, inputs_BT, targets_BT, key)
        norm = optax.global_norm(gradients)
        updates, opt_state = self._optimizer.update(gradients, opt_state, params, gradient_norm=norm, step=step)
        return optax.apply_updates(params, updates), opt_state, after

    def _loss(self, params, state, inputs_BT, targets_BT, key):
        model, dtype = self._config.model, jnp.dtype(self._config.compute_dtype)
        table_VD = params["embedding"]["table"]
        x_TBD, after = table_VD[inputs_BT.T].astype(dtype), []
        for i, before in enumerate(state):
            mask_BH = None
            if key is not None and model.state_dropout_rate:
                kept = 1 - model.state_dropout_rate
                mask_BH = jax.random.bernoulli(jax.random.fold_in(key, i), kept, before[-1].shape) / kept
            x_TBD, last = _layer(model, params["stack"][f"layer_{i}"], x_TBD, before, mask_BH, dtype)
            after.append(last)
        kernel_DV = table_VD.T if model.tie_embeddings else params["output"]["kernel"]
        logits_TBV = (x_TBD @ kernel_DV.astype(dtype)).astype(jnp.float32) + params["output"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits_TBV, targets_BT.T).mean(), after

    def close(self) -> None:
        """Stops the thread that makes batches."""
        self._batches.close()


def start(given: Start, platform: str, compiled: bool) -> ScanPeer:
    """The peer that `PeerSide` asks for; always compiled."""
    del platform, compiled
    config, params, batches, _ = given.read()
    return ScanPeer(config, params, batches)


def _layer(model, params, x_TBD, state, mask_BH, dtype):
    """One recurrent layer: outputs, time first, and the state after the last step."""
    kernel, recurrent_kernel = params["input_kernel"].astype(dtype), params["recurrent_kernel"].astype(dtype)
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh, None: None}[model.activation]

    def step(state, x_BD):
        hidden_BH = state[-1] if mask_BH is None else state[-1] * mask_BH
        from_input = (x_BD @ kernel).astype(jnp.float32) + params["bias"]
        from_state = (hidden_BH.astype(dtype) @ recurrent_kernel).astype(jnp.float32)
        if model.architecture == "rnn":
            state = [activation(from_input + from_state)]
        elif model.architecture == "gru":
            (r_x, z_x, n_x), (r_h, z_h, n_h) = (jnp.split(part, 3, axis=-1) for part in (from_input, from_state))
            update = jax.nn.sigmoid(z_x + z_h)
            new = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * (n_h + params["recurrent_bias"]))
            state = [(1 - update) * new + update * state[0]]
        else:
            i, f, g, o = jnp.split(from_input + from_state, 4, axis=-1)
            memory = jax.nn.sigmoid(f) * state[0] + jax.nn.sigmoid(i) * jnp.tanh(g)
            state = [memory, jax.nn.sigmoid(o) * jnp.tanh(memory)]
        return state, state[-1].astype(dtype)

    state, hidden_TBH = jax.lax.scan(step, state, x_TBD)
    return hidden_TBH, state
