"""What the small models share: parameters, tokens, regularisers and the number of trials."""

from configs.ptb._text import penn_treebank, steps_per_epoch
from lm.config import Config

EPOCHS = 25


def small(architecture: str) -> Config:
    """A tied model of four million parameters with dropout as in AWD-LSTM (Merity et al. 2018, arXiv:1708.02182), but less.

    Of what the paper's recipe has, Transformers and recurrent models can share dropout of words, of embeddings, between layers
    and of the output; what looks at recurrences is added by their configs.
    """
    config = penn_treebank(architecture, batch_size=64, seq_len=35)
    config.model.num_params, config.model.num_layers = 4_000_000, 2
    config.model.word_dropout_rate, config.model.embedding_dropout_rate = 0.05, 0.25
    config.model.dropout_rate = 0.2
    config.optimizer.name, config.optimizer.weight_decay = "adamw", 0.01
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.01
    return config


def recurrent(architecture: str) -> Config:
    """As `small`, with what the paper has for recurrences: locked masks, dropped weights, penalties, steps of random length."""
    config = small(architecture)
    config.data.seq_len_std = 5.0
    config.model.variational_dropout = True
    config.model.output_dropout_rate, config.model.weight_drop_rate = 0.3, 0.3
    config.training.activation_penalty, config.training.temporal_activation_penalty = 2.0, 1.0
    return config


def trained(config: Config) -> Config:
    """For so many epochs, with a look at valid after each."""
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = EPOCHS * epoch, epoch
    config.training.log_every_steps = 100
    return config
