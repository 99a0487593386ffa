"""From a config to a finished run: prepares the experiment, takes up what the folder holds, and trains or counts."""

import contextlib
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import numpy as np

from lm import processes
from lm.config import Config, common_values, resolve
from lm.data import corpus, sources, tokenizers
from lm.data.batches import batches
from lm.data.corpus import Corpus
from lm.errors import UserError
from lm.evaluation.perplexity import Layout, figures, token_losses
from lm.evaluation.scorers import neural_scorer
from lm.models.build import build, count_params, initialise, solve_widths
from lm.models.language_model import LanguageModel
from lm.models.ngram import Ngram
from lm.objectives import causal_language_model, reset_rows
from lm.parallel import Placement, device_summary, place
from lm.runs.checkpoint import Checkpoints, check_like
from lm.runs.folder import RunFolder
from lm.runs.open import open_run, parameter_shapes
from lm.training import optimizer as optimizers
from lm.training.loop import run_loop
from lm.training.metrics import MOST_LEFT_OUT, RollBack, recording, stop_for_many_bad_steps
from lm.training.progress import Progress
from lm.training.step import TrainState, dropout_key, initial_state, joined, parted, skip_step, train_step

_FACTS = {"splits": "text", "tokenizer_sha256": "tokenizer"}  # in words
# Of a model, and yet another function. A window of attention may be another: a text can be longer than those it began with.
_NOT_IN_SHAPES = "architecture", "activation", "num_heads", "positions", "input_gate", "skip_connections"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a config and its data decide before training.

    Attributes:
      config: resolved, widths solved.
      facts: what config.json keeps beside the config: parameters, vocabulary, hashes of the text.
      mixture: what is mixed into train, by name.
    """

    config: Config
    tokenizer: tokenizers.Tokenizer
    train: Corpus
    valid: Corpus
    model: LanguageModel | Ngram
    facts: dict[str, Any]
    mixture: dict[str, Corpus] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
    """How training ended.

    Attributes:
      step, best_step: last, and best on valid.
      best_loss: nats per token of the quick look at valid; inf for an n-gram, which is not looked at.
      tokens: seen, epochs counted each.
      seconds: of training steps.
    """

    step: int
    best_step: int
    best_loss: float
    tokens: int
    seconds: float


class Listener:
    """Is told how training goes; this one keeps it to itself."""

    def started(self, experiment: Experiment, step: int) -> None:
        """Training begins, or goes on, after `step` updates."""

    def stepped(self, step: int) -> None:
        """A step was sent to the devices."""

    def recorded(self, line: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def rolled_back(self, bad_step: int, step: int) -> None:
        """A step was bad; training goes on from the checkpoint of another, and will leave the bad one's batch out."""

    def is_asked_to_stop(self) -> bool:
        """Whether training is to save and end after this step; of several processes their scheduler is asked instead."""
        return False


def prepare(draft: Config, folder: RunFolder | None = None) -> Experiment:
    """Resolves a config, reads its data and builds its model.

    Args:
      folder: of a run that may have been started, as its config.json tells: then its tokenizer is used again.

    Raises:
      UserError: whatever is wrong with config or text.
    """
    config = resolve(draft)
    cache = corpus.cache_dir(config.data)
    splits = sources.load(config.data)
    if folder is not None and folder.config.exists() and folder.tokenizer.exists():
        tokenizer = tokenizers.load(folder.tokenizer)
    elif config.training.init_from:
        tokenizer = _tokenizer_of(config)
    else:
        tokenizer = tokenizers.train(config.data, splits["train"], cache)
    train, valid = (corpus.tokenise(splits[name], tokenizer, cache) for name in ("train", "valid"))
    mixture = {name: corpus.tokenise(split, tokenizer, cache) for name, split in sources.mixture(config.data).items()}
    config = solve_widths(config, tokenizer.vocab_size)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizers.sha256(tokenizer),
        "splits": {name: split.size.sha256 for name, split in splits.items()},
    }
    if mixture:
        facts["mixture"] = [found.size.sha256 for found in mixture.values()]
    if config.model.architecture != "ngram":
        facts["num_params"] = count_params(config, tokenizer.vocab_size)
    return Experiment(config, tokenizer, train, valid, build(config, tokenizer.vocab_size), facts, mixture)


def _tokenizer_of(config):
    """The tokenizer of the run that parameters come from: they mean nothing with another vocabulary."""
    run = RunFolder(config.training.init_from)
    its, _ = run.read_config()
    tokenizer = tokenizers.load(run.tokenizer)
    if tokenizer.name != config.data.tokenizer:
        raise UserError(
            f"config.training.init_from {config.training.init_from!r} has a {tokenizer.name} tokenizer, but "
            f"config.data.tokenizer is {config.data.tokenizer!r}; make them equal"
        )
    for name in ("vocab_size", "min_count"):
        here, there = getattr(config.data, name), getattr(its.data, name)
        if here != there:
            raise UserError(
                f"config.data.{name} is {here}, but config.training.init_from {config.training.init_from!r}, whose tokenizer is "
                f"used, has {there}; make them equal"
            )
    return tokenizer


def train(draft: Config, workdir: str, listener: Listener | None = None) -> Trained:
    """Trains a run to its end, from the start or from where it was interrupted.

    A finished run is left as it is; only where its corpus and caches stand now is noted in its config.

    Several processes call this together; all must see the same folder.

    Raises:
      UserError: bad config, text or folder; another experiment's folder; a non-finite loss.
      Preempted: the listener, or a scheduler of several processes, asked to stop.
    """
    listener = listener or Listener()
    folder = RunFolder(workdir)
    with contextlib.ExitStack() as held:

        def take_up():
            if processes.is_first():
                held.enter_context(folder.locked())
            experiment = prepare(draft, folder)
            if isinstance(experiment.model, Ngram) and processes.number() > 1:
                raise UserError("an n-gram is counted by one process; train it on one host")
            folder.check_same_experiment(experiment.config, experiment.facts)
            return experiment

        experiment = processes.in_turn(take_up)
        named = {_FACTS.get(name, name): json.dumps(fact, sort_keys=True) for name, fact in experiment.facts.items()}
        named |= {f"config.{name}": value for name, value in common_values(experiment.config).items()}
        differing = processes.differing(named)
        if differing:
            raise UserError(
                f"the processes of this job do not have the same {' and '.join(differing)}: give all of them the same files "
                "(config.data.path; for the built-in corpus the same Python) and the same config"
            )
        checkpoints = held.enter_context(Checkpoints(folder.checkpoints, parameter_shapes(experiment.model)))
        if isinstance(experiment.model, Ngram):
            return _count(draft, experiment, folder, checkpoints, listener)
        return _train(draft, experiment, folder, checkpoints, listener)


def _begin(draft, experiment, folder, devices, step=0):
    if not processes.is_first():
        return
    tokenizers.save(experiment.tokenizer, folder.tokenizer)
    folder.write_config(draft, experiment.config, experiment.facts)
    folder.write_environment(devices, goes_on=step > 0)


def _count(draft, experiment, folder, checkpoints, listener):
    """An n-gram's training: one pass over the train split, one checkpoint."""
    tokens, step = len(experiment.train.tokens), 1
    if checkpoints.latest_sound() is None:
        _begin(draft, experiment, folder, {})
        listener.started(experiment, 0)
        started = time.perf_counter()
        params = experiment.model.count(experiment.train.tokens, experiment.train.eos)
        seconds = time.perf_counter() - started
        line = {"step": step, "split": "train", "tokens": tokens, "epoch": 0, "seconds": round(seconds, 3)}
        line["tokens_per_second"] = round(tokens / seconds, 1)
        folder.cut_metrics(0)
        folder.append_metrics(line)
        listener.recorded(line)
        facts = {**experiment.facts, "num_params": experiment.model.num_entries(params)}  # known only now: distinct n-grams
        folder.write_config(draft, experiment.config, facts)
        progress = Progress(best_step=step, seconds=seconds, finished=True)
        checkpoints.save(step, params, {"step": np.zeros((), np.int32) + step}, dataclasses.asdict(progress))
        checkpoints.wait()
    else:
        folder.note_places(draft)
    progress = Progress.from_json(checkpoints.progress(step))
    return Trained(step, step, progress.best_loss, tokens, progress.seconds)


def _train(draft, experiment, folder, checkpoints, listener):
    config, model = experiment.config, experiment.model
    placement = place(config)
    placement.check_rows(config.data.batch_size, config.training.num_micro_batches)
    source = batches(config, experiment.train, experiment.mixture)
    optimizer, schedule = optimizers.build(config, source.steps_per_epoch)
    restore = functools.partial(_restore, config, model, optimizer, placement, source, checkpoints)
    state, carry, progress, step = restore()
    if step > config.training.num_steps:
        raise UserError(
            f"config.training.num_steps is {config.training.num_steps}, but {folder.path} has been trained for {step} steps; ask "
            "for at least as many, or use another --workdir"
        )
    at_end = step == config.training.num_steps and progress.finished
    if at_end or progress.out_of_patience(config.training.early_stopping):
        if processes.is_first():
            folder.note_places(draft)
    else:
        _begin(draft, experiment, folder, device_summary(placement), step)
        listener.started(experiment, step)
        run = functools.partial(
            run_loop,
            config,
            step_fn=compile_step(config, model, optimizer, placement),
            skip_fn=placement.compile(_skip, ("state", "rows"), donate=(0, 1)),
            source=source,
            placement=placement,
            evaluate=quick_look(config, model, experiment.valid, placement),
            schedule=schedule,
            checkpoints=checkpoints,
            on_step=listener.stepped,
            is_asked_to_stop=functools.partial(processes.are_asked_to_stop, alone=listener.is_asked_to_stop),
        )
        done = None
        while done is None:
            try:
                with recording(folder, step if checkpoints.steps() else None, listener.recorded) as record:
                    done = run(state, carry, progress, record=record)
            except RollBack as bad:
                checkpoints.wait()
                left_out = [*progress.left_out, bad.step]
                state, carry, progress, step = restore()
                progress.left_out = left_out
                since = sum(left > step for left in left_out)
                if since >= MOST_LEFT_OUT:
                    stop_for_many_bad_steps(since, schedule(step) * float(state.controls["learning_rate_scale"]), checkpoints)
                listener.rolled_back(bad.step, step)
        progress = done
        checkpoints.wait()
        step = checkpoints.steps()[-1]
    return Trained(step, progress.best_step, progress.best_loss, int(step * source.tokens_per_step), progress.seconds)


def _skip(state, carry, batch):
    """As a step whose batch is not trained on."""
    return skip_step(state), reset_rows(carry, batch.reset_B)


def compile_step(config: Config, model: LanguageModel, optimizer, placement: Placement):
    """The compiled training step (state, carry, batch) -> (state, carry); it reuses the buffers of its first two arguments."""
    training, data = config.training, config.data
    objective = causal_language_model(
        model, training.label_smoothing, training.activation_penalty, training.temporal_activation_penalty
    )
    step = functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        settings=config.optimizer,
        total=placement.total,
        dropout_key=dropout_key(config),
        num_micro_batches=training.num_micro_batches,
        on_bad_step=training.on_bad_step,
        spike_nats=training.spike_nats,
        averaging_decay=training.averaging_decay,
        full_weight=float(data.batch_size * data.seq_len) if data.seq_len_std is not None else None,
    )
    return placement.compile(step, ("state", "rows"), donate=(0, 1))


def step_memory(experiment: Experiment, placement: Placement) -> dict[str, int]:
    """What a training step takes of each device, as its compiler reckons, without making any of it.

    Returns:
      Bytes of `state` (parameters and what the optimiser keeps), and `peak`, the most there is at once: state, carry, batch
      and all that comes in between.
    """
    config, model = experiment.config, experiment.model
    source = batches(config, experiment.train, experiment.mixture)
    optimizer, _ = optimizers.build(config, source.steps_per_epoch)
    like = placement.state_like(jax.eval_shape(lambda: initial_state(initialise(model, config.seed), optimizer, config.training)))
    carry = model.initial_carry(config.data.batch_size) if source.carries else None
    longest = max(length for _, length in source.shapes)
    batch = jax.tree.map(lambda x: np.resize(x, (len(x), longest)) if x.ndim == 2 else x, source.batch(0, slice(None)))
    rows = placement.put_rows(jax.device_get(carry)), placement.put_rows(batch)
    found = compile_step(config, model, optimizer, placement).lower(like, *rows).compile().memory_analysis()
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"state": placement.state_bytes(like), "peak": outside + found.temp_size_in_bytes}


def _restore(config, model, optimizer, placement, source, checkpoints) -> tuple[TrainState, Any, Progress, int]:
    """State, carry and progress to go on from: of the latest sound checkpoint, of another run's parameters, or fresh."""
    begin = functools.partial(initial_state, optimizer=optimizer, training=config.training)
    make_params = functools.partial(initialise, model, config.seed)
    carry = model.initial_carry(config.data.batch_size) if source.carries else None
    step = processes.in_turn(checkpoints.latest_sound)
    if step is not None:
        like, rest_like = parted(jax.eval_shape(lambda: begin(make_params())))
        params, rest = checkpoints.restore(step, like, {"state": rest_like, "carry": carry})
        return joined(params, rest["state"]), rest["carry"], Progress.from_json(checkpoints.progress(step)), step
    if config.training.init_from:
        params = _best_params(config, jax.eval_shape(make_params))
        return placement.make_state(begin, params), carry, Progress(), 0
    return placement.make_state(lambda: begin(make_params())), carry, Progress(), 0


def _best_params(config, like):
    """Of the run that `config.training.init_from` names: those which were best on valid, of the same model as `like`."""
    source = f"config.training.init_from {config.training.init_from!r}"
    run = open_run(config.training.init_from)
    if run.which != "best":
        raise UserError(
            f"{source} has no sound checkpoint that was best on valid, from which this run would start; train it on, or name "
            "another run"
        )
    check_like(like, run.params, source)
    for name in _NOT_IN_SHAPES:
        there, here = (getattr(model, name) for model in (run.config.model, config.model))
        if there != here:
            raise UserError(f"config.model.{name} is {here!r}, but {source} was trained with {there!r}; make them equal")
    return run.params


def quick_look(config: Config, model: LanguageModel, valid: Corpus, placement: Placement):
    """A function from placed parameters to valid's loss, scored in parallel streams (or windows) for speed.

    Every token is scored, but streams start anew at their seams, so this figure steers training and is not for quoting;
    the line of metrics says how it was taken.
    """
    settings = config.evaluation
    layout = Layout(settings.context, settings.stride, settings.rows, row_multiple=placement.num_row_parts)
    scorer = neural_scorer(model, placement)

    def evaluate(params):
        found = figures(token_losses(scorer(params), valid, layout), valid.size.num_bytes, valid.size.num_words)
        windows = {"context": layout.context, "stride": layout.stride} if layout.context else {}
        return {"loss": found["loss"], "perplexity": found["perplexity"], "rows": layout.rows, **windows}

    return evaluate
