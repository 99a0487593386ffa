"""Measures speed: python -m launch.benchmark --config=configs/benchmark/lstm.py --mode=train --against=torch

Runs the real work on the real batches, and nothing is kept. --mode=train takes training steps, --mode=evaluate scores the
same batches, --mode=generate samples texts. Tells the time to the first step, with nothing compiled yet and in a second
start; tokens per second over some rounds; what share of it was waiting for data; peak memory; and what share of a big
matmul's speed on this machine the model's arithmetic comes to. With --against=torch the same model runs in PyTorch, from
the same parameters on the same batches, in a process of its own and in turns with ours: as its users start it and, on a
CPU, once more with our allocator settings. With --against=scan it is a plain lax.scan over time that stands beside ours.
"""

import pathlib

from absl import flags

from launch import command

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "config", None, "a config file, such as configs/compare/lstm.py; `:runlocal=1` behind it makes a trial of seconds"
)
flags.DEFINE_enum("mode", "train", ["train", "evaluate", "generate"], "what is measured")
flags.DEFINE_enum(
    "against", None, ["torch", "scan"], "also run the same in PyTorch (extra: peers), or as a plain lax.scan, in turns"
)
flags.DEFINE_integer(
    "vocab_size",
    None,
    "of the model, where that is to be larger than the text's (what is beyond never occurs)",
    lower_bound=1,
    upper_bound=10_000_000,
)
flags.DEFINE_integer("steps", None, "units of a round: steps, batches or texts; by default what fills two seconds", lower_bound=1)
flags.DEFINE_integer("rounds", 5, "rounds to measure", lower_bound=1)
flags.DEFINE_integer("num_samples", 1, "with --mode=generate: texts side by side", lower_bound=1, upper_bound=65_536)
flags.DEFINE_integer("num_tokens", 256, "with --mode=generate: tokens of a text", lower_bound=2, upper_bound=1_000_000)
flags.DEFINE_enum(
    "allocator", "tuned", ["tuned", "system"], "on a CPU: glibc told to keep freed memory, as in launch.train, or left as it is"
)
flags.DEFINE_bool("compile_peer", True, "let the peer try torch.compile too, and keep what is faster")
flags.DEFINE_string("profile", None, "also write a trace of three units to this folder, for TensorBoard or ui.perfetto.dev")


def main(overrides):
    command.check_config_given()
    draft = command.load_config(FLAGS.config, overrides)
    from lm.benchmark.benchmark import benchmark
    from lm.benchmark.units import Generation
    from lm.benchmark.workloads import Task

    with command.ProgressBar(FLAGS.rounds, " rounds") as bar:
        result = benchmark(
            Task(draft, FLAGS.mode, Generation(FLAGS.num_samples, FLAGS.num_tokens), FLAGS.vocab_size),
            FLAGS.against,
            FLAGS.steps,
            FLAGS.rounds,
            FLAGS.allocator,
            FLAGS.compile_peer,
            pathlib.Path(FLAGS.profile) if FLAGS.profile else None,
            on_round=lambda: bar.update(1),
        )
    result = {"config": FLAGS.config, **result}
    print("\n".join(report(result)))
    return result


_UNITS = {
    "train": ("training", "steps", "step"),
    "evaluate": ("evaluation", "batches", "batch"),
    "generate": ("generation", "texts", "text"),
}


def report(result):
    """The lines that a person reads."""
    speed, matmul, where = (result[name] for name in ("tokens_per_second", "matmul", "environment"))
    what, units, unit = _UNITS[result["mode"]]
    shape = f"{units} of {result['batch_size']} × {result['seq_len']} tokens of {result['text']}"
    if result["mode"] == "generate":
        shape = "{num_samples} × {num_tokens} tokens at a time".format(**result["generation"])
    yield f"{result['model']}, {result['num_params']:,} parameters, vocabulary of {result['vocab_size']:,}; {shape}"
    devices = f"{where['num_devices']} × {where['device']}"
    first, again = result["first_step_seconds"], result["warm_first_step_seconds"]
    rounds = f"{result['rounds']} rounds of {result['steps']} {units}"
    rows = [
        ("machine", f"{where['hardware']}; jax {where['jax']} on {devices}; {result['allocator']} allocator"),
        (f"first {unit}", f"{first:.2f} s with its compilation, {again:.2f} s in a second start"),
        (what, f"{_rate(speed)}, median of {rounds}; {result['step_seconds'] * 1000:,.1f} ms a {unit}"),
    ]
    if result["mode"] != "generate":
        most = "" if where["platform"] == "cpu" else "at most "  # the device may still work on what it was given ahead
        rows.append(("waiting", f"{most}{result['waiting_share']['median']:.1%} of the time, for data"))
    rows.append(("peak memory", _memory(result["memory"])))
    rows.append(
        (
            "arithmetic",
            f"{_scaled(result['flops_per_token'])}FLOP a token, {_scaled(result['flops_per_second'])}FLOP/s: "
            f"{result['share_of_matmul_peak']:.1%} of the {_scaled(matmul['flops_per_second'])}FLOP/s of a "
            f"{matmul['size']} × {matmul['size']} {matmul['dtype']} matmul here",
        )
    )
    if result["mode"] == "generate":
        few = result["few_row_matmul"]
        rows.append(
            (
                "reading",
                f"{result['share_of_few_row_matmul_peak']:.1%} of the {_scaled(few['flops_per_second'])}FLOP/s of "
                f"{few['rows']} × {few['size']} by {few['size']} × {few['width']}, which must be read like weights",
            )
        )
    for allocator, peer in (result["against"] or {"allocators": {}})["allocators"].items():
        rows += [
            (
                "torch" if peer["library"].startswith("torch") else "lax.scan",
                f"{_rate(peer['tokens_per_second'])}; {peer['library']}, {'compiled' if peer['compiled'] else 'eager'}, "
                f"{allocator} allocator; first losses {result['first_loss']:.5f} and {peer['first_loss']:.5f}",
            ),
            ("  its memory", _memory(peer["memory"])),
            (
                "  ratio",
                f"{peer['ratio']['median']:.2f} times that, median of {result['rounds']} pairs of rounds: "
                + ", ".join(f"{ratio:.2f}" for ratio in peer["ratio"]["rounds"]),
            ),
        ]
    busy = result["busy_cores"]
    if busy > 0.2:
        suffers = "; torch, whose threads wait for each other, suffers most" if result["against"] else ""
        rows.append(("take care", f"other work took {busy:.1f} cores before this began: figures are noisy{suffers}"))
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name:<{width}}  {text}" for name, text in rows)


def _memory(memory):
    device = "" if memory.get("device_peak_bytes") is None else f"; device {_mebibytes(memory['device_peak_bytes'])}"
    before = memory.get("host_peak_bytes_before")
    return f"host {_mebibytes(memory['host_peak_bytes'])}{f', {_mebibytes(before)} before the model' if before else ''}{device}"


def _rate(speed):
    return f"{speed['median']:,.0f} tokens/s ({speed['min']:,.0f} to {speed['max']:,.0f})"


def _scaled(value):
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"


def _mebibytes(count):
    return f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    command.run(main, __doc__, takes_config=True)
