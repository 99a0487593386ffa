"""From a run's folder back to what it is made of: config, tokenizer, model and parameters."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np

from lm.config import Config
from lm.data import tokenizers
from lm.errors import UserError
from lm.models.build import build, initialise
from lm.models.language_model import LanguageModel
from lm.models.ngram import Ngram
from lm.runs.checkpoint import Checkpoints, shapes_of
from lm.runs.folder import RunFolder

_TRIES = 5  # to read a checkpoint of a run that is in training, and may remove it meanwhile


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run.

    Attributes:
      folder: where it stands.
      config: resolved, with solved widths.
      facts: all of config.json.
      params: nested dict of NumPy arrays, of checkpoint `step`.
      which: what that checkpoint is: "best", "latest" or its number.
    """

    folder: RunFolder
    config: Config
    facts: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    model: LanguageModel | Ngram
    params: Any
    step: int
    which: str

    @functools.cached_property
    def params_sha256(self) -> str:
        """One hash of all parameters, their names and shapes."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
            digest.update(np.ascontiguousarray(leaf))
        return digest.hexdigest()


def open_run(workdir: str, step: str = "best") -> Run:
    """Opens a trained run.

    Args:
      workdir: its folder.
      step: "best" (on valid), "latest" or the number of a checkpoint.

    Raises:
      UserError: no run there, not trained yet, or damaged.
    """
    folder = RunFolder(workdir)
    config, facts = folder.read_config()
    if not folder.tokenizer.exists() and folder.has_checkpoints:
        raise UserError(f"{folder.tokenizer} is gone; put it back, or train the run anew")
    if not folder.tokenizer.exists():
        raise UserError(f"{folder.path} has no tokenizer and no checkpoint yet; train it first")
    tokenizer = tokenizers.load(folder.tokenizer)
    if tokenizers.sha256(tokenizer) != facts.get("tokenizer_sha256"):
        raise UserError(f"{folder.tokenizer} is not the one that this run was trained with; put it back, or train the run anew")
    model = build(config, tokenizer.vocab_size)
    checkpoints = Checkpoints(folder.checkpoints, parameter_shapes(model))
    for _ in range(_TRIES):
        try:
            chosen, which = checkpoints.choose(step)
        except FileNotFoundError:  # it was removed while it was chosen
            continue
        try:
            return Run(folder, config, facts, tokenizer, model, checkpoints.params(chosen), chosen, which)
        except UserError:
            if chosen in checkpoints.steps():
                raise
    raise UserError(f"{folder.path} is in training, which replaces its checkpoints faster than they can be read; try again")


def open_best(workdir: str) -> Run:
    """Opens a trained run at its best checkpoint, for figures that stand beside those of others.

    Raises:
      UserError: as `open_run` does; or there is no such checkpoint, or a damaged one.
    """
    run = open_run(workdir)
    if run.which != "best":
        raise UserError(
            f"{workdir} has no sound checkpoint that was best on valid, and no other is compared; train it on, or score what is "
            f"there with launch.evaluate --workdir={workdir} --step=latest"
        )
    return run


def parameter_shapes(model: LanguageModel | Ngram) -> dict[str, tuple[int, ...]] | None:
    """Path -> shape of a neural model's parameters; None for an n-gram, whose tables are as long as the text makes them."""
    if isinstance(model, Ngram):
        return None
    return shapes_of(jax.eval_shape(functools.partial(initialise, model, 0)))
