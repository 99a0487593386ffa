"""A finished run as its files tell it: config, metrics, evaluations, environment; nothing here is computed from them."""

import dataclasses
import pathlib

from lm.errors import UserError
from lm.evaluation.token_scores import TokenScores, read_token_scores
from lm.files import read_json
from lm.runs.folder import RunFolder

_FIGURES = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "nll_sum", "tokens", "bytes", "words", "text_sha256")
_RECORDS = {
    "tokenizer": ("name", "sha256", "vocab_size"),
    "protocol": ("context", "stride", "precision", "adaptation"),
    "checkpoint": ("step",),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of one run; the scores of single tokens stay on disk until they are asked for."""

    name: str
    workdir: pathlib.Path
    config: dict  # the resolved one
    num_params: int | None  # of an n-gram model: its entries
    vocab_size: int | None
    train_lines: tuple[dict, ...]
    valid_lines: tuple[dict, ...]
    evaluations: dict[str, dict]
    environment: dict

    @property
    def is_ngram(self) -> bool:
        return self.config["model"]["architecture"] == "ngram"

    def evaluation(self, name: str) -> dict:
        """The figures of evaluation/<name>.json with the protocol they were taken under.

        Raises:
          UserError: there is no such evaluation.
        """
        if name not in self.evaluations:
            raise UserError(
                f"{self.workdir} has no evaluation/{name}.json, only {', '.join(sorted(self.evaluations))}: "
                "make it with python -m launch.evaluate"
            )
        return self.evaluations[name]

    def token_scores(self, name: str) -> TokenScores:
        """Targets and nll of evaluation/<name>.npz.

        Raises:
          UserError: the file is missing or damaged, or is not the one that the figures of <name>.json came from.
        """
        return read_token_scores(self.workdir / "evaluation" / f"{name}.npz", self.evaluation(name))


def read_run(workdir: str | pathlib.Path, name: str | None = None) -> Run:
    """Reads the folder of a finished run.

    Args:
      workdir: the folder.
      name: what reports call the run; by default the folder's name.

    Returns:
      The run. A run without metrics.jsonl or environment.json (an imported model) has them empty.

    Raises:
      UserError: the folder is no run, is not evaluated yet, or a file in it is damaged.
    """
    folder = RunFolder(workdir)
    workdir = folder.path
    config = read_json(folder.config, f"{workdir} is no run: it has no config.json")
    try:
        resolved = config["resolved"]
        resolved["model"]["architecture"]
    except (KeyError, TypeError):
        raise UserError(f"{folder.config} is damaged: it has no resolved.model.architecture") from None
    evaluations = {path.stem: _read_evaluation(path) for path in sorted(folder.evaluation.glob("*.json"))}
    if not evaluations:
        raise UserError(f"{workdir} is not evaluated yet: run python -m launch.evaluate --workdir={workdir} --split=test first")
    lines = list(folder.read_metrics())
    return Run(
        name=workdir.resolve().name if name is None else name,
        workdir=workdir,
        config=resolved,
        num_params=config.get("num_params"),
        vocab_size=config.get("vocab_size"),
        train_lines=tuple(line for line in lines if line["split"] == "train"),
        valid_lines=tuple(line for line in lines if line["split"] == "valid"),
        evaluations=evaluations,
        environment=read_json(folder.environment, "") if folder.environment.exists() else {},
    )


def _read_evaluation(path):
    figures = read_json(path, f"{path} is gone")
    absent = [field for field in (*_FIGURES, *_RECORDS) if field not in figures]
    for record, fields in _RECORDS.items():
        held = figures.get(record, dict.fromkeys(fields))
        absent += [f"{record}.{field}" for field in fields if not isinstance(held, dict) or field not in held]
    if absent:
        raise UserError(f"{path} is damaged: it lacks {', '.join(absent)}")
    return figures
