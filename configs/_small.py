"""Small models of words with the regularisers of AWD-LSTM (Merity et al. 2018, arXiv:1708.02182), on equal terms."""

from configs._common import steps_of
from lm.config import Config

TOKENS_PER_STEP = 2240
LEARNING_RATES = {"rnn": 0.002, "gru": 0.012, "lstm": 0.01, "transformer": 0.002}  # chosen in the trials of configs/ptb/small


def small(config: Config, num_params: int, train_tokens: int, epochs: int) -> Config:
    """The paper's recipe with less dropout, Adam's steps and a cosine for its few epochs.

    All architectures share dropout of words, of embeddings and between layers. Recurrent ones read a stream, with locked
    masks, weight drop, penalties of activations (AR, TAR) and steps of random length (RNNs without weight drop and penalties,
    with which they learn far less); Transformers read windows, with dropout of attention.

    Args:
      config: of a corpus of words, with its architecture; changed and returned.
      num_params: widths are solved from it.
      train_tokens: in the train split.
    """
    model, data, optimizer, training = config.model, config.data, config.optimizer, config.training
    model.num_params, model.num_layers = num_params, 2
    model.word_dropout_rate, model.embedding_dropout_rate, model.dropout_rate = 0.05, 0.25, 0.2
    if model.architecture == "transformer":
        model.attention_dropout_rate = 0.2
        data.order, data.seq_len = "windows", 140
        config.evaluation.context, config.evaluation.stride = 140, 35
    else:
        data.seq_len, data.seq_len_std = 35, 5.0
        model.variational_dropout, model.output_dropout_rate = True, 0.3
        if model.architecture != "rnn":
            model.weight_drop_rate, training.activation_penalty, training.temporal_activation_penalty = 0.3, 2.0, 1.0
    data.batch_size = TOKENS_PER_STEP // data.seq_len
    optimizer.name, optimizer.weight_decay = "adamw", 0.01
    optimizer.learning_rate = LEARNING_RATES[model.architecture]
    optimizer.schedule, optimizer.warmup_steps, optimizer.final_fraction = "cosine", 100, 0.01
    epoch = steps_of(config, train_tokens)
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = epochs * epoch, epoch, 100
    return config
