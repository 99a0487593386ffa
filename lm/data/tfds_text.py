"""Text of tensorflow-datasets, read without TensorFlow from prepared ArrayRecord files; and such a dataset made of text files.

Nothing is downloaded here: a dataset that is not prepared is refused with the command that prepares it.
"""

import difflib
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from lm.config import DataConfig
from lm.data.lines import read_lines
from lm.errors import UserError

_AT_ONCE = 1024  # examples that are read together
_SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}


def load(data: DataConfig) -> dict[str, "Examples"]:
    """The text feature of the train, valid and test examples of the configured dataset.

    Raises:
      UserError: the extra is not installed; a dataset that is unknown, not prepared, or not in ArrayRecord; a split or
        feature that it does not have.
    """
    builder = _builder(data)
    feature = _feature(builder, data.text_feature)
    expressions = data.split_expressions or [_default_split(builder, split) for split in _SPLIT_NAMES]
    return {split: Examples(builder, expression, feature) for split, expression in zip(_SPLIT_NAMES, expressions, strict=True)}


class Examples:
    """The texts of one split, in the order of the files.

    Attributes:
      name: what a message calls it, such as lm1b/1.1.0/train[:1%].
    """

    def __init__(self, builder: Any, expression: str, feature: str):
        self.name = f"{builder.info.full_name}/{expression}"
        self._feature = feature
        try:
            self._source = builder.as_data_source(expression, decoders=_only(builder, feature) or None)
        except NotImplementedError as error:
            raise UserError(
                f"{builder.info.full_name} in {builder.data_dir} is not in ArrayRecord, the only format that can be read without "
                f"TensorFlow ({_first_line(error)}); prepare it with: tfds build --file_format=array_record"
            ) from None
        except (ValueError, KeyError, AssertionError) as error:
            raise UserError(
                f"config.data.split_expressions: {expression!r} is no split of {builder.info.full_name}, which has "
                f"{', '.join(builder.info.splits)} ({_first_line(error)}); a part of one is written as in train[:90%]"
            ) from None
        if not self._read(lambda: len(self._source)):
            raise UserError(f"{self.name} holds no examples; widen config.data.split_expressions")

    def __call__(self) -> Iterator[str]:
        """The texts, read anew."""
        for start in range(0, len(self._source), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(self._source)))
            examples = self._read(functools.partial(self._source.__getitems__, indices))
            for index, example in zip(indices, examples, strict=True):
                text = example[self._feature]
                if not isinstance(text, (bytes, str)):  # as of a file that was cut short
                    raise UserError(f"example {index} of {self.name} cannot be read: its files are damaged; prepare it anew")
                try:
                    text = text.decode() if isinstance(text, bytes) else text
                except UnicodeDecodeError:
                    raise UserError(f"example {index} of {self.name} is not UTF-8 text in feature {self._feature!r}") from None
                if "\0" in text:
                    raise UserError(
                        f"example {index} of {self.name} is no text: it holds a zero byte in feature {self._feature!r}"
                    )
                yield text

    def _read(self, read):
        try:
            return read()
        except Exception as error:  # ArrayRecord raises many kinds for files that are damaged or gone
            raise UserError(f"{self.name} cannot be read ({_first_line(error)}); prepare it anew") from None


def _import():
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"config.data.source is 'tfds', which needs the extra for it ({error}): pip install -e '.[tfds]'"
        ) from None
    return tensorflow_datasets


def _builder(data):
    tfds = _import()
    if data.path is not None and (pathlib.Path(data.path) / "dataset_info.json").is_file():
        try:
            found = tfds.builder_from_directory(data.path)
        except Exception as error:  # of protobuf, JSON and tfds itself, for files that are damaged or gone
            raise UserError(
                f"config.data.path {data.path!r} cannot be opened as a dataset ({_first_line(error)}); prepare it anew"
            ) from None
        named = f"{found.info.full_name}/"
        if data.dataset is not None and not named.startswith(f"{data.dataset.replace(':', '/')}/"):
            raise UserError(
                f"config.data.dataset is {data.dataset!r}, but config.data.path {data.path!r} holds {found.info.full_name}; "
                "leave one of them open"
            )
        return found
    if data.dataset is None:
        raise UserError(
            f"config.data.path {data.path!r} is no prepared dataset (it holds no dataset_info.json): give the folder of a "
            "version, such as ~/tensorflow_datasets/lm1b/1.1.0, or set config.data.dataset to a name too"
        )
    folder = os.path.expanduser(data.path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    try:  # what is prepared there is read as it stands, also where this installation does not know the dataset
        return tfds.core.read_only_builder.builder_from_files(data.dataset, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        pass
    except Exception as error:
        raise UserError(f"config.data.dataset {data.dataset!r} in {folder} cannot be opened: {_first_line(error)}") from None
    name = data.dataset.split("/")[0].split(":")[0]
    known = tfds.list_builders(with_community_datasets=False)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"config.data.dataset is {data.dataset!r}, which is neither prepared in {folder} nor known to tensorflow-datasets"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    raise UserError(
        f"config.data.dataset {data.dataset!r} is not prepared in {folder}. Preparing it takes the network and TensorFlow and is "
        "not done here: where both are at hand, pip install tensorflow tensorflow-datasets, then "
        f"tfds build {data.dataset} --file_format=array_record --data_dir={folder}, and give that folder as config.data.path"
    )


def _only(builder, feature):
    """Leaves all other features undecoded, images among them."""
    tfds = _import()
    return {name: tfds.decode.SkipDecoding() for name in builder.info.features if name != feature}


def _feature(builder, wanted):
    tfds = _import()
    texts = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
    if wanted is None and (len(texts) == 1 or "text" in texts):
        return "text" if "text" in texts else texts[0]
    if wanted in texts:
        return wanted
    what = f"{wanted!r}, which is not one of them" if wanted else "not set, and none of them is called 'text'"
    raise UserError(
        f"{builder.info.full_name} has the text features {', '.join(texts) or '(none)'}; config.data.text_feature is {what}"
    )


def _default_split(builder, split):
    for name in _SPLIT_NAMES[split]:
        if name in builder.info.splits:
            return name
    raise UserError(
        f"{builder.info.full_name} has the splits {', '.join(builder.info.splits)} and none for {split}; set "
        "config.data.split_expressions to three, such as ('train[:90%]', 'train[90%:95%]', 'train[95%:]')"
    )


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def prepare_text_files(files: Mapping[str, str | os.PathLike], data_dir: str | os.PathLike) -> pathlib.Path:
    """Makes a tensorflow-datasets dataset of text files: an example is a line with its newline, in the order of the file.

    Args:
      files: split -> text file (or .gz).
      data_dir: where datasets are kept; the dataset is `text_files/1.0.0` in it.

    Returns:
      The folder that was made, for `config.data.path`; with `config.data.examples` "pieces" its token stream is that of the
      files themselves.

    Raises:
      UserError: the extra is not installed, there is such a dataset already, or a file cannot be read as text.
    """
    builder = _text_files_builder()(files=files, data_dir=os.fspath(data_dir), file_format="array_record")
    if builder.is_prepared():
        raise UserError(f"{builder.data_dir} is there already; remove it, or give another data_dir")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


@functools.cache
def _text_files_builder():
    tfds = _import()

    class TextFiles(tfds.core.GeneratorBasedBuilder):
        """Lines of local text files."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, files, **arguments):
            self._files = files
            super().__init__(**arguments)

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(pathlib.Path(path)) for split, path in self._files.items()}

        def _generate_examples(self, path):
            for number, line in enumerate(read_lines(path)):
                yield number, {"text": line}

    return TextFiles
