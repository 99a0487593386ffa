"""The page of a folder of measurements: tables of speed beside a peer, and curves; made of the JSON files alone."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm.errors import UserError
from lm.files import write_atomically

Result = Mapping[str, Any]  # what `benchmark` returned, with the `measurement` that asked for it

_COLORS = {"rnn": "#0072B2", "gru": "#D55E00", "lstm": "#009E73", "transformer": "#CC79A7"}
_TITLES = {"train": "Training", "evaluate": "Evaluation", "generate": "Generation"}
_AXES = {
    "sequence length": "sequence length (tokens; 8,192 tokens a step)",
    "batch size": "batch size (rows of 128 tokens)",
    "width": "width (8 × 128 tokens a step)",
    "vocabulary": "vocabulary (8 × 128 tokens a step)",
    "emulated devices": "emulated devices (8 × 128 tokens a step)",
}

_OF_A_RATIO = (
    "- A ratio is ours over the peer's; the target is what this project set itself, and a ratio that reaches it is bold.",
    "- In brackets behind a target: what share of the peak of a matmul it would take beside that peer.",
    "- The peer is PyTorch, eager or compiled, whichever was faster, or where it says so a plain lax.scan with our optimiser.",
)
_FEW_ROWS = "share_of_few_row_matmul_peak"
_OF_FEW_ROWS = (
    "- Generation multiplies only as many rows as there are texts by each matrix, and cannot be done sooner than that is read:",
    "  few rows' peak is what one product of so many rows by a matrix of as many numbers comes to here.",
)
_ON_A_GPU = ("- torch's autocast to bfloat16 runs cuDNN's recurrences in float16, whatever type it is asked for.",)
_FORMERLY = (
    "- † Measured when torch.compile was given the model without its loss, and the peer's process loaded JAX as well: its",
    "  memory is left out, and its ratio is not held against the target.",
)


def read_results(folder: pathlib.Path) -> list[Result]:
    """All measurements of a folder, in the order of their suite.

    Raises:
      UserError: a file that is no measurement.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found.append((result["measurement"]["number"], result))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a result of launch.suite; move it elsewhere") from None
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def write_page(folder: pathlib.Path, heading: str, about: str, suite: Sequence[Mapping[str, Any]], command: str) -> pathlib.Path:
    """Writes README.md and the plots beside the folder's results; returns the page's path.

    Args:
      about: what is measured, below the heading.
      suite: all its measurements in order; what is not there yet stands as not yet measured.
      command: what measures it.
    """
    results = read_results(folder)
    found = {result["measurement"]["name"]: result for result in results}
    lines = [f"# {heading}", "", about, "", f"`{command}`", ""]
    rows = [found.get(wanted["name"], {"measurement": wanted, "mode": wanted["mode"]}) for wanted in suite if not wanted["axis"]]
    for mode, title in _TITLES.items():
        chosen = [row for row in rows if row["mode"] == mode]
        if chosen:
            lines += [f"## {title}", "", *table(chosen), ""]
    by_axis: dict[str, list[Result]] = {}
    for wanted in suite:
        if wanted["axis"] and wanted["name"] in found:
            by_axis.setdefault(wanted["axis"], []).append(found[wanted["name"]])
    for axis, points in by_axis.items():
        name = f"{axis.replace(' ', '_')}.png"
        curves(points, axis).savefig(folder / name, dpi=120)
        lines += [f"## By {axis}", "", f"![Tokens per second and peak memory by {axis}]({name})", ""]
    left = sum(bool(wanted["axis"]) and wanted["name"] not in found for wanted in suite)
    if left:
        lines += [f"Points of the curves that are not yet measured: {left}.", ""]
    lines += provenance(results) if results else []
    path = folder / "README.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def table(results: Sequence[Result]) -> list[str]:
    """Markdown: ours beside the peer, as it starts and with our allocator; memory; share of matmul peak.

    Args:
      results: what was measured; of what was not yet, the `measurement` alone.
    """
    columns = ["", "tokens/s", "peer", "ratio", "target", "peer, our allocator", "ratio", "memory, peer's", "of matmul peak"]
    few_rows = any(_FEW_ROWS in result for result in results)
    columns += ["of few rows' peak"] if few_rows else []
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for result in results:
        name = result["measurement"]["name"].partition(": ")[2]
        target = result["measurement"]["target"]
        if "tokens_per_second" not in result:
            share = _share(result["measurement"], None)
            empty = "  |" * few_rows
            lines.append(f"| {name} | not yet measured |  |  | {f'{target:.2f}' if target else ''} |  |  |  | {share} |{empty}")
            continue
        peers = _peers(result)
        plain, tuned = peers.get("system"), peers.get("tuned")
        cells = [
            name,
            f"{result['tokens_per_second']['median']:,.0f}",
            _peer_speed(result, plain),
            _against_target(plain["ratio"]["median"], None if _held_jax(plain, result) else target) if plain else "",
            _target(target, result, plain),
            _peer_speed(result, tuned),
            f"{tuned['ratio']['median']:.2f}" if tuned else "",
            ", ".join(f"{_memory(side['memory']):,.0f} MiB" for side in (result, plain) if side and not _held_jax(side, result)),
            _share(result["measurement"], result["share_of_matmul_peak"]),
            *([f"{result[_FEW_ROWS]:.0%}" if _FEW_ROWS in result else ""] if few_rows else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _against_target(ratio, target):
    """Bold where it is reached; one that falls short by less than is shown is cut, not rounded."""
    if target and ratio >= target:
        return f"**{ratio:.2f}**"
    falls_short = target and round(ratio, 2) >= target
    return f"{ratio - 0.005:.2f}" if falls_short else f"{ratio:.2f}"


def _target(target, result, peer):
    """The ratio asked for, and what share of the peak of a matmul, also of one of few rows, it would take beside that peer."""
    if not target or peer is None:
        return f"{target:.2f}" if target else ""
    shares = (
        result[share] * target / peer["ratio"]["median"] for share in ("share_of_matmul_peak", _FEW_ROWS) if share in result
    )
    return f"{target:.2f} ({', '.join(f'{share:.0%}' for share in shares)})"


def _share(measurement, share):
    """Of the matmul peak, beside what is asked for; bold where it is reached."""
    target = measurement.get("target_share")
    shown = "" if share is None else f"{share:.0%}"
    if target is None:
        return shown
    if share is not None and share < target <= round(share, 2):  # cut, not rounded
        shown = f"{share - 0.005:.0%}"
    return f"{f'**{shown}**' if share is not None and share >= target else shown} (target {target:.0%})".strip()


def _peer_speed(result, peer):
    if peer is None:
        return ""
    kind = " (lax.scan)" if result["against"]["name"] == "scan" else " (compiled)" if peer["compiled"] else ""
    return f"{peer['tokens_per_second']['median']:,.0f}{kind}{' †' * _held_jax(peer, result)}"


def _peers(result):
    return (result["against"] or {"allocators": {}})["allocators"]


def _held_jax(side, ours):
    """Whether it is a peer whose process held JAX, as all did once: those have a peak from before the model, too."""
    return side is not ours and "host_peak_bytes_before" in side["memory"]


def _memory(memory):
    return (memory.get("device_peak_bytes") or memory["host_peak_bytes"]) / 2**20


def curves(results: Sequence[Result], axis: str):
    """Tokens per second and peak memory against one thing that is varied, a line for each architecture.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    values = sorted({result["measurement"]["value"] for result in results})
    for name, color in _COLORS.items():
        points = sorted(
            (result for result in results if result["model"] == name), key=lambda result: result["measurement"]["value"]
        )
        if points:
            x = [result["measurement"]["value"] for result in points]
            look = dict(label=name, color=color, linewidth=2, marker="o", markersize=4)
            speed.plot(x, [result["tokens_per_second"]["median"] for result in points], **look)
            memory.plot(x, [_memory(result["memory"]) for result in points], **look)
    where = "device" if any(result["memory"].get("device_peak_bytes") for result in results) else "process"
    for axes, label in ((speed, "training (tokens per second)"), (memory, f"peak memory of the {where} (MiB)")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain_minor))
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_xlabel(_AXES.get(axis, axis))
        axes.set_ylabel(label)
        axes.grid(True, color="#D9D9D9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plain_minor(value, _):
    return f"{value:,.0f}" if round(value / 10 ** math.floor(math.log10(value))) in (2, 3, 5, 7) else ""


def provenance(results: Sequence[Result]) -> list[str]:
    """When, where and with what versions the results came about, as lines of a page."""
    lines = ["## How it was measured", ""]
    seen: dict[str, list[str]] = {}
    for result in results:
        where = result["environment"]
        peer = next(iter(_peers(result).values()), None)
        versions = f"Python {where['python']}, JAX {where['jax']}{', ' + peer['library'] if peer else ''}"
        devices = "" if where.get("platform", "cpu") == "cpu" else f", {where['num_devices']} × {where['device']}"
        seen.setdefault(f"{where['hardware']}{devices}; {versions}", []).append(where["date"])
    lines += [f"- {where}; {min(dates)} to {max(dates)}" for where, dates in seen.items()]
    compared = any(_peers(result) for result in results)
    return [
        *lines,
        *(_OF_A_RATIO if compared else []),
        "- Each side runs in a process of its own, and rounds take turns; figures are medians over the rounds. The JSON files",
        "  here hold every round, the resolved config, and how many cores other work took before.",
        "- Memory is the process's peak, libraries and compiler included; on a GPU the device's.",
        *(_OF_FEW_ROWS if any(_FEW_ROWS in result for result in results) else []),
        *(_ON_A_GPU if any(result["environment"].get("platform") == "gpu" for result in results) else []),
        *(_FORMERLY if any(_held_jax(peer, result) for result in results for peer in _peers(result).values()) else []),
    ]
