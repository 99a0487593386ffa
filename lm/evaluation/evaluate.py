"""Evaluating a finished run: which text, under which protocol, and the files that keep the figure with its protocol."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lm.config import dropout_rates, replaced
from lm.data import corpus, sources, tokenizers
from lm.errors import UserError
from lm.evaluation.perplexity import Layout, figures, token_losses
from lm.evaluation.scorers import NgramScorer, Scorer, precision_of
from lm.evaluation.token_scores import read_token_scores
from lm.evaluation.variants import PLAIN, Variant, gradient_rms, variant_scorer
from lm.files import check_writable, read_json, whole_file, write_json
from lm.models.ngram import Ngram
from lm.parallel import Placement, place
from lm.runs.open import Run

_SPLIT_OF_TEXT = "text"
_SOURCES_WITH_PATH = ("text", "tfds")
_LUCK = math.log(1e6)  # nats


def evaluate_run(
    run: Run,
    split: str = "test",
    text: str | None = None,
    data_path: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], Any] = lambda scored, total: None,
    variant: Variant = PLAIN,
) -> dict[str, Any]:
    """Scores a split, or any text, and writes `evaluation/<name>.json` and `.npz`.

    The figure that a run's config asks for is stored under the split's name; another checkpoint than the best, another
    context, a variant or another text under a name that says so. A figure that is already stored for the same checkpoint,
    text and protocol is returned as it is: test is scored once.

    Args:
      run: opened at the checkpoint to be scored.
      split: "train", "valid" or "test".
      text: a file to score instead of a split.
      data_path: where the corpus stands now, if it has moved.
      context, stride: windows instead of what the config says; stride defaults to context // 4.
      progress: called with the tokens scored since the last call, and the tokens in all.
      variant: a way of scoring whose settings were chosen on valid. Test is refused until valid was scored with them, or in the
        windows asked for here.

    Returns:
      What the JSON file holds; `stored` says whether it had been scored before.

    Raises:
      UserError: an unknown split, text that cannot be read, or a context or variant that the model cannot take.
    """
    layout, ending = _layout(run, split, context, stride)
    layout, ending = dataclasses.replace(layout, segment=variant.segment(layout.segment)), ending + variant.ending
    if text is not None and data_path is not None and not (variant.dynamic and variant.dynamic.rule == "rms"):
        raise UserError("--data_path is set, but with --text nothing of the run's corpus is read; leave one out")
    if run.config.model.architecture == "transformer" and layout.context is None:
        run.model.initial_carry(1)  # raises its sentence before any text is read
    wanted = _protocol(run, split if text is None else _SPLIT_OF_TEXT, layout, variant)
    _check_variant(run, variant, layout)
    source = None if text is None else _source(run, split, text, data_path)
    is_test = split == "test" if text is None else source.size.sha256 == run.facts.get("splits", {}).get("test")
    is_plain = variant == PLAIN and (layout.context, layout.stride) == _of_config(run)
    if is_test and not is_plain and not _earlier(run, f"valid{ending}", {"protocol": wanted["protocol"]}):
        raise UserError(
            "test is not for choosing how to score: score valid with the same flags first (--split=valid) and keep what is best"
        )
    if text is None and data_path is None:  # then the run knows its text, which need not be there any more
        known = {"text_sha256": run.facts.get("splits", {}).get(split)}
        earlier = _earlier(run, split + ending, {**wanted, **known})
        if earlier:
            return earlier
    source = source or _source(run, split, None, data_path)
    found = corpus.tokenise(source, run.tokenizer, _cache(run))
    name = (split if text is None else _name_of_text(text, found.size.sha256)) + ending
    wanted |= _text(found)
    earlier = _earlier(run, name, wanted)
    if earlier:
        return earlier
    path = run.folder.evaluation / f"{name}.json"
    check_writable(path)  # before the time that scoring takes
    nll_N, seconds = _score(run, found, layout, variant, data_path, progress)
    result = {
        **figures(nll_N, found.size.num_bytes, found.size.num_words),
        **wanted,
        "seconds": round(seconds, 3),
        "times_scored": 1 + _stored(path).get("times_scored", 0),
    }
    if source.floor is not None:
        result["floor"] = floor(source, result["nll_sum"], len(nll_N), fresh=split != "train")
    _write_arrays(path.with_name(f"{name}.npz"), {"targets": np.asarray(found.tokens, np.int32), "nll": nll_N})
    write_json(path, result)
    return {**result, "name": name, "stored": False}


def _cache(run):
    """The token cache that the run was trained with, or the user's own where that one cannot be written here."""
    try:
        return corpus.cache_dir(run.config.data)
    except UserError:
        return corpus.cache_dir(replaced(run.config, "data", cache_dir=None).data)


def _stored(path):
    try:
        return read_json(path, "") if path.exists() else {}
    except UserError as error:
        raise UserError(f"{error}; remove it, and the text is scored again") from None


def _earlier(run, name, wanted):
    """What is stored under a name for the same checkpoint, text and protocol, if anything."""
    path = run.folder.evaluation / f"{name}.json"
    earlier = _stored(path)
    same = all(earlier.get(field) == value for field, value in wanted.items() if field not in ("checkpoint", "text"))
    checkpoint = {"params_sha256": run.params_sha256, **earlier.get("checkpoint", {})}  # which older files do not tell
    if same and (checkpoint.get("step"), checkpoint["params_sha256"]) == (run.step, run.params_sha256):
        with contextlib.suppress(UserError):  # without the losses of its tokens a figure is as good as not there
            read_token_scores(path.with_suffix(".npz"), earlier)
            return {**earlier, "name": name, "stored": True}
    return None


def _name_of_text(text, sha256):
    """Of a file that is no split; the hash tells files of one name apart."""
    return f"{_SPLIT_OF_TEXT}-{sha256[:8]}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', pathlib.Path(text).name)}"


def _of_config(run):
    """Windows and their stride as the run's config asks for them."""
    return run.config.evaluation.context, run.config.evaluation.stride


def _layout(run, split, context, stride):
    """How to score, and what the name of a figure ends in: nothing, if it is the one that the run's config asks for."""
    if split not in sources.SPLITS:
        raise UserError(f"--split={split} is not a split; there are {', '.join(sources.SPLITS)}")
    settings = run.config.evaluation
    if stride is not None and context is None:
        raise UserError("--stride is set without --context; give the length of the windows too")
    if context is not None and context < 1:
        raise UserError(f"--context={context} must be at least 1")
    if context is not None:
        stride = max(1, context // 4) if stride is None else stride
        if not 1 <= stride <= context:
            raise UserError(f"--stride={stride} must be at least 1 and at most --context={context}, or tokens would be left out")
    ending = "" if run.which == "best" else f".step-{run.step}"
    if context is None or (context, stride) == _of_config(run):
        return Layout(settings.context, settings.stride, settings.rows if settings.context else 1), ending
    return Layout(context, stride, settings.rows), f"{ending}.context-{context}-stride-{stride}"


def _source(run, split, text, data_path) -> sources.Split:
    data = run.config.data
    if text is None:
        if data_path is not None:
            if data.source not in _SOURCES_WITH_PATH:
                raise UserError(f"--data_path is set, but this run's source is {data.source!r}, which has no path")
            data = replaced(run.config, "data", path=data_path, prepared=None).data
        try:
            found = sources.load(data)[split]
        except UserError as error:
            hint = "; --data_path says where the run's corpus stands now" if data.source in _SOURCES_WITH_PATH else ""
            raise UserError(f"{error}{hint}") from None
        trained_on = run.facts.get("splits", {}).get(split)
        if trained_on is not None and trained_on != found.size.sha256:
            raise UserError(
                f"the {split} text of {found.name} is not the one this run was made for (sha256 {found.size.sha256[:12]} now, "
                f"{trained_on[:12]} then); "
                + (
                    "the built-in corpus differs between Python versions: use the Python of environment.json, "
                    "or score it with --text"
                    if data.source == "python_docs"
                    else "give the right --data_path, or score it with --text"
                )
            )
    else:
        if not os.path.isfile(text):
            raise UserError(f"--text={text} is not a file; give a text file in UTF-8, or its .gz")
        found = sources.text_file(pathlib.Path(text))
    return found


def floor(source: sources.Split, nll_sum: float, num_tokens: int, fresh: bool) -> dict[str, float]:
    """How far a result lies above the true law of its text.

    A model that has not seen the text assigns it more probability than its true law does by a factor of e^x or more with
    probability at most e^-x, whatever the model: the ratio has expectation 1 (Markov's inequality). Beyond a chance of one
    in a million the figure is therefore refused.

    Args:
      source: with a floor.
      nll_sum: nats that the model needs for the text.
      fresh: whether the model has never seen the text.

    Returns:
      `loss` of the true law on this very text and `excess` of the model over it, nats per token; `entropy_rate` and
      `entropy_rate_error`, nats per character in the long run.

    Raises:
      UserError: a model below the floor, to which the text must have leaked.
    """
    floor_sum = sum(float(nats.sum()) for nats in source.floor.nats())
    if fresh and nll_sum < floor_sum - _LUCK:
        raise UserError(
            f"{source.name} cost the model {nll_sum:.1f} nats, but its true law {floor_sum:.1f}: no model that has not seen the "
            f"text gets more than {_LUCK:.1f} nats below that but once in a million, so the text has leaked into the model or "
            "the code does not score what it says; this figure is not kept"
        )
    rate = source.floor.entropy_rate()
    return {
        "loss": floor_sum / num_tokens,
        "excess": (nll_sum - floor_sum) / num_tokens,
        "entropy_rate": rate.nats,
        "entropy_rate_error": rate.error,
    }


def _check_variant(run, variant, layout):
    """Raises a UserError where the run cannot be scored that way."""
    if variant != PLAIN and isinstance(run.model, Ngram):
        raise UserError("an n-gram is scored as it is: dynamic evaluation, caches, dropout and temperature are for neural models")
    if (variant.dynamic or variant.cache) and layout.context is not None:
        raise UserError(
            "--dynamic and --cache_window follow one stream of text, but this run is scored in windows of "
            f"{layout.context} tokens; they need a model that carries its state, and no --context"
        )
    if variant.dropout_samples and not dropout_rates(run.config.model):
        raise UserError("--dropout_samples is set, but this run was trained without dropout, so all samples would be the same")


def _placement(run, layout, variant):
    """A run of more devices than there are here is scored on those there are: the figure does not depend on them. A carried
    stream is one row, for one device; but a mesh may be needed to hold the model."""
    takes_more = layout.context is not None or run.config.parallelism == "sharded"
    takes_one = variant.dynamic is not None or isinstance(run.model, Ngram)
    return place(run.config, or_fewer=True) if takes_more and not takes_one else Placement(1)


def _score(run, found, layout, variant, data_path, progress):
    """The loss of every token (nats), and the seconds of scoring."""
    placement, rms, total = _placement(run, layout, variant), None, len(found.tokens)
    layout = dataclasses.replace(layout, row_multiple=placement.num_row_parts)
    if variant.dynamic and variant.dynamic.rule == "rms":
        rms, seen = _gradient_rms(run, data_path, variant.dynamic.segment, progress)
        total += seen
    started = time.perf_counter()
    nll_N = token_losses(_scorer(run, placement, variant, rms), found, layout, lambda scored: progress(scored, total))
    seconds = time.perf_counter() - started
    if not np.isfinite(nll_N).all():
        cause = "its parameters have diverged; choose another --step, or train it anew with a smaller learning rate"
        if variant != PLAIN:
            cause = f"scored with{variant.ending.replace('.', ' ', 1)} it diverges, or did before; choose gentler settings"
        raise UserError(
            f"{run.folder.path} at step {run.step} gives token {int(np.argmin(np.isfinite(nll_N)))} of {found.name} no finite "
            f"loss: {cause}"
        )
    return nll_N, seconds


def _scorer(run, placement, variant, rms) -> Scorer:
    if isinstance(run.model, Ngram):
        return NgramScorer(run.model, run.model.prepare(run.params))
    return variant_scorer(run.model, placement, placement.put_state(run.params), variant, rms)


def _gradient_rms(run, data_path, segment, progress):
    """Of the run's parameters over train, kept beside its figures, because it takes as long as an epoch of training; and how
    many tokens were seen for it now."""
    path = run.folder.evaluation / f"gradient_rms.step-{run.step}-{run.params_sha256[:8]}.segment-{segment}.npz"
    names = flatten_dict(run.params, sep="/")
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), np.load(path) as kept:
        if {name: kept[name].shape for name in kept.files} == {name: np.shape(leaf) for name, leaf in names.items()}:
            return unflatten_dict({name: kept[name] for name in kept.files}, sep="/"), 0
    train = corpus.tokenise(_source(run, "train", None, data_path), run.tokenizer, _cache(run))
    total = len(train.tokens)
    found = jax.device_get(gradient_rms(run.model, run.params, train, segment, lambda seen: progress(seen, total)))
    _write_arrays(path, flatten_dict(found, sep="/"))
    return found, total


def _text(found):
    return {
        "text": found.name,
        "tokens": len(found.tokens),
        "bytes": found.size.num_bytes,
        "words": found.size.num_words,
        "text_sha256": found.size.sha256,
    }


def _protocol(run, split, layout, variant):
    """All that a figure depends on beside the text (PROTOCOL: it travels with the number)."""
    return {
        "split": split,
        "tokenizer": {
            "name": run.tokenizer.name,
            "sha256": tokenizers.sha256(run.tokenizer),
            "vocab_size": run.tokenizer.vocab_size,
        },
        "protocol": {
            "context": layout.context,
            "stride": layout.stride,
            "precision": precision_of(run.model),
            "adaptation": variant.adaptation,
            **variant.protocol,
        },
        "checkpoint": {"step": run.step, "which": run.which, "params_sha256": run.params_sha256},
    }


def _write_arrays(path, arrays):
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)
