"""Measures tables and curves of speed: python -m launch.suite --suite=cpu --folder=runs/speed/cpu

Runs the benchmarks of a suite one after the other (configs/benchmark/_suites.py lists them), each into a JSON file of the
folder, and writes a page with tables and plots beside them. What is there already is not measured again, so an interrupted
suite goes on. cpu and gpu stand against PyTorch (extra: peers); curves varies one thing at a time.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", None, ["cpu", "gpu", "curves"], "which measurements")
flags.DEFINE_string("folder", None, "where results and page are written")
flags.DEFINE_string("only", "", "measure only those whose name contains this")
flags.DEFINE_integer("seconds", None, "start no further measurement after this many seconds", lower_bound=1)


def main(overrides):
    if not FLAGS.suite or not FLAGS.folder:
        raise UserError("give --suite (cpu, gpu or curves) and --folder, such as --suite=cpu --folder=runs/speed/cpu")
    del overrides
    import time

    from configs.benchmark._suites import SUITES
    from lm.benchmark.page import write_page
    from lm.files import check_writable, write_json

    folder, started, left = pathlib.Path(FLAGS.folder), time.monotonic(), 0
    check_writable(folder / "README.md")
    measurements = SUITES[FLAGS.suite]()
    if not any(FLAGS.only in measurement.name for measurement in measurements):
        raise UserError(f"--only={FLAGS.only} is in no name of the {FLAGS.suite} suite; configs/benchmark/_suites.py has them")
    can_measure = FLAGS.suite != "gpu" or platform() == "gpu"
    for number, measurement in enumerate(measurements if can_measure else ()):
        path = folder / f"{re.sub(r'[^a-z0-9]+', '_', measurement.name.lower()).strip('_')}.json"
        if path.exists() or FLAGS.only not in measurement.name:
            continue
        if FLAGS.seconds is not None and time.monotonic() - started > FLAGS.seconds:
            left += 1
            continue
        print(measurement.name, flush=True)
        result = measure(measurement)
        write_json(path, {**result, "measurement": {**dataclasses.asdict(measurement), "number": number}})
    shown = f"python -m launch.suite --suite={FLAGS.suite} --folder={FLAGS.folder}"
    page = write_page(folder, f"Speed: the {FLAGS.suite} suite", [dataclasses.asdict(m) for m in measurements], shown)
    if not can_measure:
        raise UserError(f"the gpu suite needs a GPU, and JAX sees none here; {page} says what is not yet measured")
    print(f"page: {page}" + (f"; {left} measurements are left, the same command goes on" if left else ""))
    return {"page": str(page), "left": left}


def platform():
    """What JAX finds, asked in a process of its own: one that holds a GPU's memory would stand in the way."""
    asked = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def measure(measurement):
    """What the benchmark says of one measurement, its lines printed as it comes."""
    from launch.benchmark import report
    from lm.benchmark.benchmark import benchmark
    from lm.benchmark.workloads import Generation, Task

    root = pathlib.Path(__file__).parent.parent
    draft = command.load_config(str(root / measurement.config), list(measurement.overrides))
    generation = Generation(measurement.num_samples)
    with _emulated(measurement.num_emulated):
        result = benchmark(
            Task(draft, measurement.mode, generation, measurement.vocab_size), measurement.against, rounds=measurement.rounds
        )
    result = {"config": measurement.config, **result}
    print("\n".join(report(result)), flush=True)
    return result


@contextlib.contextmanager
def _emulated(num_devices):
    """Processes started meanwhile see this many CPU devices; None: those there are."""
    before = os.environ.get("XLA_FLAGS")
    if num_devices is not None:
        os.environ["XLA_FLAGS"] = f"{before or ''} --xla_force_host_platform_device_count={num_devices}".strip()
    try:
        yield
    finally:
        if num_devices is not None:
            os.environ.pop("XLA_FLAGS")
            if before is not None:
                os.environ["XLA_FLAGS"] = before


if __name__ == "__main__":
    command.run(main, __doc__, resumes=True)
