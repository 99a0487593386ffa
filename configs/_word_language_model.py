"""The LSTMs of PyTorch's word_language_model example, for any corpus."""

from configs._common import steps_of
from lm.config import Config


def word_language_model(config: Config, train_tokens: int, width: int, dropout_rate: float, epochs: int) -> Config:
    """Two layers, SGD at 20, divided by 4 when valid stalls.

    What differs: matrices and biases of an LSTM of theirs begin within 1 / √width of nothing; here the matrices begin by
    Xavier's rule, those from state to state orthogonal, and the biases at nothing.

    Args:
      config: of a stream of words, 20 rows of 35; changed and returned.
      train_tokens: in the train split.
    """
    assert (config.data.batch_size, config.data.seq_len) == (20, 35)
    config.model.num_layers, config.model.hidden_dim, config.model.dropout_rate = 2, width, dropout_rate
    config.model.forget_bias, config.model.embedding_init = 0.0, "uniform"
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.clip_norm = "sgd", 20.0, 0.25
    config.optimizer.schedule = "plateau"
    epoch = steps_of(config, train_tokens)
    config.training.num_steps, config.training.evaluate_every_steps, config.training.log_every_steps = epochs * epoch, epoch, 200
    return config
