"""Trains, scores and compares models: python -m launch.compare --configs=configs/compare/rnn.py,my.py --workdir=runs/mine

Each config gets a folder of its own in the workdir; what is finished is not done again, what was interrupted goes on. Then all
are scored on valid and test under one protocol, and report.md, report.json and plots are written to the workdir. With --workdirs
runs that are finished already are compared instead, also of one config with different settings or seeds.
"""

import pathlib

from absl import flags

from launch import command
from lm.errors import UserError
from lm.files import check_writable

FLAGS = flags.FLAGS
flags.DEFINE_list("configs", None, "config files, separated by commas; overrides hold for all of them")
flags.DEFINE_list("workdirs", None, "folders of trained runs, separated by commas, instead of --configs")
flags.DEFINE_string("workdir", None, "the folder for the runs and the report")
flags.DEFINE_integer("position_context", 256, "window, in tokens of valid, for the plot of loss by position")


def main(overrides):
    if bool(FLAGS.configs) == bool(FLAGS.workdirs):
        raise UserError("give either --configs (to train and compare) or --workdirs (to compare trained runs)")
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give a folder for the report, such as --workdir=runs/mine")
    if FLAGS.position_context < 1:
        raise UserError(f"--position_context={FLAGS.position_context} must be at least 1")
    drafts = {}
    if FLAGS.configs:
        drafts = {
            name: command.load_config(path, overrides) for name, path in _named(FLAGS.configs, "--configs", _of_file).items()
        }
        folders = {name: pathlib.Path(FLAGS.workdir) / name for name in drafts}
    else:
        if overrides:
            raise UserError(
                f"{overrides[0].split('=')[0]} is set, but trained runs have configs of their own; it goes with --configs"
            )
        folders = {name: pathlib.Path(path) for name, path in _named(FLAGS.workdirs, "--workdirs", _of_folder).items()}
    check_writable(pathlib.Path(FLAGS.workdir) / "report.md")  # now, not after hours of work, as all else that can be told now
    _check_drafts(drafts)
    from launch import console
    from lm import backend
    from lm.evaluation.evaluate import evaluate_run
    from lm.reporting.report import compare, write_report
    from lm.reporting.table import result
    from lm.runs.folder import RunFolder
    from lm.runs.open import open_best

    for folder in () if drafts else folders.values():
        RunFolder(folder).read_config()  # before any is scored
    backend.start()
    for number, (name, folder) in enumerate(folders.items(), 1):
        label = f"[{number}/{len(folders)}] {name}"
        if name in drafts:
            console.train_shown(drafts[name], str(folder), label)
        run = open_best(str(folder))
        scores = {split: result(evaluate_run(run, split)["perplexity"], 2) for split in ("valid", "test")}
        print(f"{label}: perplexity valid {scores['valid']}, test {scores['test']}", flush=True)
    by_position = _score_by_position(folders, open_best, evaluate_run)
    found = compare(folders)
    report = write_report(folders, FLAGS.workdir, by_position, found)
    print(f"\n{found.table.text().rstrip()}\n\n{found.summary}\n\nreport with plots: {report}")
    return {"report": str(report), "best": found.best, "summary": found.summary}


def _check_drafts(drafts):
    """Raises a UserError if a config has a wrong value, or if they are of different texts, which cannot be compared."""
    from lm.config import resolve
    from lm.data import sources

    texts = {}
    for name, draft in drafts.items():
        try:
            data = resolve(draft).data
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        texts.setdefault(sources.load(data)["test"].size.sha256, name)
    if len(texts) > 1:
        raise UserError(f"{' and '.join(texts.values())} have different texts for test, so they cannot be compared")


def _named(paths, flag, parts):
    """Short names for the rows: the file's or folder's own name, with its parent's where two are alike."""
    if not all(paths):
        raise UserError(f"{flag}={','.join(paths)} has nothing before or behind a comma; give names with one comma between two")
    named = {parts(path)[-1]: path for path in paths}
    if len(named) < len(paths):
        named = {"-".join(parts(path)[-2:]): path for path in paths}
    if len(named) < len(paths):
        raise UserError(
            f"{flag} names the same thing twice: {', '.join(paths)}; two settings of one config are trained into two "
            "folders by launch.train and compared by --workdirs"
        )
    return named


def _of_file(path):
    file = pathlib.Path(path.split(":")[0])
    return file.with_suffix("").parts if file.name else (path,)


def _of_folder(path):
    return pathlib.Path(path).resolve().parts


def _score_by_position(folders, open_best, evaluate_run):
    """Scores valid in windows that each start empty, for the models that can take them; the names of the figures by run."""
    context, names = FLAGS.position_context, {}
    for name, folder in folders.items():
        run = open_best(str(folder))
        if (run.config.model.max_positions or context) >= context:
            names[name] = evaluate_run(run, "valid", context=context, stride=context)["name"]
    return names


if __name__ == "__main__":
    command.run(main, __doc__, takes_config=True, resumes=True)
