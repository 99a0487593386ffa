"""lm.evaluation.generate: what is drawn, that the carry changes nothing, where a text ends, and what is refused."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import model_and_params, refused

from lm.config import Config, resolve
from lm.data.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer, encode
from lm.evaluation import generate as generation
from lm.evaluation.generate import Sampling, draw, generate, sample_tokens
from lm.models.ngram import Ngram
from lm.runs.folder import RunFolder
from lm.runs.open import Run

CHAR = CharTokenizer(["<eos>", "<unk>", *" abcdefghij"])
WORD = WordTokenizer(["<eos>", "<unk>", "the", "cat", "sat", "on", "a", "mat"])
GREEDY = Sampling(temperature=0)


def run_of(architecture, tokenizer=CHAR, scale=6.0, bias=None, **fields):
    """A run in memory; `bias` is added to the logits of some ids."""
    model, params = model_and_params(architecture, tokenizer.vocab_size, scale, **fields)
    for i, value in (bias or {}).items():
        params["output"]["bias"][i] = value
    return Run(RunFolder("nowhere"), resolve(Config()), {}, tokenizer, model, params, 1, "best")


@pytest.fixture(scope="module")
def rnn():
    return run_of("rnn", bias={0: -100.0, 1: -100.0})


MODELS = [
    ("rnn", dict(scale=2.0)),  # at 6 it is chaotic: a rounding error grows from 1e-7 to 1e-2 within twenty steps, on some CPUs
    ("gru", {}),
    ("lstm", dict(model__num_layers=2)),
    ("transformer", dict(model__num_layers=2)),
    ("transformer", dict(model__positions="learned", model__max_positions=64)),
    ("transformer", dict(model__attention_window=5, model__positions="sinusoidal", data__order="stream")),
]


@pytest.mark.parametrize("architecture, fields", MODELS)
def test_through_the_carry_is_the_whole_prefix_each_time(architecture, fields):
    run, length, num_tokens = run_of(architecture, **fields), 7, 24
    prompts_BT = np.random.default_rng(0).integers(0, CHAR.vocab_size, (16, length)).astype(np.int32)
    drawn_BT = sample_tokens(run.model, run.params, prompts_BT, num_tokens, GREEDY, jax.random.key(0))

    @jax.jit
    def logits(params, inputs_BT):
        return run.model.apply({"params": params}, run.model.apply({"params": params}, inputs_BT).hidden_BTD, method="logits")

    texts_BT = np.pad(prompts_BT, ((0, 0), (0, num_tokens)))
    for position in range(length, length + num_tokens):
        texts_BT[:, position] = np.argmax(logits(run.params, texts_BT)[:, position - 1], axis=-1)
    np.testing.assert_array_equal(drawn_BT, texts_BT[:, length:])
    assert len(np.unique(texts_BT[:, length:])) > 5  # not one token over and over


WIDE = dict(model__num_layers=2, model__hidden_dim=256)  # matrices that are not small for lm.models.products


@pytest.mark.parametrize("tied", [True, False])
def test_one_text_alone_is_what_it_is_beside_another(tied):
    model, params = model_and_params("transformer", 512, 3.0, **WIDE, model__tie_embeddings=tied)
    prompts_BT = np.random.default_rng(1).integers(0, 512, (2, 3)).astype(np.int32)
    both_BT = sample_tokens(model, params, prompts_BT, 12, GREEDY, jax.random.key(0))
    for row in (0, 1):
        alone_BT = sample_tokens(model, params, prompts_BT[row : row + 1], 12, GREEDY, jax.random.key(0))
        np.testing.assert_array_equal(alone_BT[0], both_BT[row])


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_loop_over_tokens_makes_no_matrix_of_the_models(num_samples):
    """Those of queries, keys and values are joined, and for one text the table is turned, before it."""
    model, params = model_and_params("transformer", 512, **WIDE)
    prompt_BT = np.zeros((num_samples, 1), np.int32)
    sample = jax.jit(functools.partial(generation._sample, model, 4, GREEDY))
    program = sample.lower(params, prompt_BT, jax.random.key(0)).compile().as_text()
    body = max((computation(program, name) for name in re.findall(r"body=%?([\w.-]+)", program)), key=len)
    made = re.compile(r"= f32\[([\d,]+)\]\S* (?!parameter|get-tuple-element|bitcast)[\w-]+\(")
    assert max(math.prod(map(int, shape.split(","))) for shape in made.findall(body)) < 256 * 256
    before = computation(program, program.split("ENTRY %", 1)[1].split(" ", 1)[0])
    shapes = [tuple(map(int, shape.split(","))) for shape in made.findall(before)]
    assert shapes.count((256, 768)) == 2 and ((256, 512) in shapes or (2, 128, 512) in shapes) == (num_samples == 1)


def computation(program, name):
    """The text of one computation of a compiled program."""
    return re.search(rf"^(?:ENTRY )?%?{re.escape(name)} \(.*?^}}", program, re.MULTILINE | re.DOTALL)[0]


def test_greedy_and_seeded_texts_are_reproducible(rnn):
    greedy = [generate(rnn, "a", 30, sampling=GREEDY, seed=seed) for seed in (0, 0, 1)]
    assert greedy[0] == greedy[1] == greedy[2]
    drawn = {seed: generate(rnn, "a", 30, seed=seed) for seed in (0, 1, 2)}
    assert generate(rnn, "a", 30, seed=0) == drawn[0]
    assert len({text for (text,) in drawn.values()}) == 3


def test_samples_differ_and_their_number_is_that_asked_for(rnn):
    texts = generate(rnn, "a", 30, num_samples=5)
    assert len(texts) == 5 and len(set(texts)) == 5
    assert len(set(generate(rnn, "a", 30, num_samples=3, sampling=GREEDY))) == 1


def test_one_of_one_and_a_tiny_share_are_greedy(rnn):
    greedy = generate(rnn, "a", 30, sampling=GREEDY)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-3), Sampling(3.0, top_k=1, top_p=0.5)):
        assert generate(rnn, "a", 30, sampling=sampling, seed=7) == greedy


def test_a_prompt_changes_what_follows_and_is_not_repeated(rnn):
    followed = {prompt: generate(rnn, prompt, 20, sampling=GREEDY)[0] for prompt in ("", "a", "ab", "ja ja")}
    assert len(set(followed.values())) > 1
    short = generate(rnn, "a", 5, sampling=GREEDY)[0]
    assert followed["a"].startswith(short)  # its length does not depend on what is asked for, nor what it says
    # the text goes on as if its own beginning had been the prompt
    assert generate(rnn, "a" + short, 15, sampling=GREEDY)[0] == followed["a"][len(short) :]


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


def shares(sampling, num_draws=20_000):
    logits_BV = jnp.tile(jnp.log(PROBABILITIES) + 3.0, (num_draws, 1))
    tokens_B = draw(logits_BV, jax.random.key(1), sampling)
    assert tokens_B.dtype == jnp.int32
    return np.bincount(tokens_B, minlength=5) / num_draws


@pytest.mark.parametrize(
    "sampling, support",
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_k=5), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=0.41), [1, 3]),
        (Sampling(top_p=0.64), [1, 3]),
        (Sampling(top_p=0.66), [1, 3, 4]),
        (Sampling(top_p=0.86), [1, 2, 3, 4]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(top_p=1e-46), [1]),  # 0 in float32
        (Sampling(top_k=2, top_p=0.9), [1, 3]),  # of the two that are left, 0.4 / 0.65 is not 0.9
        (Sampling(top_k=3, top_p=0.45), [1]),  # of the three that are left, 0.4 / 0.85 is 0.47
        (Sampling(temperature=0), [1]),
    ],
)
def test_what_may_be_drawn_and_how_often(sampling, support):
    expected = np.where(np.isin(np.arange(5), support), PROBABILITIES, 0)
    expected /= expected.sum()
    found = shares(sampling)
    np.testing.assert_array_equal(np.flatnonzero(found), support)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(20_000))


def test_of_equal_logits_as_many_as_asked_for_are_left():
    logits_BV = jnp.tile(jnp.array([0.0, 1.0, 1.0, 1.0, -1.0]), (500, 1))
    for k in (1, 2):
        for sampling in (Sampling(top_k=k), Sampling(top_p=0.285 * k)):  # each of the three equal ones has 0.2854
            tokens_B = draw(logits_BV, jax.random.key(2), sampling)
            assert sorted(set(tokens_B.tolist())) == [1, 2][:k]


def test_all_of_the_probability_is_every_token():
    """Also where float32 adds up to 1 before the last: nothing is cut off."""
    logits_BV = 2 * jax.random.normal(jax.random.key(0), (1, 50_257))
    one, other = (
        str(jax.make_jaxpr(functools.partial(draw, key=jax.random.key(1), sampling=sampling))(logits_BV))
        for sampling in (Sampling(top_p=1.0), Sampling())
    )
    assert one == other


def test_each_token_of_a_big_vocabulary_is_drawn_as_often_as_its_probability_says():
    num_draws, vocab_size = 50_000, 103  # no multiple of the blocks that the vocabulary is searched by
    weights = np.arange(vocab_size) % 7 * np.linspace(1, 3, vocab_size)  # every seventh is impossible
    expected = weights / weights.sum()
    logits_BV = jnp.tile(jnp.log(weights.astype(np.float32)), (num_draws, 1))
    found = np.bincount(draw(logits_BV, jax.random.key(3), Sampling()), minlength=vocab_size)
    assert not found[weights == 0].any()
    deviations = (found - num_draws * expected)[weights > 0] / np.sqrt(num_draws * expected * (1 - expected))[weights > 0]
    assert abs(deviations).max() < 4.5
    assert 0.7 < deviations.std() < 1.3


def test_nothing_without_weight_is_drawn_however_the_sum_is_rounded(rng):
    """XLA adds up many numbers in parallel, so that the sum moves where nothing is added."""
    weights_BN = (rng.random((256, 700)) * (rng.random((256, 700)) < 0.3)).astype(np.float32)
    sums_BN = np.asarray(jnp.cumsum(weights_BN, axis=-1))
    for uniform_B in (*(sums_BN[:, ::7] / sums_BN[:, -1:]).T, np.full(256, np.nextafter(np.float32(1), np.float32(0)))):
        found_B = np.asarray(generation._invert(weights_BN, np.minimum(uniform_B, np.nextafter(np.float32(1), np.float32(0)))))
        assert (weights_BN[np.arange(256), found_B] > 0).all()


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        np.testing.assert_allclose(shares(Sampling(temperature)), expected / expected.sum(), atol=4 * 0.5 / np.sqrt(20_000))
    # top_p is of the tempered probabilities: at 2.0 the likeliest token holds 0.29 of them
    np.testing.assert_array_equal(np.flatnonzero(shares(Sampling(2.0, top_p=0.3))), [1, 3])


def test_rows_are_drawn_each_on_its_own():
    logits_BV = jnp.log(jnp.array([[0.999, 0.001, 1e-9], [1e-9, 0.001, 0.999]]))
    for sampling in (Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0.5)):
        np.testing.assert_array_equal(draw(logits_BV, jax.random.key(0), sampling), [0, 2])


def test_a_text_ends_at_the_end_of_a_document(monkeypatch):
    assert generate(run_of("rnn", bias={CHAR.eos: 1000.0}), "a", 10) == [""]
    assert generate(run_of("rnn", ByteTokenizer(), bias={256: 1000.0}), "a", 10) == [""]
    assert generate(run_of("rnn", WORD, bias={WORD.eos: 1000.0}), "the", 3) == ["\n\n\n"]  # there it is the end of a line

    ids = np.array([[3, 4, 0, 5, 0], [0, 3, 3, 3, 3], [3, 4, 5, 6, 7]], np.int32)
    monkeypatch.setattr(generation, "sample_tokens", lambda *args: ids)
    assert generate(run_of("rnn"), "a", 5, num_samples=3) == ["ab", "", "abcde"]
    assert generate(run_of("rnn", WORD), "", 5, num_samples=3) == ["cat sat\non\n", "\ncat cat cat cat", "cat sat on a mat"]


def test_words_stand_apart_from_the_prompt(monkeypatch):
    run = run_of("rnn", WORD)
    for prompt, ids, text in (
        ("the", [3, 4], " cat sat"),
        ("the ", [3, 4], "cat sat"),
        ("the\n", [3, 4], "cat sat"),
        ("the", [0, 4], "\nsat"),
        ("", [3, 4], "cat sat"),
    ):
        monkeypatch.setattr(generation, "sample_tokens", lambda *args, ids=ids: np.array([ids], np.int32))
        assert generate(run, prompt, 2) == [text]
        assert encode(WORD, prompt + text).tolist() == [*encode(WORD, prompt), *ids]


def test_bad_values_are_refused(rnn, tmp_path):
    for sampling, parts in (
        (Sampling(temperature=-1.0), ["--temperature=-1.0", "0 (the likeliest token), or a number of at least 0.001"]),
        (Sampling(temperature=1e-50), ["--temperature=1e-50"]),
        (Sampling(temperature=float("nan")), ["--temperature=nan"]),
        (Sampling(temperature=float("inf")), ["--temperature=inf"]),
        (Sampling(top_k=0), ["--top_k=0", "at least 1", "13"]),
        (Sampling(top_k=14), ["--top_k=14", "at most the vocabulary's 13"]),
        (Sampling(top_p=0.0), ["--top_p=0.0", "above 0"]),
        (Sampling(top_p=1.5), ["--top_p=1.5", "at most 1"]),
        (Sampling(top_p=float("nan")), ["--top_p=nan"]),
    ):
        with refused(*parts):
            generate(rnn, "a", sampling=sampling)
    with refused("--num_tokens=0", "at least 1"):
        generate(rnn, "a", num_tokens=0)
    with refused("--num_samples=-1", "at least 1"):
        generate(rnn, "a", num_samples=-1)
    for seed in (-1, 2**32, 10**30):
        with refused(f"--seed={seed}", "below 2^32"):
            generate(rnn, "a", seed=seed)
    with refused("'z' is not in the vocabulary", "char tokenizer"):
        generate(rnn, "abz")
    with refused("'dog' is not in the vocabulary", "word tokenizer"):
        generate(run_of("rnn", WORD), "the dog")
    with refused("--prompt='\\udcff' is not UTF-8"):
        generate(run_of("rnn", ByteTokenizer()), "\udcff")
    with refused("learned positions end at model.max_positions 16", "20 tokens"):
        generate(run_of("transformer", model__positions="learned", model__max_positions=16), "aa", num_tokens=18)
    ngram = Run(RunFolder(tmp_path), resolve(Config()), {}, CHAR, Ngram(2, 13), {}, 1, "best")
    with refused(str(tmp_path), "an n-gram model", "neural run"):
        generate(ngram)


def test_the_longest_text_that_learned_positions_hold():
    run = run_of("transformer", model__positions="learned", model__max_positions=16, bias={0: -100.0, 1: -100.0})
    (text,) = generate(run, "aa", num_tokens=14)  # the last token is drawn and not read: eos, a, a and 13 of them
    assert len(text) == 14
