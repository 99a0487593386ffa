"""How training looks on a screen: a few lines at the start, a progress bar, one line per look at valid."""

import math
import signal
from typing import Any

from launch.command import ProgressBar
from lm import processes
from lm.config import Config
from lm.data.batches import batches
from lm.errors import Preempted
from lm.reporting.table import result
from lm.training.train import Experiment, Listener, Trained, train


class Console(Listener):
    """Prints; `label` stands before each line where several runs share a screen.

    From the first step to `close`, SIGTERM (a scheduler that wants its machine back) asks training to save and stop; a second
    one ends the process at once.
    """

    def __init__(self, label: str = ""):
        self._label = f"{label}: " if label else ""
        self._bar = self._context = None
        self._rate = ""
        self._is_asked_to_stop, self._before = False, None

    def started(self, experiment: Experiment, step: int) -> None:
        config = experiment.config
        print(f"{self._label}{describe(experiment)}", flush=True)
        if config.model.architecture == "ngram":
            return
        if processes.number() == 1:  # several are told by JAX, which has a handler of its own
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        if step:
            print(f"{self._label}going on from step {step}", flush=True)
        self._context = ProgressBar(config.training.num_steps, " steps", step, self._label.rstrip(": "))
        self._bar = self._context.__enter__()

    def stepped(self, step: int) -> None:
        self._bar.update(1)

    def recorded(self, line: dict[str, Any]) -> None:
        if line["split"] == "train" and "loss" in line:
            self._bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s")
            self._rate = f", {line['tokens_per_second']:,.0f} tokens/s"
        elif line["split"] == "valid":
            self._write(
                f"{self._label}step {line['step']:,} ({line['tokens']:,} tokens, {line['seconds']:.0f} s{self._rate}): "
                f"valid perplexity {result(line['perplexity'], 2)}"
            )

    def rolled_back(self, bad_step: int, step: int) -> None:
        self._write(f"{self._label}step {bad_step} was bad: going on from step {step}, without its batch")
        self._bar.update(step - self._bar.n)

    def is_asked_to_stop(self) -> bool:
        return self._is_asked_to_stop

    def _terminate(self, *_):
        self._is_asked_to_stop = True
        signal.signal(signal.SIGTERM, self._before)

    def _write(self, text):
        self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Takes the bar off the screen, and SIGTERM ends the process again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._context is not None:
            self._context.__exit__()


def train_shown(draft: Config, workdir: str, label: str) -> Trained:
    """Trains one of several runs, or goes on with it, and shows how.

    Raises:
      Preempted: SIGTERM came; also if this run had its last step: the others did not.
    """
    listener = Console(label)
    try:
        trained = train(draft, workdir, listener)
    finally:
        listener.close()
    if listener.is_asked_to_stop():
        raise Preempted(trained.step)
    return trained


def describe(experiment: Experiment) -> str:
    """One line: what is trained on what."""
    config, train = experiment.config, experiment.train
    model = config.model
    tokenizer = experiment.tokenizer
    text = f"{train.name} ({len(train.tokens):,} tokens, {tokenizer.name} vocabulary of {tokenizer.vocab_size:,})"
    if model.architecture == "ngram":
        return f"{model.ngram_order}-gram counts of {text}"
    widths = "+".join(map(str, model.layer_dims)) if model.layer_dims else f"{model.num_layers} × {model.hidden_dim}"
    widths += f", mlp {model.mlp_dim}" if model.mlp_dim else ""
    data, num_steps, source = config.data, config.training.num_steps, batches(config, train, experiment.mixture)
    up_to = "about " if data.seq_len_std is not None else "up to " if data.order == "padded" else ""
    shape = f"{data.batch_size} × {up_to}{data.seq_len} tokens"
    tokens, epochs = float(num_steps * source.tokens_per_step), float(num_steps / source.steps_per_epoch)
    return (
        f"{model.architecture} ({widths}; {experiment.facts['num_params']:,} parameters) on {text}; "
        f"{num_steps:,} steps of {shape} = {tokens / 1e6:.2f}M, {epochs:.1f} epochs"
    )


def parameter_table(experiment: Experiment) -> str:
    """Every parameter with its shape, count and role, and the total."""
    import functools

    import jax

    from lm.models.build import initialise, parameter_role

    shapes = jax.eval_shape(functools.partial(initialise, experiment.model, 0))
    rows = [("parameter", "shape", "count", "role")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(part.key for part in path)
        rows.append(("/".join(names), " × ".join(map(str, leaf.shape)), f"{math.prod(leaf.shape):,}", parameter_role(names)))
    rows.append(("total", "", f"{experiment.facts['num_params']:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)
