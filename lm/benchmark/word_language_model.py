"""PyTorch's example word_language_model, as its users train it: what they would otherwise run on the same text.

https://github.com/pytorch/examples/tree/main/word_language_model: its recurrent models, its batches that never shuffle, plain
SGD whose rate falls to a quarter whenever valid does not get better, and the best epoch on valid for test. torch is an extra
and imported inside functions only.
"""

import copy
import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm.config import DataConfig
from lm.data import corpus, sources, tokenizers
from lm.errors import UserError
from lm.evaluation.perplexity import perplexity

_EVALUATION_ROWS = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """The example's options, under its own names, with its own defaults.

    `model` is "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"; `lr` is meant to be 5 for an RNN; `bptt` counts time steps.
    """

    model: str = "LSTM"
    emsize: int = 200
    nhid: int = 200
    nlayers: int = 2
    lr: float = 20.0
    clip: float = 0.25
    epochs: int = 40
    batch_size: int = 20
    bptt: int = 35
    dropout: float = 0.2
    seed: int = 1111


def train(path: str, settings: Settings, on_epoch: Callable[[dict[str, Any]], Any] = lambda epoch: None) -> dict[str, Any]:
    """Trains the model on the words of a folder of text and scores test once.

    Args:
      path: folder with train, valid and test, as `config.data.path`.
      settings: the options.
      on_epoch: called after each epoch with its number, learning rate, perplexity on valid and the seconds so far.

    Returns:
      Perplexity of the best epoch on test: `example_perplexity` as the example scores it (ten rows, each with an empty start,
      the rest of the division left out) and `perplexity` of every token in one row, the first predicted from `<eos>`; the
      seconds of training alone; and what it ran with.

    Raises:
      UserError: torch is missing, or the text; training has diverged.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("word_language_model needs PyTorch, which is not installed; install the extra: pip install -e '.[peers]'")
    import torch

    data = DataConfig(source="text", path=path, tokenizer="word", min_count=1)
    splits, cache = sources.load(data), corpus.cache_dir(data)
    tokenizer = tokenizers.train(data, splits["train"], cache)
    tokens = {
        name: torch.from_numpy(corpus.tokenise(split, tokenizer, cache).tokens.astype(np.int64)) for name, split in splits.items()
    }
    for name, rows in (("train", settings.batch_size), ("valid", _EVALUATION_ROWS), ("test", _EVALUATION_ROWS)):
        if len(tokens[name]) < 2 * rows:
            raise UserError(f"{splits[name].name} has {len(tokens[name])} tokens, too few for {rows} rows of at least 2")
    torch.manual_seed(settings.seed)
    model = _model(settings, tokenizer.vocab_size)
    train_TB, valid_TB = _rows(tokens["train"], settings.batch_size), _rows(tokens["valid"], _EVALUATION_ROWS)
    rate, best_loss, best, epochs, seconds = settings.lr, math.inf, None, [], 0.0
    for number in range(1, settings.epochs + 1):
        started = time.perf_counter()
        _train_epoch(model, train_TB, settings, rate)
        seconds += time.perf_counter() - started  # of training alone, as in a run of ours
        valid_loss = _mean_loss(model, valid_TB, settings.bptt)
        epochs.append(
            {
                "epoch": number,
                "learning_rate": rate,
                "valid_perplexity": perplexity(valid_loss),
                "seconds": round(seconds, 1),
            }
        )
        on_epoch(epochs[-1])
        if not math.isfinite(valid_loss):
            raise UserError(f"the loss on valid is not finite after epoch {number} at --lr={rate:g}; give a smaller one")
        if valid_loss < best_loss:
            best_loss, best = valid_loss, copy.deepcopy(model.state_dict())
        else:
            rate /= 4
    if best is not None:
        model.load_state_dict(best)
    whole = torch.cat([torch.tensor([tokenizer.eos]), tokens["test"]])
    return {
        **dataclasses.asdict(settings),
        "data_path": path,
        "vocab_size": tokenizer.vocab_size,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "epochs_run": epochs,
        "example_perplexity": perplexity(_mean_loss(model, _rows(tokens["test"], _EVALUATION_ROWS), settings.bptt)),
        "perplexity": perplexity(_mean_loss(model, whole[:, None], settings.bptt)),
        "num_scored": len(tokens["test"]),
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }


def _model(settings, vocab_size):
    import torch
    from torch import nn

    class RNNModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(settings.dropout)
            self.encoder = nn.Embedding(vocab_size, settings.emsize)
            sizes = settings.emsize, settings.nhid, settings.nlayers
            kind, _, nonlinearity = settings.model.partition("_")
            options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
            self.rnn = getattr(nn, kind)(*sizes, dropout=settings.dropout, **options)
            self.decoder = nn.Linear(settings.nhid, vocab_size)
            nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
            nn.init.zeros_(self.decoder.bias)
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

        def forward(self, inputs_TB, hidden):
            output_TBD, hidden = self.rnn(self.drop(self.encoder(inputs_TB)), hidden)
            logits_NV = self.decoder(self.drop(output_TBD)).flatten(0, 1)
            return torch.log_softmax(logits_NV, dim=1), hidden

    return RNNModel()


def _rows(tokens, num_rows):
    """The text cut into so many rows, the rest left out: [T, B]."""
    return tokens[: len(tokens) // num_rows * num_rows].view(num_rows, -1).t().contiguous()


def _segments(tokens_TB, bptt) -> Iterator[tuple[Any, Any]]:
    for start in range(0, len(tokens_TB) - 1, bptt):
        length = min(bptt, len(tokens_TB) - 1 - start)
        yield tokens_TB[start : start + length], tokens_TB[start + 1 : start + 1 + length].flatten()


def _train_epoch(model, train_TB, settings, rate):
    import torch
    from torch import nn

    model.train()
    hidden = None
    for inputs_TB, targets_N in _segments(train_TB, settings.bptt):
        model.zero_grad()
        output_NV, hidden = model(inputs_TB, _detached(hidden))
        nn.functional.nll_loss(output_NV, targets_N).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-rate)


def _mean_loss(model, tokens_TB, bptt) -> float:
    import torch
    from torch import nn

    model.eval()
    total, count, hidden = 0.0, 0, None
    with torch.no_grad():
        for inputs_TB, targets_N in _segments(tokens_TB, bptt):
            output_NV, hidden = model(inputs_TB, hidden)
            total += nn.functional.nll_loss(output_NV, targets_N, reduction="sum").item()
            count += len(targets_N)
    return total / count


def _detached(hidden):
    if isinstance(hidden, tuple):
        return tuple(part.detach() for part in hidden)
    return hidden if hidden is None else hidden.detach()
