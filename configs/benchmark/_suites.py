"""Which measurements make up the speed tables and curves; launch.suite runs them, and a suite's docstring opens its page."""

import dataclasses

FOLDER = "configs/benchmark"
ARCHITECTURES = ("rnn", "gru", "lstm", "transformer")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One call of launch.benchmark.

    Attributes:
      name: of its result; unique within the suite.
      config, overrides: as on the command line.
      mode, vocab_size, num_samples, rounds, against: as the flags.
      target: the ratio to the peer that is asked for; None: none is.
      target_share: the share of the machine's matmul peak that is asked for; None: none is.
      num_emulated: CPU devices to emulate; None: those there are.
      axis, value: of a curve, what is varied and how far.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    mode: str = "train"
    vocab_size: int | None = None
    num_samples: int = 1
    rounds: int = 5
    against: str | None = None
    target: float | None = None
    target_share: float | None = None
    num_emulated: int | None = None
    axis: str | None = None
    value: int | None = None


def _shape(**values):
    """Overrides: section__field=value."""
    return tuple(f"--config.{name.replace('__', '.')}={value}" for name, value in values.items())


_SMALL = _shape(model__hidden_dim=200, data__batch_size=20, data__seq_len=20)
_ROWS = (  # name, config, overrides, vocabulary, target of training
    ("LSTM 2 × 200", "lstm", _SMALL, None, 1.8),
    ("LSTM 2 × 650", "lstm", (), None, 1.2),
    ("RNN 2 × 650", "rnn", (), None, 1.8),
    ("GRU 2 × 650", "gru", (), None, 1.5),
    ("Transformer 6 × 256", "transformer", (), None, 1.25),
    ("Transformer 6 × 256, V 50,257", "transformer", (), 50_257, 1.5),
)


def cpu() -> list[Measurement]:
    """Against PyTorch on a CPU: training and evaluation of six shapes, generation of each architecture."""
    found = []
    for mode in ("train", "evaluate"):
        for name, config, overrides, vocab_size, target in _ROWS:
            found.append(
                Measurement(
                    f"{mode}: {name}",
                    f"{FOLDER}/{config}.py",
                    overrides,
                    mode,
                    vocab_size,
                    against="torch",
                    target=target if mode == "train" else 1.3,
                )
            )
    for name, config, overrides, vocab_size, _ in _ROWS[1:-1]:
        for num_samples in (1, 16):
            found.append(
                Measurement(
                    f"generate: {name}, {num_samples} at a time",
                    f"{FOLDER}/{config}.py",
                    overrides,
                    "generate",
                    vocab_size,
                    num_samples,
                    against="torch",
                    target=3.0,
                )
            )
    return found


def gpu() -> list[Measurement]:
    """Against PyTorch on a GPU, in bfloat16 (extras `cuda`, `peers`); RNN, GRU and state dropout against a plain scan in JAX."""
    one = ("--config.num_devices=1",)
    large = ("--config.model.hidden_dim=1500", "--config.compute_dtype=bfloat16", *one)
    wide = (*large, *_shape(data__batch_size=256, data__seq_len=128))
    rows = (
        ("GPT-2 124M, 16 × 1024", "gpt2", one, 50_257, "torch", 1.1, 0.45),
        ("LSTM 2 × 1500, 20 × 35", "lstm", large, None, "torch", 1.3, None),
        ("LSTM 2 × 1500, 256 × 128", "lstm", wide, None, "torch", 1.3, None),
        ("RNN 2 × 1500, 20 × 35", "rnn", large, None, "scan", 3.0, None),
        ("GRU 2 × 1500, 20 × 35", "gru", large, None, "scan", 3.0, None),
        (
            "LSTM 2 × 1500 with state dropout, 20 × 35",
            "lstm",
            (*large, *_shape(model__state_dropout_rate=0.25)),
            None,
            "scan",
            3.0,
            None,
        ),
        ("AWD-LSTM, 80 × 70", "awd_lstm", one, None, "torch", 1.5, None),
    )
    return [
        Measurement(f"train: {name}", f"{FOLDER}/{config}.py", overrides, "train", vocab_size, 1, 3, against, target, share)
        for name, config, overrides, vocab_size, against, target, share in rows
    ]


def curves() -> list[Measurement]:
    """Training of two layers of 256 over the built-in corpus, 8 × 128 tokens a step and a vocabulary of 1,000; one thing varied
    at a time. By sequence length a step has 8,192 tokens, so there are fewer rows the longer they are. By vocabulary all have
    one table for embedding and output, and AdamW. Elsewhere, where both cost little, recurrent models have two tables and SGD,
    Transformers one and AdamW.
    """
    found = []

    def add(axis, value, vocab_size=None, num_emulated=None, **shape):
        base = dict(model__num_layers=2, model__hidden_dim=256, data__vocab_size=1000, data__batch_size=8, data__seq_len=128)
        for architecture in ARCHITECTURES:
            overrides = _shape(**base | shape)
            name, config = f"{axis} {value}: {architecture}", f"{FOLDER}/{architecture}.py"
            found.append(
                Measurement(
                    name, config, overrides, vocab_size=vocab_size, rounds=3, num_emulated=num_emulated, axis=axis, value=value
                )
            )

    for length in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        add("sequence length", length, data__seq_len=length, data__batch_size=8192 // length)
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        add("batch size", rows, data__batch_size=rows)
    for width in (64, 128, 256, 512, 1024):
        add("width", width, model__hidden_dim=width)
    same = dict(model__tie_embeddings=True, optimizer__name="adamw", optimizer__learning_rate=0.001)
    for vocab_size in (1_000, 4_000, 16_000, 64_000, 256_000):
        add("vocabulary", vocab_size, vocab_size=vocab_size, **same)
    for count in (1, 2, 4, 8):
        add("emulated devices", count, num_emulated=count)
    return found


SUITES = {"cpu": cpu, "gpu": gpu, "curves": curves}
