"""Can it learn at all: each architecture overfits one batch, and learns to copy text it has never seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import NEURAL
from lm.data.batches import Batch
from lm.models.build import build, initialise
from lm.objectives import causal_language_model
from lm.training import optimizer as optimizers
from lm.training.step import dropout_key, initial_state, train_step


def trained(config, vocab_size, batches):
    """Fresh parameters, taken through one step with each of the stacked batches; the parameters, and the loss of each step."""
    model = build(config, vocab_size)
    optimizer, _ = optimizers.build(config, steps_per_epoch=1)
    step = functools.partial(
        train_step,
        objective=causal_language_model(model),
        optimizer=optimizer,
        settings=config.optimizer,
        total=lambda tree: tree,
        dropout_key=dropout_key(config),
    )

    def one(state, batch):
        state, _ = step(state, None, batch)
        return state, (state.log_sums["loss"], state.log_sums["weight"])

    @jax.jit
    def run(batches):
        return jax.lax.scan(one, initial_state(initialise(model, config.seed), optimizer), batches)

    state, (loss, weight) = run(batches)
    return model, state.params, np.diff(loss, prepend=0) / np.diff(weight, prepend=0)


def batch_of(inputs, targets, loss_weights):
    """A batch, or a stack of them: any number of leading axes."""
    rows = np.broadcast_to(np.arange(inputs.shape[-2], dtype=np.int32), inputs.shape[:-1])
    return Batch(inputs, targets, loss_weights.astype(np.float32), None, np.zeros(inputs.shape[:-1], bool), rows)


@pytest.mark.parametrize("architecture", NEURAL)
def test_every_architecture_overfits_one_batch(tiny, rng, architecture):
    """Random tokens, which can only be learnt by heart."""
    text = rng.integers(0, 11, (4, 9)).astype(np.int32)
    fields = {"model__hidden_dim": 32, "model__num_layers": 1, "optimizer__learning_rate": 0.02, "training__num_steps": 120}
    batches = batch_of(*(np.tile(tokens, (120, 1, 1)) for tokens in (text[:, :-1], text[:, 1:], np.ones((4, 8)))))
    _, _, losses = trained(tiny(architecture, **fields), 11, batches)
    assert losses[0] > 2 and losses[-1] < 0.1


SYMBOLS, LENGTH = 8, 3
UNSEEN = np.random.default_rng(9).permutation(SYMBOLS**LENGTH)[:64]  # patterns that training never shows, by number


def copying(numbers):
    """Patterns by number, each followed by a separator and itself again; only the copy counts."""
    patterns = numbers[..., None] // SYMBOLS ** np.arange(LENGTH) % SYMBOLS
    text = np.concatenate([patterns, np.full((*numbers.shape, 1), SYMBOLS), patterns], axis=-1).astype(np.int32)
    counts = np.broadcast_to(np.arange(2 * LENGTH) >= LENGTH, (*numbers.shape, 2 * LENGTH))
    return batch_of(text[..., :-1], text[..., 1:], counts)


@pytest.mark.parametrize(
    ("architecture", "steps", "fields"),
    [("lstm", 800, {"model__hidden_dim": 64}), ("transformer", 200, {"model__hidden_dim": 32})],
)
def test_copies_what_it_has_never_seen(tiny, rng, architecture, steps, fields):
    """Every token of every copy is right, step by step from what it said itself."""
    schedule = {"optimizer__learning_rate": 0.01, "optimizer__schedule": "cosine", "optimizer__warmup_steps": 20}
    config = tiny(architecture, model__num_layers=1, training__num_steps=steps, **schedule, **fields)
    seen = np.setdiff1d(np.arange(SYMBOLS**LENGTH), UNSEEN)
    model, params, losses = trained(config, SYMBOLS + 1, copying(rng.choice(seen, (steps, 32))))
    unseen = copying(UNSEEN)

    @jax.jit
    def continue_greedily(params, prompt):
        def next_token(hidden):
            return model.apply({"params": params}, hidden[:, -1:], method="logits").argmax(axis=-1)

        def step(memory, _):
            token, carry = memory
            hidden, carry = model.apply({"params": params}, token, carry)
            return (next_token(hidden), carry), token[:, 0]

        hidden, carry = model.apply({"params": params}, prompt, model.initial_carry(len(prompt), 2 * LENGTH))
        return jnp.stack(jax.lax.scan(step, (next_token(hidden), carry), length=LENGTH)[1], axis=1)

    prompt, want = unseen.inputs_BT[:, : LENGTH + 1], unseen.targets_BT[:, LENGTH:]
    np.testing.assert_array_equal(continue_greedily(params, prompt), want)
    assert losses[0] > 1.5 and losses[-1] < 0.05
