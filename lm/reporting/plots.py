"""The figures of a comparison, drawn from finished runs and returned unsaved; matplotlib is imported only to draw one."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lm.reporting.runs import Run
from lm.reporting.statistics import PositionLoss
from lm.reporting.table import figures, perplexity_decimals, result

# Okabe and Ito's palette, which stays apart for colour-blind eyes, without its yellow, which is lost on white
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1)), (0, (8, 2)))
_GREYS = ("#595959", "#8C8C8C", "#404040")
_INK, _FAINT = "#262626", "#D9D9D9"


def styles(runs: Sequence[Run]) -> dict[str, dict]:
    """Colour and line style of each run, the same in every figure; n-gram baselines are grey."""
    neural = zip(itertools.cycle(_COLORS), itertools.cycle(_DASHES))
    baseline = zip(itertools.cycle(_GREYS), itertools.cycle(_DASHES[3:]))
    chosen = {}
    for run in runs:
        color, dashes = next(baseline if run.is_ngram else neural)
        chosen[run.name] = {"color": color, "linestyle": dashes}
    return chosen


def learning_curves(runs: Sequence[Run], measure: str):
    """Valid results while training, against tokens seen and against training time; n-gram models as horizontal lines.

    Args:
      runs: the runs; a curve needs lines of valid in metrics.jsonl, a baseline needs the evaluation of valid.
      measure: "perplexity", or "bits_per_byte" where the tokenizers differ.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    look = styles(runs)
    curves = {run.name: _valid_curve(run, measure) for run in runs if not run.is_ngram}
    baselines = {run.name: run.evaluation("valid")[measure] for run in runs if run.is_ngram and "valid" in run.evaluations}
    baselines = {name: value for name, value in baselines.items() if math.isfinite(value)}
    longest = max((curve["seconds"].max(initial=0) for curve in curves.values()), default=0)
    unit, unit_seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)

    columns = max(1, min(len(curves), int(115 / (max(map(len, curves), default=0) + 9))))  # of the legend, by its letters
    figure = Figure(figsize=(11, 4.6 + 0.2 * math.ceil(len(curves) / columns)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, x, scale, label in (
        (panels[0], "tokens", 1, "tokens seen" if measure == "perplexity" else "tokens seen (each model's own)"),
        (panels[1], "seconds", unit_seconds, f"training time ({unit})"),
    ):
        for name, curve in curves.items():
            single = "o" if curve["value"].size == 1 else None
            axes.plot(curve[x] / scale, curve["value"], label=name, linewidth=2, marker=single, **look[name])
        for name, value in baselines.items():
            axes.axhline(value, linewidth=1.3, **look[name])
        axes.set_xlabel(label, color=_INK)
        axes.set_xlim(left=0)
        _tidy(axes)
    _counts(panels[0].xaxis)
    panels[0].set_ylabel(f"valid {_words(measure)}", color=_INK)
    _logarithmic(panels[0], [curve["value"] for curve in curves.values()], list(baselines.values()))
    _label_right(panels[1], [(value, name, look[name]["color"]) for name, value in baselines.items()])
    figure.suptitle(f"Learning curves: {_words(measure)} on valid while training (lower is better)", color=_INK, fontsize=13)
    if curves:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2)
    return figure


def result_bars(runs: Sequence[Run], measure: str):
    """Bars of the test result of each run with its value inside; the valid result as a marker.

    Args:
      runs: the runs, drawn from top to bottom.
      measure: "perplexity", or "bits_per_byte" where the tokenizers differ.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    look, rows = styles(runs), [figures(run) for run in runs]
    test = [row[f"test_{measure}"] for row in rows]
    valid = [row[f"valid_{measure}"] for row in rows]
    decimals = perplexity_decimals(test) if measure == "perplexity" else 4
    finite = [value for value in (*test, *valid) if value is not None and math.isfinite(value)]
    widest, best = max(finite), min(value for value in test if math.isfinite(value))

    figure = Figure(figsize=(9, 1.2 + 0.5 * len(runs)), layout="constrained")
    axes, marks = figure.subplots(), []
    for y, (run, test_value, valid_value) in enumerate(zip(runs, test, valid, strict=True)):
        bar = test_value if math.isfinite(test_value) else 0.0
        axes.barh(y, bar, height=0.62, color=look[run.name]["color"])
        shown = valid_value is not None and math.isfinite(valid_value)
        if shown:
            marks = axes.plot(valid_value, y, marker="D", markersize=7, linestyle="none", color="white", markeredgecolor=_INK)
        ends = (bar, valid_value) if shown else (bar,)
        inside = min(ends) > 0.15 * widest  # else there is no room, and the value stands behind bar and marker
        axes.text(
            min(ends) - 0.015 * widest if inside else max(ends) + 0.015 * widest,
            y,
            result(test_value, decimals),
            ha="right" if inside else "left",
            va="center_baseline",
            color=_readable_on(look[run.name]["color"]) if inside else _INK,
            fontweight="bold" if test_value == best and len(runs) > 1 else "normal",
        )
    axes.set_yticks(range(len(runs)), [run.name for run in runs], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.04 * widest)
    axes.set_xlabel(_words(measure), color=_INK)
    _tidy(axes)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.suptitle(f"{_words(measure).capitalize()} on test, whole split (lower is better)", color=_INK, fontsize=13)
    if marks:
        figure.legend(marks, ["valid"], loc="upper right", frameon=False, handletextpad=0.2)
    return figure


def loss_by_position(runs: Sequence[Run], positions: Mapping[str, PositionLoss], evaluation: str):
    """Mean nll against the position in the context, one line a run, with light 95% bands.

    Args:
      runs: all runs of the comparison, which decide the colours.
      positions: by name, the bins of the runs to draw; all over the same context.
      evaluation: what one of them comes from, for the title.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    look = styles(runs)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    opacity = min(0.12, 0.5 / len(positions))
    for name, bins in positions.items():
        x = np.arange(bins.loss_P.size)
        axes.plot(x, bins.loss_P, linewidth=2, marker="o", markersize=4, **look[name])
        axes.fill_between(x, bins.low_P, bins.high_P, color=look[name]["color"], alpha=opacity, linewidth=0)
    bins = max(positions.values(), key=lambda bins: bins.loss_P.size)
    ranges = [str(first) if first == last else f"{first}–{last}" for first, last in zip(bins.first_P, bins.last_P, strict=True)]
    axes.set_xticks(range(len(ranges)), ranges)
    axes.set_xlabel("position in the context (tokens)", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    _tidy(axes)
    _label_right(axes, [(bins.loss_P[-1], name, look[name]["color"]) for name, bins in positions.items()])
    split = evaluation.partition(".")[0]
    figure.suptitle(f"Loss by position in the context, {split} (lower is better)", color=_INK, fontsize=13)
    return figure


def _valid_curve(run, measure):
    lines = [line for line in run.valid_lines if line.get("loss") is not None and math.isfinite(line["loss"])]
    if measure != "perplexity" and "valid" not in run.evaluations:
        lines = []  # without the bytes of the text there are no bits per byte
    loss = np.array([line["loss"] for line in lines], dtype=np.float64)
    if measure == "perplexity":
        value = np.exp(np.minimum(loss, 700.0))  # beyond it float64 overflows; the axis ends far below
    elif lines:
        valid = run.evaluation("valid")
        value = loss * valid["tokens"] / valid["bytes"] / math.log(2)
    else:
        value = loss
    return {
        "value": value,
        "tokens": np.array([line["tokens"] for line in lines], dtype=np.float64),
        "seconds": np.array([line["seconds"] for line in lines], dtype=np.float64),
    }


def _words(measure):
    return measure.replace("_", " ")


def _readable_on(color):
    """White on dark, ink on light colours: whichever has the higher contrast by the relative luminance of WCAG 2."""
    from matplotlib.colors import to_rgb

    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    return "white" if np.dot([0.2126, 0.7152, 0.0722], linear) < 0.23 else _INK


def _tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.grid(True, color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _counts(axis):
    """Plain words for big numbers: 500k, 10M."""
    from matplotlib.ticker import FuncFormatter

    def written(value, _):
        for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{letter}"
        return f"{value:g}"

    axis.set_major_formatter(FuncFormatter(written))


def _logarithmic(axes, curves, baselines):
    """A logarithmic y axis with plain numbers; a curve far above the best leaves at the top instead of flattening the rest."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    values = np.concatenate([np.concatenate([*curves, np.array([])]), baselines])
    if not values.size:
        return
    axes.set_yscale("log")
    lowest = values.min()
    highest = max([min(values.max(), 30 * lowest), *baselines])
    margin = max(highest / lowest, 1.05) ** 0.06
    low, high = lowest / margin, highest * margin
    axes.set_ylim(low, high)
    if high / low < 4:
        ticks = MaxNLocator(6).tick_values(low, high)
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        mantissas = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 15 else (1, 2, 5)
        ticks = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _label_right(axes, labels):
    """Names at the right end of lines, moved apart where they would overlap; needs the final limits of the y axis."""
    if not labels:
        return
    to_fraction = axes.transScale + axes.transLimits
    at = sorted((to_fraction.transform((axes.get_xlim()[1], value))[1], name, color) for value, name, color in labels)
    height = 14 / 72 / (0.75 * axes.figure.get_figheight())  # a line of text as a share of the panel
    groups = []  # of labels that touch, each centred on the mean of its lines

    def centre(group):
        return sum(fraction for fraction, *_ in group) / len(group)

    for label in at:
        groups.append([label])
        while len(groups) > 1 and centre(groups[-1]) - centre(groups[-2]) < (len(groups[-1]) + len(groups[-2])) / 2 * height:
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        for place, (_, name, color) in enumerate(group):
            y = centre(group) + (place - (len(group) - 1) / 2) * height
            axes.text(1.015, y, name, transform=axes.transAxes, va="center", color=color, parse_math=False)
