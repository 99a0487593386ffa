"""lm.reporting: reading runs, refusing what cannot be compared, the statistics, the table, the figures and the report."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lm.errors import UserError
from lm.reporting import plots, report as reports
from lm.reporting.comparable import check_comparable
from lm.reporting.report import compare, write_report
from lm.reporting.runs import read_run
from lm.reporting.statistics import default_block_length, loss_by_position, paired_block_bootstrap
from lm.reporting.table import comparison_table, duration, result

BYTES, WORDS = 6000, 1000
VARIANT = "valid.context-64-stride-64"


def write_evaluation(workdir, name, nll_N, **changes):
    """evaluation/<name>.json and .npz of a text with BYTES and WORDS; `changes` may name fields of records as record__field."""
    nll_N = np.asarray(nll_N, np.float32)
    total = float(nll_N.sum(dtype=np.float64))
    figures = {
        "split": name.partition(".")[0],
        "loss": total / nll_N.size,
        "perplexity": float(np.exp(total / nll_N.size)),
        "bits_per_byte": total / math.log(2) / BYTES,
        "word_perplexity": float(np.exp(total / WORDS)),
        "nll_sum": total,
        "tokens": nll_N.size,
        "bytes": BYTES,
        "words": WORDS,
        "text_sha256": "text",
        "tokenizer": {"name": "subword", "sha256": "tokenizer", "vocab_size": 50},
        "protocol": {"context": None, "stride": None, "precision": "float32", "adaptation": None},
        "checkpoint": {"step": 80, "which": "best"},
        "seconds": 0.5,
    }
    for field, value in changes.items():
        record, _, inner = field.partition("__")
        if inner:
            figures[record][inner] = value
        else:
            figures[field] = value
    (workdir / "evaluation").mkdir(exist_ok=True)
    (workdir / "evaluation" / f"{name}.json").write_text(json.dumps(figures))
    targets_N = np.random.default_rng(1).integers(0, 50, nll_N.size).astype(np.int32)  # the text: equal for all runs
    np.savez(workdir / "evaluation" / f"{name}.npz", targets=targets_N, nll=nll_N)


def make_run(workdir, loss, *, architecture="lstm", num_tokens=2000, seed=0, **changes):
    """A run with evaluations of valid and test whose mean nll is exactly `loss` (test) and `loss` + 0.1 (valid)."""
    workdir.mkdir()
    config = {"given": {}, "resolved": {"model": {"architecture": architecture}}, "num_params": 1234567, "vocab_size": 50}
    (workdir / "config.json").write_text(json.dumps(config))
    if architecture == "ngram":
        lines = [{"step": 1, "split": "train", "tokens": 9000, "seconds": 3.0, "tokens_per_second": 3000.0}]
    else:
        lines = [
            {"step": 40, "split": "train", "loss": 5.0, "tokens": 40000, "seconds": 100.0, "tokens_per_second": 400.0},
            {"step": 40, "split": "valid", "loss": loss + 0.5, "tokens": 40000, "seconds": 100.0, "rows": 4},
            {"step": 80, "split": "train", "loss": 4.0, "tokens": 80000, "seconds": 200.0, "tokens_per_second": 1000.0},
            {"step": 120, "split": "train", "loss": 3.0, "tokens": 120000, "seconds": 230.0, "tokens_per_second": 1100.0},
            {"step": 120, "split": "valid", "loss": loss + 0.1, "tokens": 120000, "seconds": 230.0, "rows": 4},
        ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = f"python -m launch.train --config={architecture}"
    environment = {"python": "3.11", "device": "cpu", "date": "2026-01-01", "command": command}
    (workdir / "environment.json").write_text(json.dumps(environment))
    noise_N = np.random.default_rng(seed).normal(0, 0.3, num_tokens)
    write_evaluation(workdir, "test", loss + noise_N - noise_N.mean(), **changes)
    write_evaluation(workdir, "valid", loss + 0.1 + noise_N - noise_N.mean(), **changes)
    return workdir


@pytest.fixture
def pair(tmp_path):
    return {"a": make_run(tmp_path / "a", math.log(20)), "b": make_run(tmp_path / "b", math.log(30), seed=1)}


# Reading


def test_read_run_keeps_what_the_files_say(tmp_path):
    run = read_run(make_run(tmp_path / "lstm-small", math.log(20)))
    assert (run.name, run.num_params, run.vocab_size, run.is_ngram) == ("lstm-small", 1234567, 50, False)
    assert [line["step"] for line in run.train_lines] == [40, 80, 120]
    assert [line["step"] for line in run.valid_lines] == [40, 120]
    assert run.evaluation("test")["perplexity"] == pytest.approx(20)
    assert run.token_scores("test").nll_N.shape == (2000,)


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "config.json").unlink(), ["no run", "config.json"]),
        (lambda run: (run / "config.json").write_text("{"), ["config.json", "damaged"]),
        (lambda run: (run / "config.json").write_text("{}"), ["config.json", "architecture"]),
        (lambda run: [path.unlink() for path in run.glob("evaluation/*")], ["not evaluated yet", "launch.evaluate"]),
        (lambda run: (run / "evaluation/test.json").write_text("[]"), ["test.json", "damaged"]),
        (lambda run: (run / "evaluation/test.json").write_text('{"protocol": {}}'), ["test.json", "loss", "protocol.context"]),
        (lambda run: edit(run / "evaluation/test.json", protocol=None), ["test.json", "lacks protocol.context"]),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{}\n'), ["metrics.jsonl", "line 1"]),
    ],
)
def test_read_run_names_what_is_wrong(tmp_path, damage, words):
    workdir = make_run(tmp_path / "run", 3.0)
    damage(workdir)
    with pytest.raises(UserError) as error:
        read_run(workdir)
    assert all(word in str(error.value) for word in words), error.value


def test_token_scores_must_belong_to_the_figures(tmp_path):
    workdir = make_run(tmp_path / "run", 3.0)
    path = workdir / "evaluation" / "test.npz"
    with np.load(path) as arrays:
        targets_N, nll_N = arrays["targets"], arrays["nll"]
    for wrong in (nll_N * 1.01, nll_N[:-1]):
        np.savez(path, targets=targets_N[: wrong.size], nll=wrong)
        with pytest.raises(UserError, match="test.npz"):
            read_run(workdir).token_scores("test")
    path.write_bytes(b"not a zip file")
    with pytest.raises(UserError, match="test.npz is damaged"):
        read_run(workdir).token_scores("test")
    path.unlink()
    with pytest.raises(UserError, match="test.npz is missing"):
        read_run(workdir).token_scores("test")


# What may be compared


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"text_sha256": "other"}, "text_sha256", "'other'"),
        ({"bytes": 6001}, "bytes", "6001"),
        ({"words": 999}, "words", "999"),
        ({"protocol__adaptation": "dynamic"}, "adaptation", "'dynamic'"),
        ({"protocol__dropout_samples": 10}, "dropout_samples", "10"),
        ({"protocol__temperature": 1.1}, "temperature", "1.1"),
        ({"num_tokens": 1999}, "tokens", "1999"),
        ({"text_sha256": "other", "tokenizer__sha256": "other"}, "text_sha256", "'other'"),
    ],
)
def test_comparison_refuses_and_names_field_runs_and_values(tmp_path, change, field, value):
    one = read_run(make_run(tmp_path / "one", 3.0))
    other = read_run(make_run(tmp_path / "other", 3.0, **change))
    with pytest.raises(UserError) as error:
        check_comparable([one, other], "test")
    test = one.evaluation("test")
    ours = test[field] if field in test else test["protocol"].get(field)
    for word in (f"{field} is", f"{ours!r} for one", f"{value} for other"):
        assert word in str(error.value)


def test_context_precision_and_step_may_differ(tmp_path):
    changes = {"protocol__context": 64, "protocol__stride": 16, "protocol__precision": "bfloat16", "checkpoint__step": 7}
    runs = [read_run(make_run(tmp_path / "one", 3.0)), read_run(make_run(tmp_path / "other", 3.0, **changes))]
    assert check_comparable(runs, "test") is True
    table = comparison_table(runs)
    columns = dict(zip(table.headers, zip(*table.rows, strict=True), strict=True))
    assert columns["test context"] == ("carried", "windows 64, stride 16")
    assert columns["precision"] == ("float32", "bfloat16")
    assert columns["step"] == ("80", "7")


def test_equal_tokenizers_need_equal_tokens_whatever_stands_between(tmp_path):
    other = {"tokenizer__sha256": "other"}
    runs = [
        read_run(make_run(tmp_path / "one", 3.0)),
        read_run(make_run(tmp_path / "two", 3.0, num_tokens=1500, **other)),
        read_run(make_run(tmp_path / "three", 3.0, num_tokens=1600, **other)),
    ]
    assert check_comparable(runs[:2], "test") is False
    with pytest.raises(UserError, match="tokens is 1500 for two and 1600 for three"):
        check_comparable(runs, "test")


def test_different_tokenizers_are_compared_by_bytes_and_words_only(tmp_path):
    workdirs = {
        "subword": make_run(tmp_path / "subword", 3.0),
        "word": make_run(tmp_path / "word", 5.0, num_tokens=1000, tokenizer__sha256="other", tokenizer__name="word"),
        "bigram": make_run(tmp_path / "bigram", 4.0, architecture="ngram"),
    }
    comparison = compare(workdirs)
    assert comparison.measure == "bits_per_byte" and comparison.best == "word" and comparison.differences == {}
    assert "valid perplexity" not in comparison.table.headers and "test perplexity" not in comparison.table.headers
    columns = dict(zip(comparison.table.headers, zip(*comparison.table.rows, strict=True), strict=True))
    # 2000 tokens at 3 nats against 1000 at 5, over the same 6000 bytes and 1000 words
    assert columns["test bits per byte"][:2] == (f"{1 / math.log(2):.4f}", f"{5000 / 6000 / math.log(2):.4f}")
    assert columns["test word perplexity"][:2] == (f"{math.exp(6):,.2f}", f"{math.exp(5):,.2f}")
    assert "not comparable" in comparison.table.text() and "unknown-word" in comparison.table.text()
    for name, tokenizer in (("subword", "tokenizer"), ("word", "other")):
        windows = {"protocol__context": 64, "protocol__stride": 64}
        write_evaluation(workdirs[name], VARIANT, np.ones(1000), tokenizer__sha256=tokenizer, **windows)
    report = write_report(workdirs, tmp_path / "report", dict.fromkeys(("subword", "word"), VARIANT))
    assert sorted(path.name for path in report.parent.glob("plots/*")) == ["bits_per_byte.png", "learning_curves.png"]
    assert "perplexity.png" not in report.read_text() and "no loss by position" in report.read_text()


def test_pairs_with_other_targets_are_refused(pair):
    path = pair["b"] / "evaluation" / "test.npz"
    with np.load(path) as arrays:
        np.savez(path, targets=arrays["targets"][::-1], nll=arrays["nll"])
    with pytest.raises(UserError, match=r"a and b .* targets differ"):
        compare(pair)


# Statistics


def test_interval_of_independent_noise_is_the_analytic_one():
    generator = np.random.default_rng(3)
    num_tokens, deviation, planted = 100_000, 0.8, 0.05
    first_N = generator.normal(4.0, 1.0, num_tokens)
    second_N = first_N - planted - generator.normal(0.0, deviation, num_tokens)
    interval = paired_block_bootstrap(first_N, second_N, seed=4)
    assert interval.estimate == pytest.approx((first_N - second_N).mean(), abs=1e-12)
    assert interval.low < planted < interval.high
    # the spread of a variance over 391 blocks is some 6 percent, that of a width 3
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * deviation / math.sqrt(num_tokens), rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        noise_N = np.random.default_rng(seed).normal(0.1, 1.0, 4000)
        interval = paired_block_bootstrap(noise_N, np.zeros(4000), num_resamples=500, seed=seed)
        covered += interval.low < 0.1 < interval.high
    assert 180 <= covered <= 199


def test_blocks_see_what_neighbours_share():
    generator, rho = np.random.default_rng(5), 0.9
    noise_N = generator.normal(0.0, 1.0, 50_000)
    for index in range(1, noise_N.size):
        noise_N[index] += rho * noise_N[index - 1]
    zeros_N = np.zeros_like(noise_N)
    blocks = paired_block_bootstrap(noise_N, zeros_N, num_resamples=2000)
    single = paired_block_bootstrap(noise_N, zeros_N, num_resamples=2000, block_length=1)
    # the standard error of the mean of an AR(1) grows by sqrt((1 + rho) / (1 - rho)), here 4.36
    assert (blocks.high - blocks.low) / (single.high - single.low) == pytest.approx(math.sqrt((1 + rho) / (1 - rho)), rel=0.15)


def test_bootstrap_is_seeded_signed_and_exact_in_length():
    generator = np.random.default_rng(6)
    first_N, second_N = generator.normal(size=1003), generator.normal(size=1003)
    once = paired_block_bootstrap(first_N, second_N, num_resamples=200, seed=1)
    assert once == paired_block_bootstrap(first_N, second_N, num_resamples=200, seed=1)
    assert once != paired_block_bootstrap(first_N, second_N, num_resamples=200, seed=2)
    swapped = paired_block_bootstrap(second_N, first_N, num_resamples=200, seed=1)
    np.testing.assert_allclose(np.array(swapped), [-once.estimate, -once.high, -once.low], atol=1e-12)
    # a resample of a constant has exactly N tokens, also where the last block is cut and where one block is everything
    for block_length in (1, 7, 256, 5000):
        constant = paired_block_bootstrap(np.full(1003, 2.5), np.full(1003, 2.0), block_length=block_length, num_resamples=50)
        np.testing.assert_allclose(np.array(constant), 0.5, atol=1e-12)
    assert [default_block_length(count) for count in (1, 49, 1000, 12_800, 245_569)] == [1, 1, 20, 256, 256]
    # as many words where tokens are bytes or subwords, with at least fifty blocks
    assert [default_block_length(*counts) for counts in ((600_000, 100_000), (46_677, 18_000), (6000, 1000))] == [1536, 664, 120]


def test_blocks_of_a_report_are_as_long_as_so_many_words(tmp_path):
    many = read_run(make_run(tmp_path / "run", 3.0, num_tokens=40_000))
    assert reports._block_length(many) == default_block_length(40_000, WORDS) == 800


def test_what_was_scored_on_another_valid_does_not_compare(tmp_path):
    pair = [read_run(make_run(tmp_path / name, 3.0)) for name in ("one", "other")]
    edit(tmp_path / "other" / "evaluation" / "valid.json", text_sha256="another")
    with pytest.raises(UserError, match="cannot be compared on valid"):
        comparison_table([pair[0], read_run(tmp_path / "other")])


def test_every_token_weighs_the_same_wherever_it_stands():
    difference_N = np.zeros(2000)
    difference_N[:20] = 50.0
    at_the_edge = paired_block_bootstrap(difference_N, np.zeros(2000), block_length=200)
    inside = paired_block_bootstrap(np.roll(difference_N, 1000), np.zeros(2000), block_length=200)
    np.testing.assert_allclose(np.array(at_the_edge), np.array(inside), atol=0.02)


def test_bootstrap_refuses_what_is_no_pair():
    with pytest.raises(UserError, match="same N tokens"):
        paired_block_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(UserError, match="finite"):
        paired_block_bootstrap(np.array([0.0, np.inf]), np.zeros(2))


def test_loss_by_position_finds_a_planted_function_of_the_position():
    context, num_tokens = 12, 12 * 40 + 5  # the last window is short
    position_N = np.arange(num_tokens) % context + 1
    bins = loss_by_position(10.0 / position_N, context)
    assert list(zip(bins.first_P, bins.last_P, strict=True)) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12)]
    for first, last, loss in zip(bins.first_P, bins.last_P, bins.loss_P, strict=True):
        inside = (position_N >= first) & (position_N <= last)
        assert loss == pytest.approx((10.0 / position_N)[inside].mean())
    np.testing.assert_allclose(bins.loss_P[:2], [10, 5])
    np.testing.assert_allclose(bins.high_P[:2] - bins.low_P[:2], 0, atol=1e-9)


def test_loss_by_position_has_the_analytic_band_and_takes_short_texts():
    nll_N = np.random.default_rng(7).normal(4.0, 1.0, 64 * 2000)
    bins = loss_by_position(nll_N, 64)
    size_P = bins.last_P - bins.first_P + 1
    np.testing.assert_allclose(bins.high_P - bins.loss_P, 1.96 / np.sqrt(2000 * size_P), rtol=0.1)
    few = loss_by_position(np.array([1.0, 2.0, 3.0, 2.0, 8.0, 2.0]), 2)  # windows whose first losses are 1, 3 and 8
    np.testing.assert_allclose(few.high_P - few.loss_P, [1.96 * np.std([1, 3, 8], ddof=1) / np.sqrt(3), 0], atol=1e-12)
    short = loss_by_position(np.array([3.0, 2.0, 1.0]), 64)
    assert short.last_P.tolist() == [1, 2, 3] and short.loss_P.tolist() == [3, 2, 1] and np.isnan(short.low_P).all()


# Table


def test_table_shows_exactly_what_the_files_say(tmp_path):
    runs = [
        read_run(make_run(tmp_path / "lstm", math.log(20)), "lstm|big"),
        read_run(make_run(tmp_path / "bigram", math.log(150), architecture="ngram")),
        read_run(make_run(tmp_path / "gru", math.log(30), protocol__context=64, protocol__stride=16)),
    ]
    (tmp_path / "gru" / "evaluation" / "valid.json").unlink()
    runs[2] = read_run(tmp_path / "gru")
    table = comparison_table(runs)
    bits = [f"{2000 * math.log(p) / math.log(2) / BYTES:.4f}" for p in (20, 150, 30)]
    valid = [f"{p * math.exp(0.1):.2f}" for p in (20, 150)]
    assert table.headers == (
        *("model", "parameters", "tokens seen", "tokens/s", "train time"),
        *("valid perplexity", "test perplexity", "test bits per byte", "test context", "step"),
    )
    assert table.rows == (
        ("lstm|big", "1,234,567", "120,000", "1,000", "3 min 50 s", valid[0], "20.00", bits[0], "carried", "80"),
        ("bigram", "1,234,567 n-grams", "9,000", "3,000", "3.0 s", valid[1], "150.00", bits[1], "carried", "80"),
        ("gru", "1,234,567", "120,000", "1,000", "3 min 50 s", "–", "30.00", bits[2], "windows 64, stride 16", "80"),
    )
    assert table.best == {(0, 5), (0, 6), (0, 7)}
    lines = table.text().splitlines()
    assert lines[0].split() == ["tokens", "train", "valid", "test", "test", "bits", "test"]
    assert all(f"{value}*" in lines[3] for value in (valid[0], "20.00", bits[0]))
    ends = {line.index(value) + len(value) for line, value in zip(lines[3:6], ("20.00", "150.00", "30.00"), strict=True)}
    assert len(ends) == 1
    markdown = table.markdown().splitlines()
    assert markdown[2].startswith(r"| lstm\|big | 1,234,567 |") and "| **20.00** |" in markdown[2] and "| 150.00 |" in markdown[3]


def test_runs_that_are_level_are_called_so(tmp_path):
    found = compare({name: make_run(tmp_path / name, 3.0) for name in "ab"})
    assert "has the same perplexity as" in found.summary and "below" not in found.summary


def test_table_of_one_run_marks_nothing_and_missing_metrics_are_dashes(tmp_path):
    workdir = make_run(tmp_path / "run", math.log(20))
    (workdir / "metrics.jsonl").unlink()
    table = comparison_table([read_run(workdir)])
    assert table.best == frozenset() and "*" not in table.text()
    assert table.rows[0][2:5] == ("–", "–", "–")
    plots.learning_curves([read_run(workdir)], "perplexity").savefig(tmp_path / "empty.png")


def test_table_says_when_valid_was_taken_otherwise(tmp_path):
    workdir = make_run(tmp_path / "run", 3.0)
    write_evaluation(workdir, "valid", np.full(2000, 3.0), protocol__context=64, protocol__stride=16)
    (note,) = comparison_table([read_run(workdir)]).notes
    assert "windows 64, stride 16" in note and "run" in note


def test_table_says_which_training_is_not_at_its_end(pair):
    config = {"resolved": {"model": {"architecture": "lstm"}, "training": {"num_steps": 1000}}}
    (pair["b"] / "config.json").write_text(json.dumps(config))
    (note,) = comparison_table([read_run(folder) for folder in pair.values()]).notes
    assert note.startswith("b was trained for 120 of its 1,000 steps")
    config["resolved"]["training"]["num_steps"] = 120
    (pair["b"] / "config.json").write_text(json.dumps(config))
    assert not comparison_table([read_run(folder) for folder in pair.values()]).notes


def test_table_says_where_times_do_not_compare(tmp_path):
    runs = [read_run(make_run(tmp_path / name, 3.0)) for name in ("rnn", "gru", "lstm")]
    placed = [
        dataclasses.replace(run, environment={**run.environment, "hardware": place, "platform": "cpu"})
        for run, place in zip(runs, ("Abacus, 2 cores", "Loom, 8 cores", "Abacus, 2 cores"), strict=True)
    ]
    counted = dataclasses.replace(runs[1], environment={"hardware": "Abacus, 2 cores"})  # as an n-gram model's
    assert comparison_table([placed[0], counted, placed[2]]).notes == ()
    (note,) = comparison_table(placed).notes
    assert note.startswith("Trained on different machines") and "(rnn, lstm: Abacus, 2 cores; gru: Loom, 8 cores)" in note
    on_gpu = {"hardware": "Abacus, 2 cores", "platform": "gpu", "device": "H100", "num_devices": 2}
    (note,) = comparison_table([placed[0], dataclasses.replace(runs[1], environment=on_gpu)]).notes
    assert "(rnn: Abacus, 2 cores; gru: Abacus, 2 cores, 2 × H100)" in note
    moved = dataclasses.replace(placed[0], environment={**placed[0].environment, "earlier": [placed[1].environment] * 2})
    (note,) = comparison_table([moved, placed[2]]).notes
    assert "(rnn: Loom, 8 cores, then Abacus, 2 cores; lstm: Abacus, 2 cores)" in note


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "–"), (0.25, "0.2 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (3599.9, "1 h 00 min")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


# Report and figures


def test_a_result_that_would_fill_a_line_is_shortened():
    shown = [result(value, 2) for value in (None, 9.999, 1234.567, math.exp(700), math.inf)]
    assert shown == ["–", "10.00", "1,234.57", "1.01e+304", "inf"]


def test_report_holds_the_numbers(pair, tmp_path):
    pair["5-gram"] = make_run(tmp_path / "ngram", math.log(60), architecture="ngram", seed=2)
    for name in "ab":
        nll_N = 1.0 + 1.0 / (np.arange(2000) % 64 + 1)
        write_evaluation(pair[name], VARIANT, nll_N, protocol__context=64, protocol__stride=64)
    report = write_report(pair, tmp_path / "out" / "report", dict.fromkeys("ab", VARIANT))
    assert report == tmp_path / "out" / "report" / "report.md"
    text, values = report.read_text(), json.loads((report.parent / "report.json").read_text())
    assert sorted(path.name for path in report.parent.iterdir()) == ["plots", "report.json", "report.md"]
    for name in ("learning_curves", "perplexity", "loss_by_position"):
        assert (report.parent / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{name}.png)" in text and f"plots/{name}.png" in values["plots"]

    gap = {entry["model"]: entry for entry in values["differences"] if entry["against"] == "a"}
    over_ngram = {entry["model"]: entry["nats_per_token"] for entry in values["differences"] if entry["against"] == "5-gram"}
    assert over_ngram == {"a": pytest.approx(math.log(20 / 60), abs=1e-6), "b": pytest.approx(math.log(30 / 60), abs=1e-6)}
    assert "nats per token above a |" in text and "nats per token above 5-gram |" in text
    assert values["best"] == "a" and values["measure"] == "perplexity" and set(gap) == {"b", "5-gram"}
    assert gap["b"]["nats_per_token"] == pytest.approx(math.log(1.5), abs=1e-6)
    assert gap["b"]["low"] < math.log(1.5) < gap["b"]["high"] and gap["b"]["against"] == "a" and gap["b"]["block_length"] == 40
    assert "a has the lowest perplexity, 20.00: 33.3% below that of b (30.00)" in values["summary"]
    assert f"{gap['b']['low']:.4f} to {gap['b']['high']:.4f}, so the two are told apart" in values["summary"]
    assert "5-gram, has 60.00" in values["summary"]
    assert [model["test_perplexity"] for model in values["models"]] == pytest.approx([20, 30, 60])
    assert values["models"][0]["evaluations"]["test"]["text_sha256"] == "text"
    assert values["loss_by_position"]["a"]["last"] == [1, 2, 4, 8, 16, 32, 64]
    assert values["loss_by_position"]["a"]["loss"][:2] == pytest.approx([2.0, 1.5])

    protocol = ("N (tokens): 2,000", "6,000 bytes, 1,000 words, sha256 `text`", "vocabulary of 50")
    environment = ("- date: 2026-01-01", "- device: cpu", "python -m launch.train --config=lstm")
    for words in (values["summary"], "| **20.00** |", "| 5-gram |", "Not evaluated so: 5-gram", *protocol, *environment):
        assert words in text


def test_report_of_equals_does_not_claim_a_winner(tmp_path):
    workdirs = {name: make_run(tmp_path / name, 3.0 + 1e-4 * seed, seed=seed) for seed, name in enumerate("ab")}
    assert "does not tell the two apart" in compare(workdirs).summary


def test_report_survives_a_diverged_run_and_drops_old_plots(pair, tmp_path):
    diverged = pair["diverged"] = make_run(tmp_path / "diverged", 3.0)
    for split in ("valid", "test"):
        write_evaluation(diverged, split, np.full(2000, np.nan))
    lines = (diverged / "metrics.jsonl").read_text().replace('"loss": 3.1', '"loss": NaN')
    (diverged / "metrics.jsonl").write_text(lines)
    old = tmp_path / "report" / "plots" / "loss_by_position.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier report")
    report = write_report(pair, tmp_path / "report")
    values = json.loads((report.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert values["best"] == "a" and [entry["model"] for entry in values["differences"]] == ["b"]
    assert values["models"][2]["test_perplexity"] is None and not old.exists()


def test_who_reads_a_report_while_it_is_replaced_reads_the_old_one(pair, tmp_path):
    report = write_report(pair, tmp_path / "report")
    before = report.read_text()
    with report.open() as reader:
        write_report({"a": pair["a"]}, tmp_path / "report")
        assert reader.read() == before != report.read_text()


def test_a_failing_report_leaves_the_old_one_whole(pair, tmp_path, monkeypatch):
    report = write_report(pair, tmp_path / "report")
    before = {path: path.read_bytes() for path in report.parent.rglob("*") if path.is_file()}
    monkeypatch.setattr("lm.reporting.report.json.dumps", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(pair, tmp_path / "report")
    assert {path: path.read_bytes() for path in report.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, f"has no evaluation/{VARIANT}.json"),
        ({}, "do not overlap"),
        ({"protocol__context": 64, "protocol__stride": 32}, "windows 64, stride 32"),
    ],
)
def test_report_refuses_a_variant_that_shows_no_positions(pair, tmp_path, changes, words):
    if changes is not None:
        write_evaluation(pair["a"], VARIANT, np.ones(2000), **changes)
    with pytest.raises(UserError, match=words):
        write_report(pair, tmp_path / "report", {"a": VARIANT})
    assert not (tmp_path / "report").exists()


def test_positions_of_a_run_whose_own_protocol_they_are(pair, tmp_path):
    """Its figure is called plainly "valid"; that of another run is not."""
    windows = {"protocol__context": 64, "protocol__stride": 64}
    write_evaluation(pair["a"], VARIANT, np.ones(2000), **windows)
    write_evaluation(pair["b"], "valid", np.full(2000, 2.0), **windows)
    report = write_report(pair, tmp_path / "report", {"a": VARIANT, "b": "valid"})
    values = json.loads((report.parent / "report.json").read_text())
    assert {name: bins["loss"][0] for name, bins in values["loss_by_position"].items()} == {"a": 1.0, "b": 2.0}
    assert values["evaluations_by_position"] == {"a": VARIANT, "b": "valid"}


def test_a_report_that_cannot_be_written_is_one_sentence(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*cannot be written"):
        write_report(pair, tmp_path / "file")


def test_a_comparison_needs_runs_and_a_finite_result(tmp_path):
    with pytest.raises(UserError, match="nothing to compare"):
        compare({})
    workdir = make_run(tmp_path / "run", 3.0)
    write_evaluation(workdir, "test", np.full(2000, np.inf))
    with pytest.raises(UserError, match="no run has a finite test perplexity: run"):
        compare({"run": workdir})


def test_a_model_keeps_its_colour_in_every_figure(pair, tmp_path):
    from matplotlib.colors import to_hex, to_rgb

    pair["5-gram"] = make_run(tmp_path / "ngram", math.log(60), architecture="ngram")
    runs = [read_run(path, name) for name, path in pair.items()]
    positions = {"b": loss_by_position(np.ones(640), 64)}
    curves = plots.learning_curves(runs, "perplexity").axes[0]
    bars = plots.result_bars(runs, "perplexity").axes[0]
    position = plots.loss_by_position(runs, positions, VARIANT).axes[0]
    colors = {line.get_label(): line.get_color() for line in curves.lines}
    assert len(set(colors.values())) == 3
    red, green, blue = to_rgb(curves.lines[-1].get_color())  # of the baseline
    assert red == green == blue
    assert position.lines[0].get_color() == colors["b"]
    assert [to_hex(patch.get_facecolor()).upper() for patch in bars.patches[:2]] == [colors["a"], colors["b"]]
    np.testing.assert_allclose(curves.lines[0].get_ydata(), 20 * np.exp([0.5, 0.1]))
    np.testing.assert_allclose([patch.get_width() for patch in bars.patches], [20, 30, 60], rtol=1e-6)
