"""Where text comes from: the name of a source -> train, valid and test splits of documents, read as streams of lines."""

import ast
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lm.config import DataConfig, is_open
from lm.data import shards, synthetic, tfds_text
from lm.data.lines import joined_lines, lines_of, read_lines
from lm.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """One part of a corpus, read anew each time it is asked for, so that memory does not grow with it.

    Attributes:
      name: what a message calls it, such as a path.
      documents: gives the documents, each an iterable of lines that keep their newline.
      closed: whether a document's end is an event of its own, which one `eos` stands for.
      floor: of a text whose law is known, what no model can beat; else None.
      file: the plain text file whose bytes are the text, where there is one; parts of it can then be read alone.
      prepared: the tokens of a text that was tokenised beforehand and need not be there any more; else None.
    """

    name: str
    documents: Callable[[], Iterable[Iterable[str]]]
    closed: bool = False
    floor: "Floor | None" = None
    file: pathlib.Path | None = None
    prepared: shards.PreparedSplit | None = None

    @functools.cached_property
    def size(self) -> "TextSize":
        """Counts and hash of the original text, in one pass."""
        if self.prepared is not None:
            facts = self.prepared.facts
            return TextSize(facts["sha256"], facts["num_bytes"], facts["num_words"])
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
class Floor:
    """The true law of a text.

    Attributes:
      nats: gives the true -log p of each character given all before it, in order, in pieces.
      entropy_rate: computes what their mean comes to in a long text; seconds for a hidden Markov model.
    """

    nats: Callable[[], Iterator[np.ndarray]]
    entropy_rate: Callable[[], synthetic.EntropyRate]


@dataclasses.dataclass(frozen=True)
class TextSize:
    """What identifies a text whatever its tokenizer: sha256, UTF-8 bytes, words between white space."""

    sha256: str
    num_bytes: int
    num_words: int


def load(data: DataConfig) -> dict[str, Split]:
    """The three splits of the configured source.

    Raises:
      UserError: a path that is missing, or text that cannot be read.
    """
    if data.prepared is not None:
        return prepared(data)
    return {"python_docs": python_docs, "text": text, "tfds": tfds_examples, "synthetic": synthetic_text}[data.source](data)


def prepared(data: DataConfig) -> dict[str, Split]:
    """The splits of `data.prepared`, which must have been made from such a config.

    Raises:
      UserError: no such folder, or one made with other settings.
    """
    found, made_with = shards.read(data.prepared, "prepared")
    for name, value in shards.decisive(data).items():
        if made_with.get(name) != value:
            raise UserError(
                f"config.data.prepared {data.prepared!r} was made with config.data.{name} = {made_with.get(name)!r}, but it is "
                f"{value!r} now; make them equal, or run launch.prepare_data with this config into another folder"
            )
    floors = {name: split.floor for name, split in synthetic_text(data).items()} if data.source == "synthetic" else {}
    return {
        name: Split(f"{data.prepared}/{name}", functools.partial(_no_text, data.prepared), floor=floors.get(name), prepared=split)
        for name, split in found.items()
    }


def mixture(data: DataConfig) -> dict[str, Split]:
    """The train splits that `data.mixture` adds to the config's own, by the names of their folders.

    Raises:
      UserError: no such folder, or one whose text has no documents where `data.order` asks for them.
    """
    folders = data.mixture or ()
    names = [pathlib.Path(folder).name for folder in folders]
    if len({data.source, *names}) < 1 + len(names):  # then their paths tell them apart
        names = [str(pathlib.Path(folder).absolute()) for folder in folders]
    found = {}
    for name, folder in zip(names, folders, strict=True):
        splits, made_with = shards.read(folder, "mixture")
        kind = (made_with.get(field) for field in ("tokenizer", "source", "examples"))
        if data.order in ("packed", "padded") and is_open(*kind):
            raise UserError(
                f"config.data.order is {data.order!r}, but no document ends in the text of config.data.mixture {folder!r}; take "
                "another folder, or config.data.order='windows'"
            )
        found[name] = Split(f"{folder}/train", functools.partial(_no_text, folder), prepared=splits["train"])
    return found


def _no_text(folder):
    raise UserError(
        f"{folder} holds the tokens of a text, not the text itself, which is asked for here; set config.data.prepared=None"
    )


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
    except (SyntaxError, ValueError, OSError):
        return  # some distributions keep templates or fixtures of bad code beside their modules, or links to nowhere
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
            functools.partial(one_document, functools.partial(_characters, path, low, high, data.tokenizer == "word")),
        )
        for name, low, high in zip(SPLITS, bounds, bounds[1:], strict=False)
    }


def text_file(path: pathlib.Path) -> Split:
    """One file as one open document: its bytes are its text, and nothing is added at its end.

    Raises:
      UserError: it cannot be opened.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    plain = None if path.suffix == ".gz" else path
    return Split(str(path), functools.partial(one_document, functools.partial(read_lines, path)), file=plain)


def one_document(lines: Callable[[], Iterator[str]]) -> Iterator[Iterable[str]]:
    """The documents of a text that is one."""
    yield lines()


def _file_of_split(folder: pathlib.Path, split: str) -> pathlib.Path:
    endings = (".txt", ".txt.gz", ".tokens", ".tokens.gz", ".raw", ".raw.gz")
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"config.data.path {str(folder)!r} cannot be read: {error.strerror}") from None
    found = [p for p in files if split in p.name.split(".") and (p.name.endswith(endings) or p.name == split)]
    if len(found) != 1:
        what = f"are {len(found)} such files: {', '.join(p.name for p in found)}" if found else "is none"
        raise UserError(
            f"config.data.path {str(folder)!r} must hold one {split} file, such as {split}.txt, {split}.txt.gz or "
            f"name.{split}.txt; there {what}"
        )
    return found[0]


def _characters(path, low, high, whole_lines) -> Iterator[str]:
    position, begin, line_ends = 0, 0, True
    for line in read_lines(path):
        start, position = position, position + len(line)
        if line_ends or not whole_lines:  # a very long line comes in pieces, which stay together
            begin = start
        line_ends = line.endswith("\n")
        if begin >= high:
            return
        if whole_lines:
            if low <= begin:
                yield line
        elif position > low:
            yield line[max(low - start, 0) : high - start]


def tfds_examples(data: DataConfig) -> dict[str, Split]:
    """A prepared dataset of tensorflow-datasets: each example a document, or all of them the pieces of one text."""

    def documents(examples):
        return (lines_of(example) for example in examples())

    def pieces(examples):
        yield joined_lines(examples())

    closed = data.examples == "documents"
    return {
        name: Split(examples.name, functools.partial(documents if closed else pieces, examples), closed)
        for name, examples in tfds_text.load(data).items()
    }


def synthetic_text(data: DataConfig) -> dict[str, Split]:
    """Text drawn from a process whose entropy is known, the same for the same fields of the config."""
    entropy_rate = synthetic.process(data).entropy_rate

    def split(name):
        def lines():
            return (characters for characters, _ in synthetic.text(data, name))

        def nats():
            return (nats for _, nats in synthetic.text(data, name))

        return Split(f"synthetic {data.process}/{name}", functools.partial(one_document, lines), floor=Floor(nats, entropy_rate))

    return {name: split(name) for name in SPLITS}
