"""Plans a mesh on paper: python -m launch.plan --config=configs/scale/10b.py --device=v5p --num_devices=128

Counts from the config what each device holds and sends in a training step, on every mesh of data × fsdp × tensor that splits
the model evenly and fits into memory (on --config.mesh_shape alone, if that is set), and tells the fastest first. Nothing is run,
and no device is needed. Assumed: half of the devices' stated speed in matmuls, their stated bandwidths, and nothing sent while
something is computed.
"""

import math

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "a config file, such as configs/scale/10b.py")
flags.DEFINE_enum("device", "h100", ["v5p", "h100", "h200"], "TPU v5p, or H100 or H200 SXM in nodes of eight")
flags.DEFINE_integer("num_devices", 8, "that the mesh is made of", lower_bound=1)
flags.DEFINE_integer("vocab_size", None, "of the model; by default config.data.vocab_size", lower_bound=2)
flags.DEFINE_integer("meshes", 5, "how many meshes are told of", lower_bound=1)


def main(overrides):
    command.check_config_given()
    draft = command.load_config(FLAGS.config, overrides)
    from lm.benchmark.plan import MACHINES, plans
    from lm.config import resolve
    from lm.data.tokenizers import ByteTokenizer
    from lm.models.build import count_params, solve_widths

    config, machine = resolve(draft), MACHINES[FLAGS.device]
    vocab_size = (
        FLAGS.vocab_size or config.data.vocab_size or (ByteTokenizer.vocab_size if config.data.tokenizer == "byte" else None)
    )
    if vocab_size is None:
        raise UserError("the text decides how large the vocabulary is, and a plan reads none: give --vocab_size")
    config = solve_widths(config, vocab_size)
    asked = math.prod(config.mesh_shape) if config.mesh_shape else config.num_devices
    num_devices = asked or FLAGS.num_devices
    if FLAGS["num_devices"].present and FLAGS.num_devices != num_devices:
        field = f"mesh_shape {config.mesh_shape}" if config.mesh_shape else "num_devices"
        raise UserError(f"--num_devices={FLAGS.num_devices} is set, but config.{field} takes {num_devices}; leave one out")
    found = plans(config, vocab_size, num_devices, machine)
    num_params = count_params(config, vocab_size)
    print(
        f"{num_params:,} parameters, {config.data.batch_size:,} × {config.data.seq_len:,} tokens a step, on "
        f"{num_devices} × {machine.name}\n"
    )
    print("| mesh | state, GiB | in all, GiB | sent, GB | computing, s | sending, s | sending's share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for plan in found[: FLAGS.meshes]:
        print(
            f"| {' × '.join(map(str, plan.mesh_shape))} | {plan.state_bytes / 2**30:.2f} | {plan.memory_bytes / 2**30:.1f} | "
            f"{plan.sent_bytes / 1e9:.1f} | {plan.compute_seconds:.2f} | {plan.sending_seconds:.2f} | {plan.share:.0%} |"
        )
    best = found[0]
    print("\nper device on the first mesh:")
    for what, num_bytes in best.memory.items():
        print(f"  holds {num_bytes / 2**30:8.2f} GiB  {what}")
    for sent in sorted(best.sent, key=lambda sent: -sent.num_bytes):
        print(f"  sends {sent.num_bytes / 1e9:8.2f} GB   {sent.what}, along {' × '.join(sent.axes)}")
    return {
        "config": FLAGS.config,
        "num_params": num_params,
        "device": machine.name,
        "num_devices": num_devices,
        "plans": [
            {
                "mesh_shape": plan.mesh_shape,
                "state_bytes": plan.state_bytes,
                "memory_bytes": plan.memory_bytes,
                "sent_bytes": plan.sent_bytes,
                "compute_seconds": plan.compute_seconds,
                "sending_seconds": plan.sending_seconds,
            }
            for plan in found[: FLAGS.meshes]
        ],
    }


if __name__ == "__main__":
    command.run(main, __doc__, takes_config=True)
