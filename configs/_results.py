"""Which rows the page of results has: what papers report, and the configs behind ours; launch.results trains and tabulates."""

from lm.evaluation.variants import Dynamic, Variant
from lm.reporting.results import Row, Section

OPENING = """\
Perplexities of this codebase. Each figure is of one static model's best checkpoint on valid, on the whole split, every token
scored once in corpus order; what was done otherwise is said in its line. Test was scored once. The JSON files behind the
figures, with the protocol, the environment and the seed of each, lie beside this page, which is made of them alone:

    python -m launch.results --folder=lm/reporting/results

A row is trained and scored, and again after any interruption taken up, by

    python -m launch.results --folder=lm/reporting/results --only=ptb/small --workdir=runs/results --data_path=/path/to/ptb

which is `launch.train` with the config of its line and `--config.data.path`, then `launch.evaluate` for valid and test."""


def _row(path: str, name: str, **options) -> Row:
    """Of the config that is named like it."""
    return Row(path, name, f"configs/{path}.py", **options)


def _zaremba(size: str, valid: float, test: float, seeds=(0,)) -> Row:
    paper, published = "Zaremba et al. 2014", {"last epoch": (valid, test)}
    return _row(f"ptb/zaremba_{size}", f"LSTM, {size}", seeds=seeds, paper=paper, published=published, last_epoch=True)


def _paper(path: str, name: str, paper: str, static, cache=None, dynamic=None) -> Row:
    """What a paper reports as (valid, test), and Krause et al. 2018 of dynamic evaluation."""
    published = {"": static, "cache": cache, "dynamic": dynamic}
    return _row(path, name, paper=paper, published={kind: figures for kind, figures in published.items() if figures})


_PTB = (
    _zaremba("small", 120.7, 114.5, seeds=(0, 1, 2)),
    _zaremba("medium", 86.2, 82.7),
    _zaremba("large", 82.2, 78.4),
    _paper("ptb/awd_lstm", "AWD-LSTM", "Merity et al. 2018", (60.0, 57.3), (53.9, 52.8), (51.6, 51.1)),
    _paper("ptb/awd_lstm_mos", "AWD-LSTM-MoS", "Yang et al. 2018", (None, 55.97), None, (None, 47.69)),
    _paper("ptb/mogrifier", "Mogrifier LSTM", "Melis et al. 2020", (51.4, 50.1), None, (44.9, 44.8)),
    _paper("ptb/transformer_xl", "Transformer-XL", "Dai et al. 2019", (56.72, 54.52)),
)
_WIKITEXT2 = (
    _row("wikitext2/lstm_200", "LSTM of PyTorch's example, 3 epochs"),
    _paper("wikitext2/awd_lstm", "AWD-LSTM", "Merity et al. 2018", (68.6, 65.8), (53.8, 52.0), (46.4, 44.3)),
    _paper("wikitext2/mogrifier", "Mogrifier LSTM", "Melis et al. 2020", (57.3, 55.1), None, (40.2, 38.6)),
)
_DYNAMIC = Variant(Dynamic("sgd", 0.3, 0.001))
_LSTM = _row("ptb/small/lstm", "LSTM", variants=(_DYNAMIC,))


def _part(name: str, *overrides: str, num_steps: int = 5100) -> Row:
    """The small LSTM for twelve epochs, with a part of its recipe left out."""
    given = (f"training.num_steps={num_steps}", *overrides)
    return Row(f"ptb/parts/{name.replace(' ', '_')}", name, _LSTM.config, tuple(f"--config.{override}" for override in given))


SECTIONS = (
    Section(
        "Published on the Penn Treebank",
        "10,000 words, 82,430 tokens of test. What the papers report is valid / test.",
        "published",
        _PTB,
    ),
    Section("Published on WikiText-2", "33,278 words, 245,569 tokens of test.", "published", _WIKITEXT2),
    Section(
        "Characters of the Penn Treebank",
        "The same text by characters, `<unk>` and `N` spelt out, each line ending in a newline; 449,945 characters of test.",
        "published",
        (_row("ptb/char_lstm", "LSTM"),),
        "bits per character",
    ),
    Section(
        "Small models of the Penn Treebank on equal terms",
        "Four million parameters each, widths solved from that budget; the same text and the same number of epochs.",
        "equal",
        (_row("ptb/small/rnn", "RNN"), _row("ptb/small/gru", "GRU"), _LSTM, _row("ptb/small/transformer", "Transformer")),
    ),
    Section(
        "Small models of WikiText-2 on equal terms",
        "Eight million parameters each and four epochs, otherwise as those of the Penn Treebank.",
        "equal",
        tuple(_row(f"wikitext2/small/{model.lower()}", model) for model in ("RNN", "GRU", "LSTM", "Transformer")),
    ),
    Section(
        "What dynamic evaluation adds",
        "The small LSTM as trained, and with parameters that follow the text they score (Krause et al. 2018).",
        "published",
        (_LSTM,),
    ),
    Section(
        "What each regulariser buys",
        "The small LSTM for twelve epochs with one part of its recipe left out, all else equal; the cost is in nats per token.",
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
