"""Files that are there whole or not at all, and where those lie that can be made again."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from lm.errors import UserError


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, of which a reader sees the old one or the new one, never a part, also after a crash.

    Raises:
      UserError: the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes UTF-8 text as a `whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode())


def user_cache() -> pathlib.Path:
    """The user's folder for what can be made again: lm in $XDG_CACHE_HOME or ~/.cache. It need not exist."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lm"


def make_writable(folder: pathlib.Path) -> None:
    """Makes a folder; raises an OSError if it is not there then, or nothing can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_writable(path: pathlib.Path) -> None:
    """Raises a UserError unless a file can be written there; makes its folder."""
    try:
        make_writable(path.parent)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def sha256_of(path: pathlib.Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: pathlib.Path, missing: str) -> dict[str, Any]:
    """A JSON file, which holds an object.

    Raises:
      UserError: with the sentence `missing` where there is no such file; naming the file where it is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return values


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file for people and programs, atomically."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
