"""Which rows the page of results has: what papers report, and the configs behind ours; launch.results trains and tabulates."""

from lm.evaluation.variants import Cache, Dynamic, Variant
from lm.reporting.results import Published, Row, Section

OPENING = """\
Perplexities of this codebase. Each figure is of one model as trained, at the checkpoint that was best in the quick looks at
valid while training, on the whole split, every token scored once in corpus order, at temperature 1; what was done otherwise is
said in its line. Test was scored once in each way. Bold is what was measured here; of models on equal terms, the lowest of a
column. The JSON files behind the figures, with the protocol, the environment and the seed of each, lie beside this page, which
is made of them alone:

    python -m launch.results --folder=lm/reporting/results

A row is trained and scored, and again after any interruption taken up, by

    python -m launch.results --folder=runs/results_page --only=ptb/small --workdir=runs/results --data_path=/path/to/ptb

which is `launch.train` with the config of its line and `--config.data.path`, then `launch.evaluate` for valid and test. A
fine-tuned row names in `init_from` the row that it continues, which is trained before it; `launch.train` takes that run's folder
there, and its time is that of its own stage. What is kept in the folder, as everything with a figure is in this one, is not run
again.
`--only` takes any part of a path, such as `ptb/parts` or `wikitext2/small`."""


def _row(path: str, name: str, **options) -> Row:
    """Of the config that is named like it."""
    return Row(path, name, f"configs/{path}.py", **options)


_BY_SGD, _BY_RMS, _OVER_MASKS = Variant(Dynamic("sgd", 0.3, 0.001)), Variant(Dynamic()), Variant(dropout_samples=100)
_ZAREMBA_2014, _MERITY_2018, _KRAUSE_2018 = "Zaremba et al. 2014", "Merity et al. 2018", "Krause et al. 2018"
_GAL_2016, _MELIS_2018, _MELIS_2020 = "Gal & Ghahramani 2016", "Melis et al. 2018", "Melis et al. 2020"
_YANG_2018, _DAI_2019, _MIKOLOV_2012 = "Yang et al. 2018", "Dai et al. 2019", "Mikolov & Zweig 2012"


def _tuned(first: Row, name: str, published, variants, *overrides: str) -> Row:
    """Another row's model after a fine-tuning stage: from its best parameters, averaged from the start."""
    stage = f"training.init_from={first.path}", "training.averaging=start", "training.early_stopping=5", *overrides
    given = tuple(f"--config.{override}" for override in stage)
    return Row(f"{first.path}_tuned", name, first.config, given, published=published, variants=variants)


def _zaremba(size: str, valid: float, test: float, seeds=(0,)) -> Row:
    published = {"last epoch": Published(valid, test, _ZAREMBA_2014)}
    return _row(f"ptb/zaremba_{size}", f"LSTM, {size}", seeds=seeds, published=published, last_epoch=True)


def _awd_lstm(corpus: str, cache: Cache, *, plain, tuned, cached, dynamic) -> tuple[Row, Row]:
    """The model without its fine-tuning stage, and with it; the cache's settings are those of the authors' code."""
    first = _row(f"{corpus}/awd_lstm", "AWD-LSTM without fine-tuning", published={"": Published(*plain, _MERITY_2018)})
    published = {
        "": Published(*tuned, _MERITY_2018),
        "cache": Published(*cached, _MERITY_2018),
        "dynamic": Published(*dynamic, _KRAUSE_2018),
    }
    return first, _tuned(first, "AWD-LSTM", published, (Variant(cache=cache), _BY_RMS))


def _gal(size: str, valid: float, test: float, test_over_masks: float) -> Row:
    last, over_masks = Published(valid, test, _GAL_2016), Published(None, test_over_masks, _GAL_2016)
    options = dict(published={"last epoch": last, "dropout_samples": over_masks}, variants=(_OVER_MASKS,), last_epoch=True)
    return _row(f"ptb/gal_{size}", f"variational LSTM, {size}", **options)


def _melis(corpus: str, valid: float | None, test: float) -> Row:
    return _row(f"{corpus}/melis", "tuned LSTM", published={"": Published(valid, test, _MELIS_2018)})


def _example(corpus: str, width: int, test: float) -> Row:
    """The LSTM of PyTorch's example as its users report it."""
    published = {"": Published(None, test, "users of PyTorch's example")}
    return _row(f"{corpus}/lstm_{width}", f"LSTM of PyTorch's example, {width} units, tied", published=published)


def _transformer_xl(corpus: str, test: float, size: str = "") -> Row:
    published = {"": Published(None, test, _DAI_2019)}
    return _row(f"{corpus}/transformer_xl{size and '_' + size}", f"Transformer-XL{size and ', ' + size}", published=published)


def _mixture(corpus: str, learning_rate: float, plain, tuned, dynamic) -> tuple[Row, Row]:
    """As `_awd_lstm`; the fine-tuning stage has a learning rate of its own."""
    first = _row(f"{corpus}/awd_lstm_mos", "AWD-LSTM-MoS without fine-tuning", published={"": Published(*plain, _YANG_2018)})
    published = {"": Published(*tuned, _YANG_2018), "dynamic": Published(*dynamic, _YANG_2018)}
    return first, _tuned(first, "AWD-LSTM-MoS", published, (_BY_RMS,), f"optimizer.learning_rate={learning_rate}")


def _mogrifier(corpus: str, static, dynamic) -> Row:
    published = {"": Published(*static, _MELIS_2020), "dynamic": Published(*dynamic, _MELIS_2020)}
    return _row(f"{corpus}/mogrifier", "Mogrifier LSTM", published=published, variants=(_BY_RMS,))


_PTB = (
    _row("ptb/kneser_ney_5", "Kneser-Ney 5-gram", published={"": Published(None, 141.2, _MIKOLOV_2012)}),
    _row("ptb/mikolov", "recurrent network", published={"": Published(None, 124.7, _MIKOLOV_2012)}),
    _zaremba("small", 120.7, 114.5, seeds=(0, 1, 2)),
    _zaremba("medium", 86.2, 82.7),
    _zaremba("large", 82.2, 78.4),
    _gal("medium", 81.8, 79.7, 79.0),
    _gal("large", 77.3, 75.0, 74.1),
    _melis("ptb", 60.9, 58.3),
    *_awd_lstm(
        "ptb",
        Cache(window=500, flatness=1.0, share=0.1),
        plain=(60.7, 58.8),
        tuned=(60.0, 57.3),
        cached=(53.9, 52.8),
        dynamic=(51.6, 51.1),
    ),
    *_mixture("ptb", 25.0, (58.08, 55.97), (56.54, 54.44), (48.33, 47.69)),
    _mogrifier("ptb", (51.4, 50.1), (44.9, 44.8)),
    _row("ptb/transformer_xl", "Transformer-XL", published={"": Published(56.72, 54.52, _DAI_2019)}),
    _example("ptb", 1500, 72.30),
)
_WIKITEXT2 = (
    _row("wikitext2/lstm_200", "LSTM of PyTorch's example, 3 epochs", peer="word_language_model.json"),
    _example("wikitext2", 650, 86.68),
    _example("wikitext2", 1500, 84.1),
    _melis("wikitext2", 69.1, 65.9),
    *_awd_lstm(
        "wikitext2",
        Cache(window=3785, flatness=0.662, share=0.1279),
        plain=(69.1, 66.0),
        tuned=(68.6, 65.8),
        cached=(53.8, 52.0),
        dynamic=(46.4, 44.3),
    ),
    *_mixture("wikitext2", 20.0, (66.01, 63.33), (63.88, 61.45), (42.41, 40.68)),
    _mogrifier("wikitext2", (57.3, 55.1), (40.2, 38.6)),
)
_WIKITEXT103 = (_transformer_xl("wikitext103", 24.0), _transformer_xl("wikitext103", 18.3, "large"))
_ENWIK8 = (
    _melis("enwik8", None, 1.30),
    _row("enwik8/awd_lstm", "AWD-LSTM", published={"": Published(None, 1.232, "Merity et al. 2018b")}),
    _row("enwik8/mogrifier", "Mogrifier LSTM", published={"": Published(None, 1.122, _MELIS_2020)}),
    _transformer_xl("enwik8", 0.99),
)
_LSTM = _row("ptb/small/lstm", "LSTM", variants=(_BY_SGD, Variant(Dynamic("rms", 0.0005, 0.002, 0.0002))))


def _part(name: str, *overrides: str, num_steps: int = 5100) -> Row:
    """The small LSTM for twelve epochs, with a part of its recipe left out."""
    given = (f"training.num_steps={num_steps}", *overrides)
    return Row(f"ptb/parts/{name.replace(' ', '_')}", name, _LSTM.config, tuple(f"--config.{override}" for override in given))


SECTIONS = (
    Section(
        "Published on the Penn Treebank",
        "10,000 words, 82,430 tokens of test. What the papers report is valid / test. AWD-LSTM has the settings that its\n"
        "authors released, with which they report 61.2 / 58.8, fine-tuned 58.8 / 56.5 and with the cache 53.2 / 52.5.\n"
        "Dynamic evaluation has the settings of its authors' code for AWD-LSTM on this corpus, save that its decay is relative\n"
        "to the mean over all entries, theirs to that over arrays: it is to be chosen on valid. Where samples of dropout are\n"
        "averaged, ours leave out words too, the paper's do not.",
        "published",
        _PTB,
    ),
    Section(
        "Published on WikiText-2",
        "33,278 words, 245,569 tokens of test. The first stands beside the example itself, run here for as many epochs:\n"
        "`python -m launch.word_language_model --data_path=/path/to/wikitext-2 --epochs=3 --json=PATH`; its time below\n"
        "was taken with three looks at valid in it, ours without. With the settings that the authors of AWD-LSTM released they\n"
        "report 68.7 / 65.6, fine-tuned 67.4 / 64.7 and with the cache 52.2 / 50.6.",
        "published",
        _WIKITEXT2,
    ),
    Section("Published on WikiText-103", "267,735 words, 245,569 tokens of test.", "published", _WIKITEXT103),
    Section(
        "Published on lm1b",
        "The One Billion Word Benchmark: 793,471 words; test is the first of its fifty held-out files.",
        "published",
        (_transformer_xl("lm1b", 21.8),),
    ),
    Section(
        "Subwords of lm1b",
        "The same corpus by 30,000 subwords; test is all fifty held-out files. Flax's example reports 3.127 nats per\n"
        "sentencepiece, with which the figure of no other tokenizer compares.",
        "published",
        (_row("lm1b/transformer", "Transformer of flax's example"),),
    ),
    Section(
        "Published on enwik8",
        "100 million bytes of Wikipedia with its markup, 5 million of them test; bits per byte. Merity et al. 2018b is\n"
        "arXiv:1803.08240.",
        "published",
        _ENWIK8,
        "bits per character",
    ),
    Section(
        "Published on text8",
        "100 million characters, 26 letters and the space, 5 million of them test; bits per character.",
        "published",
        (_transformer_xl("text8", 1.08),),
        "bits per character",
    ),
    Section(
        "Characters of the Penn Treebank",
        "The same text by characters, `<unk>` and `N` spelt out, each line ending in a newline; 449,945 characters of test.\n"
        "Papers leave out the spaces at both ends of a line, which cost next to nothing; 442,423 characters remain, for each\n"
        "of which the bits below are 1.7% more (1.466 on test).",
        "published",
        (_row("ptb/char_lstm", "LSTM"),),
        "bits per character",
    ),
    Section(
        "Small models of the Penn Treebank on equal terms",
        """\
Four million parameters each, widths solved from that budget; the same text and 25 epochs. Each had three trials of two epochs
on valid, the RNN four, of which the heads of the configs tell; what the recipes share and where they differ stands in
`configs/_small.py`: the RNN has neither weight drop nor the penalties of activations (AR, TAR), with which two epochs brought
it to 352 on valid instead of 196. The GRU's learning rate, the best of its trials, proved too high for 25 epochs, so its
figure says little about GRUs. The last column is the step of the best checkpoint; tokens seen and time are those of the whole
training, the speed its median. GRU, LSTM and Transformer had some other work beside them and the RNN had none, so speeds, and
what was reached in equal time, are rough.""",
        "equal",
        (_row("ptb/small/rnn", "RNN"), _row("ptb/small/gru", "GRU"), _LSTM, _row("ptb/small/transformer", "Transformer")),
    ),
    Section(
        "Small models of WikiText-2 on equal terms",
        "Eight million parameters each and three epochs, else as those of the Penn Treebank, with their learning rates. The\n"
        "GRU, whose rate was too high for 25 epochs there, ends level with the LSTM here (one seed each). All four were trained\n"
        "on the same kind of machine, one after the other, each with some other work beside it; so speeds and what was reached\n"
        "in equal time are rough.",
        "equal",
        tuple(_row(f"wikitext2/small/{model.lower()}", model) for model in ("RNN", "GRU", "LSTM", "Transformer")),
    ),
    Section(
        "What dynamic evaluation adds",
        "The small LSTM as trained, and with parameters that follow the text they score (Krause et al. 2018). Of four settings\n"
        "by SGD and nine by RMS, of which the config's head tells, these were the best on valid.",
        "published",
        (_LSTM,),
    ),
    Section(
        "What each regulariser buys",
        "The small LSTM for twelve epochs (5,100 steps; 4,968 where all are of 35 tokens) with one part of its recipe left out,\n"
        "all else equal; the cost is in nats per token, negative where the model is better off without the part, at this size\n"
        "and in so few epochs. One seed each, and not all on one CPU, as the lines tell; that alone moved the test of the small\n"
        "LSTM of Zaremba et al. by 0.009 nats: a cost of that size says nothing.",
        "parts",
        (
            _part("the whole recipe"),
            _part("without weight drop", "model.weight_drop_rate=0.0"),
            _part("without locked masks", "model.variational_dropout=False"),
            _part("without word dropout", "model.word_dropout_rate=0.0"),
            _part("without embedding dropout", "model.embedding_dropout_rate=0.0"),
            _part("without dropout between layers", "model.dropout_rate=0.0"),
            _part("without output dropout", "model.output_dropout_rate=0.0"),
            _part("without AR and TAR", "training.activation_penalty=0.0", "training.temporal_activation_penalty=0.0"),
            _part("without random lengths", "data.seq_len_std=None", num_steps=4968),
        ),
    ),
)
