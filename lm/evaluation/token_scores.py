"""The scores of single tokens as they are stored beside a figure, and whether they are those of the figure."""

import pathlib
import typing
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.errors import UserError


class TokenScores(typing.NamedTuple):
    """What a run said of every token of a text, in corpus order."""

    targets_N: np.ndarray  # int32
    nll_N: np.ndarray  # float32, nats


def read_token_scores(path: pathlib.Path, figures: Mapping[str, Any]) -> TokenScores:
    """Reads evaluation/<name>.npz.

    Args:
      figures: what <name>.json holds; `tokens` and `nll_sum` are read.

    Raises:
      UserError: the file is missing or damaged, or is not the one that the figures came from.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            scores = TokenScores(arrays["targets"], arrays["nll"])
        if scores.nll_N.dtype != np.float32 or scores.targets_N.dtype != np.int32:
            raise ValueError(f"targets are {scores.targets_N.dtype} and nll {scores.nll_N.dtype}, not int32 and float32")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, though {path.stem}.json is there: evaluate the run again") from None
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}): evaluate the run again") from error
    total = scores.nll_N.sum(dtype=np.float64)
    shapes_fit = scores.targets_N.shape == scores.nll_N.shape == (figures["tokens"],)
    # float32 on disk against a float64 sum; looser than rounding, far tighter than two different models
    if not shapes_fit or not np.isclose(total, figures["nll_sum"], rtol=1e-5, atol=1e-6, equal_nan=True):
        raise UserError(
            f"{path} holds {scores.nll_N.size} tokens with nll_sum {total:.6g}, but {path.stem}.json says {figures['tokens']} "
            f"and {figures['nll_sum']:.6g}: evaluate the run again"
        )
    return scores
