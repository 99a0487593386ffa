"""Trains PyTorch's example, a peer of our runs: python -m launch.word_language_model --data_path=data/ptb --epochs=6

The recurrent models of the example word_language_model, its training and its defaults. Ends with perplexity on test of the
epoch that was best on valid, as the example scores it and over every token, as launch.evaluate does. Needs the extra `peers`.
"""

import datetime

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("data_path", None, "folder with train, valid and test, as config.data.path")
flags.DEFINE_enum("model", "LSTM", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"], "kind of its layers")
flags.DEFINE_integer("epochs", 40, "passes over train", lower_bound=1)
flags.DEFINE_float("lr", 20.0, "learning rate at first; the example says 5 for an RNN", lower_bound=0.0)
flags.DEFINE_integer("seed", 1111, "of parameters and dropout")


def main(overrides):
    del overrides
    if not FLAGS.data_path:
        raise UserError("--data_path is missing: give a folder with train, valid and test, such as --data_path=data/ptb")
    from lm.benchmark.word_language_model import Settings, train

    line = "epoch {epoch:2d}  learning rate {learning_rate:<8.4g} valid perplexity {valid_perplexity:7.2f}  {seconds:6.0f} s"
    settings = Settings(model=FLAGS.model, epochs=FLAGS.epochs, lr=FLAGS.lr, seed=FLAGS.seed)
    result = train(FLAGS.data_path, settings, lambda epoch: print(line.format(**epoch), flush=True))
    print(
        "{model}, {num_params:,} parameters, {seconds:.0f} s of training on {num_threads} threads of torch {torch}\n"
        "test perplexity {perplexity:.2f} of all {num_scored:,} tokens; {example_perplexity:.2f} as the example scores it".format(
            **result
        )
    )
    return {**result, "date": datetime.date.today().isoformat()}


if __name__ == "__main__":
    command.run(main, __doc__)
