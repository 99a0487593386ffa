"""Token shards: a corpus that was tokenised beforehand lies in a folder, in many files, and is read as one array."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.config import DataConfig
from lm.errors import UserError
from lm.files import read_json, sha256_of, write_json

FORMAT = 1
_OPEN_AT_ONCE = 512  # files that are mapped at a time
_MEND = "run launch.prepare_data again, which mends the folder"


class Shards:
    """Integers in several files, indexed (from 0) like the NumPy array [N] of all of them one after the other.

    Attributes:
      dtype: of the integers.
      largest: one of them.
    """

    def __init__(self, paths: Sequence[pathlib.Path], lengths: Sequence[int], dtype: str, largest: int):
        """Reads nothing yet; `lengths` are those of the files, in integers."""
        self.dtype, self.largest = np.dtype(dtype), largest
        self._paths = paths
        self._ends = np.cumsum(np.asarray(lengths, np.int64))
        self._starts = self._ends - lengths
        self._open = functools.lru_cache(_OPEN_AT_ONCE)(self._map)

    def _map(self, number):
        try:
            return np.memmap(self._paths[number], self.dtype, "r")
        except OSError as error:
            raise UserError(f"{self._paths[number]} cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int | slice | np.ndarray) -> Any:
        """As of an array; a slice without a step."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self._between(start, stop)
        index = np.asarray(index)
        flat = index.ravel()
        shard_of = np.searchsorted(self._ends, flat, side="right")
        found = np.empty(len(flat), self.dtype)
        for number in np.unique(shard_of):
            here = shard_of == number
            found[here] = self._open(int(number))[flat[here] - self._starts[number]]
        return found.reshape(index.shape)[()]

    def _between(self, start, stop):
        number, parts = int(np.searchsorted(self._ends, start, side="right")), []
        while start < stop:
            first, end = int(self._starts[number]), int(self._ends[number])
            if first < end:
                parts.append(self._open(number)[start - first : min(stop, end) - first])
            start, number = end, number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([*parts, np.zeros(0, self.dtype)])

    def __array__(self, dtype=None, copy=None):
        del copy  # there is no array yet that could be shared
        return self._between(0, len(self)).astype(dtype or self.dtype, copy=False)


def pieces(tokens: np.ndarray | Shards, length: int = 1 << 24) -> Iterator[np.ndarray]:
    """The tokens one after the other, so many at a time."""
    for start in range(0, len(tokens), length):
        yield tokens[start : start + length]


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """One split as `launch.prepare_data` has left it.

    Attributes:
      folder: of all splits and their tokenizer.
      name: of the split.
      tokenizer_sha256: of the tokenizer that made the tokens.
      facts: `sha256`, `num_bytes` and `num_words` of the text, `tokens`, `dtype`, `largest`, and of each shard `file`, `tokens`
        and `sha256`.
    """

    folder: pathlib.Path
    name: str
    tokenizer_sha256: str
    facts: dict[str, Any]

    @property
    def tokenizer(self) -> pathlib.Path:
        """Where the tokenizer is."""
        return self.folder / "tokenizer.json"

    def tokens(self) -> Shards:
        """All tokens. Those of valid and test, from which figures are made, are read and held against their hashes; train may be
        too large for that.

        Raises:
          UserError: a shard that is missing, has another size than it should, or other content where that is looked at.
        """
        facts = self.facts
        paths = [self.folder / shard["file"] for shard in facts["shards"]]
        itemsize = np.dtype(facts["dtype"]).itemsize
        for path, shard in zip(paths, facts["shards"], strict=True):
            found = path.stat().st_size if path.is_file() else None
            if found != shard["tokens"] * itemsize:
                what = "is missing" if found is None else f"has {found:,} bytes, not the {shard['tokens'] * itemsize:,} it had"
                raise UserError(f"{path} {what}; {_MEND}")
            if self.name != "train" and sha256_of(path) != shard["sha256"]:
                raise UserError(f"{path} is not as it was written; {_MEND}")
        return Shards(paths, [shard["tokens"] for shard in facts["shards"]], facts["dtype"], facts["largest"])


def write_manifest(folder: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes the manifest, sealed with a hash of itself."""
    write_json(manifest_path(folder), {"format": FORMAT, **values, "seal": _seal({"format": FORMAT, **values})})


def _seal(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def manifest_path(folder: pathlib.Path) -> pathlib.Path:
    """What makes a prepared folder complete: written last."""
    return folder / "manifest.json"


# What of a config's data decides its tokens: all but how they are batched, and where things lie.
_NOT_DECISIVE = {
    "path",
    "cache_dir",
    "order",
    "seq_len",
    "seq_len_std",
    "batch_size",
    "prefetch",
    "prepared",
    "mixture",
    "mixture_weights",
}


def decisive(data: DataConfig) -> dict[str, Any]:
    """The fields of a config that decide its tokens, as JSON has them."""
    found = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.name not in _NOT_DECISIVE}
    return json.loads(json.dumps(found))


def read(folder: str | os.PathLike, asked_for: str) -> tuple[dict[str, PreparedSplit], dict[str, Any]]:
    """The splits of a prepared folder, and the fields of the config that decided their tokens.

    Args:
      asked_for: the field of the config that names the folder.

    Raises:
      UserError: no such folder, or one that is not complete.
    """
    folder = pathlib.Path(folder)
    missing = f"config.data.{asked_for}: {str(folder)!r} is no folder that launch.prepare_data has finished (no manifest.json)"
    manifest = read_json(manifest_path(folder), missing)
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{manifest_path(folder)} has format {manifest['format']}, not {FORMAT}; prepare the text again")
        if manifest.pop("seal") != _seal(manifest):
            raise UserError(f"{manifest_path(folder)} has been changed or damaged; run launch.prepare_data again, which mends it")
        made_by = manifest["tokenizer_sha256"]
        found = {name: PreparedSplit(folder, name, made_by, facts) for name, facts in manifest["splits"].items()}
        return found, manifest["data"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{manifest_path(folder)} is no manifest of launch.prepare_data") from None
