"""Variants of scoring, off by default and named with each figure: adaptation to the text, dropout averaged, a temperature."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.data.batches import Stream
from lm.data.corpus import Corpus
from lm.errors import UserError
from lm.evaluation.scorers import NeuralScorer, compiled_scorer, log_probs, neural_scorer, precisely
from lm.models.language_model import LanguageModel
from lm.objectives import causal_language_model, reset_rows
from lm.parallel import Placement

_SAMPLES_AT_ONCE = 16
_RMS_ROWS = 100  # as in the code of Krause et al.
_LEARNING_RATES = {"rms": 5e-5, "sgd": 0.3}
_EPSILON = 2e-5
_LONGEST = 1_000_000  # a cache, of whose tokens all hidden states are held


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Dynamic evaluation: after each few tokens were scored, the parameters take a step along their gradient.

    Krause et al. 2018, arXiv:1709.07432: θ <- θ - η g / (r + ε) + min(1, λ r / mean(r)) (θ₀ - θ), where r is the root mean
    square of the gradients of train (section 4.2); or, with rule "sgd", θ <- θ - η g + λ (θ₀ - θ). The defaults are those of
    the authors' code for rms on the Penn Treebank (its older ones, 0.002, 0.02 and 0.001, are of sums in place of means). Its
    mean(r) is over the means of arrays, here it is over all entries, as the formula has it: let valid choose λ. That of η for
    sgd was the best of four on valid of the Penn Treebank (configs/ptb/small/lstm.py).

    Attributes:
      rule: "rms" or "sgd".
      learning_rate: η; g is the gradient of the mean loss of a segment. None becomes the rule's default.
      decay: λ, how far back to the trained parameters θ₀ each step goes.
      epsilon: ε, of rms alone. None becomes its default.
      segment: tokens between two steps.
    """

    rule: str = "rms"
    learning_rate: float | None = None
    decay: float = 0.002
    epsilon: float | None = None
    segment: int = 5

    def __post_init__(self):
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", _LEARNING_RATES.get(self.rule, 0.0))
        if self.epsilon is None and self.rule == "rms":
            object.__setattr__(self, "epsilon", _EPSILON)
        if self.epsilon is not None and self.rule == "sgd":
            raise UserError("--dynamic_epsilon is of --dynamic=rms, but --dynamic=sgd is set; leave it out")


@dataclasses.dataclass(frozen=True)
class Cache:
    """Continuous neural cache: p = (1 - share) p_model + share p_cache, p_cache(w) ∝ Σ_i [x_i = w] exp(flatness h·h_i).

    Grave et al. 2017, arXiv:1612.04426: the sum is over the last `window` tokens x_i, each with the hidden state h_i that
    predicted it.
    """

    window: int = 500
    flatness: float = 0.3
    share: float = 0.1


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is done otherwise than to score with the model as it is; by default nothing.

    Attributes:
      dynamic, cache: adaptation to the text that is scored; one of them at most.
      dropout_samples: probabilities are the mean of so many passes with dropout on (Gal & Ghahramani 2016,
        arXiv:1506.02142); None: one pass without.
      temperature: divides the logits; chosen on valid.
    """

    dynamic: Dynamic | None = None
    cache: Cache | None = None
    dropout_samples: int | None = None
    temperature: float = 1.0

    def __post_init__(self):
        """Refuses what does not go together or is out of bounds, by the names of the flags."""
        if sum(map(bool, (self.dynamic, self.cache, self.dropout_samples))) > 1:
            raise UserError("--dynamic, --cache_window and --dropout_samples are different ways to score; give one of them")
        dynamic, cache = self.dynamic or Dynamic(), self.cache or Cache()
        for name, value, fits, words in (
            ("temperature", self.temperature, self.temperature > 0, "above 0"),
            ("dropout_samples", self.dropout_samples, self.dropout_samples is None or self.dropout_samples >= 1, "at least 1"),
            ("dynamic", dynamic.rule, dynamic.rule in ("rms", "sgd"), "rms or sgd"),
            ("dynamic_learning_rate", dynamic.learning_rate, dynamic.learning_rate >= 0, "at least 0"),
            ("dynamic_decay", dynamic.decay, 0 <= dynamic.decay <= 1, "between 0 and 1"),
            ("dynamic_epsilon", dynamic.epsilon, dynamic.epsilon is None or dynamic.epsilon > 0, "above 0"),
            ("dynamic_segment", dynamic.segment, dynamic.segment >= 1, "at least 1"),
            ("cache_window", cache.window, 1 <= cache.window <= _LONGEST, f"at least 1 and at most {_LONGEST:,}"),
            ("cache_flatness", cache.flatness, cache.flatness >= 0, "at least 0"),
            ("cache_share", cache.share, 0 <= cache.share < 1, "at least 0 and below 1"),
        ):
            if not fits or value in (math.inf, -math.inf):
                raise UserError(f"--{name}={value} must be {words}{', and finite' if fits else ''}")

    @property
    def adaptation(self) -> dict[str, Any] | None:
        """What a figure says of how the model adapts to the text; figures are compared only where this is equal."""
        ways = {"dynamic": self.dynamic, "cache": self.cache}
        found = {name: dataclasses.asdict(way) for name, way in ways.items() if way}
        given = {name: {key: value for key, value in way.items() if value is not None} for name, way in found.items()}
        return given or None

    @property
    def protocol(self) -> dict[str, Any]:
        """Further entries of a figure's protocol; none for the model as it is."""
        found = {"dropout_samples": self.dropout_samples} if self.dropout_samples else {}
        return {**found, "temperature": self.temperature} if self.temperature != 1.0 else found

    def segment(self, usual: int) -> int:
        """Tokens that a stream advances at a time: as usual, or so many more that they are whole segments of `Dynamic`."""
        return -(-usual // self.dynamic.segment) * self.dynamic.segment if self.dynamic else usual

    @property
    def ending(self) -> str:
        """What the name of a figure's files ends in; nothing for the model as it is."""
        settings = {**(self.adaptation or {}), **self.protocol}
        return "".join(f".{name.replace('_', '-')}-{_joined(value)}" for name, value in settings.items())


def _joined(value):
    return "-".join(str(part) for part in value.values()) if isinstance(value, Mapping) else str(value)


PLAIN = Variant()


def variant_scorer(model: LanguageModel, placement: Placement, params: Any, variant: Variant, rms: Any = None) -> NeuralScorer:
    """The scorer of a variant, plain or not.

    Args:
      params: placed.
      rms: what `gradient_rms` returns, for dynamic evaluation of rule "rms".
    """
    if variant.dynamic:
        return dynamic_scorer(model, variant, params, rms)
    if variant.cache:
        return cache_scorer(model, placement, variant)(params)
    if variant.dropout_samples:
        return dropout_scorer(model, placement, variant)(params)
    return neural_scorer(model, placement, variant.temperature)(params)


def dropout_scorer(model: LanguageModel, placement: Placement, variant: Variant) -> Callable[[Any], NeuralScorer]:
    """Scores with the mean of the probabilities of `dropout_samples` models, each with dropout masks of its own.

    A sample keeps its masks from segment to segment (those that differ from token to token begin anew in each).
    """
    num_samples = variant.dropout_samples

    def score(params, memory, batch):
        memory = reset_rows(memory, batch.reset_B)

        def score_sample(number, carry):
            options = {"rows_B": batch.rows_B, "train": True, "rngs": {"dropout": jax.random.key(number)}}
            return log_probs(model, params, carry, batch, variant.temperature, **options)

        by_sample = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), memory)
        log_prob_KBT, by_sample = jax.lax.map(
            lambda sample: score_sample(*sample), (jnp.arange(num_samples), by_sample), batch_size=_SAMPLES_AT_ONCE
        )
        nll_BT = jnp.log(num_samples) - jax.nn.logsumexp(log_prob_KBT, axis=0)
        return nll_BT, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), by_sample)

    def empty(num_rows):
        carry = model.initial_carry(num_rows)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], num_samples, axis=1), carry)

    return compiled_scorer(model, placement, score, empty)


def cache_scorer(model: LanguageModel, placement: Placement, variant: Variant) -> Callable[[Any], NeuralScorer]:
    """Scores with a cache of hidden states and of the tokens that followed them, see `Cache`; one row is one stream."""
    cache = variant.cache

    def score(params, memory, batch):
        memory = reset_rows(memory, batch.reset_B)
        hidden_BTD, carry = model.apply({"params": params}, batch.inputs_BT, memory["carry"], segments_BT=batch.segments_BT)
        scores = model.apply({"params": params}, hidden_BTD, batch.targets_BT, variant.temperature, method="score")
        hidden_BTD = hidden_BTD.astype(jnp.float32)
        keys_BSD = jnp.concatenate([memory["hidden_BWD"], hidden_BTD], axis=1)
        words_BS = jnp.concatenate([memory["words_BW"], jnp.where(batch.loss_weights_BT > 0, batch.targets_BT + 1, 0)], axis=1)
        length = batch.targets_BT.shape[1]
        age_TS = jnp.arange(length)[:, None] + cache.window - jnp.arange(cache.window + length)
        seen_BTS = ((age_TS > 0) & (age_TS <= cache.window))[None] & (words_BS > 0)[:, None]
        match_BTS = cache.flatness * jnp.einsum("btd,bsd->bts", hidden_BTD, keys_BSD)
        weights_BTS = jnp.where(seen_BTS, jax.nn.softmax(match_BTS, axis=-1, where=seen_BTS), 0)
        cached_BT = jnp.sum(weights_BTS * (words_BS[:, None] == batch.targets_BT[..., None] + 1), axis=-1)
        share_BT = jnp.where(seen_BTS.any(axis=-1), cache.share, 0.0)
        mixed_BT = jnp.logaddexp(jnp.log1p(-share_BT) + scores.log_prob_BT, jnp.log(share_BT * cached_BT))
        return -mixed_BT, {"carry": carry, "hidden_BWD": keys_BSD[:, -cache.window :], "words_BW": words_BS[:, -cache.window :]}

    def empty(num_rows):
        made = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[0])
        width = made.hidden_BTD.shape[-1]
        return {
            "carry": model.initial_carry(num_rows),
            "hidden_BWD": jnp.zeros((num_rows, cache.window, width)),
            "words_BW": jnp.zeros((num_rows, cache.window), jnp.int32),  # a token's number and one; 0: nothing there
        }

    return compiled_scorer(model, placement, score, empty)


def dynamic_scorer(model: LanguageModel, variant: Variant, params: Any, rms: Any | None) -> NeuralScorer:
    """Scores with parameters that follow the text, see `Dynamic`; on one device.

    Args:
      params: the trained parameters.
      rms: what `gradient_rms` returns; None with rule "sgd".
    """
    dynamic = variant.dynamic

    def follow(params, gradients, trained):
        if dynamic.rule == "sgd":
            scaled, back = gradients, jax.tree.map(lambda _: dynamic.decay, params)
        else:
            leaves = jax.tree.leaves(rms)
            mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)
            scaled = jax.tree.map(lambda g, r: g / (r + dynamic.epsilon), gradients, rms)
            back = jax.tree.map(lambda r: jnp.minimum(1.0, dynamic.decay * r / mean), rms)
        return jax.tree.map(lambda p, g, b, start: p - dynamic.learning_rate * g + b * (start - p), params, scaled, back, trained)

    def score(trained, memory, batch):
        def score_segment(memory, tokens):
            segment = batch.replace(inputs_BT=tokens[0], targets_BT=tokens[1], loss_weights_BT=tokens[2])

            def mean_loss(params):
                log_prob_BT, carry = log_probs(model, params, memory["carry"], segment, variant.temperature)
                weight = jnp.maximum(jnp.sum(segment.loss_weights_BT), 1)
                return -jnp.sum(log_prob_BT * segment.loss_weights_BT) / weight, (-log_prob_BT, carry)

            gradients, (nll_BT, carry) = jax.grad(mean_loss, has_aux=True)(memory["params"])
            return {"params": follow(memory["params"], gradients, trained), "carry": carry}, nll_BT

        length = batch.inputs_BT.shape[1]
        padding = -length % dynamic.segment  # of a text's end alone: see `Variant.segment`

        def cut(x_BT):
            return jnp.pad(x_BT, ((0, 0), (0, padding))).reshape(len(x_BT), -1, dynamic.segment).swapaxes(0, 1)

        memory = {**memory, "carry": reset_rows(memory["carry"], batch.reset_B)}
        tokens = cut(batch.inputs_BT), cut(batch.targets_BT), cut(batch.loss_weights_BT)
        memory, nll_SBT = jax.lax.scan(score_segment, memory, tokens)
        return nll_SBT.swapaxes(0, 1).reshape(len(batch.inputs_BT), -1)[:, :length], memory

    def empty(num_rows):
        return {"params": params, "carry": model.initial_carry(num_rows)}

    return compiled_scorer(model, Placement(1), score, empty)(params)


def gradient_rms(
    model: LanguageModel, params: Any, train: Corpus, segment: int, progress: Callable[[int], Any] = lambda seen: None
) -> Any:
    """Root mean square of each parameter's gradient over train, of the mean loss of 100 rows × `segment` tokens.

    Args:
      progress: called with the number of tokens seen since the last call.

    Raises:
      UserError: a segment longer than train.
    """
    if len(train.tokens) < segment:
        raise UserError(
            f"--dynamic_segment={segment} is longer than the text that was trained on, of {len(train.tokens)} tokens; shorten it"
        )
    source = Stream(train, min(_RMS_ROWS, len(train.tokens) // segment), segment, seed=0)
    objective = causal_language_model(model)

    @jax.jit
    @functools.partial(precisely, model)
    def add(params, squares, carry, batch):
        def mean_loss(params):
            sums, after = objective(params, carry, batch, None, False)
            return sums["objective"] / sums["weight"], after

        gradients, carry = jax.grad(mean_loss, has_aux=True)(params)
        return jax.tree.map(lambda s, g: s + g * g, squares, gradients), carry

    squares, carry = jax.tree.map(jnp.zeros_like, params), model.initial_carry(source.batch_size)
    for step in range(source.steps_per_epoch):
        squares, carry = add(params, squares, carry, source.batch(step, slice(None)))
        progress(source.batch_size * segment)
    return jax.tree.map(lambda s: jnp.sqrt(s / source.steps_per_epoch), squares)
