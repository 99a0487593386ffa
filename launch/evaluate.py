"""Scores a trained run: python -m launch.evaluate --workdir=runs/lstm --split=test

Every token of the split (or of any text, with --text) is scored once, in order; the figure is written to the run's folder with
the protocol it was taken under. Test is scored once: asked again, the stored figure is given.
"""

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "the folder of a trained run")
flags.DEFINE_string("split", "test", "train, valid or test")
flags.DEFINE_string("step", "best", "the checkpoint: best (on valid), latest, or its number")
flags.DEFINE_string("text", None, "score this text file instead of a split")
flags.DEFINE_string("data_path", None, "where the run's corpus stands now, if it has moved")
flags.DEFINE_integer("context", None, "score in windows of this many tokens instead of what the run's config says")
flags.DEFINE_integer("stride", None, "tokens scored in each window after the first [context // 4]")


def main(overrides):
    del overrides
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the folder of a trained run")
    from lm import backend
    from lm.evaluation.evaluate import evaluate_run
    from lm.reporting.table import scored_context
    from lm.runs.open import open_run

    backend.start()
    run = open_run(FLAGS.workdir, FLAGS.step)
    with command.ProgressBar(1, " tokens") as bar:

        def progress(scored, total):
            bar.total = total
            bar.update(scored)

        result = evaluate_run(run, FLAGS.split, FLAGS.text, FLAGS.data_path, FLAGS.context, FLAGS.stride, progress)
    words = f"{result['word_perplexity']:.1f}" if result["words"] else "–"
    print(f"{result['text']}, scored by {FLAGS.workdir} at step {result['checkpoint']['step']} ({run.which})")
    print(
        f"  perplexity {result['perplexity']:.3f}   loss {result['loss']:.4f} nats/token   "
        f"{result['bits_per_byte']:.4f} bits/byte   word perplexity {words}"
    )
    print(
        f"  {result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['words']:,} words; "
        f"{scored_context(result['protocol'])}; {result['protocol']['precision']}; {result['seconds']:.1f} s"
    )
    if "floor" in result:
        floor = result["floor"]
        print(
            f"  {floor['excess']:.4f} nats/token above the floor of this text, {floor['loss']:.4f} (its process in the long run: "
            f"{floor['entropy_rate']:.4f} nats/character, exact to {max(floor['entropy_rate_error'], 1e-9):.0e})"
        )
    print(f"  {'stored before' if result['stored'] else 'written'}: {run.folder.evaluation / result['name']}.json")
    return result


if __name__ == "__main__":
    command.run(main, __doc__)
