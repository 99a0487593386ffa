"""The Transformer of flax's lm1b example: 6 × 512 over 30,000 subwords, in bfloat16. Published: 3.127 nats per sentencepiece.

python -m launch.train --config=configs/lm1b/transformer.py --config.data.path=/path/to/tensorflow_datasets --workdir=runs/lm1b

Needs the extra `tfds` and the dataset lm1b, prepared. Not yet run; the work of eight TPU cores for half a day: 500,000 steps of
256 × 128 tokens. Settings are those of the example. Its pieces are of sentencepiece, ours of byte-level BPE, so figures do not
compare; bits per byte would. It scores sentences one by one; here a token sees the sentences before its own, in training too.
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    model, data, optimizer, training = config.model, config.data, config.optimizer, config.training
    data.source, data.path, data.dataset = "tfds", "data/tensorflow_datasets", "lm1b"
    data.split_expressions = "train[1%:]", "train[:1%]", "test"
    data.tokenizer, data.vocab_size = "subword", 30_000
    data.order, data.batch_size, data.seq_len = "windows", 256, 128
    model.architecture, model.num_layers, model.hidden_dim, model.num_heads, model.mlp_dim = "transformer", 6, 512, 8, 2048
    model.positions, model.activation, model.tie_embeddings = "sinusoidal", "relu", False
    model.dropout_rate, model.attention_dropout_rate = 0.1, 0.1
    optimizer.name, optimizer.learning_rate, optimizer.b2 = "adamw", 0.0016, 0.98
    optimizer.schedule, optimizer.warmup_steps, optimizer.clip_norm = "inverse_sqrt", 1000, None
    optimizer.weight_decay, optimizer.decayed = 0.1, "all"
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = 500_000, 10_000, 200
    config.compute_dtype = "bfloat16"
    return finish(config, argument)
