"""lm.training.metrics: what is recorded stands in metrics.jsonl and in TensorBoard's events, or a sentence says why not."""

import functools
import pathlib
import struct

import pytest
import tensorboardX.record_writer
from helpers import refused
from tensorboardX.proto.event_pb2 import Event

from lm.runs.folder import RunFolder
from lm.training.metrics import recording

COUNTS = {"tokens": 64, "seconds": 0.5}
LINES = [
    {"step": 2, "split": "train", **COUNTS, "loss": 3.5, "learning_rate": 0.25},
    {"step": 3, "split": "valid", **COUNTS, "loss": 3.25},
    {"step": 4, "split": "train", **COUNTS, "loss": 3.0},
]


def record(folder, step, lines):
    heard = []
    with recording(folder, step, heard.append) as tell:
        for line in lines:
            tell(line)
    return heard


def events(folder):
    """(step, name, value) of every scalar; a record is its length, a checksum of that, the event and its checksum."""
    (path,) = folder.tensorboard.iterdir()
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += length + 16
    return found


def test_both_files_hold_what_was_recorded_and_are_cut_back_together(tmp_path):
    folder = RunFolder(tmp_path)
    assert record(folder, 0, LINES) == LINES == list(folder.read_metrics())
    assert events(folder) == [
        (2, "train/tokens", 64),
        (2, "train/seconds", 0.5),
        (2, "train/loss", 3.5),
        (2, "train/learning_rate", 0.25),
        (3, "valid/tokens", 64),
        (3, "valid/seconds", 0.5),
        (3, "valid/loss", 3.25),
        (4, "train/tokens", 64),
        (4, "train/seconds", 0.5),
        (4, "train/loss", 3.0),
    ]
    again = {"step": 4, "split": "train", **COUNTS, "loss": 2.0}
    assert record(folder, 3, [again]) == [again]
    assert list(folder.read_metrics()) == [*LINES[:2], again]
    assert [event for event in events(folder) if event[1].endswith("loss")][1:] == [
        (3, "valid/loss", 3.25),
        (4, "train/loss", 2.0),
    ]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_full_disk_is_told_where_many_lines_are_recorded(tmp_path, monkeypatch, split):
    full = functools.partial(pathlib.Path("/dev/full").open, "wb")
    monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda path: full())
    with refused(str(tmp_path / "tensorboard"), "cannot be written: No space left on device"):
        record(RunFolder(tmp_path), 0, [{"step": step, "split": split, "loss": 1.0} for step in range(1, 500)])
