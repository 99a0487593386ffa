"""Samples text from a trained run: python -m launch.generate --workdir=runs/lstm --prompt="Return the"

The text is drawn token by token through the model's carry; it ends at the end of a document or after --num_tokens; a
model of words, each of whose lines ends like a document, always goes on to --num_tokens.
"""

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "the folder of a trained run")
flags.DEFINE_string("prompt", "", "what the text begins with")
flags.DEFINE_string("step", "best", "the checkpoint: best (on valid), latest, or its number")
flags.DEFINE_integer("num_tokens", 200, "tokens to draw at most")
flags.DEFINE_integer("num_samples", 1, "texts to draw")
flags.DEFINE_float("temperature", 1.0, "below 1 sharper, above 1 flatter; 0 takes the likeliest token each time")
flags.DEFINE_integer("top_k", None, "draw among the k likeliest tokens only")
flags.DEFINE_float("top_p", None, "draw among the likeliest tokens that hold this share of the probability")
flags.DEFINE_integer("seed", 0, "of the draws")


def main(overrides):
    del overrides
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the folder of a trained run")
    from lm import backend
    from lm.evaluation.generate import Sampling, generate
    from lm.runs.open import open_run

    backend.start()
    run = open_run(FLAGS.workdir, FLAGS.step)
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    texts = generate(run, FLAGS.prompt, FLAGS.num_tokens, FLAGS.num_samples, sampling, FLAGS.seed)
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} ---")
        print(FLAGS.prompt + text)
    return {"workdir": FLAGS.workdir, "step": run.step, "prompt": FLAGS.prompt, "texts": texts}


if __name__ == "__main__":
    command.run(main, __doc__)
