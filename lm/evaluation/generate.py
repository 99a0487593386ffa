"""Sampling text from a finished run through the model's carry: the prompt once, then one token a step in one compiled loop."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.tokenizers import encode
from lm.errors import UserError
from lm.models.language_model import LanguageModel
from lm.models.ngram import Ngram
from lm.parallel import Placement
from lm.runs.open import Run

_LOWEST_TEMPERATURE = 1e-3  # logits divided by less could leave float32
_MOST = {"num_tokens": 1_000_000, "num_samples": 65_536}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw among the k likeliest tokens only; None: all.
      top_p: draw among the likeliest tokens whose probabilities first add up to p (Holtzman et al. 2020, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, vocab_size: int) -> None:
        """Raises a UserError for a value that means nothing."""
        if self.temperature != 0 and not _LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(
                f"--temperature={self.temperature} must be 0 (the likeliest token), or a number of at least {_LOWEST_TEMPERATURE}"
            )
        if self.top_k is not None and not 1 <= self.top_k <= vocab_size:
            raise UserError(f"--top_k={self.top_k} must be at least 1 and at most the vocabulary's {vocab_size}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p} must be above 0 and at most 1")


def draw(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id for each row, int32 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        _, likeliest_BK = jax.lax.top_k(logits_BV, sampling.top_k)  # of equal ones the first
        logits_BV = _only(logits_BV, likeliest_BK, True)
    if sampling.top_p is not None and sampling.top_p < 1:  # float32 may add up to 1 before the last
        likeliest_BV = jnp.argsort(-logits_BV, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits_BV, likeliest_BV, axis=-1))
        needed_BV = (jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p).at[:, 0].set(True)
        logits_BV = _only(logits_BV, likeliest_BV, needed_BV)
    return _draw_by_weights(jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True)), key)


def _only(logits_BV, tokens_BK, kept_BK):
    """The logits, -inf where a token is not named, or named and not kept."""
    kept_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(len(logits_BV))[:, None], tokens_BK].set(kept_BK)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _draw_by_weights(weights_BV, key):
    """An index for each row, as often as its weight says: by inversion, first of a block of columns, then within the block.

    Two random numbers a row; Gumbel noise on every logit took as long as the model.
    """
    vocab_size = weights_BV.shape[-1]
    width = math.isqrt(vocab_size - 1) + 1
    weights_BV = jnp.pad(weights_BV, ((0, 0), (0, -vocab_size % width)))
    weights_BNW = weights_BV.reshape(len(weights_BV), -1, width)
    block_uniform_B, column_uniform_B = jax.random.uniform(key, (2, len(weights_BV)))
    block_B = _invert(weights_BNW.sum(axis=-1), block_uniform_B)
    weights_BW = jnp.take_along_axis(weights_BNW, block_B[:, None, None], axis=1)[:, 0]
    return block_B * width + _invert(weights_BW, column_uniform_B)


def _invert(weights_BN, uniform_B):
    """The first index up to which the weights add up to more than that share of them all: never one of weight 0.

    The sum, made in parallel, may rise by a rounding where a weight is 0; or end below what it reached before, and a share
    close to 1 may be rounded to all of it: then it is the last weight.
    """
    sums_BN, there_BN = jnp.cumsum(weights_BN, axis=-1), weights_BN > 0
    passed_BN = (sums_BN > (uniform_B * sums_BN[:, -1])[:, None]) & there_BN
    last_B = weights_BN.shape[-1] - 1 - jnp.argmax(there_BN[:, ::-1], axis=-1)
    return jnp.where(passed_BN.any(axis=-1), jnp.argmax(passed_BN, axis=-1), last_B).astype(jnp.int32)


def sample_tokens(model: LanguageModel, params, prompt_BT, num_tokens: int, sampling: Sampling, key) -> jax.Array:
    """Continues prompts, int32 [B, num_tokens].

    Args:
      prompt_BT: int32, what stands before, `eos` first.
      key: of the draws.
    """
    return _sampler(model, num_tokens, sampling)(params, prompt_BT, key)[0]


@functools.lru_cache(maxsize=4)
def _sampler(model, num_tokens, sampling):
    return Placement(1).compile(functools.partial(_sample, model, num_tokens, sampling), ("rows",))


def _sample(model, num_tokens, sampling, params, prompt_BT, key):
    batch_size, length = prompt_BT.shape
    carry = model.initial_carry(batch_size, length + num_tokens - 1)
    if length > 1:  # what is drawn first follows the prompt's last token, which is the loop's as all drawn ones are
        carry = model.apply({"params": params}, prompt_BT[:, :-1], carry)[1]

    def step(state, key):
        token_B, carry = state
        hidden_BTD, carry = model.apply({"params": params}, token_B[:, None], carry)
        logits_BV = model.apply({"params": params}, hidden_BTD, method="logits")[:, 0]
        token_B = draw(logits_BV, key, sampling)
        return (token_B, carry), token_B

    _, tokens_TB = jax.lax.scan(step, (prompt_BT[:, -1], carry), jax.random.split(key, num_tokens))
    return (tokens_TB.T,)


def generate(
    run: Run, prompt: str = "", num_tokens: int = 200, num_samples: int = 1, sampling: Sampling | None = None, seed: int = 0
) -> list[str]:
    """Texts that continue a prompt (without it), each ended by the first end of a document; of words, whose lines end
    like documents, by `num_tokens`.

    Raises:
      UserError: a prompt with symbols that the run's tokenizer does not know, values that mean nothing, or an n-gram.
    """
    sampling = sampling or Sampling()
    if isinstance(run.model, Ngram):
        raise UserError(f"{run.folder.path} is an n-gram model, which only scores text; generate with a neural run")
    for name, value in (("num_tokens", num_tokens), ("num_samples", num_samples)):
        if not 1 <= value <= _MOST[name]:
            raise UserError(f"--{name}={value} must be at least 1 and at most {_MOST[name]:,}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must be at least 0 and below 2^32")
    sampling.check(run.tokenizer.vocab_size)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt={prompt!a} is not UTF-8") from None
    ids = encode(run.tokenizer, prompt, strict=True)
    prompt_BT = np.tile(np.concatenate([[run.tokenizer.eos], ids]).astype(np.int32), (num_samples, 1))
    tokens_BT = np.asarray(sample_tokens(run.model, run.params, prompt_BT, num_tokens, sampling, jax.random.key(seed)))
    texts = [run.tokenizer.decode(_document(tokens, run.tokenizer)) for tokens in tokens_BT]
    if run.tokenizer.ends_lines and prompt and not prompt[-1].isspace():
        texts = [text if text.startswith("\n") else f" {text}" for text in texts]  # words stand apart
    return texts


def _document(tokens, tokenizer):
    if tokenizer.ends_lines:
        return tokens
    ends = np.flatnonzero(tokens == tokenizer.eos)
    return tokens[: ends[0]] if len(ends) else tokens
