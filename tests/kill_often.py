"""Kills runs with SIGKILL at random moments, as often as asked: python tests/kill_often.py --times=50

The same command goes on each time, and what a run has left in the end must be, bit for bit, what one has left that was never
killed. Moments are drawn from the start of the process on, so they fall into imports, compilation, steps, looks at valid and
into the writing of checkpoints, of which there are many. The suite has a short form (tests/test_resume.py).
"""

import argparse
import contextlib
import pathlib
import random
import signal
import subprocess
import tempfile
import time

from helpers import config_file, write_corpus
from test_resume import assert_same_outcome, launched, lstm, outcome, transformer

from lm.runs.checkpoint import Checkpoints

STEPS = dict(training__num_steps=300, training__evaluate_every_steps=97, training__checkpoint_every_steps=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, kills, finished = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        corpus = write_corpus(scratch / "corpus", train=40, valid=8, test=8)
        whole = {}
        for make in (lstm, transformer):
            path = config_file(scratch / f"{make.__name__}.py", make(corpus, **STEPS))
            started = time.monotonic()
            finish(path, scratch / f"{make.__name__} whole")
            whole[path] = outcome(scratch / f"{make.__name__} whole"), time.monotonic() - started
        while kills < options.times:
            path = list(whole)[finished % 2]
            expected, seconds = whole[path]
            workdir = scratch / f"{path.stem} {finished}"
            kills += kill_until_done(path, workdir, draw, seconds, options.times - kills)
            assert_same_outcome(expected, outcome(workdir))
            finished += 1
            print(f"{path.stem}: done and as if never killed; {kills} kills so far", flush=True)
    print(f"{kills} kills over {finished} runs: every run went on and ended bit for bit the same")


def kill_until_done(path, workdir, draw, seconds, times):
    """Kills and goes on until the run is done, at most so often, each time within so many seconds; how often it was killed."""
    for kills in range(times):
        with launched(path, workdir) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, seconds))
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()[1]
                return kills
            process.send_signal(signal.SIGKILL)
        saved = Checkpoints(workdir / "checkpoints").steps()
        partial = bool(list((workdir / "checkpoints").glob("*.partial")))
        print(f"  killed; saved: {saved[-1] if saved else 'nothing yet'}{', while saving' if partial else ''}", flush=True)
    finish(path, workdir)
    return times


def finish(path, workdir):
    """Lets a run go on to its end."""
    with launched(path, workdir) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err


if __name__ == "__main__":
    main()
