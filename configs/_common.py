"""What all config files share: their argument, and how a trial of seconds is made of an experiment."""

from lm.config import Config
from lm.errors import UserError


def steps_of(config: Config, train_tokens: int) -> int:
    """Steps that a stream of the config's batches takes through so many tokens; about, where steps differ in length."""
    data = config.data
    length = data.seq_len if data.seq_len_std is None else 0.975 * data.seq_len  # one time in twenty it is half as long
    return int(train_tokens // data.batch_size // length)


def finish(config: Config, argument: str) -> Config:
    """The config, made small if the file's argument says so.

    Args:
      config: the experiment in full size.
      argument: "", or "runlocal=1": everything shrunken at one place, here, for a trial of seconds.

    Raises:
      UserError: any other argument.
    """
    if argument in ("", "runlocal=0"):
        return config
    if argument != "runlocal=1":
        raise UserError(f"the config's argument is {argument!r}, but the only one there is, is runlocal=1 (a trial of seconds)")
    model, data, training = config.model, config.data, config.training
    if model.architecture == "ngram":
        return config
    if model.layer_dims:
        model.layer_dims = (16,) * len(model.layer_dims)
        model.embed_dim = model.embed_dim and 16
    elif model.num_params:
        model.num_params = 30_000
    else:
        model.hidden_dim = 16
    if model.num_layers:
        model.num_layers = min(model.num_layers, 2)
    if model.num_heads:
        model.num_heads = 2
    if model.mlp_dim:
        model.mlp_dim = 32
    data.batch_size, data.seq_len = 8, 16
    if data.vocab_size:
        data.vocab_size = min(data.vocab_size, 1000)
    if model.num_softmaxes:
        model.num_softmaxes = 2
    if model.cutoffs:
        model.cutoffs = (10, 20)
    if model.attention_window:
        model.attention_window = 16
    training.num_steps, training.log_every_steps, training.evaluate_every_steps = 2, 1, 1
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    config.evaluation.rows = 64
    return config
