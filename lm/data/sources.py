"""Where text comes from: the name of a source -> train, valid and test splits of documents, read as streams of lines."""

import ast
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator

from lm.config import DataConfig
from lm.errors import UserError

SPLITS = ("train", "valid", "test")
_LONGEST = 1 << 16  # bytes of a line that are read at once


@dataclasses.dataclass(frozen=True)
class Split:
    """One part of a corpus, read anew each time it is asked for, so that memory does not grow with it.

    Attributes:
      name: what a message calls it, such as a path.
      documents: gives the documents, each an iterable of lines that keep their newline.
      closed: whether a document's end is an event of its own, which one `eos` stands for.
    """

    name: str
    documents: Callable[[], Iterable[Iterable[str]]]
    closed: bool = False

    @functools.cached_property
    def size(self) -> "TextSize":
        """Counts and hash of the original text, in one pass."""
        digest, num_bytes, num_words = hashlib.sha256(), 0, 0
        for document in self.documents():
            for line in document:
                encoded = line.encode()
                digest.update(encoded)
                num_bytes += len(encoded)
                num_words += len(line.split())
            if self.closed:
                digest.update(b"\0")  # not a character of any text: files with one are refused
        return TextSize(digest.hexdigest(), num_bytes, num_words)


@dataclasses.dataclass(frozen=True)
class TextSize:
    """What identifies a text whatever its tokenizer: sha256, UTF-8 bytes, words between white space."""

    sha256: str
    num_bytes: int
    num_words: int


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text with their newlines; unlike str.splitlines, no other character ends a line."""
    return iter(io.StringIO(text, newline="\n"))


def load(data: DataConfig) -> dict[str, Split]:
    """The three splits of the configured source.

    Raises:
      UserError: a path that is missing, or text that cannot be read.
    """
    return {"python_docs": python_docs, "text": text}[data.source](data)


def python_docs(data: DataConfig) -> dict[str, Split]:
    """The running Python's language reference and standard-library docstrings: about 2 MB of English, always there.

    A document is one reference topic or one module's docstrings. In the order of the sha256 of their names they fill
    test, then valid, each up to 5% of all bytes, then train. A paragraph that already stood in an earlier document is
    left out (docstrings are copied between modules, topics include each other), so that train holds no paragraph of
    valid or test.
    """
    del data
    documents = _python_documents()
    budget = sum(len(body.encode()) for body in documents) / 20
    parts: dict[str, list[str]] = {"test": [], "valid": [], "train": []}
    remaining = iter(documents)
    for name in ("test", "valid"):
        filled = 0
        for body in remaining:
            parts[name].append(body)
            filled += len(body.encode())
            if filled >= budget:
                break
    parts["train"].extend(remaining)
    return {name: Split(f"python_docs/{name}", functools.partial(_documents_of, parts[name]), closed=True) for name in SPLITS}


def _documents_of(bodies: list[str]) -> Iterator[Iterable[str]]:
    return (lines_of(body) for body in bodies)


_LEFT_OUT = {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "pydoc_data", "__pycache__"}


@functools.cache
def _python_documents() -> tuple[str, ...]:
    from pydoc_data import topics

    named = {f"topic {name}": [body] for name, body in topics.topics.items()}
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        # config-3.x-<platform> folders hold build settings that differ between machines, not documentation
        if _LEFT_OUT.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        named[f"module {relative.as_posix()}"] = list(_docstrings(path))
    seen: set[str] = set()
    documents = []
    for name in sorted(named, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        paragraphs = []
        for paragraph in "\n\n".join(named[name]).replace("\r\n", "\n").split("\n\n"):
            paragraph = paragraph.strip("\n")
            words = " ".join(paragraph.split())  # the same paragraph stands at other depths of indentation elsewhere
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append("\n\n".join(paragraphs) + "\n")
    if sum(map(len, documents)) < 100_000:
        raise UserError(f"this Python's standard library ({library}) has no sources to read; use config.data.source='text'")
    return tuple(documents)


def _docstrings(path: pathlib.Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # some distributions keep templates or fixtures of bad code beside their modules
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def text(data: DataConfig) -> dict[str, Split]:
    """Text files: a folder that holds one train, one valid and one test file, or one file split by `fractions`.

    With words as units a cut moves to the next end of a line, so that no line is torn.
    """
    path = pathlib.Path(data.path)
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        raise UserError(
            f"config.data.path {str(path)!r} does not exist: give a folder with train, valid and test files, or a file"
        )
    if path.is_dir():
        if data.fractions is not None:
            raise UserError(f"config.data.fractions is set, but config.data.path {str(path)!r} is a folder with its own splits")
        return {name: text_file(_file_of_split(path, name)) for name in SPLITS}
    fractions = data.fractions or (0.9, 0.05, 0.05)
    num_characters = sum(map(len, read_lines(path)))
    bounds = [0, *(int(num_characters * share + 1e-6) for share in itertools.accumulate(fractions))]
    bounds[-1] = num_characters
    return {
        name: Split(
            f"{path} [{low}:{high}]",
            functools.partial(_one_document, functools.partial(_characters, path, low, high, data.tokenizer == "word")),
        )
        for name, low, high in zip(SPLITS, bounds, bounds[1:], strict=False)
    }


def text_file(path: pathlib.Path) -> Split:
    """One file as one open document: its bytes are its text, and nothing is added at its end."""
    return Split(str(path), functools.partial(_one_document, functools.partial(read_lines, path)))


def _one_document(lines: Callable[[], Iterator[str]]) -> Iterator[Iterable[str]]:
    yield lines()


def _file_of_split(folder: pathlib.Path, split: str) -> pathlib.Path:
    endings = (".txt", ".txt.gz", ".tokens", ".tokens.gz", ".raw", ".raw.gz")
    found = sorted(p for p in folder.iterdir() if split in p.name.split(".") and (p.name.endswith(endings) or p.name == split))
    if len(found) != 1:
        what = f"{len(found)} such files: {', '.join(p.name for p in found)}" if found else "none"
        raise UserError(
            f"config.data.path {str(folder)!r} must hold one {split} file, such as {split}.txt, {split}.txt.gz or "
            f"name.{split}.txt; there is {what}"
        )
    return found[0]


def _characters(path, low, high, whole_lines) -> Iterator[str]:
    position = 0
    for line in read_lines(path):
        start, position = position, position + len(line)
        if whole_lines:
            if low <= start < high:
                yield line
        elif position > low and start < high:
            yield line[max(low - start, 0) : high - start]


def read_lines(path: pathlib.Path) -> Iterator[str]:
    """The lines of a UTF-8 text file or its .gz, newline kept, one at a time; a very long line in pieces.

    Raises:
      UserError: a file that is missing, empty, binary, not UTF-8, or has CRLF line ends or a byte order mark.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            for number, line in enumerate(_pieces(file), 1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    raise UserError(f"{path} begins with a byte order mark (BOM); remove it: sed -i '1s/^\\xEF\\xBB\\xBF//'")
                if b"\0" in line:
                    raise UserError(f"{path} is a binary file (line {number} holds a zero byte); text in UTF-8 is needed")
                if line.endswith(b"\r\n"):
                    raise UserError(
                        f"{path} has CRLF line ends (line {number}); make them LF, for example with: sed -i 's/\\r$//'"
                    )
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} is not UTF-8: byte {line[error.start]:#04x} in line {number}, column {error.start + 1}; "
                        "convert it, for example with iconv"
                    ) from None
            if not number:
                raise UserError(f"{path} is empty; there is no text to read")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _pieces(file) -> Iterator[bytes]:
    """The lines of a binary file, those beyond _LONGEST bytes in pieces, so that memory does not grow with them.

    A line is cut before a single space between two words, where no tokenizer joins what stands on both sides; one that
    has none is cut between characters.
    """
    rest = b""
    while chunk := file.readline(_LONGEST):
        chunk, rest = rest + chunk, b""
        if len(chunk) >= _LONGEST and not chunk.endswith(b"\n"):
            cuts = [match.start() for match in re.finditer(rb"(?<=\S) (?=\S)", chunk)]
            cut = cuts[-1] if cuts else max(i for i in range(len(chunk) - 3, len(chunk)) if chunk[i] & 0xC0 != 0x80)
            chunk, rest = chunk[:cut], chunk[cut:]
        yield chunk
    if rest:
        yield rest
