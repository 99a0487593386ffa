"""Scores a trained run: python -m launch.evaluate --workdir=runs/lstm --split=test

Every token of the split (or of any text, with --text) is scored once, in order; the figure is written to the run's folder with
the protocol it was taken under. Test is scored once: asked again, the stored figure is given.

Variants: --dynamic=rms (dynamic evaluation), --cache_window=500 (neural cache), --dropout_samples=100 (probabilities averaged
over dropout) and --temperature. Their settings, and windows other than the run's own (--context), are chosen on valid: test is
scored so only after valid was.
"""

from absl import flags

from launch import command
from lm.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "the folder of a trained run")
flags.DEFINE_string("split", None, "train, valid or test [test]")
flags.DEFINE_string("step", "best", "the checkpoint: best (on valid), latest, or its number")
flags.DEFINE_string("text", None, "score this text file instead of a split")
flags.DEFINE_string("data_path", None, "where the run's corpus stands now, if it has moved")
flags.DEFINE_integer("context", None, "score in windows of this many tokens instead of what the run's config says")
flags.DEFINE_integer("stride", None, "tokens scored in each window after the first [context // 4]")
flags.DEFINE_float("temperature", 1.0, "divides the logits")
flags.DEFINE_integer("dropout_samples", None, "average the probabilities of so many passes with dropout on")
flags.DEFINE_enum("dynamic", None, ["rms", "sgd"], "after each few tokens, let the parameters take a step along their gradient")
flags.DEFINE_float("dynamic_learning_rate", None, "factor on that gradient [rms: 0.00005, sgd: 0.3]")
flags.DEFINE_float("dynamic_decay", None, "how far back to the trained parameters each step goes [0.002]")
flags.DEFINE_float("dynamic_epsilon", None, "added to the gradients' root mean square in --dynamic=rms [0.00002]")
flags.DEFINE_integer("dynamic_segment", None, "tokens between two steps [5]")
flags.DEFINE_integer("cache_window", None, "mix in a cache of so many last tokens and their hidden states")
flags.DEFINE_float("cache_flatness", None, "factor on the products of hidden states, by which the cache is looked up [0.3]")
flags.DEFINE_float("cache_share", None, "the cache's share of the probability [0.1]")


def variant():
    """The way of scoring that the flags ask for."""
    from lm.evaluation.variants import Cache, Dynamic, Variant

    def given(prefix, switch):
        names = [name for name in FLAGS if name.startswith(prefix)]
        found = {name.removeprefix(prefix): FLAGS[name].value for name in names if FLAGS[name].value is not None}
        if found and FLAGS[switch].value is None:
            raise UserError(f"--{prefix}{next(iter(found))} is set without --{switch}; set that too, or leave it out")
        return found

    dynamic, cache = given("dynamic_", "dynamic"), given("cache_", "cache_window")
    return Variant(
        Dynamic(FLAGS.dynamic, **dynamic) if FLAGS.dynamic else None,
        Cache(**cache) if cache else None,
        FLAGS.dropout_samples,
        FLAGS.temperature,
    )


def main(overrides):
    del overrides
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the folder of a trained run")
    if FLAGS.split is not None and FLAGS.text is not None:
        raise UserError("--split and --text are both set, but one text is scored; leave one out")
    from lm import backend
    from lm.evaluation.evaluate import evaluate_run
    from lm.reporting import table
    from lm.runs.open import open_run

    backend.start()
    how = variant()
    run = open_run(FLAGS.workdir, FLAGS.step)
    split = "test" if FLAGS.split is None else FLAGS.split
    if FLAGS.step == "best" and run.which != "best" and split == "test" and FLAGS.text is None:
        raise UserError(
            "the checkpoint that was best on valid is not to be had, and no other is scored on test unasked; --step=latest takes "
            f"that of step {run.step}"
        )
    with command.ProgressBar(1, " tokens") as bar:

        def progress(scored, total):
            bar.total = total
            bar.update(scored)

        result = evaluate_run(run, split, FLAGS.text, FLAGS.data_path, FLAGS.context, FLAGS.stride, progress, how)
    which = "" if run.which.isdigit() else f" ({run.which})"
    print(f"{result['text']}, scored by {FLAGS.workdir} at step {result['checkpoint']['step']}{which}")
    print(
        f"  perplexity {table.result(result['perplexity'], 3)}   loss {result['loss']:.4f} nats/token   "
        f"{result['bits_per_byte']:.4f} bits/byte   word perplexity {table.result(result['word_perplexity'], 1)}"
    )
    print(
        f"  {result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['words']:,} words; "
        f"{table.scored_context(result['protocol'])}; {result['protocol']['precision']}; {result['seconds']:.1f} s"
    )
    for name, settings in {**(result["protocol"]["adaptation"] or {}), **how.protocol}.items():
        shown = ", ".join(f"{key} {value}" for key, value in settings.items()) if isinstance(settings, dict) else settings
        print(f"  {name.replace('_', ' ')}: {shown}")
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
