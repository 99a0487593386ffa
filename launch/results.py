"""Runs and tabulates the results of this codebase: python -m launch.results --folder=lm/reporting/results

Without --workdir it writes the page anew from what is kept in the folder. With it, rows that are not there yet (--only picks
some) are trained, scored on valid and test and kept; an interrupted one goes on. The rows are those of configs/_results.py, or
of a file of your own (--tables) that names an OPENING and SECTIONS like it.
"""

import pathlib
import runpy

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("folder", None, "where the small files of finished runs are kept and the page is written")
flags.DEFINE_string("tables", None, "a Python file that lists sections and rows, instead of configs/_results.py")
flags.DEFINE_string("workdir", None, "train and score what is missing, in folders in here")
flags.DEFINE_string("only", "", "run only rows whose path contains this, such as ptb/small")
flags.DEFINE_string("data_path", None, "where the corpus of these rows stands, which must all be of one corpus")


def main(overrides):
    del overrides
    if not FLAGS.folder:
        raise UserError("--folder is missing: give the folder of results, such as --folder=lm/reporting/results")
    for name in ("only", "data_path"):
        if FLAGS[name].value and not FLAGS.workdir:
            raise UserError(f"--{name} is set without --workdir, where rows are trained; give that too, or leave it out")
    command.check_data_path(FLAGS.data_path)
    from lm.files import check_writable
    from lm.reporting.results import is_scored, read_kept, rows_by_path, write_page

    folder = pathlib.Path(FLAGS.folder)
    if not FLAGS.workdir and not folder.is_dir():
        raise UserError(f"--folder={folder} does not exist: give the folder of kept runs, or --workdir too, to train them for it")
    check_writable(folder / "README.md")
    opening, sections = _tables()
    rows = rows_by_path(sections)
    if not any(FLAGS.only in path for path in rows):
        raise UserError(f"--only={FLAGS.only} is in the path of no row; there are {', '.join(rows)}")
    root, runs = pathlib.Path(__file__).parent.parent, {}
    drafts = [
        (row, seed, command.load_config(str(root / row.config), [*row.overrides, f"--config.seed={seed}"]))
        for row in rows.values()
        for seed in row.seeds
    ]

    def missing():
        kept = ((each, read_kept(folder, *each)) for each in drafts)
        return [each for each, run in kept if run is None or not is_scored(run, each[0])]

    if FLAGS.workdir:
        _run_missing([each for each in missing() if FLAGS.only in each[0].path], folder)
    for row, seed, draft in drafts:
        found = read_kept(folder, row, seed, draft)
        if found is not None:
            runs.setdefault(row.path, []).append(found)
    page = write_page(folder, opening, sections, runs)
    incomplete = {row.path for row, _, _ in missing()}
    left = [path for path in rows if path in incomplete]
    print(f"page: {page}; {len(rows) - len(left)} of {len(rows)} rows are there, with all their seeds and ways of scoring")
    return {"page": str(page), "left": left}


def _tables():
    """What stands above the sections, and the sections."""
    from lm.reporting.results import Section

    if FLAGS.tables is None:
        from configs import _results

        return _results.OPENING, _results.SECTIONS
    try:
        found = runpy.run_path(FLAGS.tables)
        opening, sections = found["OPENING"], found["SECTIONS"]
    except UserError as error:
        raise UserError(f"--tables={FLAGS.tables}: {error}") from None
    except OSError as error:
        raise UserError(f"--tables={FLAGS.tables} cannot be read: {error}") from None
    except Exception as error:  # it is a program; whatever is wrong with it is told in its own words
        raise UserError(
            f"--tables={FLAGS.tables}: {type(error).__name__}: {' '.join(str(error).split())}; configs/_results.py shows what "
            "belongs there"
        ) from None
    if not isinstance(opening, str) or not isinstance(sections, tuple) or not all(isinstance(one, Section) for one in sections):
        raise UserError(f"--tables={FLAGS.tables}: OPENING must be text, SECTIONS a tuple of Section; see configs/_results.py")
    return opening, sections


def _run_missing(drafts, folder):
    from lm.reporting.results import keep, run_path

    corpora = sorted({draft.data.path or draft.data.source for _, _, draft in drafts})
    if FLAGS.data_path and len(corpora) > 1:
        raise UserError(
            f"--data_path is one corpus, but the rows to run are of {', '.join(corpora)}; pick those of one with --only, "
            "such as --only=ptb/"
        )
    for row, seed, draft in drafts:
        workdir = run_path(pathlib.Path(FLAGS.workdir), row, seed)
        _train_and_score(row, draft, workdir)
        keep(workdir, run_path(folder, row, seed), row, draft)


def _train_and_score(row, draft, workdir):
    from launch import console
    from lm import backend
    from lm.config import replaced
    from lm.evaluation.evaluate import evaluate_run
    from lm.evaluation.variants import PLAIN
    from lm.reporting.table import result
    from lm.runs.open import open_best, open_run

    backend.start()
    if FLAGS.data_path:
        draft = replaced(draft, "data", path=FLAGS.data_path)
    if draft.training.init_from:
        start = pathlib.Path(FLAGS.workdir) / draft.training.init_from / workdir.name
        draft = replaced(draft, "training", init_from=str(start))
    label = f"{row.path}/{workdir.name}"
    console.train_shown(draft, str(workdir), label)
    for step in ("best", "latest") if row.last_epoch else ("best",):
        run = open_best(str(workdir)) if step == "best" else open_run(str(workdir), step)
        for variant in (PLAIN, *row.variants) if step == "best" else (PLAIN,):
            scored = (evaluate_run(run, split, variant=variant)["perplexity"] for split in ("valid", "test"))
            valid, test = (result(perplexity, 2) for perplexity in scored)
            print(f"{label}, {step}{variant.ending}: perplexity valid {valid}, test {test}", flush=True)


if __name__ == "__main__":
    command.run(main, __doc__, resumes=True)
