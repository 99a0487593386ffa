"""launch.results: what is kept of a run, which rows the page has, and that it says what the kept files say."""

import dataclasses
import json
import math
import shutil

import pytest
from helpers import ROOT, call_verbs, config_file, draft, refused, untrained_run, write_corpus

import configs._results as registry
from configs._common import steps_of
from configs.ptb._text import TRAIN_TOKENS
from launch.command import load_config
from lm.config import resolve
from lm.evaluation.evaluate import evaluate_run
from lm.files import read_json, write_json
from lm.models.build import count_params, solve_widths
from lm.reporting.results import NOT_YET_RUN, Row, Section, is_scored, keep, read_kept, run_path, write_page
from lm.reporting.runs import read_run
from lm.runs.folder import RunFolder
from lm.runs.open import open_run

KEPT = ROOT / "lm" / "reporting" / "results"
ROWS = {row.path: row for section in registry.SECTIONS for row in section.rows}


def test_every_row_is_an_experiment_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    for row in (row for section in registry.SECTIONS for row in section.rows):
        assert dataclasses.replace(row, name=ROWS[row.path].name) == ROWS[row.path]
    configs = [repr(resolve(load_config(row.config, list(row.overrides)))) for row in ROWS.values()]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    "path, vocab_size, millions",
    [
        ("ptb/mikolov", 10_000, 6.1),
        ("ptb/zaremba_medium", 10_000, 20),
        ("ptb/zaremba_large", 10_000, 66),
        ("ptb/gal_medium", 10_000, 20),
        ("ptb/gal_large", 10_000, 66),
        ("ptb/melis", 10_000, 24),
        ("ptb/awd_lstm", 10_000, 24),
        ("ptb/awd_lstm_mos", 10_000, 22),
        ("ptb/mogrifier", 10_000, 24),
        ("ptb/transformer_xl", 10_000, 24),
        ("wikitext2/melis", 33_278, 24),
        ("wikitext2/awd_lstm", 33_278, 33),
        ("wikitext2/awd_lstm_mos", 33_278, 35),
        ("wikitext2/mogrifier", 33_278, 35),
        ("wikitext103/transformer_xl", 267_735, 151),
        ("wikitext103/transformer_xl_large", 267_735, 283),  # by their script; the paper says 257
        ("enwik8/melis", 205, 46),
        ("enwik8/awd_lstm", 205, 47),
        ("enwik8/mogrifier", 205, 96),
        ("enwik8/transformer_xl", 205, 277),
        ("text8/transformer_xl", 27, 277),
        ("lm1b/transformer_xl", 793_471, 836),  # 0.8 billion: 700 of the layers, 136 of the clusters
    ],
)
def test_a_published_model_is_of_the_papers_size(path, vocab_size, millions, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = solve_widths(resolve(load_config(ROWS[path].config, [])), vocab_size)
    assert abs(count_params(config, vocab_size) / 1e6 / millions - 1) < 0.025  # papers round, up or down


@pytest.mark.parametrize("path, vocab_size, theirs", [("ptb", 10_000, 24_221_600), ("wikitext2", 33_278, 33_556_078)])
def test_awd_lstm_is_of_its_authors_size(path, vocab_size, theirs, monkeypatch):
    """As their code counts, where each gate has two biases in place of one."""
    monkeypatch.chdir(ROOT)
    config = resolve(load_config(ROWS[f"{path}/awd_lstm"].config, []))
    assert count_params(config, vocab_size) == theirs - 4 * (1150 + 1150 + 400)


@pytest.mark.parametrize(
    "path, fields",
    [
        ("ptb/melis", dict(num_layers=4)),
        ("ptb/mogrifier", dict(num_layers=2, mogrifier_rounds=5, mogrifier_rank=84)),
        ("wikitext2/mogrifier", dict(num_layers=2, mogrifier_rounds=6, mogrifier_rank=48)),
        ("ptb/transformer_xl", dict(num_layers=12, num_heads=10)),
    ],
)
def test_a_model_whose_width_is_solved_has_the_papers_shape(path, fields, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = resolve(load_config(ROWS[path].config, []))
    assert {name: getattr(config.model, name) for name in fields} == fields


def test_what_is_left_out_costs_no_step_of_twelve_epochs(monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = next(section for section in registry.SECTIONS if section.kind == "parts")
    for row in parts.rows:
        config = load_config(row.config, list(row.overrides))
        assert config.training.num_steps == 12 * steps_of(config, TRAIN_TOKENS), row.path


@pytest.mark.parametrize("path", [path for path in ROWS if (KEPT / path).exists()])
def test_a_kept_run_is_of_the_row_as_it_is_today_and_speaks_of_no_machine(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    row = ROWS[path]
    for seed in row.seeds:
        run = read_kept(KEPT, row, seed, load_config(row.config, [*row.overrides, f"--config.seed={seed}"]))
        assert run is None or {"valid", "test"} <= set(run.evaluations)
    for file in (KEPT / path).rglob("*.json*"):
        assert '"/' not in file.read_text(), file


def test_the_kept_page_is_what_the_command_writes(tmp_path):
    shutil.copytree(KEPT, tmp_path / "results")
    (done,) = call_verbs([["launch.results", f"--folder={tmp_path / 'results'}"]], tmp_path / "said")
    assert done.code == 0, done.err
    assert (tmp_path / "results" / "README.md").read_text() == (KEPT / "README.md").read_text()


TABLES = """
from lm.evaluation.variants import Dynamic, Variant
from lm.reporting.results import Published, Row, Section

PATH, RATE = {path!r}, {rate}
DYNAMIC = Variant(Dynamic("sgd", 0.1, 0.0))
PUBLISHED = {{"": Published(20.5, 19.25, "A paper"), "dynamic": Published(None, 9.0, "Another")}}
WHOLE = Row("a/lstm", "LSTM", PATH, (), (0, 1), PUBLISHED, (DYNAMIC,), True)
RENAMED = Row("a/lstm", "all of it", PATH, (), (0, 1), PUBLISHED, (DYNAMIC,), True)
TUNED = Row("a/tuned", "tuned", PATH, ("--config.training.init_from=a/part",))
PART = Row("a/part", "without a part", PATH, (f"--config.optimizer.learning_rate={{RATE}}",))
MISSING = Row("a/missing", "Missing", PATH, ("--config.data.batch_size=2",), published={{"": Published(3.0, 2.0, "A paper")}})
OPENING = "Opening."
SECTIONS = (
    Section("published", "Of papers.", "published", (WHOLE, PART, TUNED, MISSING)),
    Section("equal", "Of equals.", "equal", (WHOLE, PART, MISSING)),
    Section("parts", "Of parts.", "parts", (RENAMED, PART, MISSING)),
)
"""


def valid_lines(kept):
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "valid"]


def test_what_is_kept_of_runs_is_on_the_page(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    fields = dict(training__num_steps=3, training__evaluate_every_steps=2, training__log_every_steps=1, evaluation__rows=4)
    path = str(config_file(tmp_path / "lstm.py", draft(corpus, **fields, optimizer__learning_rate=0.1)))
    for name, rate in (("tables", 0.001), ("changed", 0.01)):
        (tmp_path / f"{name}.py").write_text(TABLES.format(path=path, rate=rate))
    folder, workdir = tmp_path / "results", tmp_path / "runs"
    folder.mkdir()
    verb = ["launch.results", f"--folder={folder}", f"--tables={tmp_path / 'tables.py'}"]
    train = [f"--workdir={workdir}", f"--data_path={corpus}"]
    calls = [[*verb], *([*verb, *train, f"--only={row}"] for row in ("a/lstm", "a/tuned", "a/part", "a/tuned"))]
    empty, *trained = call_verbs(calls, tmp_path / "said")
    assert empty.code == 0 and "0 of 4 rows are there" in empty.out
    assert [done.code for done in trained] == [0, 1, 0, 0] and "3 of 4 rows are there" in trained[3].out
    assert "a/part/seed_0" in trained[1].err  # where it is to start from
    assert read_json(folder / "a" / "tuned" / "seed_0" / "config.json", "")["resolved"]["training"]["init_from"] == "a/part"
    assert "a/lstm/seed_0, best.dynamic-sgd-0.1-0.0-5: perplexity valid" in trained[0].out
    shutil.rmtree(workdir)
    before = (folder / "README.md").read_text()
    changed = ["launch.results", f"--folder={folder}", f"--tables={tmp_path / 'changed.py'}"]
    again, refusal = call_verbs([[*verb, *train, "--only=a/lstm"], changed], tmp_path / "again")
    assert again.code == 0 and not workdir.exists()  # what is kept is not trained again
    assert refusal.code == 1 and "optimizer.learning_rate: 0.001 then, 0.01 now" in refusal.err
    assert "remove it and run the row again" in refusal.err and (folder / "README.md").read_text() == before

    def score(row, seed, name):
        return read_json(folder / row / f"seed_{seed}" / "evaluation" / f"{name}.json", "")

    def spread(name):
        low, high = sorted(math.exp(score("a/lstm", seed, name)["loss"]) for seed in (0, 1))
        return f"**{math.sqrt(low * high):,.2f}** ({low:,.2f} to {high:,.2f})"  # exp of the losses' mean

    lines = before.splitlines()
    assert lines[:3] == ["# Results", "", "Opening."]
    (plain,) = [line for line in lines if line.startswith("| LSTM | ") and "A paper" in line]
    assert f"| 20.5 / 19.25 (A paper) | {spread('valid')} | {spread('test')} | carried |" in plain and "| 0, 1 |" in plain
    equal, parts = lines[lines.index("## equal") :], lines[lines.index("## parts") :]
    assert any(line.startswith("| LSTM | ") for line in equal) and any(line.startswith("| all of it | ") for line in parts)
    (reached,) = [line for line in equal if line.startswith("At equal training time, ")]
    looks = {name: valid_lines(folder / row / "seed_0") for name, row in (("LSTM", "a/lstm"), ("without a part", "a/part"))}
    seconds = min(lines[-1]["seconds"] for lines in looks.values())
    for name, lines_of_valid in looks.items():
        found = min((line["perplexity"] for line in lines_of_valid if line["seconds"] <= seconds), default=math.inf)
        assert f"{name} {found:,.2f}" in reached
    (adapted,) = [
        line for line in lines if line.startswith("| LSTM, dynamic: rule sgd, learning rate 0.1, decay 0.0, segment 5 | ")
    ]
    assert f"| – / 9.0 (Another) | {spread('valid.dynamic-sgd-0.1-0.0-5')} |" in adapted
    (last,) = [line for line in lines if line.startswith("| LSTM, last epoch | ")]
    assert spread("test.step-3") in last
    (absent,) = [line for line in lines if line.startswith("| Missing | ") and "3.0 / 2.0" in line]
    assert absent.count(NOT_YET_RUN) == 2
    costs = [
        score("a/part", 0, split)["loss"] - sum(score("a/lstm", s, split)["loss"] for s in (0, 1)) / 2
        for split in ("valid", "test")
    ]
    (line,) = (line for line in parts if line.startswith("| without a part | "))
    machine = read_json(folder / "a" / "part" / "seed_0" / "environment.json", "")["hardware"]
    *_, on_valid, on_test, training, seeds, command = line.strip("| ").split(" | ")
    assert [on_valid, on_test, seeds] == [f"{costs[0]:+.4f}", f"{costs[1]:+.4f}", "0"]
    assert machine in training and command.startswith(f"`{path} --config.optimizer.learning_rate=")
    assert "Not yet run: Missing." in lines and (folder / "equal.png").stat().st_size > 10_000
    kept = folder / "a" / "lstm" / "seed_0"
    assert not [file for file in kept.rglob("*") if file.suffix == ".npz"]
    assert read_json(kept / "evaluation" / "test.json", "")["text"] == "test.txt"

    for split in ("valid", "test"):  # as if the row had got this way of scoring since
        for seed in (0, 1):
            (folder / "a" / "lstm" / f"seed_{seed}" / "evaluation" / f"{split}.dynamic-sgd-0.1-0.0-5.json").unlink()
    (asked,) = call_verbs([verb], tmp_path / "asked")
    assert asked.code == 0 and "2 of 4 rows are there, with all their seeds and ways of scoring" in asked.out

    other = folder / "a" / "part" / "seed_0"
    test = other / "evaluation" / "test.json"
    write_json(test, {**read_json(test, ""), "text_sha256": "another"})
    found = {"a/lstm": [read_run(kept)], "a/part": [read_run(other)]}
    rows = tuple(Row(path, path, "lstm.py") for path in found)
    for kind in ("parts", "published"):
        with refused("cannot be compared on test: text_sha256"):
            write_page(tmp_path / "mixed", "", [Section("Mixed", "", kind, rows)], found)
    (tmp_path / "mixed").mkdir()
    for split in ("valid", "test"):  # the same text in other tokens
        scored = read_json(kept / "evaluation" / f"{split}.json", "")
        tokenizer = {**scored["tokenizer"], "sha256": "another"}
        write_json(other / "evaluation" / f"{split}.json", {**scored, "tokenizer": tokenizer, "tokens": 7})
    found["a/part"] = [read_run(other)]
    for kind in ("parts", "published"):
        with refused("the rows of 'Mixed' have different tokenizers, whose perplexity does not compare"):
            write_page(tmp_path / "mixed", "", [Section("Mixed", "", kind, rows)], found)
    text = write_page(tmp_path / "mixed", "", [Section("Mixed", "", "equal", rows)], found).read_text()
    assert "At equal training time" not in text and "![Valid bits per byte against" in text and "valid perplexity" not in text

    asks_last = Row("a/lstm", "LSTM", "lstm.py", last_epoch=True)
    assert is_scored(read_run(kept), asks_last)
    (last,) = (kept / "evaluation").glob("test.step-*.json")
    last.unlink()
    assert is_scored(read_run(kept), rows[0]) and not is_scored(read_run(kept), asks_last)


def test_only_what_a_row_asks_for_is_kept(tmp_path):
    config = draft(write_corpus(tmp_path / "corpus"), "ngram")
    workdir = untrained_run(config, tmp_path / "run")
    windows = [dict(split=split, context=8) for split in ("valid", "test")]
    for options in (dict(split="valid"), dict(split="test"), *windows):
        evaluate_run(open_run(str(workdir)), **options)
    keep(workdir, tmp_path / "kept", Row("a/ngram", "n-gram", "ngram.py"), config)
    assert {path.name for path in (tmp_path / "kept" / "evaluation").iterdir()} == {"valid.json", "test.json"}


def test_what_a_run_may_change_a_row_may_not(tmp_path):
    """More steps, and looks at valid, which choose the best checkpoint; not how often it logs."""
    corpus, row = write_corpus(tmp_path / "corpus"), Row("a/lstm", "LSTM", "lstm.py")
    config = draft(corpus)
    RunFolder(run_path(tmp_path, row, 0)).write_config(config, resolve(config), {})
    steps = config.training.num_steps
    for field, value in (("num_steps", steps + 1), ("evaluate_every_steps", 7)):
        with refused(f"training.{field}: ", f" then, {value} now", "remove it and run the row again"):
            read_kept(tmp_path, row, 0, draft(corpus, **{f"training__{field}": value}))
    RunFolder(run_path(tmp_path, row, 0)).write_environment({})
    with refused("is not evaluated yet"):  # the config is the row's
        read_kept(tmp_path, row, 0, draft(corpus, training__log_every_steps=7))


def test_a_peer_stands_where_a_paper_does(tmp_path):
    row = Row("a/lstm", "LSTM", "lstm.py", peer="peer.json")

    def line():
        page = write_page(tmp_path, "", [Section("Peers", "", "published", (row,))], {})
        return next(line for line in page.read_text().splitlines() if line.startswith("| LSTM | "))

    (tmp_path / "a" / "lstm").mkdir(parents=True)
    assert "(PyTorch's example" not in line()
    peer = {"perplexity": 140.118, "seconds": 1860.2, "hardware": "A processor, 2 cores", "date": "2026-11-28 02:00 UTC"}
    write_json(tmp_path / "a" / "lstm" / "peer.json", peer)
    assert "| – / 140.12 (PyTorch's example, 31 min 00 s; A processor, 2 cores, 2026-11-28) | not yet run |" in line()


def test_what_is_wrong_is_said_in_one_sentence(tmp_path):
    (tmp_path / "empty.py").write_text("OPENING = ''\n")
    (tmp_path / "rows.py").write_text("OPENING, SECTIONS = '', ('a row',)\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    section = "from lm.reporting.results import Row, Section\nOPENING = ''\nSECTIONS = (Section('T', '', {kind!r}, {rows}),)\n"
    (tmp_path / "kind.py").write_text(section.format(kind="sorted", rows="()"))
    (tmp_path / "twice.py").write_text(section.format(kind="equal", rows="(Row('a', 'A', 'a.py'), Row('a', 'B', 'b.py'))"))
    both = ["configs/compare/lstm.py", "configs/ptb/small/lstm.py"]
    (tmp_path / "both.py").write_text(
        section.format(kind="equal", rows=f"tuple(Row(path, path, path) for path in {both})").replace("'T'", "'Both'")
    )
    (tmp_path / "results").mkdir()
    folder = f"--folder={tmp_path / 'results'}"
    calls = {
        f"--folder={tmp_path / 'result'} does not exist: give the folder of kept runs": [folder[:-1]],
        f"--data_path={tmp_path / 'x'} does not exist": [
            folder,
            f"--workdir={tmp_path / 'runs'}",
            f"--data_path={tmp_path / 'x'}",
        ],
        "--folder is missing": [],
        "--only=nothing is in the path of no row; there are ptb/": [folder, "--only=nothing", f"--workdir={tmp_path / 'runs'}"],
        "--only is set without --workdir": [folder, "--only=ptb"],
        "the rows to run are of data/enwik8, data/lm1b, data/ptb, data/tensorflow_datasets, data/text8/text8": [
            folder,
            f"--workdir={tmp_path / 'runs'}",
            f"--data_path={tmp_path}",
        ],
        "broken.py: ModuleNotFoundError: No module named 'nothing_of_that_name'": [folder, f"--tables={tmp_path / 'broken.py'}"],
        "kind.py: section 'T' has kind 'sorted'; there are published, equal": [folder, f"--tables={tmp_path / 'kind.py'}"],
        "two rows have the path 'a', but not the same config": [folder, f"--tables={tmp_path / 'twice.py'}"],
        "the rows to run are of data/ptb, python_docs": [
            folder,
            f"--tables={tmp_path / 'both.py'}",
            f"--workdir={tmp_path / 'runs'}",
            f"--data_path={tmp_path}",
        ],
        "empty.py: KeyError: 'SECTIONS'; configs/_results.py shows": [folder, f"--tables={tmp_path / 'empty.py'}"],
        "rows.py: OPENING must be text, SECTIONS a tuple of Section;": [folder, f"--tables={tmp_path / 'rows.py'}"],
        "absent.py cannot be read": [folder, f"--tables={tmp_path / 'absent.py'}"],
    }
    for done, sentence in zip(
        call_verbs([["launch.results", *call] for call in calls.values()], tmp_path / "said"), calls, strict=True
    ):
        assert done.code == 1 and sentence in done.err and done.err.count("\n") == 1
