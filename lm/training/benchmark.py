"""How fast a config trains: the real step on the real loader, timed in rounds, beside what the machine can do and a peer."""

import contextlib
import functools
import itertools
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Config, resolve, to_json
from lm.data.batches import batches, prefetch
from lm.errors import UserError
from lm.models.build import build, initialise, parameter_role
from lm.parallel import Placement, device_summary, peak_bytes, place
from lm.runs.folder import environment
from lm.training import optimizer as optimizers, torch_peer
from lm.training.step import initial_state
from lm.training.train import Experiment, compile_step, prepare

PEERS = ("torch",)
_WARM_UP = 5  # steps after the first that are run before anything is measured
_ROUND_SECONDS = 2.0
_LOSS_TOLERANCE = 1e-4


def benchmark(
    draft: Config,
    against: str | None = None,
    steps: int | None = None,
    rounds: int = 5,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains for some rounds and measures.

    Args:
      against: one of PEERS, which trains in the same process; rounds of both alternate, and which goes first does too.
      steps: of a round; None: as many of ours as fill about two seconds.
      rounds: to measure.
      on_round: called after each.

    Returns:
      All that was measured, in plain types.

    Raises:
      UserError: a bad config or text; a model without training steps; a peer that is missing, that cannot do what the
        config asks for, or whose first loss is another one; a loss that is not finite.
    """
    load_average = os.getloadavg()
    config = resolve(draft)
    if config.model.architecture == "ngram":
        raise UserError("config.model.architecture is 'ngram', which is counted in one pass and has no training step to measure")
    placement = place(config)
    placement.check_rows(config.data.batch_size, config.training.num_micro_batches)
    if against == "torch":
        torch_peer.check(draft, config, placement.devices[0].platform, placement.num_devices)
    experiment = prepare(draft)
    config, vocab_size = experiment.config, experiment.tokenizer.vocab_size

    with contextlib.ExitStack() as stack:
        host_before = host_peak_bytes()
        trainer = stack.enter_context(contextlib.closing(Trainer(experiment, placement)))
        tokens_per_step = float(trainer.source.tokens_per_step)
        first_step_seconds = trainer.run(1)
        first_loss = trainer.mean_loss()
        trainer.run(_WARM_UP)
        steps = steps or max(1, round(_ROUND_SECONDS * 3 / trainer.run(3)))
        memory = {  # before a peer is loaded, whose memory would be counted too
            "host_peak_bytes": host_peak_bytes(),
            "host_peak_bytes_before_first_step": host_before,
            "device_peak_bytes": peak_bytes(placement),
        }
        runners: list[Any] = [trainer]
        peer: dict[str, Any] = {}
        if against == "torch":
            learning_rates = trainer.learning_rates(1 + _WARM_UP + rounds * steps)
            params = initialise(experiment.model, config.seed)
            other = torch_peer.TorchPeer(config, vocab_size, params, trainer.source, learning_rates)
            runners.append(stack.enter_context(contextlib.closing(other)))
            peer = {"name": against, **other.versions, "first_loss": other.first_loss()}
            _check_same(first_loss, peer["first_loss"], against)
            peer["first_step_seconds"] = other.run(1)
            other.run(_WARM_UP)

        rates: list[list[float]] = [[] for _ in runners]
        matmul = SquareMatmul(placement, config.compute_dtype)
        matmul_rate = 0.0
        for i in range(rounds):
            for which in sorted(range(len(runners)), reverse=i % 2 == 1):
                rates[which].append(steps * tokens_per_step / runners[which].run(steps))
            matmul_rate = max(matmul_rate, matmul.rate())  # each round, so that a moment of other work does not set it
            on_round()
        loss = trainer.mean_loss()

    if against:
        ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
        peer |= {"tokens_per_second": spread(rates[1], 1), "ratio": spread(ratios, 4)}
    speed = spread(rates[0], 1)
    flops = flops_per_token(config, vocab_size)
    return {
        "model": config.model.architecture,
        "num_params": experiment.facts["num_params"],
        "vocab_size": vocab_size,
        "text": experiment.train.name,
        "batch_size": config.data.batch_size,
        "seq_len": config.data.seq_len,
        "steps": steps,
        "rounds": rounds,
        "first_step_seconds": first_step_seconds,
        "first_loss": first_loss,
        "mean_loss": loss,
        "tokens_per_second": speed,
        "step_seconds": tokens_per_step / speed["median"],
        "memory": memory,
        "flops_per_token": flops,
        "flops_per_second": flops * speed["median"],
        "matmul": {"flops_per_second": matmul_rate, "size": matmul.size, "dtype": config.compute_dtype},
        "share_of_matmul_peak": flops * speed["median"] / matmul_rate,
        "against": peer or None,
        "load_average": load_average,  # before we began
        "resolved": to_json(config),
        "environment": {**environment(), **device_summary(placement)},
    }


class Trainer:
    """The training step as a run takes it: compiled, placed, from fresh parameters, on batches made ahead.

    Attributes:
      source: of the batches.
      state: placed, after the steps so far.
    """

    def __init__(self, experiment: Experiment, placement: Placement):
        config, model = experiment.config, experiment.model
        self.source = batches(config, experiment.train)
        optimizer, self._schedule = optimizers.build(config, self.source.steps_per_epoch)
        self._step = compile_step(config, model, optimizer, placement)
        state = initial_state(initialise(model, config.seed), optimizer)
        carry = model.initial_carry(config.data.batch_size) if self.source.carries else None
        self.state, self._carry = placement.put_state(state), placement.put_rows(carry)
        self._placement = placement

        def batch(step):
            return placement.put_rows(self.source.batch(step, slice(None)))

        self._batches = prefetch(batch, 0, sys.maxsize, config.data.prefetch)

    def run(self, num_steps: int) -> float:
        """Trains for some steps; returns the seconds until the devices had done them."""
        started = time.perf_counter()
        for rows in itertools.islice(self._batches, num_steps):
            self.state, self._carry = self._step(self.state, self._carry, rows)
        jax.block_until_ready((self.state, self._carry))
        return time.perf_counter() - started

    def mean_loss(self) -> float:
        """Nats per token, over all steps so far.

        Raises:
          UserError: a loss or gradient was not finite.
        """
        sums = self._placement.get_state(self.state.log_sums)
        if sums["non_finite_step"]:
            raise UserError(
                f"the loss or gradient of step {int(sums['non_finite_step'])} is not finite, so nothing measured here would "
                "count; try a smaller config.optimizer.learning_rate"
            )
        return float(sums["loss"]) / float(sums["weight"])

    def learning_rates(self, num_steps: int) -> np.ndarray:
        """Of the first steps."""
        return np.asarray(self._schedule(jnp.arange(num_steps)))

    def close(self) -> None:
        """Stops the thread that makes batches."""
        self._batches.close()


def _check_same(ours: float, theirs: float, name: str) -> None:
    if not abs(ours - theirs) <= _LOSS_TOLERANCE:
        raise UserError(
            f"the first loss is {ours:.6f} here and {theirs:.6f} in {name}, more than {_LOSS_TOLERANCE:g} apart: the two models "
            "are not the same, so their speeds cannot be compared"
        )


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Floating-point operations that training on one token needs, forward and backward.

    6 N + 12 L D S: N counts the entries of all matrices that every token is multiplied with, the output's V × D among them
    whether tied or free; the embedding's look-up, biases and norms are left out. Each entry costs a multiplication and an
    addition, once forward and twice backward. The second term is a Transformer's attention, where D numbers of every layer
    meet S visible keys, once for the scores and once for the mixing; S is the mean over positions: of min(t, window) for
    t = 1 … seq_len in windows, and the window where a cache is carried.

    Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (6 N, and the attention's share); Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B (6 N + 12 L H Q T, which counts all T keys where a causal mask shows half of them).

    Args:
      config: resolved, its widths solved.
      vocab_size: V.
    """
    model, length = config.model, config.data.seq_len
    shapes = jax.eval_shape(functools.partial(initialise, build(config, vocab_size), 0))
    entries = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(part.key for part in path)
        multiplied = parameter_role(names) in ("matrix", "output")
        if multiplied or (model.tie_embeddings and names == ("embedding", "table")):
            entries += math.prod(leaf.shape)
    attention = 0.0
    if model.architecture == "transformer":
        window = math.inf if model.attention_window is None else model.attention_window
        cached = config.data.order == "stream"
        visible = window if cached else sum(min(t, window) for t in range(1, length + 1)) / length
        attention = 12.0 * model.num_layers * model.hidden_dim * visible
    return 6.0 * entries + attention


class SquareMatmul:
    """What this machine makes of a big square matmul, on all devices at once: the practical peak of its arithmetic.

    Attributes:
      size: rows and columns.
    """

    def __init__(self, placement: Placement, dtype: str, size: int | None = None):
        """Compiles it and runs it once; `size` None is 2048 on a CPU and 8192 elsewhere."""
        self.size = size or (2048 if placement.devices[0].platform == "cpu" else 8192)
        self._num_devices = placement.num_devices
        factor = np.random.default_rng(0).standard_normal((self.size, self.size), np.float32)
        self._factor = placement.put_state(factor.astype(jnp.dtype(dtype)))
        self._product = placement.compile(lambda x: x @ x)
        jax.block_until_ready(self._product(self._factor))

    def rate(self, repetitions: int = 3) -> float:
        """Floating-point operations per second of the fastest of some repetitions."""
        durations = []
        for _ in range(repetitions):
            started = time.perf_counter()
            jax.block_until_ready(self._product(self._factor))
            durations.append(time.perf_counter() - started)
        return self._num_devices * 2 * self.size**3 / min(durations)


def host_peak_bytes() -> int:
    """The most memory that this process has held so far, its libraries and the preparation of the data included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def spread(values: Sequence[float], digits: int) -> dict[str, Any]:
    """Median, minimum, maximum, and the values one by one, rounded."""
    values = [round(value, digits) for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}
