"""Lines of text: of a string, and of UTF-8 files, with a clear sentence for what is no such file."""

import gzip
import io
import math
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator

from lm.errors import UserError

_LONGEST = 1 << 16  # bytes of a line that are read at once


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text with their newlines; unlike str.splitlines, no other character ends a line."""
    return iter(io.StringIO(text, newline="\n"))


def joined_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of texts that are one behind the other, as if they were one file; a very long line in pieces, as there."""
    return (piece.decode() for piece in _pieces(io.BufferedReader(_Joined(texts))))


class _Joined(io.RawIOBase):
    """A binary file of texts, one behind the other."""

    def __init__(self, texts):
        self._texts, self._rest = iter(texts), memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._rest:
            text = next(self._texts, None)
            if text is None:
                return 0
            self._rest = memoryview(text.encode())
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def read_lines(path: pathlib.Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The lines of a UTF-8 text file or its .gz, newline kept, one at a time; a very long line in pieces.

    Args:
      start, stop: the bytes to read, from the beginning of a line to the end of one (`cuts` finds such); None: to the end.

    Raises:
      UserError: a file that is missing, empty, binary, not UTF-8, or has CRLF line ends or a byte order mark.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            file.seek(start)
            since = f" from byte {start:,} on" if start else ""
            number = 0
            for number, line in enumerate(_pieces(file, None if stop is None else stop - start), 1):
                if number == 1 and not start and line.startswith(b"\xef\xbb\xbf"):
                    raise UserError(f"{path} begins with a byte order mark (BOM); remove it: sed -i '1s/^\\xEF\\xBB\\xBF//'")
                if b"\0" in line:
                    raise UserError(f"{path} is a binary file (line {number}{since} holds a zero byte); text in UTF-8 is needed")
                if line.endswith(b"\r\n"):
                    raise UserError(
                        f"{path} has CRLF line ends (line {number}{since}); make them LF, for example with: sed -i 's/\\r$//'"
                    )
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} is not UTF-8: byte {line[error.start]:#04x} in line {number}{since}, column {error.start + 1}; "
                        "convert it, for example with iconv"
                    ) from None
            if not number and not start:
                raise UserError(f"{path} is empty; there is no text to read")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def cuts(path: pathlib.Path, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts a text file into parts of `num_bytes` or a little more, each from the beginning of a line to the end of one."""
    try:
        size, start = path.stat().st_size, 0
        with path.open("rb") as file:
            while True:
                file.seek(start + num_bytes - 1)
                while (piece := file.readline(_LONGEST)) and not piece.endswith(b"\n"):
                    pass
                stop = min(file.tell(), size)
                yield start, stop
                if stop == size:
                    return
                start = stop
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _pieces(file, num_bytes=None) -> Iterator[bytes]:
    """The lines of a binary file, those beyond _LONGEST bytes in pieces, so that memory does not grow with them.

    A line is cut before a single space between two words, where no tokenizer joins what stands on both sides; one that
    has none is cut between characters.
    """
    rest, left = b"", math.inf if num_bytes is None else num_bytes
    while chunk := file.readline(int(min(_LONGEST, left))):
        left -= len(chunk)
        chunk, rest = rest + chunk, b""
        if len(chunk) >= _LONGEST and not chunk.endswith(b"\n"):
            cuts = [match.start() for match in re.finditer(rb"(?<=\S) (?=\S)", chunk)]
            starts = [i for i in range(len(chunk) - 4, len(chunk)) if chunk[i] & 0xC0 != 0x80]  # a character has 4 bytes at most
            cut = cuts[-1] if cuts else max(starts, default=len(chunk))
            chunk, rest = chunk[:cut], chunk[cut:]
        yield chunk
    if rest:
        yield rest
