"""A comparison of finished runs, as values, and as report.md, report.json and plots in a folder."""

import dataclasses
import json
import math
import pathlib
import shlex
from collections.abc import Mapping

import numpy as np

from lm.errors import UserError
from lm.files import whole_file, write_atomically
from lm.reporting import plots
from lm.reporting.comparable import check_comparable
from lm.reporting.runs import Run, read_run
from lm.reporting.statistics import (
    NUM_RESAMPLES,
    Interval,
    default_block_length,
    loss_by_position,
    paired_block_bootstrap,
)
from lm.reporting.table import MISSING, Table, comparison_table, escaped, figures, perplexity_decimals, result, scored_context

_PLOTS = ("learning_curves", "perplexity", "bits_per_byte", "loss_by_position")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the finished runs say beside each other."""

    runs: tuple[Run, ...]
    measure: str  # "perplexity", or "bits_per_byte" where the tokenizers differ
    best: str  # name of the run with the lowest test result
    summary: str
    table: Table
    # reference (the best run, and the best n-gram) -> name -> nats per token above it; empty where the tokenizers differ
    differences: dict[str, dict[str, Interval]]


def compare(workdirs: Mapping[str, str | pathlib.Path]) -> Comparison:
    """Reads finished runs and compares them on test.

    Args:
      workdirs: name -> folder, in the order of the table.

    Returns:
      Table, pairwise differences against the best and the best n-gram (paired block bootstrap) and a summary made from them.

    Raises:
      UserError: a folder is no evaluated run, the runs are not comparable, or none has a finite result.
    """
    if not workdirs:
        raise UserError("there is nothing to compare: give at least one finished run")
    runs = tuple(read_run(path, name) for name, path in workdirs.items())
    table = comparison_table(runs)
    same_tokens = check_comparable(runs, "test")
    measure = "perplexity" if same_tokens else "bits_per_byte"
    ranked = sorted((run for run in runs if math.isfinite(_test(run, measure))), key=lambda run: _test(run, measure))
    if not ranked:
        raise UserError(f"no run has a finite test {measure}: {', '.join(run.name for run in runs)} have all diverged")
    baseline = next((run for run in ranked if run.is_ngram), ranked[0])
    references = {run.name: run for run in (ranked[0], baseline)} if same_tokens else {}
    differences = {name: _differences(ranked, reference) for name, reference in references.items()}
    return Comparison(runs, measure, ranked[0].name, _summary(ranked, measure, differences), table, differences)


def write_report(
    workdirs: Mapping[str, str | pathlib.Path],
    out: str | pathlib.Path,
    by_position: Mapping[str, str] | None = None,
    comparison: Comparison | None = None,
) -> pathlib.Path:
    """Writes report.md, report.json and plots/*.png about finished runs.

    Each file is replaced whole, report.md last, so a reader never sees half of one or a link to a plot that is not there yet.

    Args:
      workdirs: name -> folder, in the order of the table.
      out: the folder to write to; made if need be.
      by_position: for some runs the name of an evaluation with context n and stride n, such as "valid.context-256-stride-256"
        (just "valid" where the run's config asks for that), for the loss by position in the context. None: no such plot.
      comparison: what `compare` has made of the same folders, if it has.

    Returns:
      The path of report.md.

    Raises:
      UserError: as `compare`; a run lacks its evaluation by position, or that has windows that overlap; a file cannot be written.
    """
    comparison = comparison or compare(workdirs)
    runs, measure = comparison.runs, comparison.measure
    positions = _positions(runs, by_position) if by_position else {}
    drawn = {
        "learning_curves": plots.learning_curves(runs, measure),
        measure: plots.result_bars(runs, measure),
    }
    if positions:
        drawn["loss_by_position"] = plots.loss_by_position(runs, positions, next(iter(by_position.values())))
    out = pathlib.Path(out)
    for name in _PLOTS:
        path = out / "plots" / f"{name}.png"
        if name in drawn:
            with whole_file(path) as file:
                drawn[name].savefig(file, format="png", dpi=150)
        else:
            path.unlink(missing_ok=True)  # of an earlier report in this folder, which this one does not speak of
    values = _as_json(comparison, positions, by_position, drawn)
    text = json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "report.json", f"{text}\n")
    write_atomically(out / "report.md", _as_markdown(comparison, positions, by_position, drawn))
    return out / "report.md"


def _test(run, measure):
    return run.evaluation("test")[measure]


def _differences(ranked, reference):
    """Each finite run against one of them, on the same tokens; the targets must agree, or the pairs are none."""
    reference_targets_N, reference_nll_N = reference.token_scores("test")
    differences = {}
    for run in ranked:
        if run is reference:
            continue
        targets_N, nll_N = run.token_scores("test")
        if not np.array_equal(targets_N, reference_targets_N):
            raise UserError(
                f"{reference.name} and {run.name} cannot be compared on test: text and tokenizer are equal, but targets differ "
                f"in {run.workdir / 'evaluation' / 'test.npz'}; evaluate both again"
            )
        differences[run.name] = paired_block_bootstrap(nll_N, reference_nll_N, block_length=_block_length(reference))
    return differences


def _positions(runs, names):
    having = [run for run in runs if run.name in names]
    if not check_comparable(having, names):
        return {}  # a position counts tokens, which are not the same ones
    contexts = {}
    for run in having:
        protocol = run.evaluation(names[run.name])["protocol"]
        if protocol["context"] is None or protocol["context"] != protocol["stride"]:
            raise UserError(
                f"loss by position needs windows that do not overlap (context equal to stride), but {names[run.name]} of "
                f"{run.name} has {scored_context(protocol)}"
            )
        contexts[run.name] = protocol["context"]
    if len(set(contexts.values())) > 1:
        raise UserError(f"loss by position needs one context for all runs, but there are {contexts}")
    return {run.name: loss_by_position(run.token_scores(names[run.name]).nll_N, contexts[run.name]) for run in having}


def _summary(ranked, measure, differences):
    best, *others = ranked
    word = measure.replace("_", " ")
    values = {run.name: _test(run, measure) for run in ranked}
    decimals = perplexity_decimals(list(values.values())) if measure == "perplexity" else 4

    def shown(run):
        return result(values[run.name], decimals)

    if not others:
        return f"{best.name} has a test {word} of {shown(best)}; there is no other run to hold it against."
    second = others[0]
    text = f"On the {best.evaluation('test')['words']:,} words of test, {best.name} has "
    if values[best.name] == values[second.name]:
        text += f"the same {word} as {second.name}, {shown(best)}, and no other run has a lower one"
    else:
        text += (
            f"the lowest {word}, {shown(best)}: {1 - values[best.name] / values[second.name]:.1%} below that of {second.name} "
            f"({shown(second)}), the next best"
        )
    if measure == "bits_per_byte":
        text += ". The tokenizers differ, so there is no paired interval of that difference."
    else:
        gap = differences[best.name][second.name]
        text += f", a difference of {gap.estimate:.4f} nats per token with a 95% interval of {gap.low:.4f} to {gap.high:.4f}"
        text += ", so the two are told apart on this text." if gap.low > 0 else ", so this text does not tell the two apart."
    baseline = next((run for run in others if run.is_ngram), None)
    if baseline not in (None, second) and not best.is_ngram:
        text += f" The best n-gram, {baseline.name}, has {shown(baseline)}."
    return text


def _as_json(comparison, positions, by_position, drawn):
    return {
        "summary": comparison.summary,
        "measure": comparison.measure,
        "best": comparison.best,
        "models": [
            {**figures(run), "workdir": str(run.workdir), "vocab_size": run.vocab_size, "evaluations": run.evaluations}
            for run in comparison.runs
        ],
        "notes": list(comparison.table.notes),
        "differences": [
            {
                "model": name,
                "against": reference,
                "nats_per_token": gap.estimate,
                "low": gap.low,
                "high": gap.high,
                "confidence": 0.95,
                "block_length": _block_length(comparison.runs[0]),
                "num_resamples": NUM_RESAMPLES,
            }
            for reference, gaps in comparison.differences.items()
            for name, gap in gaps.items()
        ],
        "evaluations_by_position": dict(by_position or {}),
        "loss_by_position": {
            name: {field.removesuffix("_P"): values.tolist() for field, values in bins._asdict().items()}
            for name, bins in positions.items()
        },
        "environment": {run.name: run.environment for run in comparison.runs},
        "plots": [f"plots/{name}.png" for name in drawn],
    }


def _finite(value):
    """JSON knows no infinity and no nan: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_markdown(comparison, positions, by_position, drawn):
    runs = comparison.runs
    title = f"# Comparison of {', '.join(run.name for run in runs)}"
    sections = [title, comparison.summary, comparison.table.markdown().rstrip()]
    if comparison.differences:
        sections += ["## Differences", _difference_section(comparison)]
    sections += ["## Plots", *(f"{_caption(name, comparison, positions)}\n\n![{name}](plots/{name}.png)" for name in drawn)]
    if by_position and not positions:
        sections.append("There is no loss by position: the tokenizers differ, so positions do not count the same tokens.")
    splits = [split for split in ("test", "valid") if any(split in run.evaluations for run in runs)]
    sections += ["## Protocol", *(_protocol(runs, split) for split in splits)]
    sections += ["## Environment", _environment(runs), "## How to reproduce", _commands(runs)]
    return "\n\n".join(sections) + "\n"


def _difference_section(comparison):
    sections = [
        "Differences in mean nll on test, in nats per token, from per-token differences: paired circular block bootstrap, "
        f"blocks of {_block_length(comparison.runs[0])} tokens, {NUM_RESAMPLES:,} resamples. The interval covers the choice of "
        "text, not that of the training seed."
    ]
    for reference, gaps in comparison.differences.items():
        rows = [
            f"| model | nats per token above {escaped(reference)} | 95% interval | perplexity ratio |",
            "| --- | ---: | ---: | ---: |",
        ]
        rows += [
            f"| {escaped(name)} | {gap.estimate:.4f} | {gap.low:.4f} to {gap.high:.4f} | {math.exp(min(gap.estimate, 700)):.3f} |"
            for name, gap in gaps.items()
        ]
        sections.append("\n".join(rows))
    return "\n\n".join(sections)


def _block_length(run):
    test = run.evaluation("test")
    return default_block_length(test["tokens"], test["words"])


def _caption(name, comparison, positions):
    if name == "learning_curves":
        return (
            "Learning curves: a curve that lies lower on the left learns more from the same text, on the right more in the same "
            "time. Curves are quick looks in parallel streams; a horizontal line is an n-gram model on the whole split."
        )
    if name == "loss_by_position":
        left_out = [run.name for run in comparison.runs if run.name not in positions]
        absent = f" Not evaluated so: {', '.join(left_out)}." if left_out else ""
        return (
            "Loss by position: a line falls as far as a model gains from what it has read since its window began empty; where it "
            f"turns flat, more context no longer helps. Bands are 95% intervals of each mean.{absent}"
        )
    return "Results: the length of a bar is the test result; a diamond far from its end would mean that valid and test disagree."


def _protocol(runs, split):
    having = [run for run in runs if split in run.evaluations]

    def told(value):
        return _by_name({run.name: value(run.evaluation(split)) for run in having})

    entries = {
        "text": lambda taken: f"{_count(taken['bytes'])} bytes, {_count(taken['words'])} words, sha256 `{taken['text_sha256']}`",
        "N (tokens)": lambda taken: _count(taken["tokens"]),
        "tokenizer": lambda taken: _tokenizer(taken["tokenizer"]),
        "context": lambda taken: scored_context(taken["protocol"]),
        "precision": lambda taken: taken["protocol"]["precision"],
        "adaptation to the text": lambda taken: _plain(taken["protocol"]["adaptation"] or "none"),
        "checkpoint": lambda taken: _checkpoint(taken["checkpoint"]),
    }
    rule = f"**{split}**: every token of the whole split is scored once, in corpus order; perplexity = exp(sum of nll / N)."
    return "\n".join([rule, "", *(f"- {label}: {told(value)}" for label, value in entries.items())])


def _tokenizer(tokenizer):
    return f"{tokenizer['name']}, vocabulary of {_count(tokenizer['vocab_size'])}, sha256 `{tokenizer['sha256']}`"


def _checkpoint(checkpoint):
    which, step = checkpoint.get("which"), checkpoint["step"]
    return f"step {_count(step)}" + (f", {which}" if which else "")


def _by_name(values):
    """The value once where all runs share it, else each with the names of its runs."""
    names = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return "; ".join(value if len(names) == 1 else f"{value} ({', '.join(having)})" for value, having in names.items())


def _count(value):
    return MISSING if value is None else f"{value:,}"


def _environment(runs):
    """What the runs noted; the command stands under how to reproduce."""
    names = dict.fromkeys(name for run in runs for name in run.environment if name != "command")
    lines = [f"- {name}: {_by_name({run.name: _plain(run.environment.get(name, MISSING)) for run in runs})}" for name in names]
    return "\n".join(lines) or "No run has written an environment.json."


def _commands(runs):
    commands = {}
    for run in runs:
        command = run.environment.get("command")
        if command:
            commands.setdefault(shlex.join(command) if isinstance(command, list) else str(command), []).append(run.name)
    if not commands:
        return "No run has noted its command."
    return "\n\n".join(f"{', '.join(names)}:\n\n```sh\n{command}\n```" for command, names in commands.items())


def _plain(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
