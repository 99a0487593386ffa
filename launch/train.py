"""Trains one model: python -m launch.train --config=configs/compare/lstm.py --workdir=runs/lstm

Run the same command again after any interruption and it goes on from the last checkpoint. The workdir keeps the config, the
tokenizer, metrics.jsonl, TensorBoard events and the best and latest checkpoints. Score the result with launch.evaluate.

Several hosts train one model together: start the same command on each, with a workdir that all see. Under SLURM, on Cloud TPU
and on GKE the hosts find each other; elsewhere --coordinator_address, --num_processes and --process_id tell.
"""

import dataclasses
import math
import shlex

from absl import flags

from launch import command, guard, hosts
from lm.errors import Preempted, UserError

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "config", None, "a config file, such as configs/compare/lstm.py; `:runlocal=1` behind it makes a trial of seconds"
)
flags.DEFINE_string("workdir", None, "the run's folder; made if need be")
flags.DEFINE_boolean("dry_run", False, "print the parameters, the memory of a step and what would be trained, and train nothing")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT on the first of several hosts, where they meet")
flags.DEFINE_integer("num_processes", None, "how many processes train together, usually one on each host")
flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


def main(overrides):
    command.check_config_given()
    if not FLAGS.workdir and not FLAGS.dry_run:
        raise UserError("--workdir is missing: give a folder for the run, such as --workdir=runs/first")
    draft = command.load_config(FLAGS.config, overrides)
    meeting = FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    if hosts.is_one_of_many(*meeting) and not FLAGS.dry_run:
        guard.join(FLAGS.workdir, *meeting)
    from launch import console
    from lm import backend, parallel, processes
    from lm.config import resolve
    from lm.evaluation.perplexity import perplexity
    from lm.reporting import table
    from lm.runs.checkpoint import Checkpoints
    from lm.runs.folder import RunFolder
    from lm.training.train import Listener, prepare, step_memory, train

    backend.start()
    if FLAGS.dry_run:
        folder = RunFolder(FLAGS.workdir) if FLAGS.workdir else None
        experiment = prepare(draft, folder)
        if folder is not None:
            folder.check_same_experiment(experiment.config, experiment.facts)
        settings, memory = experiment.config, None
        if settings.model.architecture != "ngram":
            placement = parallel.place(settings)
            placement.check_rows(settings.data.batch_size, settings.training.num_micro_batches)
            print(console.parameter_table(experiment))
            memory = step_memory(experiment, placement)
            print(
                f"\non {placement.num_devices} device(s): {placement.devices[0].device_kind}; by the compiler's reckoning a step "
                f"takes {memory['peak'] / 2**20:,.1f} MiB of each, {memory['state'] / 2**20:,.1f} MiB of it the state"
            )
        print(f"would train {console.describe(experiment)}")
        done = Checkpoints(folder.checkpoints).steps() if folder is not None else []
        if done:
            print(f"{FLAGS.workdir} has been trained for {done[-1]:,} steps, where it would go on")
        return {"config": FLAGS.config, **experiment.facts, "bytes_per_device": memory}
    if not processes.is_first():
        try:
            train(draft, FLAGS.workdir, Listener())
        except Preempted:
            guard.leave(143)  # the first tells of it
        return None
    listener = console.Console()
    try:
        result = train(draft, FLAGS.workdir, listener)
    finally:
        listener.close()
    quick = (
        f"best valid perplexity {table.result(perplexity(result.best_loss), 2)} (quick look) at step {result.best_step:,}; "
        if math.isfinite(result.best_loss)
        else ""
    )
    print(f"trained {result.tokens:,} tokens in {result.seconds:.0f} s; {quick}{FLAGS.workdir}")
    wanted = resolve(draft).training
    if wanted.early_stopping is not None and result.step < wanted.num_steps:
        looks = f"{wanted.early_stopping} looks at valid in a row brought nothing better"
        print(f"stopped early, at step {result.step:,} of {wanted.num_steps:,}: {looks}")
    print(f"next: python -m launch.evaluate --workdir={shlex.quote(FLAGS.workdir)} --split=test")
    best_loss = result.best_loss if math.isfinite(result.best_loss) else None  # JSON has no infinity
    return {"workdir": FLAGS.workdir, **dataclasses.asdict(result), "best_loss": best_loss}


if __name__ == "__main__":
    command.run(main, __doc__, takes_config=True, resumes=True)
