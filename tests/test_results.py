"""launch.results: what is kept of a run, which rows the page has, and that it says what the kept files say."""

import dataclasses
import math
import shutil

import pytest
from absl import flags
from helpers import ROOT, config_file, draft, refused, write_corpus

import configs._results as registry
from launch import results as verb
from launch.command import load_config
from lm.config import resolve
from lm.evaluation.variants import Dynamic, Variant
from lm.files import read_json
from lm.reporting.results import NOT_YET_RUN, Row, Section, read_kept

KEPT = ROOT / "lm" / "reporting" / "results"
ROWS = {row.path: row for section in registry.SECTIONS for row in section.rows}


def test_every_row_is_an_experiment_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    for row in (row for section in registry.SECTIONS for row in section.rows):
        assert dataclasses.replace(row, name=ROWS[row.path].name) == ROWS[row.path]
    configs = [repr(resolve(load_config(row.config, list(row.overrides)))) for row in ROWS.values()]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize("path", [path for path in ROWS if (KEPT / path).exists()])
def test_a_kept_run_is_of_the_row_as_it_is_today_and_speaks_of_no_machine(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    row = ROWS[path]
    for seed in row.seeds:
        run = read_kept(KEPT, row, seed, load_config(row.config, [*row.overrides, f"--config.seed={seed}"]))
        assert run is None or {"valid", "test"} <= set(run.evaluations)
    for file in (KEPT / path).rglob("*.json*"):
        assert '"/' not in file.read_text(), file


def test_what_is_kept_of_runs_is_on_the_page(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    fields = dict(training__num_steps=3, training__evaluate_every_steps=2, training__log_every_steps=1, evaluation__rows=4)
    config = draft(corpus, **fields, optimizer__learning_rate=0.1)
    path = str(config_file(tmp_path / "lstm.py", config))
    dynamic = Variant(Dynamic("sgd", 0.1, 0.0))
    whole = Row("a/lstm", "LSTM", path, (), (0, 1), "A paper", {"": (20.5, 19.25), "dynamic": (None, 9.0)}, (dynamic,), True)
    part = Row("a/part", "without a part", path, ("--config.optimizer.learning_rate=0.001",))
    missing = Row("a/missing", "Missing", path, ("--config.seed=9",), published={"": (3.0, 2.0)})
    sections = tuple(Section(kind, f"Of {kind}.", kind, (whole, part, missing)) for kind in ("published", "equal"))
    renamed = dataclasses.replace(whole, name="all of it")
    sections += (Section("parts", "Of parts.", "parts", (renamed, part, missing)),)
    monkeypatch.setattr(registry, "SECTIONS", sections)
    folder, workdir = tmp_path / "results", tmp_path / "runs"

    def call(*arguments):
        flags.FLAGS(["results", f"--folder={folder}", "--workdir=", "--only=", "--data_path=", *arguments])
        return verb.main([])

    assert call() == {"page": str(folder / "README.md"), "left": ["a/lstm", "a/part", "a/missing"]}
    assert (folder / "README.md").read_text().count(NOT_YET_RUN) > 5
    for only in ("a/lstm", "a/part"):
        left = call(f"--workdir={workdir}", f"--only={only}", f"--data_path={corpus}")["left"]
    assert left == ["a/missing"]
    shutil.rmtree(workdir)
    before = (folder / "README.md").read_text()
    assert call(f"--workdir={workdir}", "--only=a/lstm")["left"] == left and not workdir.exists()
    assert (folder / "README.md").read_text() == before

    def score(row, seed, name):
        return read_json(folder / row / f"seed_{seed}" / "evaluation" / f"{name}.json", "")

    def spread(name):
        low, high = sorted(math.exp(score("a/lstm", seed, name)["loss"]) for seed in (0, 1))
        return f"**{(low + high) / 2:,.2f}** ({low:,.2f} to {high:,.2f})"

    lines = before.splitlines()
    (plain,) = [line for line in lines if line.startswith("| LSTM | ") and "A paper" in line]
    assert f"| 20.5 / 19.25 (A paper) | {spread('valid')} | {spread('test')} | carried |" in plain and "| 0, 1 |" in plain
    equal, parts = lines[lines.index("## equal") :], lines[lines.index("## parts") :]
    assert any(line.startswith("| LSTM | ") for line in equal) and any(line.startswith("| all of it | ") for line in parts)
    (adapted,) = [line for line in lines if line.startswith("| LSTM, dynamic sgd, 0.1, 0.0, 5 | ")]
    assert f"| – / 9.0 (A paper) | {spread(f'valid{dynamic.ending}')} |" in adapted
    (last,) = [line for line in lines if line.startswith("| LSTM, last epoch | ")]
    assert spread("test.step-3") in last
    (absent,) = [line for line in lines if line.startswith("| Missing | ") and "3.0 / 2.0" in line]
    assert absent.count(NOT_YET_RUN) == 2
    costs = [
        score("a/part", 0, split)["loss"] - sum(score("a/lstm", s, split)["loss"] for s in (0, 1)) / 2
        for split in ("valid", "test")
    ]
    assert any(f"| {costs[0]:+.4f} | {costs[1]:+.4f} |" in line for line in lines if line.startswith("| without a part | "))
    assert "Not yet run: Missing." in lines and (folder / "equal.png").stat().st_size > 10_000
    kept = folder / "a" / "lstm" / "seed_0"
    assert not [file for file in kept.rglob("*") if file.suffix == ".npz"]
    assert read_json(kept / "evaluation" / "test.json", "")["text"] == "test.txt"

    other = dataclasses.replace(part, overrides=("--config.optimizer.learning_rate=0.01",))
    monkeypatch.setattr(registry, "SECTIONS", (Section("published", "", "published", (other,)),))
    with refused("a/part", "optimizer.learning_rate: 0.001 then, 0.01 now", "remove it and run the row again"):
        call()


def test_a_row_that_there_is_not_is_refused(tmp_path):
    flags.FLAGS(["results", f"--folder={tmp_path}", "--only=nothing"])
    with refused("--only=nothing is in the path of no row; there are ptb/"):
        verb.main([])
