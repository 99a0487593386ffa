"""What the configs of this folder share."""

from lm.config import Config


def decoder(**shape) -> Config:
    """A Transformer in bfloat16 on a mesh, its blocks made again for the backward pass.

    Args:
      shape: num_layers, hidden_dim, num_heads, mlp_dim; batch_size and seq_len.
    """
    config = Config()
    config.parallelism, config.compute_dtype = "sharded", "bfloat16"
    config.model.architecture, config.model.positions, config.model.norm = "transformer", "rotary", "rms_norm"
    config.model.activation, config.model.remat = "swiglu", "full"
    for name in ("num_layers", "hidden_dim", "num_heads", "mlp_dim"):
        setattr(config.model, name, shape[name])
    config.data.order, config.data.tokenizer, config.data.vocab_size = "windows", "subword", 32_768
    config.data.batch_size, config.data.seq_len = shape["batch_size"], shape["seq_len"]
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adamw", 3e-4, 0.1
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.clip_norm = "cosine", 2000, 1.0
    config.training.num_steps = 100_000
    return config
