"""The page of results: kept runs beside what was published, beside each other, and with one part of the recipe left out."""

import dataclasses
import json
import math
import pathlib
import re
import statistics
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from lm.config import Config, differences, with_places
from lm.config.stored import from_json
from lm.errors import UserError
from lm.files import read_json, write_atomically, write_json
from lm.reporting.comparable import check_comparable
from lm.reporting.plots import learning_curves
from lm.reporting.runs import Run, read_run
from lm.reporting.table import MISSING, Table, comparison_table, duration, figures, parameters, place, result, scored_context

NOT_YET_RUN = "not yet run"
_MEASURES = "perplexity", "bits per character"


class Published(typing.NamedTuple):
    """Figures of a paper or of a peer, in the section's measure."""

    valid: float | None
    test: float | None
    paper: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the tables, and how it comes about.

    Attributes:
      path: where its runs are kept in the folder of results; unique.
      name: in the tables.
      config, overrides: as launch.train takes them; but `training.init_from` is the path of a row, which is trained before.
      seeds: one run each; tables show the median.
      published: by way of scoring: "" as trained, "last epoch", "dynamic", "cache", "dropout_samples".
      variants: further ways of scoring (lm.evaluation.variants.Variant), whose settings are a paper's or were chosen on valid.
      last_epoch: whether the paper reports its last epoch, which is then scored beside the best on valid.
      peer: a file in the folder at `path`, as launch.word_language_model --json writes it; it stands where a paper does.
    """

    path: str
    name: str
    config: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    variants: tuple[Any, ...] = ()
    last_epoch: bool = False
    peer: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A table with its heading.

    Attributes:
      title, text: what stands above it.
      kind: "published", beside the papers' figures; "equal", models that share parameters and tokens, with their learning
        curves; "parts", the first row whole and the others without one part each.
      measure: "perplexity" or "bits per character".

    Raises:
      UserError: another kind or measure.
    """

    title: str
    text: str
    kind: str
    rows: tuple[Row, ...]
    measure: str = "perplexity"

    def __post_init__(self):
        for name, value, known in (("kind", self.kind, _TABLES), ("measure", self.measure, _MEASURES)):
            if value not in known:
                raise UserError(f"section {self.title!r} has {name} {value!r}; there are {', '.join(known)}")


def rows_by_path(sections: Sequence[Section]) -> dict[str, Row]:
    """All rows; one that stands in several sections, maybe under other names, once.

    Raises:
      UserError: two rows of one path that are not the same runs.
    """
    found: dict[str, Row] = {}
    for row in (row for section in sections for row in section.rows):
        other = dataclasses.replace(found.get(row.path, row), name=row.name, published=row.published)
        if row != other:
            raise UserError(f"two rows have the path {row.path!r}, but not the same config, overrides, seeds and ways of scoring")
        found[row.path] = row
    return found


def run_path(folder: pathlib.Path, row: Row, seed: int) -> pathlib.Path:
    """Where the small files of a run are kept."""
    return folder / row.path / f"seed_{seed}"


def keep(workdir: pathlib.Path, kept: pathlib.Path, row: Row, draft: Config) -> None:
    """Keeps the small files of a finished run: config, environment, metrics and its row's figures, without paths of the machine.

    Args:
      workdir: the run, which may have been scored in other ways as well.
      kept: the folder to make.
      draft: the config as the row gives it, whose paths stand for those of the machine.
    """
    run, saved = read_run(workdir), read_json(workdir / "config.json", "")
    for form in ("given", "resolved"):
        saved[form] = with_places(saved[form], draft)
        saved[form]["training"]["init_from"] = draft.training.init_from
    for name in [f"{split}{ending}" for split in ("valid", "test") for ending in _endings(run, row)]:
        evaluation = run.evaluation(name)
        write_json(kept / "evaluation" / f"{name}.json", {**evaluation, "text": pathlib.Path(evaluation["text"]).name})
    lines = [*run.train_lines, *run.valid_lines]
    write_atomically(kept / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(kept / "environment.json", {name: value for name, value in run.environment.items() if name != "command"})
    write_json(kept / "config.json", saved)  # last: what has one is whole


def read_kept(folder: pathlib.Path, row: Row, seed: int, draft: Config) -> Run | None:
    """A kept run; None if there is none.

    Args:
      draft: the config that the row gives today.

    Raises:
      UserError: it was made with another config.
    """
    path = run_path(folder, row, seed)
    if not (path / "config.json").exists():
        return None
    then = from_json(read_json(path / "config.json", "")["given"])
    changed = differences(then, draft)
    for name in ("num_steps", "evaluate_every_steps"):  # which a run may change, and a row may not
        before, now = getattr(then.training, name), getattr(draft.training, name)
        if before != now:
            changed.append(f"training.{name}: {before} then, {now} now")
    if changed:
        raise UserError(f"{path} was made with another config ({'; '.join(changed)}): remove it and run the row again")
    return read_run(path)


def is_scored(run: Run, row: Row) -> bool:
    """Whether a kept run has a figure for each way of scoring that the row names today."""
    return all(f"{split}{ending}" in run.evaluations for split in ("valid", "test") for ending in _endings(run, row))


def _endings(run, row):
    """Of the names of a row's evaluations, after the split."""
    last = [f".step-{run.valid_lines[-1]['step']}"] if row.last_epoch else []
    return ["", *(variant.ending for variant in row.variants), *last]


def write_page(
    folder: pathlib.Path, opening: str, sections: Sequence[Section], runs: Mapping[str, Sequence[Run]]
) -> pathlib.Path:
    """Writes README.md and the plots; returns the page's path.

    Args:
      opening: what stands above the sections.
      runs: by the path of their row; of a row that has none, the tables say that it is not yet run.
    """
    lines = ["# Results", "", *opening.splitlines(), ""]
    for section in sections:
        section = dataclasses.replace(section, rows=tuple(_beside_peer(folder, row) for row in section.rows))
        found = {
            row.path: tuple(dataclasses.replace(run, name=row.name) for run in runs.get(row.path, ())) for row in section.rows
        }
        lines += [f"## {section.title}", "", *section.text.splitlines(), "", *_TABLES[section.kind](section, found), ""]
        first = [found[row.path][0] for row in section.rows if found[row.path]]
        if section.kind == "equal" and first:
            plot = f"{re.sub(r'[^a-z0-9]+', '_', section.title.lower()).strip('_')}.png"
            measure = "perplexity" if check_comparable(first, "test") else "bits_per_byte"
            learning_curves(first, measure).savefig(folder / plot, dpi=120)
            lines += [f"![Valid {_words(measure)} against tokens seen and against training time]({plot})", ""]
    write_atomically(folder / "README.md", "\n".join(lines).rstrip() + "\n")
    return folder / "README.md"


def _beside_peer(folder, row):
    """The row with its peer's figure, if that is there. Its quick look at valid has a protocol of its own and stays out."""
    path = folder / row.path / row.peer
    if not row.peer or not path.exists():
        return row
    peer = read_json(path, "")
    said = f"PyTorch's example, {duration(peer['seconds'])}; {place(peer)}, {peer['date'][:10]}"
    return dataclasses.replace(row, published={"": Published(None, round(peer["perplexity"], 2), said)})


class _Way(typing.NamedTuple):
    """Runs of one row, all scored in one way."""

    kind: str  # "" as trained, "last epoch", or the variant: "dynamic", "cache"; as in `Row.published`
    label: str  # with its settings
    tests: list[dict]
    valids: list[dict]


def _ways(runs: Sequence[Run]) -> list[_Way]:
    """How the runs were scored on test, each way once, as trained first."""
    found = {}
    for run in runs:
        for name, test in run.evaluations.items():
            split, _, ending = name.partition(".")
            if split != "test":
                continue
            kind, label = _how(test["protocol"]) if not ending.startswith("step-") else ("last epoch",) * 2
            way = found.setdefault(label, _Way(kind, label, [], []))
            way.tests.append(test)
            way.valids.append(run.evaluation(f"valid{name.removeprefix('test')}"))
    return [found[label] for label in sorted(found)]


def _how(protocol):
    """Of a way of scoring: its kind, and its settings in words."""
    extras = {**(protocol["adaptation"] or {}), **{name: protocol.get(name) for name in ("dropout_samples", "temperature")}}
    extras = {name: settings for name, settings in extras.items() if settings is not None}
    words = [
        f"{_words(name)}: {', '.join(f'{_words(key)} {value}' for key, value in settings.items())}"
        if isinstance(settings, dict)
        else f"{_words(name)} {settings}"
        for name, settings in extras.items()
    ]
    return next(iter(extras), ""), "; ".join(words)


def _words(name):
    return name.replace("_", " ")


def _published(section, runs):
    """Ours beside the papers', a line for each way of scoring."""
    headers = "model", "parameters", "published", "valid", "test", "scored", "training", "seeds", "config"
    _check_one_text(section, runs)
    lines = []
    for row in section.rows:
        found = runs[row.path]
        ways = _ways(found)
        reached = {way.kind for way in ways}
        wanted = row.published or ([""] if not ways else [])
        for way in [*ways, *(_Way(kind, _words(kind), [], []) for kind in wanted if kind not in reached)]:
            lines.append(
                (
                    ", ".join(filter(None, (row.name, way.label))),
                    *(parameters([statistics.median(run.num_params for run in found)], found[:1]) if found else [MISSING]),
                    _quoted(row.published[way.kind]) if way.kind in row.published else MISSING,
                    *(_spread(scores, section.measure) for scores in (way.valids, way.tests)),
                    scored_context(way.tests[0]["protocol"]) if way.tests else MISSING,
                    _training(found),
                    _seeds(found) if way.tests else MISSING,
                    _command(row),
                )
            )
    return _markdown(headers, lines)


def _quoted(published):
    valid, test = (MISSING if value is None else str(value) for value in published[:2])
    return f"{valid} / {test} ({published.paper})"


def _equal(section, runs):
    """Models beside each other, and which are not yet run."""
    there = [runs[row.path][0] for row in section.rows if runs[row.path]]
    lines = comparison_table(there).markdown().splitlines() if there else []
    missing = [row.name for row in section.rows if not runs[row.path]]
    said = [f"Not yet run: {', '.join(missing)}."] if missing else []
    trained = [run for run in there if run.valid_lines]  # n-grams are not
    if len(trained) > 1 and check_comparable(trained, "test") and len({place(run.environment) for run in trained}) == 1:
        said = [_at_equal_time(trained), *(["", *said] if said else [])]
    return [*lines, *([""] if lines and said else []), *said]


def _at_equal_time(runs):
    """What each had reached on valid when the first was through."""
    seconds = min(run.valid_lines[-1]["seconds"] for run in runs)
    lowest = {
        run.name: min((line["perplexity"] for line in run.valid_lines if line["seconds"] <= seconds), default=math.inf)
        for run in runs
    }
    reached = ", ".join(f"{name} {result(value, 2)}" for name, value in sorted(lowest.items(), key=lambda item: item[1]))
    return (
        f"At equal training time, {duration(seconds)}, when the first was through all its steps: {reached}. These are the lowest "
        "of the looks at valid until then; the schedules of learning rates of those who are slower were not yet at their ends."
    )


def _parts(section, runs):
    """What leaving a part out costs, in nats per token of valid and of test."""
    headers, lines = ("model", "valid", "test", "cost on valid", "cost on test", "training", "seeds", "config"), []
    whole = runs[section.rows[0].path]
    _check_one_text(section, runs)
    for row in section.rows:
        scores = [[run.evaluation(split) for run in runs[row.path]] for split in ("valid", "test")]
        costs = [MISSING, MISSING]
        if whole and runs[row.path] and row != section.rows[0]:
            costs = [
                f"{statistics.median(_losses(found)) - statistics.median(run.evaluation(split)['loss'] for run in whole):+.4f}"
                for split, found in zip(("valid", "test"), scores, strict=True)
            ]
        cells = [_spread(found, section.measure) for found in scores]
        lines.append((row.name, *cells, *costs, _training(runs[row.path]), _seeds(runs[row.path]), _command(row)))
    return _markdown(headers, lines)


def _check_one_text(section, runs):
    """Raises a UserError if rows, or seeds of one, were scored on another text, in other tokens or in another way."""
    named = [dataclasses.replace(run, name=f"{row.path}/{run.name}") for row in section.rows for run in runs[row.path]]
    for split in ("valid", "test"):
        if not check_comparable(named, split):
            raise UserError(
                f"the rows of {section.title!r} have different tokenizers, whose {section.measure} does not compare; make a "
                "section of each tokenizer, or one of kind 'equal', which falls back on bits per byte"
            )


_TABLES = {"published": _published, "equal": _equal, "parts": _parts}


def _losses(scores):
    return [score["loss"] for score in scores]


def _spread(scores, measure):
    """Of the median loss over seeds, and of the lowest and highest of several."""
    if not scores:
        return NOT_YET_RUN
    losses, decimals = _losses(scores), 2 if measure == "perplexity" else 3

    def shown(loss):
        return result(math.exp(loss) if measure == "perplexity" else loss / math.log(2), decimals)

    middle = f"**{shown(statistics.median(losses))}**"
    return middle if len(losses) == 1 else f"{middle} ({shown(min(losses))} to {shown(max(losses))})"


def _training(runs):
    """Time and place, the place once for runs of one."""
    if not runs:
        return MISSING
    seconds = statistics.median(figures(run)["train_seconds"] for run in runs)
    places = {f"{place(run.environment)}, {run.environment['date'][:10]}" for run in runs}
    return f"{duration(seconds)}; {'; '.join(sorted(places))}"


def _seeds(runs):
    return ", ".join(str(run.config["seed"]) for run in runs) or MISSING


def _command(row):
    """The config and its overrides, as launch.train takes them."""
    return f"`{' '.join((row.config, *row.overrides))}`"


def _markdown(headers, rows):
    return Table(headers, tuple(rows), (False,) * len(headers), frozenset(), ()).markdown().splitlines()
