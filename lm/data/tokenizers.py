"""Text <-> token ids: byte, char, word and subword tokenizers, how they are trained, saved and loaded."""

import contextlib
import hashlib
import itertools
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from lm.config import DataConfig
from lm.data.lines import lines_of
from lm.data.sources import Split
from lm.errors import UserError
from lm.files import write_atomically

_FORMAT = 1  # of what is kept in the cache; another one where the same text is to give another vocabulary


class Tokenizer(Protocol):
    """Attributes: `name`; `vocab_size`, `eos` counted; `eos`, the id of the end of a document or line; `ends_lines`,
    whether every line ends in `eos` in place of its newline."""

    name: str
    vocab_size: int
    eos: int
    ends_lines: bool

    def encode_lines(self, lines: Iterable[str], strict: bool = False) -> Iterator[np.ndarray]:
        """Ids (int32) of each line; with `strict`, a symbol that is not in the vocabulary is a UserError."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what was encoded comes back exactly, but for unknown symbols and the spacing of words."""

    def to_json(self) -> dict:
        """All that `from_json` needs."""


def encode(tokenizer: Tokenizer, text: str, strict: bool = False) -> np.ndarray:
    """Ids (int32) of a whole text."""
    return np.concatenate([*tokenizer.encode_lines(lines_of(text), strict), np.zeros(0, np.int32)])


class ByteTokenizer:
    """The 256 byte values of UTF-8, and `eos`."""

    name, vocab_size, eos, ends_lines = "byte", 257, 256, False

    def encode_lines(self, lines, strict=False):
        del strict  # every byte is known
        return (np.frombuffer(line.encode(), np.uint8).astype(np.int32) for line in lines)

    def decode(self, ids):
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def to_json(self):
        return {"name": self.name}

    @classmethod
    def from_json(cls, saved):
        del saved
        return cls()

    @classmethod
    def train(cls, data, split):
        del data, split
        return cls()


class _Listed:
    """What char and word share: a list of symbols, of which the first is `eos` and one is `<unk>`."""

    eos = 0

    def __init__(self, symbols: list[str]):
        self.symbols = symbols
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.unk = self.ids["<unk>"]
        self.vocab_size = len(symbols)

    def _ids(self, symbols, strict):
        ids = np.fromiter((self.ids.get(symbol, self.unk) for symbol in symbols), np.int32)
        unknown = [symbol for symbol in symbols if symbol not in self.ids] if strict else []
        if unknown:
            raise UserError(f"{unknown[0]!r} is not in the vocabulary of the {self.name} tokenizer ({self.vocab_size} entries)")
        return ids

    def to_json(self):
        return {"name": self.name, "symbols": self.symbols}

    @classmethod
    def from_json(cls, saved):
        return cls(saved["symbols"])


class CharTokenizer(_Listed):
    """The characters of train in code-point order, after `<eos>` and `<unk>`."""

    name, ends_lines = "char", False

    def encode_lines(self, lines, strict=False):
        return (self._ids(line, strict) for line in lines)

    def decode(self, ids):
        return "".join(self.symbols[i] for i in ids if i != self.eos)

    @classmethod
    def train(cls, data, split):
        del data
        characters = set()
        for document in split.documents():
            for line in document:
                characters.update(line)
        return cls(["<eos>", "<unk>", *sorted(characters)])


class WordTokenizer(_Listed):
    """The words of train, most frequent first, after `<eos>`, a line's newline, and `<unk>`; either may be the data's own."""

    name, ends_lines = "word", True

    def encode_lines(self, lines, strict=False):
        for line in lines:
            ids = self._ids(line.split(), strict)
            yield np.append(ids, np.int32(self.eos)) if line.endswith("\n") else ids

    def decode(self, ids):
        text = " ".join("\n" if i == self.eos else self.symbols[i] for i in ids)
        return text.replace(" \n ", "\n").replace(" \n", "\n").replace("\n ", "\n")

    @classmethod
    def train(cls, data, split):
        counts = Counter()
        for document in split.documents():
            for line in document:
                counts.update(line.split())
        counts.pop("<eos>", None)
        counts.pop("<unk>", None)
        words = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= data.min_count]
        if data.vocab_size is not None:
            words = words[: data.vocab_size - 2]
        return cls(["<eos>", "<unk>", *words])


# Before a space that follows something other than white space, byte-level pre-tokenisation always cuts: so the ids of a line are
# those of its words, cut there, one after the other.
_WORDS = re.compile(r"(?<=\S)(?= )")


class SubwordTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) by the `tokenizers` library.

    A line is the unit of segmentation: no token crosses a newline, so a text can be encoded as a stream of lines. `eos`
    stands after the library's own entries, where no text can spell it.
    """

    name, ends_lines = "subword", False
    _most_known, _longest_known = 1 << 18, 64  # words, and characters of one

    def __init__(self, model):
        self._model = model
        self._known: dict[str, bytes] = {}  # ids of words seen before, as int32
        self.eos = model.get_vocab_size()
        self.vocab_size = self.eos + 1

    def encode_lines(self, lines, strict=False):
        """As every tokenizer; a word is given to the library once, which is several times as fast."""
        del strict  # every byte is known
        for line in lines:
            words = _WORDS.split(line)
            try:
                ids = list(map(self._known.__getitem__, words))
            except KeyError:
                ids = self._learn(words)
            yield np.frombuffer(b"".join(ids), np.int32)

    def _learn(self, words):
        if len(self._known) > self._most_known:
            self._known.clear()
        new = [word for word in words if word not in self._known]
        for word, found in zip(new, self._model.encode_batch(new, add_special_tokens=False), strict=True):
            self._known[word] = np.asarray(found.ids, np.int32).tobytes()
        ids = [self._known[word] for word in words]
        for word in new:  # of a text without spaces a word is a line, and seldom comes again
            if len(word) > self._longest_known:
                self._known.pop(word, None)
        return ids

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids if i != self.eos], skip_special_tokens=False)

    def to_json(self):
        return {"name": self.name, "model": json.loads(self._model.to_str())}

    @classmethod
    def from_json(cls, saved):
        import tokenizers

        model = tokenizers.Tokenizer.from_str(json.dumps(saved["model"]))
        plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}.items()
        if model.normalizer or model.get_added_tokens_decoder() or not plain <= saved["model"]["pre_tokenizer"].items():
            raise ValueError("it splits words in a way of its own")
        return cls(model)

    @classmethod
    def train(cls, data, split):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=data.vocab_size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
            special_tokens=[],
        )
        model.train_from_iterator(itertools.chain.from_iterable(split.documents()), trainer)
        trained = cls(model)
        if trained.vocab_size < 258:
            raise UserError(f"{split.name} holds too little text for subwords; set config.data.tokenizer to byte or char")
        if trained.vocab_size != data.vocab_size:
            raise UserError(
                f"config.data.vocab_size is {data.vocab_size}, but {split.name} holds too little text for more than "
                f"{trained.vocab_size} subwords; set it to at most that"
            )
        return trained


_KINDS = {kind.name: kind for kind in (ByteTokenizer, CharTokenizer, WordTokenizer, SubwordTokenizer)}


def sha256(tokenizer: Tokenizer) -> str:
    """Hash of all that decides the ids; equal hashes mean equal token streams."""
    return hashlib.sha256(_serialised(tokenizer).encode()).hexdigest()


def _serialised(tokenizer):
    return json.dumps(tokenizer.to_json(), sort_keys=True, ensure_ascii=False)


def save(tokenizer: Tokenizer, path: pathlib.Path) -> None:
    """Writes the tokenizer as JSON, atomically."""
    write_atomically(path, _serialised(tokenizer))


def load(path: pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
      UserError: a file that is missing or is no tokenizer.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return _KINDS[saved["name"]].from_json(saved)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a run's folder holds its tokenizer") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise UserError(f"{path} is not a tokenizer of this project: it has no {error}") from None
    except Exception as error:  # the Rust library raises bare Exception for a model that it cannot read
        raise UserError(f"{path} is not a tokenizer of this project: {error}") from None


def train(data: DataConfig, split: Split, cache: pathlib.Path) -> Tokenizer:
    """The configured tokenizer with its vocabulary from the train split alone, kept in the cache by content.

    Args:
      data: names the tokenizer and the size of its vocabulary.
      split: the train split.
      cache: folder of the token cache.
    """
    if split.prepared is not None:
        return load(split.prepared.tokenizer)
    decisive = [_FORMAT, data.tokenizer, data.vocab_size, data.min_count, split.size.sha256]
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:24]
    for path in cache.glob(f"tokenizer-{key}-*.json"):
        with contextlib.suppress(UserError):  # a damaged entry is made again
            found = load(path)
            if path.name == _entry(key, found):
                return found
    tokenizer = fit(data, split)
    save(tokenizer, cache / _entry(key, tokenizer))
    return tokenizer


def _entry(key, tokenizer):
    """Its name in the cache, which tells whether it is as it was written."""
    return f"tokenizer-{key}-{sha256(tokenizer)[:12]}.json"


def fit(data: DataConfig, split: Split) -> Tokenizer:
    """As `train`, without a cache and the pass over the text that finds its place there."""
    return _KINDS[data.tokenizer].train(data, split)
