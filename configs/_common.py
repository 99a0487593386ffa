"""What all config files share: their argument, and how a trial of seconds is made of an experiment."""

from lm.config import Config
from lm.errors import UserError


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
    if model.attention_window:
        model.attention_window = 16
    training.num_steps, training.log_every_steps, training.evaluate_every_steps = 2, 1, 1
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    config.evaluation.rows = 64
    return config
