"""What is measured of ours: training, evaluation and generation as the verbs do them, on the config's own batches."""

import dataclasses
import itertools
import sys
import time
from typing import Protocol

import jax
import numpy as np

from lm.benchmark.units import Generation, run_on
from lm.config import Config, dropout_rates, resolve
from lm.data.batches import batches
from lm.data.prefetch import prefetch
from lm.errors import UserError
from lm.evaluation.generate import Sampling, sample_tokens
from lm.evaluation.scorers import neural_scorer, score_ahead
from lm.models.build import build, count_params, initialise, solve_widths
from lm.parallel import Placement
from lm.training import optimizer as optimizers
from lm.training.step import initial_state
from lm.training.train import Experiment, compile_step, prepare


@dataclasses.dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
      draft: the config.
      mode: "train" for training steps, "evaluate" for scoring of the same batches, "generate" for sampling.
      generation: for mode "generate".
      vocab_size: of the model, where that is to be larger than the text's: tokens beyond the text's never occur, and cost a
        model what others cost.
    """

    draft: Config
    mode: str = "train"
    generation: Generation = dataclasses.field(default_factory=Generation)
    vocab_size: int | None = None

    def prepare(self) -> Experiment:
        """The experiment, its facts and model with the vocabulary that was asked for.

        Raises:
          UserError: whatever is wrong with config or text; a vocabulary smaller than the text's.
        """
        experiment = prepare(self.draft)
        if self.vocab_size is None:
            return experiment
        if self.vocab_size < experiment.tokenizer.vocab_size:
            raise UserError(
                f"--vocab_size={self.vocab_size} is smaller than the vocabulary of the text, {experiment.tokenizer.vocab_size}; "
                "make that smaller by config.data.vocab_size or config.data.tokenizer=byte"
            )
        config = solve_widths(resolve(self.draft), self.vocab_size)
        facts = {"vocab_size": self.vocab_size, "num_params": count_params(config, self.vocab_size)}
        model = build(config, self.vocab_size)
        return dataclasses.replace(experiment, config=config, model=model, facts={**experiment.facts, **facts})


class Workload(Protocol):
    """Work in equal units, from fresh parameters.

    Attributes:
      tokens_per_unit: of one step, scored batch or generated text.
    """

    tokens_per_unit: float

    def run(self, num_units: int) -> tuple[float, float]:
        """Does some units; returns the seconds until the devices had done them, and those of waiting for data."""

    def first_loss(self) -> float:
        """Nats per token of the first batch, from the fresh parameters; asked for after the first unit.

        Raises:
          UserError: it is not finite.
        """

    def close(self) -> None:
        """Stops the threads that make batches."""


class Training:
    """The training step as a run takes it: compiled, placed, on batches made ahead.

    Attributes:
      state: placed, after the steps so far.
    """

    def __init__(self, experiment: Experiment, placement: Placement):
        config, model = experiment.config, experiment.model
        source = batches(config, experiment.train, experiment.mixture)
        self.tokens_per_unit = float(source.tokens_per_step)
        optimizer, _ = optimizers.build(config, source.steps_per_epoch)
        self._step = compile_step(config, model, optimizer, placement)
        state = placement.make_state(lambda: initial_state(initialise(model, config.seed), optimizer, config.training))
        carry = model.initial_carry(config.data.batch_size) if source.carries else None
        self.state, self._carry = placement.put_state(state), placement.put_rows(carry)
        self._experiment, self._placement = experiment, placement
        self._first, self._first_loss = source.batch(0, slice(None)), None
        self._drops = bool(dropout_rates(config.model))

        def batch(step):
            return placement.put_rows(source.batch(step, slice(None)))

        self._batches = prefetch(batch, 0, sys.maxsize, config.data.prefetch)

    def run(self, num_units: int) -> tuple[float, float]:
        return run_on(self._batches, num_units, self._train)

    def _train(self, batches):
        for rows in batches:
            self.state, self._carry = self._step(self.state, self._carry, rows)
            if self._first_loss is None and not self._drops:
                self._first_loss = self._mean_loss()
        jax.block_until_ready((self.state, self._carry))

    def first_loss(self) -> float:
        self._mean_loss()  # of all steps so far
        if self._first_loss is None:  # of what drops: scored, as a peer's is, since both draw what they drop otherwise
            model = self._experiment.model
            params = self._placement.put_state(initialise(model, self._experiment.config.seed))
            self._first_loss = first_loss(neural_scorer(model, self._placement)(params), self._first)
        return self._first_loss

    def _mean_loss(self):
        sums = self._placement.get_state(self.state.log_sums)
        if sums["bad_step"]:
            raise UserError(
                f"the loss or gradient of step {int(sums['bad_step'])} is not finite, so nothing measured here would "
                "count; try a smaller config.optimizer.learning_rate"
            )
        return float(sums["loss"]) / float(sums["weight"])

    def close(self) -> None:
        self._batches.close()


class Evaluation:
    """Scoring, as launch.evaluate does it, of the batches that training would read, carried where those are."""

    def __init__(self, experiment: Experiment, placement: Placement):
        config, model = experiment.config, experiment.model
        source = batches(config, experiment.train, experiment.mixture)
        self.tokens_per_unit = float(source.tokens_per_step)
        params = placement.make_state(lambda: initialise(model, config.seed))
        self._scorer = neural_scorer(model, placement)(placement.put_state(params))
        self._rows = config.data.batch_size if source.carries else None
        self._first = source.batch(0, slice(None))
        self._batches = prefetch(lambda step: source.batch(step, slice(None)), 0, sys.maxsize, config.data.prefetch)

    def run(self, num_units: int) -> tuple[float, float]:
        return run_on(self._batches, num_units, self._score)

    def _score(self, batches):
        memory = None if self._rows is None else self._scorer.start(self._rows)
        for _ in score_ahead(self._scorer, memory, ((batch, None) for batch in batches)):
            pass

    def first_loss(self) -> float:
        return first_loss(self._scorer, self._first)

    def close(self) -> None:
        self._batches.close()


class Generating:
    """Sampling, as launch.generate does it, after a prompt of nothing but the beginning."""

    tokens_per_unit: float

    def __init__(self, experiment: Experiment, placement: Placement, generation: Generation):
        config, model = experiment.config, experiment.model
        self.tokens_per_unit = float(generation.num_samples * generation.num_tokens)
        self._model, self._generation = model, generation
        self._params = placement.put_state(placement.make_state(lambda: initialise(model, config.seed)))
        self._prompt_BT = np.full((generation.num_samples, 1), experiment.tokenizer.eos, np.int32)
        self._keys = (jax.random.key(seed) for seed in itertools.count())
        self._scorer = neural_scorer(model, placement)(self._params)
        self._first = batches(config, experiment.train, experiment.mixture).batch(0, slice(None))

    def run(self, num_units: int) -> tuple[float, float]:
        started = time.perf_counter()
        for key in itertools.islice(self._keys, num_units):
            np.asarray(sample_tokens(self._model, self._params, self._prompt_BT, self._generation.num_tokens, Sampling(), key))
        return time.perf_counter() - started, 0.0

    def first_loss(self) -> float:
        return first_loss(self._scorer, self._first)

    def close(self) -> None:
        pass


def first_loss(scorer, batch) -> float:
    """Nats per token of a batch whose rows start empty."""
    weights_BT = np.asarray(batch.loss_weights_BT)
    nll_BT = scorer.fetch(scorer.score(None, batch)[0])
    loss = float((nll_BT * weights_BT).sum() / weights_BT.sum())
    if not np.isfinite(loss):
        raise UserError("the loss of the first batch is not finite; try a smaller config.model.init_scale")
    return loss


def workload(mode: str, experiment: Experiment, placement: Placement, generation: Generation) -> Workload:
    """The workload by the name of its mode."""
    if mode == "generate":
        return Generating(experiment, placement, generation)
    return {"train": Training, "evaluate": Evaluation}[mode](experiment, placement)
