"""Trains PyTorch's example, a peer of our runs: python -m launch.word_language_model --data_path=data/ptb --epochs=6

The recurrent models of the example word_language_model, its training and its defaults. Ends with perplexity on test of the
epoch that was best on valid, as the example scores it and over every token, as launch.evaluate does. Needs the extra `peers`.
"""

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("data_path", None, "folder with train, valid and test, as config.data.path")
flags.DEFINE_enum("model", None, ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"], "kind of its layers; by default LSTM")
flags.DEFINE_integer("epochs", None, "passes over train; by default as many as the example takes, 40", lower_bound=1)
flags.DEFINE_float("lr", None, "learning rate at first; by default the example's 20, but it means 5 for an RNN", lower_bound=0.0)
flags.DEFINE_integer("seed", None, "of parameters and dropout; by default the example's")


def main(overrides):
    del overrides
    if not FLAGS.data_path:
        raise UserError("--data_path is missing: give a folder with train, valid and test, such as --data_path=data/ptb")
    command.check_data_path(FLAGS.data_path)
    from lm.benchmark.word_language_model import Settings, train
    from lm.runs.folder import environment

    line = "epoch {epoch:2d}  learning rate {learning_rate:<8.4g} valid perplexity {valid_perplexity:7.2f}  {seconds:6.0f} s"
    given = {name: FLAGS[name].value for name in ("model", "epochs", "lr", "seed") if FLAGS[name].value is not None}
    result = train(FLAGS.data_path, Settings(**given), lambda epoch: print(line.format(**epoch), flush=True))
    print(
        "{model}, {num_params:,} parameters, {seconds:.0f} s of training on {num_threads} threads of torch {torch}\n"
        "test perplexity {perplexity:.2f} of all {num_scored:,} tokens; {example_perplexity:.2f} as the example scores it".format(
            **result
        )
    )
    machine = environment()
    return {**result, "hardware": machine["hardware"], "date": machine["date"]}


if __name__ == "__main__":
    command.run(main, __doc__)
