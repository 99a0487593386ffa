"""Tokenises a corpus once, on all cores: python -m launch.prepare_data --config=C --folder=D

Train, valid and test of the config's text become shards of tokens in the folder, with the tokenizer and a manifest of counts and
hashes; training reads them with --config.data.prepared=D in place of the text, on any host. Run the same command again after
any interruption and it goes on with the shards that are missing; once more, and it checks the hashes of all and mends what is
damaged. On several hosts that share the folder, give each --num_processes and its --process_id.
"""

import os
import pathlib
import shlex
import time

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "a config file, such as configs/ptb/zaremba_small.py; its data section counts")
flags.DEFINE_string("folder", None, "where the shards are written; made if need be")
flags.DEFINE_string("tokenizer", None, "use this tokenizer.json (of a run or another such folder) and train none")
flags.DEFINE_integer("workers", None, "processes that tokenise [one for each core]", lower_bound=1)
flags.DEFINE_integer("shard_mib", 32, "MiB of text in each shard, about", lower_bound=1, upper_bound=1 << 20)
flags.DEFINE_integer("num_processes", 1, "how many share the work, usually one on each host", lower_bound=1)
flags.DEFINE_integer("process_id", 0, "which of them this is, from 0", lower_bound=0)


def main(overrides):
    command.check_config_given()
    if not FLAGS.folder:
        raise UserError("--folder is missing: give a folder for the shards, such as --folder=prepared/first")
    if FLAGS.process_id >= FLAGS.num_processes:
        raise UserError(f"--process_id={FLAGS.process_id} must be below --num_processes={FLAGS.num_processes}")
    from lm.data.prepare import Job, prepare, total_bytes

    draft = command.load_config(FLAGS.config, overrides)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = FLAGS.workers or cores
    job = Job(num_workers, FLAGS.num_processes, FLAGS.process_id)
    tokenizer = pathlib.Path(FLAGS.tokenizer) if FLAGS.tokenizer else None
    started, done = time.perf_counter(), 0
    with command.ProgressBar(total_bytes(draft, job), "B") as bar:

        def progress(num_bytes):
            nonlocal done
            done += num_bytes
            bar.update(num_bytes)

        found = prepare(draft, pathlib.Path(FLAGS.folder), job, FLAGS.shard_mib << 20, tokenizer, progress)
    seconds = time.perf_counter() - started
    for name, facts in found.splits.items():
        tokens, shards = f"{facts['tokens']:,} tokens", _shards(len(facts["shards"]))
        print(f"{name}: {tokens} in {shards}, of {facts['num_bytes']:,} bytes and {facts['num_words']:,} words")
    print(f"{done / 1e6:,.1f} MB of text in {seconds:,.1f} s, {num_workers} workers")
    if found.missing:
        print(f"{_shards(found.missing)} still to come; the last of the {FLAGS.num_processes} processes finishes {FLAGS.folder}")
    else:
        given = shlex.join([f"--config={FLAGS.config}", *overrides, f"--config.data.prepared={FLAGS.folder}"])
        print(f"next: python -m launch.train {given} --workdir=…")
    return {"folder": FLAGS.folder, "missing": found.missing, "splits": found.splits, "seconds": seconds, "bytes": done}


def _shards(number):
    return f"{number} {'shard' if number == 1 else 'shards'}"


if __name__ == "__main__":
    command.run(main, __doc__, takes_config=True, resumes=True)
