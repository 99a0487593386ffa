"""From a run's folder back to what it is made of: config, tokenizer, model and parameters."""

import dataclasses
from typing import Any

from lm.config import Config
from lm.data import tokenizers
from lm.models.build import build
from lm.models.language_model import LanguageModel
from lm.models.ngram import Ngram
from lm.runs.checkpoint import Checkpoints
from lm.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run.

    Attributes:
      folder: where it stands.
      config: resolved, with solved widths.
      facts: all of config.json.
      params: nested dict of NumPy arrays, of checkpoint `step`.
      which: how that checkpoint was chosen: "best", "latest" or its number.
    """

    folder: RunFolder
    config: Config
    facts: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    model: LanguageModel | Ngram
    params: Any
    step: int
    which: str


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
    chosen = Checkpoints(folder.checkpoints).choose(step)
    tokenizer = tokenizers.load(folder.tokenizer)
    model = build(config, tokenizer.vocab_size)
    return Run(folder, config, facts, tokenizer, model, Checkpoints(folder.checkpoints).params(chosen), chosen, step)
