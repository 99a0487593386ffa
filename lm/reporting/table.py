"""The comparison table: raw values of each run, and one set of cells shown as aligned text or as Markdown."""

import dataclasses
import math
import statistics
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.reporting.comparable import check_comparable
from lm.reporting.runs import Run

MISSING = "–"
_TOO_LONG = 1e9  # for all the digits of a result


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells in the order they were given; `best` marks the lowest of each column of results, `notes` say what it needs."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]  # per column: aligned to the right
    best: frozenset[tuple[int, int]]  # (row, column)
    notes: tuple[str, ...]

    def text(self) -> str:
        """Aligned columns for a terminal; headers in two lines, `*` behind the best."""
        starred = {column for _, column in self.best}
        cells = [
            [cell + ("*" if (r, c) in self.best else " " if c in starred else "") for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]
        heads = [_two_lines(header) for header in self.headers]
        heads = [[line + " " if c in starred else line for line in lines] for c, lines in enumerate(heads)]
        columns = list(zip(*([head[0] for head in heads], [head[1] for head in heads], *cells), strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, width, numeric in zip(line, widths, self.numeric, strict=True)
            ).rstrip()
            for line in zip(*columns, strict=True)
        ]
        lines.insert(2, "  ".join("-" * width for width in widths))
        marks = ("* lowest of its column",) if self.best else ()
        return "\n".join([*lines, *marks, *self.notes]) + "\n"

    def markdown(self) -> str:
        """A Markdown table, the best in bold, then the notes as paragraphs."""
        rows = [
            [f"**{cell}**" if (r, c) in self.best else cell for c, cell in enumerate(map(escaped, row))]
            for r, row in enumerate(self.rows)
        ]
        rule = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.headers, rule, *rows]]
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in self.notes)


class _Column(typing.NamedTuple):
    key: str  # of `figures`
    header: str
    show: Callable[[list, Sequence[Run]], list[str]]  # the values of the column -> its cells
    numeric: bool = True
    result: bool = False  # lowest is best


def figures(run: Run) -> dict:
    """The raw values behind a run's row: counts, seconds, and the figures of valid and test; None where there is none.

    tokens_per_second is the median of the log lines: with three or more, the compilation in the first one does not count.
    """
    valid, test = run.evaluations.get("valid"), run.evaluation("test")
    speeds = [line["tokens_per_second"] for line in run.train_lines if line.get("tokens_per_second") is not None]
    lines = (*run.train_lines, *run.valid_lines)
    return {
        "model": run.name,
        "architecture": run.config["model"]["architecture"],
        "parameters": run.num_params,
        "tokens_seen": max((line["tokens"] for line in lines if line.get("tokens") is not None), default=None),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "train_seconds": max((line["seconds"] for line in lines if line.get("seconds") is not None), default=None),
        "valid_perplexity": valid and valid["perplexity"],
        "valid_bits_per_byte": valid and valid["bits_per_byte"],
        "test_perplexity": test["perplexity"],
        "test_bits_per_byte": test["bits_per_byte"],
        "test_word_perplexity": test["word_perplexity"],
        "test_excess": test.get("floor", {}).get("excess"),
        "context": test["protocol"]["context"],
        "stride": test["protocol"]["stride"],
        "precision": test["protocol"]["precision"],
        "step": test["checkpoint"]["step"],
    }


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row a run, in the given order, from the evaluations of valid and test.

    With different tokenizers, bits per byte and word perplexity take the place of perplexity. Precision is a column where it
    differs.

    Args:
      runs: the runs; each evaluated on test, on valid where there is one.

    Raises:
      UserError: the runs are not comparable (lm.reporting.comparable), or one has no evaluation of test.
    """
    same_tokens = check_comparable(runs, "test")
    check_comparable([run for run in runs if "valid" in run.evaluations], "valid")
    rows = [figures(run) for run in runs]
    columns = _columns(
        same_tokens,
        known_floor=any(row["test_excess"] is not None for row in rows),
        mixed_precision=len({row["precision"] for row in rows}) > 1,
    )
    cells = [column.show([_value(row, column.key) for row in rows], runs) for column in columns]
    return Table(
        headers=tuple(column.header for column in columns),
        rows=tuple(zip(*cells, strict=True)),
        numeric=tuple(column.numeric for column in columns),
        best=frozenset(
            (r, c) for c, column in enumerate(columns) if column.result for r in _lowest([row[column.key] for row in rows])
        ),
        notes=tuple(_notes(runs, same_tokens)),
    )


def place(environment: Mapping[str, Any]) -> str:
    """The machine that a run was on, and its devices where they are not its CPU; of a run that has moved, all in order."""
    return ", then ".join(dict.fromkeys(_machine(one) for one in (*environment.get("earlier", ()), environment)))


def _machine(environment):
    on_cpu = environment.get("platform") in ("cpu", None)  # None: an n-gram model's, which takes no device
    return environment["hardware"] + ("" if on_cpu else f", {environment['num_devices']} × {environment['device']}")


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 45 s, 3 min 20 s, 1 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def scored_context(protocol: dict) -> str:
    """What a scored token was predicted from, in words: carried, or windows n, stride s."""
    if protocol["context"] is None:
        return "carried"
    return f"windows {protocol['context']:,}, stride {protocol['stride']:,}"


def result(value: float | None, decimals: int) -> str:
    """A perplexity or a number of bits; all of one column share the decimals, save those that would fill a line."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "inf"
    return f"{value:,.{decimals}f}" if value < _TOO_LONG else f"{value:.2e}"


def perplexity_decimals(values: Sequence[float | None]) -> int:
    """Three for the low perplexities of bytes and characters, else two."""
    return 3 if any(value is not None and value < 10 for value in values) else 2


def _columns(same_tokens, known_floor, mixed_precision):
    if same_tokens:
        results = [
            _Column("valid_perplexity", "valid perplexity", _perplexities, result=True),
            _Column("test_perplexity", "test perplexity", _perplexities, result=True),
            _Column("test_bits_per_byte", "test bits per byte", _bits, result=True),
        ]
    else:
        results = [
            _Column("valid_bits_per_byte", "valid bits per byte", _bits, result=True),
            _Column("test_bits_per_byte", "test bits per byte", _bits, result=True),
            _Column("test_word_perplexity", "test word perplexity", _perplexities, result=True),
        ]
    return [
        _Column("model", "model", lambda values, runs: values, numeric=False),
        _Column("parameters", "parameters", parameters),
        _Column("tokens_seen", "tokens seen", _whole),
        _Column("tokens_per_second", "tokens/s", _whole),
        _Column("train_seconds", "train time", lambda values, runs: [duration(value) for value in values]),
        *results,
        *([_Column("test_excess", "test excess, nats/token", _bits, result=True)] if known_floor else []),
        _Column("context", "test context", lambda values, runs: [scored_context(value) for value in values], numeric=False),
        *([_Column("precision", "precision", lambda values, runs: values, numeric=False)] if mixed_precision else []),
        _Column("step", "step", _whole),
    ]


def _value(row, key):
    return row if key == "context" else row[key]


def _whole(values, runs):
    return [MISSING if value is None else f"{round(value):,}" for value in values]


def parameters(values: Sequence[float | None], runs: Sequence[Run]) -> list[str]:
    """Counts of parameters, or of an n-gram model's n-grams."""
    cells = zip(_whole(values, runs), runs, strict=True)
    return [f"{cell} n-grams" if run.is_ngram and cell != MISSING else cell for cell, run in cells]


def _perplexities(values, runs):
    return [result(value, perplexity_decimals(values)) for value in values]


def _bits(values, runs):
    return [result(value, 4) for value in values]


def _lowest(values):
    """Rows with the lowest value; none where there is nothing to compare."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(values) < 2 or not finite:
        return []
    return [row for row, value in enumerate(values) if value == min(finite)]


def _notes(runs, same_tokens):
    if not same_tokens:
        yield (
            "The tokenizers differ, so perplexity and nats per token are not comparable: the table shows bits per byte and word "
            "perplexity, and counts of tokens are each model's own."
        )
        if any(run.evaluation("test")["tokenizer"]["name"] == "word" for run in runs):
            yield (
                "A word tokenizer predicts one unknown-word token where others must spell a rare word out, and neither repeated "
                "spaces nor the end of a document, which flatters its bits per byte."
            )
    for floor in [run.evaluation("test")["floor"] for run in runs if "floor" in run.evaluation("test")][:1]:
        yield (
            f"The excess is over the floor of this text, {floor['loss']:.4f} nats per token: its true law's own loss, which no "
            f"model can beat. In the long run the law has {floor['entropy_rate']:.4f} nats per character (at most "
            f"{floor['entropy_rate_error']:.0e} off)."
        )
    places: dict[str, list[str]] = {}
    for run in runs:
        if "hardware" in run.environment:
            places.setdefault(place(run.environment), []).append(run.name)
    if len(places) > 1:
        trained = "; ".join(f"{', '.join(names)}: {place}" for place, names in places.items())
        yield f"Trained on different machines, so speeds and times do not compare ({trained})."
    for run in runs:
        done = max((line["step"] for line in (*run.train_lines, *run.valid_lines)), default=None)
        wanted = run.config.get("training", {}).get("num_steps")
        if not run.is_ngram and None not in (done, wanted) and done < wanted:
            yield f"{run.name} was trained for {done:,} of its {wanted:,} steps: it stopped early, or is still to go on."
    for run in runs:
        if "valid" not in run.evaluations:
            continue
        valid, test = run.evaluation("valid"), run.evaluation("test")
        if (valid["protocol"], valid["checkpoint"]["step"]) != (test["protocol"], test["checkpoint"]["step"]):
            yield (
                f"valid of {run.name} was taken otherwise than test: {scored_context(valid['protocol'])}, "
                f"{valid['protocol']['precision']}, step {valid['checkpoint']['step']}."
            )


def _two_lines(header):
    """The header over two lines, the shorter above where it cannot be even: `test bits` over `per byte`."""
    words = header.split(" ")
    cuts = [(" ".join(words[:cut]), " ".join(words[cut:])) for cut in range(len(words))]
    return min(cuts, key=lambda lines: max(map(len, lines)))


def escaped(cell: str) -> str:
    """A cell of a Markdown table: a bar inside a name must not end it."""
    return cell.replace("|", "\\|")
