"""The fields of an experiment: each with its type, its default, its bounds and a line that says what it means."""

import dataclasses
import typing

from lm.config.section import Section, setting

STATEFUL = ("rnn", "gru", "lstm", "slstm")  # whose gates look at the state
RECURRENT = (*STATEFUL, "mingru", "minlstm", "mlstm")
NEURAL = (*RECURRENT, "transformer")
ARCHITECTURES = (*NEURAL, "ngram")
INITIALIZERS = ("uniform", "normal", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal")


@dataclasses.dataclass(eq=False)
class ModelConfig(Section):
    _section: typing.ClassVar = "model"
    architecture: str = setting("lstm", "which model", choices=ARCHITECTURES)
    num_params: int | None = setting(
        None, "budget of parameters, embeddings and output counted; the width is solved from it", at_least=1, only=NEURAL
    )
    num_layers: int | None = setting(None, "number of layers", at_least=1, only=NEURAL)
    hidden_dim: int | None = setting(
        None, "width of every recurrent layer, or of the Transformer; by default 256", at_least=1, only=NEURAL
    )
    layer_dims: tuple[int, ...] | None = setting(None, "width of each recurrent layer, one by one", at_least=1, only=RECURRENT)
    skip_connections: bool | None = setting(
        None, "whether the output is the sum of what all layers put out, which are then of one width", only=RECURRENT
    )
    embed_dim: int | None = setting(None, "width of the embedding; by default that of the last layer", at_least=1, only=RECURRENT)
    tie_embeddings: bool | None = setting(None, "whether the output uses the embedding's table", only=NEURAL)
    project_output: bool | None = setting(
        None, "whether a matrix leads from the last layer to a tied embedding of another width, embed_dim", only=RECURRENT
    )
    cutoffs: tuple[int, ...] | None = setting(
        None,
        "word: tokens, numbered by frequency, at which further clusters of the vocabulary begin (adaptive embedding and softmax)",
        at_least=1,
        only=NEURAL,
    )
    narrowing: int | None = setting(
        None, "how many times narrower the embeddings of each further cluster are; by default 4", at_least=1, only=NEURAL
    )
    num_softmaxes: int | None = setting(
        None,
        "softmaxes that are mixed, each over a projection of the last layer to the embedding's width",
        at_least=1,
        only=NEURAL,
    )
    softmax_dropout_rate: float | None = setting(
        None, "share dropped of what each softmax of a mixture reads, after its tanh", at_least=0, below=1, only=NEURAL
    )
    activation: str | None = setting(
        None,
        "non-linearity of the RNN's state or of the Transformer's feed-forward layer (gelu is the exact one)",
        choices={"rnn": ("tanh", "relu"), "transformer": ("relu", "gelu", "gelu_tanh", "swiglu")},
        only=("rnn", "transformer"),
    )
    num_heads: int | None = setting(
        None, "attention heads, or those of an mLSTM; they divide hidden_dim", at_least=1, only=("transformer", "mlstm")
    )
    mlp_dim: int | None = setting(
        None,
        "width of the feed-forward layer; by default 4 hidden_dim, or 8/3 of it for swiglu",
        at_least=1,
        only=("transformer",),
    )
    positions: str | None = setting(
        None, "how positions are told apart", choices=("learned", "sinusoidal", "rotary", "relative"), only=("transformer",)
    )
    max_positions: int | None = setting(
        None, "rows of the table of learned positions, in tokens; by default 1024", at_least=1, only=("transformer",)
    )
    attention_window: int | None = setting(
        None, "positions a token may see, itself included; None: all of its text", at_least=1, only=("transformer",)
    )
    norm: str | None = setting(None, "normalisation", choices=("layer_norm", "rms_norm"), only=("transformer",))
    qk_norm: bool | None = setting(
        None, "whether each head's queries and keys are normalised before they meet", only=("transformer",)
    )
    dropout_rate: float | None = setting(
        None, "share dropped between recurrent layers, or on a Transformer's residual branches", at_least=0, below=1, only=NEURAL
    )
    embedding_dropout_rate: float | None = setting(
        None, "share dropped of the embedding's output; by default dropout_rate", at_least=0, below=1, only=NEURAL
    )
    output_dropout_rate: float | None = setting(
        None, "share dropped of the last layer's output; by default dropout_rate", at_least=0, below=1, only=RECURRENT
    )
    attention_dropout_rate: float | None = setting(
        None, "share dropped of the attention weights; by default dropout_rate", at_least=0, below=1, only=("transformer",)
    )
    word_dropout_rate: float | None = setting(
        None, "share of the vocabulary whose embeddings are dropped whole", at_least=0, below=1, only=NEURAL
    )
    weight_drop_rate: float | None = setting(
        None, "share dropped of the recurrent matrices' entries", at_least=0, below=1, only=STATEFUL
    )
    state_dropout_rate: float | None = setting(
        None,
        "share dropped of the hidden state where it enters the next step, one mask for all steps of a segment",
        at_least=0,
        below=1,
        only=STATEFUL,
    )
    variational_dropout: bool | None = setting(
        None, "one dropout mask for all steps of a segment (not of attention weights)", only=NEURAL
    )
    kernel_init: str | None = setting(None, "initialiser of the matrices", choices=INITIALIZERS, only=NEURAL)
    recurrent_init: str | None = setting(None, "initialiser of the state-to-state matrices", choices=INITIALIZERS, only=STATEFUL)
    embedding_init: str | None = setting(
        None, "initialiser of embedding, learned positions and free output", choices=INITIALIZERS, only=NEURAL
    )
    init_scale: float | None = setting(
        None, "half-width of uniform and standard deviation of normal initialisers", above=0, only=NEURAL
    )
    forget_bias: float | None = setting(None, "initial bias of the forget gate", only=("lstm", "slstm", "minlstm", "mlstm"))
    input_gate: str | None = setting(
        None,
        "the input gate i beside the forget gate f: free, coupled (i = 1 - f) or capped (i at most 1 - f)",
        choices=("free", "coupled", "capped"),
        only=("lstm",),
    )
    mogrifier_rounds: int | None = setting(
        None, "how often input and hidden state gate each other before a step; 0: never", at_least=0, only=("lstm",)
    )
    mogrifier_rank: int | None = setting(None, "rank of the matrices of those gates; None: full", at_least=1, only=("lstm",))
    scan_layers: bool | None = setting(
        None, "run all layers by one compiled loop; by default where remat is on", only=("transformer",), resumable=True
    )
    remat: str | None = setting(
        None,
        "what the backward pass makes again instead of keeping it: nothing, all but the matmuls' results, or whole layers",
        choices=("none", "matmuls", "full"),
        only=("transformer",),
        resumable=True,
    )
    ngram_order: int | None = setting(None, "longest n-gram, in tokens (5: four tokens of context)", at_least=1, only=("ngram",))


@dataclasses.dataclass(eq=False)
class DataConfig(Section):
    _section: typing.ClassVar = "data"
    source: str = setting("python_docs", "where the text comes from", choices=("python_docs", "text", "tfds", "synthetic"))
    path: str | None = setting(
        None,
        "text: a folder with train, valid and test files, or one file to be split (.gz too); tfds: the folder that datasets are "
        "kept in, or that of one prepared version",
        resumable=True,
    )
    fractions: tuple[float, ...] | None = setting(
        None, "text, one file: shares of train, valid and test, by characters, in this order", at_least=0, at_most=1
    )
    dataset: str | None = setting(None, "tfds: a name such as lm1b, or wiki40b/en:1.3.0")
    text_feature: str | None = setting(None, "tfds: the feature that is read; by default text, or the only text there is")
    split_expressions: tuple[str, ...] | None = setting(
        None, "tfds: train, valid and test as split expressions; by default the dataset's own splits"
    )
    examples: str | None = setting(
        None,
        "tfds: documents: each example ends in <eos>; pieces: they are joined as they stand, as from one text file",
        choices=("documents", "pieces"),
    )
    process: str | None = setting(
        None,
        "synthetic: what draws the text (lm/data/synthetic.py says how)",
        choices=("markov", "hidden_markov", "copy", "dyck"),
    )
    num_characters: int | None = setting(
        None, "synthetic: characters of train; valid and test have a tenth of that each", at_least=10
    )
    synthetic_seed: int | None = setting(None, "synthetic: seed of the process and of its text", at_least=0, below=2**32)
    alphabet_size: int | None = setting(None, "markov, hidden_markov, copy: different letters", at_least=2, at_most=26)
    markov_order: int | None = setting(None, "markov: letters that the next one depends on", at_least=1)
    num_states: int | None = setting(None, "hidden_markov: hidden states", at_least=1, at_most=64)
    copy_length: int | None = setting(None, "copy: letters to be copied", at_least=1)
    max_depth: int | None = setting(None, "dyck: brackets open at once, at most", at_least=1)
    tokenizer: str = setting("subword", "unit of the text", choices=("byte", "char", "word", "subword"))
    vocab_size: int | None = setting(
        None, "entries of the vocabulary: exact for subword, at most for word, <eos> and <unk> counted", at_least=1
    )
    min_count: int | None = setting(None, "word: occurrences in train below which a word becomes <unk>", at_least=1)
    order: str = setting(
        "stream",
        "stream: contiguous rows, the carry passed from step to step; windows: shuffled, each starting empty; packed: such "
        "windows in which no document sees another; padded: a document a row (a document ends with <eos>); all are scored alike, "
        "as one text with its documents in a row",
        choices=("stream", "windows", "packed", "padded"),
    )
    seq_len: int = setting(64, "tokens of a row in one step", at_least=1)
    seq_len_std: float | None = setting(
        None,
        "stream: standard deviation, in tokens, of a step's length, drawn around seq_len or, one time in twenty, around half of "
        "it; an update counts as much as the step is long",
        above=0,
    )
    batch_size: int = setting(32, "rows of a step over all devices", at_least=1)
    prefetch: int = setting(2, "batches made and put on the device ahead of time", at_least=0, resumable=True)
    cache_dir: str | None = setting(None, "folder of the token cache; by default lm in the user's cache folder", resumable=True)
    prepared: str | None = setting(
        None, "a folder made by launch.prepare_data from this config, whose tokens are read in place of the text", resumable=True
    )
    mixture: tuple[str, ...] | None = setting(
        None, "further such folders, of the same tokenizer, whose train tokens are mixed into these", resumable=True
    )
    mixture_weights: tuple[float, ...] | None = setting(
        None,
        "shares of training tokens: of the config's own text, then of each of the mixture; to the nearest row of a stream's "
        "batch, or of 1,000 windows or documents",
        above=0,
        below=1,
    )


@dataclasses.dataclass(eq=False)
class OptimizerConfig(Section):
    _section: typing.ClassVar = "optimizer"
    name: str = setting(
        "adam",
        "update rule",
        choices=("sgd", "momentum", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon"),
    )
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    schedule: str = setting(
        "constant",
        "how the learning rate changes after warm-up",
        choices=("constant", "cosine", "inverse_sqrt", "step", "plateau"),
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", at_least=0)
    final_fraction: float | None = setting(None, "cosine: share of learning_rate left at num_steps", at_least=0, at_most=1)
    decay_factor: float | None = setting(
        None, "step, plateau: factor on the learning rate, each epoch or each stall of valid", above=0, below=1
    )
    decay_start_epoch: int | None = setting(None, "step: epochs at the full learning rate", at_least=0)
    plateau_patience: int | None = setting(None, "plateau: looks at valid without improvement before a decay", at_least=0)
    weight_decay: float | None = setting(
        None, "decay of parameters per unit of learning rate; by default 0.01 for adamw, else 0", at_least=0
    )
    decayed: str = setting(
        "matrices", "what weight_decay acts on: matrices inside the model, or all parameters", choices=("matrices", "all")
    )
    clip_norm: float | None = setting(1.0, "largest global norm of the gradient; None: no such clipping", above=0)
    clip_value: float | None = setting(None, "largest absolute value of a gradient entry, instead of clip_norm", above=0)
    momentum: float | None = setting(None, "momentum, muon: decay of the velocity; rmsprop: of the squares", at_least=0, below=1)
    b1: float | None = setting(None, "adam, adamw, lion, muon's adam: decay of the first moment", at_least=0, below=1)
    b2: float | None = setting(None, "adam, adamw, lion, muon's adam: decay of the second moment", at_least=0, below=1)
    adam_learning_rate: float | None = setting(
        None, "muon: peak learning rate of adam on all that is no matrix; by default learning_rate", above=0
    )


@dataclasses.dataclass(eq=False)
class TrainingConfig(Section):
    _section: typing.ClassVar = "training"
    num_steps: int = setting(1000, "updates in all", at_least=1, below=2**31, resumable=True)
    num_micro_batches: int = setting(1, "parts that a step's rows are cut into, their gradients added", at_least=1)
    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary (objective only)", at_least=0, below=1)
    activation_penalty: float | None = setting(
        None,
        "AR: factor on the mean square of the last layer's output after dropout (objective only)",
        at_least=0,
        only=RECURRENT,
    )
    temporal_activation_penalty: float | None = setting(
        None,
        "TAR: factor on the mean square of the change of the last layer's output from token to token, before dropout "
        "(objective only)",
        at_least=0,
        only=RECURRENT,
    )
    averaging: str | None = setting(
        None,
        "evaluate the mean of the parameters after each step from the start, or since valid has stalled (NT-ASGD)",
        choices=("start", "stall"),
    )
    averaging_patience: int | None = setting(
        None,
        "stall: the mean begins with a look at valid worse than the best of those with at least so many others in between",
        at_least=0,
    )
    averaging_decay: float | None = setting(
        None, "largest weight of the past in the mean, per step; None: all steps weigh the same", above=0, below=1
    )
    log_every_steps: int = setting(50, "steps between lines of metrics", at_least=1, resumable=True)
    evaluate_every_steps: int = setting(
        200, "steps between looks at valid, each followed by a checkpoint", at_least=1, resumable=True
    )
    checkpoint_every_steps: int | None = setting(
        None, "steps between further checkpoints; None: only after looks at valid", at_least=1, resumable=True
    )
    on_bad_step: str = setting(
        "stop",
        "after a step with a non-finite loss, gradient or update: end the run, leave the update out, or go back to the last "
        "checkpoint and leave the batch out",
        choices=("stop", "skip", "rollback"),
    )
    spike_nats: float | None = setting(
        None, "a step is bad, too, whose loss lies so many nats per token above the recent mean; None: never", above=0
    )
    early_stopping: int | None = setting(None, "looks at valid without improvement after which training ends", at_least=1)
    init_from: str | None = setting(None, "workdir of a run whose best parameters are the start")


@dataclasses.dataclass(eq=False)
class EvaluationConfig(Section):
    _section: typing.ClassVar = "evaluation"
    context: int | None = setting(
        None, "tokens of a window; None: the carry runs through the whole split in one stream", at_least=1
    )
    stride: int | None = setting(None, "tokens scored in each window after the first", at_least=1)
    rows: int = setting(16, "windows scored together; while training, parallel streams that the split is cut into", at_least=1)


@dataclasses.dataclass(eq=False)
class Config(Section):
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    seed: int = setting(0, "seed of parameters, dropout and the order of windows", at_least=0, below=2**32)
    parallelism: str = setting(
        "pmap",
        "how work is spread over devices: a copy of the state on each, or the state split over a mesh of them",
        choices=("pmap", "sharded"),
        resumable=True,
    )
    mesh_shape: tuple[int, ...] | None = setting(
        None, "data × fsdp × tensor devices of a sharded run; None: all for fsdp", at_least=1, resumable=True
    )
    num_devices: int | None = setting(None, "devices to use; None: all that JAX sees", at_least=1, resumable=True)
    dropout_generator: str = setting(
        "threefry",
        "random bits of dropout: the same on any number of devices, or rbg's, which accelerators make faster and a CPU slower",
        choices=("threefry", "rbg"),
    )
    compute_dtype: str = setting(
        "float32", "precision of activations and matmuls; parameters and loss stay float32", choices=("float32", "bfloat16")
    )
