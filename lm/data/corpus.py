"""A tokenised split: made once, kept in a cache on disk keyed by its content, and read through memory mapping."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np

from lm.config import DataConfig
from lm.data import sources, tokenizers
from lm.data.shards import Shards, pieces
from lm.errors import UserError
from lm.files import make_writable, sha256_of, user_cache

_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokens of one split, in corpus order.

    Attributes:
      name: what a message calls the split.
      tokens: int [N], memory-mapped, in one file or in shards.
      size: bytes, words and hash of the original text.
      vocab_size, eos: those of the tokenizer.
    """

    name: str
    tokens: np.ndarray | Shards
    size: sources.TextSize
    vocab_size: int
    eos: int

    def __post_init__(self):
        if not len(self.tokens):
            raise UserError(f"{self.name} holds no text")
        check_ids(self.tokens, self.vocab_size, self.name)


def check_ids(tokens: np.ndarray | Shards, vocab_size: int, name: str) -> None:
    """Raises a UserError for a token id outside the vocabulary (an accelerator would silently clamp it)."""
    known = isinstance(tokens, Shards)  # those who made them have looked at each
    for piece in [np.array([tokens.largest])] if known else pieces(tokens):
        worst = int(piece.max()) if int(piece.max()) >= vocab_size else int(piece.min())
        if not 0 <= worst < vocab_size:
            raise UserError(
                f"{name} holds token id {worst}, but the vocabulary ends at {vocab_size - 1}; its tokenizer is another one"
            )


def cache_dir(data: DataConfig) -> pathlib.Path:
    """The folder of the token cache, made if need be.

    Raises:
      UserError: a folder that cannot be written.
    """
    folder = pathlib.Path(data.cache_dir) if data.cache_dir else user_cache()
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(
            f"the token cache {folder} cannot be written ({error.strerror}); set config.data.cache_dir to a folder that can"
        ) from None
    return folder


def tokenise(split: sources.Split, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path) -> Corpus:
    """The split's tokens, from the cache if a sound copy is there, else made in one pass with constant memory.

    Each document of a closed split ends in one `eos`. With a tokenizer whose lines end in `eos`, every line does instead,
    the last one also where its newline is missing.
    """
    if split.prepared is not None:
        if split.prepared.tokenizer_sha256 != tokenizers.sha256(tokenizer):
            raise UserError(
                f"{split.name} holds the tokens of another tokenizer than this run's; prepare the text again with "
                "launch.prepare_data and its --tokenizer=FILE, or set config.data.prepared=None"
            )
        return Corpus(split.name, split.prepared.tokens(), split.size, tokenizer.vocab_size, tokenizer.eos)
    key = hashlib.sha256(
        json.dumps([_FORMAT, split.size.sha256, split.closed, tokenizers.sha256(tokenizer)]).encode()
    ).hexdigest()[:24]
    folder = cache / f"tokens-{key}"
    dtype = token_type(tokenizer.vocab_size)
    tokens = _open(folder, dtype)
    if tokens is None:
        _make(split, tokenizer, folder, dtype)
        tokens = _open(folder, dtype)
    if tokens is None:
        raise UserError(f"the token cache {folder} cannot be read back; remove it, or check the disk")
    return Corpus(split.name, tokens, split.size, tokenizer.vocab_size, tokenizer.eos)


def _open(folder, dtype):
    """The memory-mapped tokens, or None where there are none or they are damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        path = folder / "tokens.bin"
        if sha256_of(path) != manifest["sha256"] or dtype.name != manifest["dtype"]:
            return None
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def token_type(vocab_size: int) -> np.dtype:
    """In what the tokens of such a vocabulary are kept."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def _make(split, tokenizer, folder, dtype):
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            digest, text, count = hashlib.sha256(), hashlib.sha256(), 0
            with (temporary / "tokens.bin").open("wb") as file:
                for ids in token_ids(_hashed(split, text), tokenizer):
                    count += len(ids)
                    piece = ids.astype(dtype).tobytes()
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if text.hexdigest() != split.size.sha256:
                raise UserError(f"{split.name} was changed while it was read; start again")
            manifest = {"tokens": count, "dtype": dtype.name, "sha256": digest.hexdigest(), "text": split.name}
            (temporary / "manifest.json").write_text(json.dumps(manifest))
            temporary.chmod(0o755)  # made for its maker alone, it would shut out others with whom the cache is shared
            if _open(folder, dtype) is None:  # else another process has just finished it, and may be reading it
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not folder.exists():
            raise UserError(f"the token cache {folder.parent} cannot be written: {error.strerror}") from None


def _hashed(split, digest):
    """The split, whose text is taken into a digest as `sources.Split.size` does while it is read."""

    def lines(document):
        for line in document:
            digest.update(line.encode())
            yield line

    def documents():
        for document in split.documents():
            yield lines(document)
            if split.closed:
                digest.update(b"\0")

    return dataclasses.replace(split, documents=documents)


def token_ids(split: sources.Split, tokenizer: tokenizers.Tokenizer) -> Iterator[np.ndarray]:
    """The ids of a split's text, line by line, as they are in a corpus."""
    for document in split.documents():
        yield from tokenizer.encode_lines(_with_final_newline(document, split.closed) if tokenizer.ends_lines else document)
        if split.closed and not tokenizer.ends_lines:
            yield np.array([tokenizer.eos], np.int32)


def _with_final_newline(lines, is_document):
    """A document has one even if there is nothing in it; a part of an open text may be empty."""
    line = "" if is_document else "\n"
    for line in lines:
        yield line
    if not line.endswith("\n"):
        yield "\n"
