"""Measures training: python -m launch.benchmark --config=configs/compare/lstm.py --against=torch

Runs the real training step on the real batches, and nothing is kept. Tells the time to the first step, tokens per second
over some rounds, peak memory, and what share of a big matmul's speed on this machine the model's arithmetic comes to. With
--against=torch the same model trains in PyTorch, from the same parameters on the same batches, in turns with ours.
"""

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "config", None, "a config file, such as configs/compare/lstm.py; `:runlocal=1` behind it makes a trial of seconds"
)
flags.DEFINE_enum("against", None, ["torch"], "also train the same model in this library, in turns (extra: peers)")
flags.DEFINE_integer("steps", None, "training steps of a round; by default as many as fill two seconds", lower_bound=1)
flags.DEFINE_integer("rounds", 5, "rounds to measure", lower_bound=1)
flags.DEFINE_enum(
    "allocator", "tuned", ["tuned", "system"], "on a CPU: glibc told to keep freed memory, as in launch.train, or left as it is"
)


def main(overrides):
    if not FLAGS.config:
        raise UserError(f"--config is missing: give one of {', '.join(command.known_configs())}, or a file of your own")
    draft = command.load_config(FLAGS.config, overrides)
    from lm import parallel
    from lm.training.benchmark import benchmark

    parallel.start(FLAGS.allocator)
    with command.ProgressBar(FLAGS.rounds, " rounds") as bar:
        result = benchmark(draft, FLAGS.against, FLAGS.steps, FLAGS.rounds, on_round=lambda: bar.update(1))
    result = {"config": FLAGS.config, "allocator": FLAGS.allocator, **result}
    print("\n".join(report(result)))
    return result


def report(result):
    """The lines that a person reads."""
    speed, memory, matmul, where = (result[name] for name in ("tokens_per_second", "memory", "matmul", "environment"))
    peer = result["against"]
    rounds = f"{result['rounds']} rounds of {result['steps']} steps"
    yield (
        f"{result['model']}, {result['num_params']:,} parameters, vocabulary of {result['vocab_size']:,}; "
        f"steps of {result['batch_size']} × {result['seq_len']} tokens of {result['text']}"
    )
    devices = f"{where['num_devices']} × {where['device']}"
    rows = [
        ("machine", f"{where['hardware']}; jax {where['jax']} on {devices}; {result['allocator']} allocator"),
        ("first step", f"{result['first_step_seconds']:.2f} s, compilation included"),
        ("training", f"{_rate(speed)}, median of {rounds}; {result['step_seconds'] * 1000:,.1f} ms a step"),
    ]
    if peer:
        rows += [
            (
                f"{peer['name']} {peer['torch']}",
                f"{_rate(peer['tokens_per_second'])}, {peer['num_threads']} threads; first losses equal: "
                f"{result['first_loss']:.5f} and {peer['first_loss']:.5f}",
            ),
            (
                "ratio",
                f"{peer['ratio']['median']:.2f} times {peer['name']}, median of {result['rounds']} pairs of rounds "
                f"({peer['ratio']['min']:.2f} to {peer['ratio']['max']:.2f})",
            ),
        ]
    device = "" if memory["device_peak_bytes"] is None else f", device {_mebibytes(memory['device_peak_bytes'])}"
    before = _mebibytes(memory["host_peak_bytes_before_first_step"])
    rows += [
        ("peak memory", f"host {_mebibytes(memory['host_peak_bytes'])} ({before} before the first step){device}"),
        (
            "arithmetic",
            f"{_scaled(result['flops_per_token'])}FLOP a token, {_scaled(result['flops_per_second'])}FLOP/s: "
            f"{result['share_of_matmul_peak']:.1%} of the {_scaled(matmul['flops_per_second'])}FLOP/s of a "
            f"{matmul['size']} × {matmul['size']} {matmul['dtype']} matmul here",
        ),
    ]
    load = result["load_average"][0]
    if load > 0.5:
        suffers = f"; {peer['name']}, whose threads wait for each other, suffers most" if peer else ""
        rows.append(("take care", f"the machine was busy before this began (load {load:.1f}): figures are noisy{suffers}"))
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name:<{width}}  {text}" for name, text in rows)


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
