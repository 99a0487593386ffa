"""Measures tables and curves of speed: python -m launch.suite --suite=cpu --folder=runs/speed/cpu

Runs the benchmarks of a suite one after the other (configs/benchmark/_suites.py lists them), each into a JSON file of the
folder, and writes a page with tables and plots beside them. What is there already is not measured again, so an interrupted
suite goes on; what cannot be measured is told, and the rest is done. cpu and gpu stand against PyTorch (extra: peers); curves
varies one thing at a time.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import pathlib
import re
import subprocess
import sys

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
_GPU_SECONDS = 420  # a call then ends within ten minutes, the measurement that it is in included

flags.DEFINE_enum("suite", None, ["cpu", "gpu", "curves"], "which measurements")
flags.DEFINE_string("folder", None, "where results and page are written")
flags.DEFINE_string("only", "", "measure only those whose name contains this")
flags.DEFINE_integer(
    "seconds",
    None,
    "start no further measurement after this many seconds (the same command goes on); by default 420 for gpu, so that a call "
    "fits into ten minutes on a machine that is shared, else no end",
    lower_bound=1,
)


def main(overrides):
    if not FLAGS.suite or not FLAGS.folder:
        raise UserError("give --suite (cpu, gpu or curves) and --folder, such as --suite=cpu --folder=runs/speed/cpu")
    del overrides
    import time

    from configs.benchmark._suites import SUITES
    from lm.benchmark.page import write_page
    from lm.benchmark.workers import changed_environment
    from lm.files import check_writable, write_json

    folder, started, left, failed = pathlib.Path(FLAGS.folder), time.monotonic(), 0, []
    seconds = FLAGS.seconds or (_GPU_SECONDS if FLAGS.suite == "gpu" else math.inf)
    check_writable(folder / "README.md")
    measurements = SUITES[FLAGS.suite]()
    if not any(FLAGS.only in measurement.name for measurement in measurements):
        raise UserError(f"--only={FLAGS.only} is in no name of the {FLAGS.suite} suite; configs/benchmark/_suites.py has them")
    shown = f"python -m launch.suite --suite={FLAGS.suite} --folder={FLAGS.folder}"

    def page():
        heading, about = f"Speed: the {FLAGS.suite} suite", inspect.getdoc(SUITES[FLAGS.suite])
        return write_page(folder, heading, about, [dataclasses.asdict(m) for m in measurements], shown)

    page()  # before hours of work: what cannot be read is told now
    paths = [folder / f"{re.sub(r'[^a-z0-9]+', '_', wanted.name.lower()).strip('_')}.json" for wanted in measurements]
    for path, measurement in zip(paths, measurements, strict=True):
        check_same(path, measurement)
    wanting = [
        (number, path, measurement)
        for number, (path, measurement) in enumerate(zip(paths, measurements, strict=True))
        if not path.exists()
    ]
    with changed_environment({"JAX_PLATFORMS": "cpu"} if FLAGS.suite == "cpu" else {}):
        here = machine() if wanting else {}
        can_measure = not wanting or FLAGS.suite != "gpu" or here["platform"] == "gpu"
        if wanting and can_measure:
            check_machine(zip(paths, measurements, strict=True), here)
        for number, path, measurement in wanting if can_measure else ():
            if FLAGS.only not in measurement.name:
                continue
            if time.monotonic() - started > seconds:
                left += 1
                continue
            print(measurement.name, flush=True)
            try:
                result = measure(measurement)
            except UserError as error:  # the others can still be had
                failed.append(measurement.name)
                print(f"  not measured: {error}", file=sys.stderr, flush=True)
                continue
            write_json(path, {**result, "measurement": {**dataclasses.asdict(measurement), "number": number}})
            page()  # after each, since what ends this process need not end what it has measured
    written = page()
    if not can_measure:
        raise UserError(f"the gpu suite needs a GPU, and JAX sees none here; {written} says what is not yet measured")
    print(f"page: {written}" + (f"; {left} measurements are left, the same command goes on" if left else ""))
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}; the reasons stand above, and {written} has the rest")
    return {"page": str(written), "left": left}


def check_same(path, measurement):
    """Raises a UserError if another measurement of that name is kept."""
    from lm.files import read_json

    if not path.exists():
        return
    kept = read_json(path, "")["measurement"]
    for name, now in json.loads(json.dumps(dataclasses.asdict(measurement))).items():
        if kept.get(name) != now:
            raise UserError(
                f"{path} was measured with {name} = {kept.get(name)!r}, but it is {now!r} now; remove it and measure again"
            )


def check_machine(measurements, here):
    """Raises a UserError if what is kept was measured on another machine than what is to come would be.

    Args:
      measurements: (path of its result, Measurement) of each.
      here: as `machine` has it.
    """
    from lm.files import read_json
    from lm.reporting.table import place

    for path, measurement in measurements:
        if not path.exists():
            continue
        there = read_json(path, "")["environment"]
        told = ("hardware",) if measurement.num_emulated else ("hardware", "platform", "device")
        if any(there.get(name) != here[name] for name in told):
            raise UserError(
                f"{path} was measured on {place(there)}, and this is {place(here)}; give a --folder of this machine's own"
            )


def machine():
    """This machine and the devices that JAX finds, asked in a process of its own: one that holds a GPU would stand in the way.

    Raises:
      UserError: it finds not what JAX_PLATFORMS asks for.
    """
    from lm.runs.folder import environment

    asked = (
        "import json; from lm.backend import start; from lm.parallel import Placement, device_summary; start(); "
        "print(json.dumps(device_summary(Placement())))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"JAX does not start: {done.stderr.strip().splitlines()[-1].removeprefix('lm.errors.UserError: ')}")
    return {**environment(), **json.loads(done.stdout)}


def measure(measurement):
    """What the benchmark says of one measurement, its lines printed as it comes."""
    from launch.benchmark import report
    from lm.benchmark.benchmark import benchmark
    from lm.benchmark.units import Generation
    from lm.benchmark.workloads import Task

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
    """Processes started meanwhile see this many CPU devices and no others; None: those there are."""
    from lm.benchmark.workers import changed_environment

    if num_devices is None:
        yield
        return
    flags_of_xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}".strip()
    with changed_environment({"XLA_FLAGS": flags_of_xla, "JAX_PLATFORMS": "cpu"}):
        yield


if __name__ == "__main__":
    command.run(main, __doc__, resumes=True)
