"""The same model, optimiser and batches in PyTorch, as its users write them: what launch.benchmark measures training against.

torch is an extra, imported inside functions only. Mathematics and starting point are ours to the last bias, so that first
losses and updates can be held against each other; everything else (layouts, kernels, threads) is left to torch.
"""

import importlib.util
import itertools
import sys
import time
from typing import Any

import numpy as np

from lm.config import RECURRENT, Config, ModelConfig
from lm.data.batches import Batch, BatchSource, prefetch
from lm.errors import UserError

_OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")  # whose updates in torch are those of lm.training.optimizer
_NORM_EPSILON = 1e-6


def check(draft: Config, config: Config, platform: str, num_devices: int) -> None:
    """Raises a UserError, with what to set, where the peer cannot do what the config asks for.

    Args:
      draft: as given; only what was set there is named.
      config: the draft, resolved.
      platform, num_devices: what JAX runs on.
    """
    rates = [name for name, value in vars(draft.model).items() if name.endswith("_rate") and value]
    if rates:
        raise UserError(
            "--against=torch compares the first losses of both, for which dropout must be off; set "
            + ", ".join(f"--config.model.{name}=0" for name in rates)
        )
    settings = config.optimizer
    if settings.name not in _OPTIMIZERS:
        raise UserError(
            f"config.optimizer.name is {settings.name!r}, but --against=torch knows no update in torch that is the same; "
            f"use one of {', '.join(_OPTIMIZERS)}"
        )
    if settings.name == "momentum" and settings.weight_decay:
        raise UserError(
            f"config.optimizer.weight_decay is {settings.weight_decay}, but torch's momentum would gather the decay in its "
            "velocity; for --against=torch set it to 0 or use adamw"
        )
    if config.data.order in ("packed", "padded"):
        raise UserError(
            f"--against=torch knows no documents within a row, but config.data.order is {config.data.order!r}; set it to windows"
        )
    if config.model.architecture == "transformer" and config.data.order == "stream":
        raise UserError("--against=torch has no key/value cache for a Transformer's stream; set --config.data.order=windows")
    if platform != "cpu" or num_devices > 1:
        raise UserError(
            f"--against=torch compares on one CPU device, but JAX uses {num_devices} of {platform}; set JAX_PLATFORMS=cpu and "
            "--config.num_devices=1"
        )
    for name, value, wanted in (
        ("compute_dtype", config.compute_dtype, "float32"),
        ("training.num_micro_batches", config.training.num_micro_batches, 1),
    ):
        if value != wanted:
            raise UserError(f"config.{name} is {value}, which --against=torch does not do; set --config.{name}={wanted}")
    if importlib.util.find_spec("torch") is None:
        raise UserError("--against=torch needs PyTorch, which is not installed; install the extra: pip install -e '.[peers]'")


class TorchPeer:
    """Trains in PyTorch from given parameters, on the batches that `lm` trains on.

    Attributes:
      model: a torch.nn.Module: inputs_BT, state -> logits_BTV, state.
      versions: of torch, and the number of its threads.
    """

    def __init__(self, config: Config, vocab_size: int, params: Any, source: BatchSource, learning_rates: np.ndarray):
        """Builds the model with a copy of the parameters.

        Args:
          config: as `check` passes it, its widths solved.
          params: ours, NumPy or JAX.
          learning_rates: of each step that will be run.
        """
        import torch

        self._config, self._source = config, source
        self._learning_rates = iter(learning_rates.tolist())
        self.model = (_recurrent if config.model.architecture in RECURRENT else _transformer)(config, vocab_size)
        copied = {name: torch.from_numpy(np.array(value)) for name, value in state_dict(params, config.model).items()}
        self.model.load_state_dict(copied)
        self._optimizer = _optimizer(config, self.model)
        self._state = None
        self._batches = prefetch(lambda step: _batch(source.batch(step, slice(None))), 0, sys.maxsize, config.data.prefetch)
        self.versions = {"torch": torch.__version__, "num_threads": torch.get_num_threads()}

    def first_loss(self) -> float:
        """Nats per token of the first batch, without a step."""
        import torch

        inputs_BT, targets_BT, _ = _batch(self._source.batch(0, slice(None)))
        with torch.no_grad():
            logits_BTV, _ = self.model(inputs_BT, None)
            return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()))

    def run(self, num_steps: int) -> float:
        """Trains for some steps; returns their seconds."""
        started = time.perf_counter()
        for batch, learning_rate in zip(itertools.islice(self._batches, num_steps), self._learning_rates, strict=False):
            self._step(*batch, learning_rate)
        return time.perf_counter() - started

    def _step(self, inputs_BT, targets_BT, starts, learning_rate):
        from torch import nn

        settings, training = self._config.optimizer, self._config.training
        logits_BTV, state = self.model(inputs_BT, None if starts else self._state)
        loss = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), label_smoothing=training.label_smoothing
        )
        self._optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        elif settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), settings.clip_value)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._state = _detached(state)

    def close(self) -> None:
        """Stops the thread that makes batches."""
        self._batches.close()


def _batch(batch: Batch):
    """Inputs, targets, and whether all rows start empty (a stream's rows begin an epoch together)."""
    import torch

    return *(torch.from_numpy(x).long() for x in (batch.inputs_BT, batch.targets_BT)), bool(batch.reset_B.all())


def _detached(state):
    return [_detached(part) for part in state] if isinstance(state, (list, tuple)) else state.detach()


def _optimizer(config, model):
    """Decay is for matrices only; where it is decoupled from the gradient (sgd, adamw), torch's is the same as ours."""
    import torch

    settings = config.optimizer
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.startswith("stack.") and parameter.ndim == 2].append(parameter)
    decayed = [
        {"params": groups[True], "weight_decay": settings.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    if settings.name in ("adam", "adamw"):
        return torch.optim.AdamW(decayed, lr=settings.learning_rate, betas=(settings.b1, settings.b2))
    return torch.optim.SGD(decayed, lr=settings.learning_rate, momentum=settings.momentum or 0.0)


def _layer_dims(model: ModelConfig) -> tuple[int, ...]:
    return model.layer_dims or (model.hidden_dim,) * model.num_layers


def _modules(model: ModelConfig) -> list[tuple[int, int]]:
    """(width, layers) of each torch module: one for all layers if they are equally wide, else one each."""
    layer_dims = _layer_dims(model)
    return [(layer_dims[0], len(layer_dims))] if len(set(layer_dims)) == 1 else [(width, 1) for width in layer_dims]


def _recurrent(config, vocab_size):
    from torch import nn

    model = config.model
    options = {"nonlinearity": model.activation} if model.architecture == "rnn" else {}
    kind = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[model.architecture]

    class RecurrentLanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            width = model.embed_dim or _layer_dims(model)[-1]
            self.embedding = nn.Embedding(vocab_size, width)
            self.stack = nn.ModuleList()
            for hidden_dim, num_layers in _modules(model):
                self.stack.append(kind(width, hidden_dim, num_layers, batch_first=True, **options))
                width = hidden_dim
            self.output = nn.Linear(width, vocab_size)
            if model.tie_embeddings:
                self.output.weight = self.embedding.weight

        def forward(self, inputs_BT, state):
            hidden_BTD, after = self.embedding(inputs_BT), []
            for layers, before in zip(self.stack, state or [None] * len(self.stack), strict=True):
                hidden_BTD, last = layers(hidden_BTD, before)
                after.append(last)
            return self.output(hidden_BTD), after

    built = RecurrentLanguageModel()
    for layers in built.stack:
        _train_one_bias(layers, model.architecture)
    return built


def _train_one_bias(layers, architecture):
    """torch adds two biases everywhere; trained both, their sum would move twice as fast as one. So the second stays zero,
    but for what the GRU's reset gate scales."""
    import torch

    for name, bias in layers.named_parameters():
        if not name.startswith("bias_hh"):
            continue
        if architecture == "gru":
            trained = torch.zeros_like(bias)
            trained[-layers.hidden_size :] = 1
            bias.register_hook(lambda gradient, trained=trained: gradient * trained)
        else:
            bias.requires_grad_(False)


def _transformer(config, vocab_size):
    import torch
    from torch import nn
    from torch.nn import functional as F

    model, length = config.model, config.data.seq_len
    width, num_heads = model.hidden_dim, model.num_heads
    norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[model.norm]

    def angles(size):
        frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)
        return torch.from_numpy(np.arange(length)[:, None] * frequencies)

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.gated = model.activation == "swiglu"
            self.inward = nn.Linear(width, model.mlp_dim, bias=not self.gated)
            self.outward = nn.Linear(model.mlp_dim, width, bias=not self.gated)
            if self.gated:
                self.gate = nn.Linear(width, model.mlp_dim, bias=False)

        def forward(self, x_BTD):
            if self.gated:
                return self.outward(F.silu(self.gate(x_BTD)) * self.inward(x_BTD))
            approximate = "tanh" if model.activation == "gelu_tanh" else "none"
            return self.outward(F.gelu(self.inward(x_BTD), approximate=approximate))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_key_value = nn.Linear(width, 3 * width)
            self.outward = nn.Linear(width, width)
            if model.positions == "rotary":
                turn = angles(width // num_heads)
                self.register_buffer("sine", turn.sin().float(), persistent=False)
                self.register_buffer("cosine", turn.cos().float(), persistent=False)
            mask = None
            if model.attention_window is not None and model.attention_window < length:
                distance = torch.arange(length)[:, None] - torch.arange(length)
                mask = (distance >= 0) & (distance < model.attention_window)
            self.register_buffer("mask", mask, persistent=False)

        def rotate(self, x_BHTK):
            first, second = x_BHTK.chunk(2, dim=-1)
            return torch.cat([first * self.cosine - second * self.sine, second * self.cosine + first * self.sine], dim=-1)

        def forward(self, x_BTD):
            projected = self.query_key_value(x_BTD).unflatten(-1, (3, num_heads, width // num_heads))
            q_BHTK, k_BHTK, v_BHTK = projected.permute(2, 0, 3, 1, 4)
            if model.positions == "rotary":
                q_BHTK, k_BHTK = self.rotate(q_BHTK), self.rotate(k_BHTK)
            mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=self.mask, is_causal=self.mask is None)
            return self.outward(mixed_BHTK.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.feed_forward_norm = norm(width, eps=_NORM_EPSILON), norm(width, eps=_NORM_EPSILON)
            self.attention, self.feed_forward = Attention(), FeedForward()

        def forward(self, x_BTD):
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
            return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))

    class TransformerLanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(vocab_size, width)
            if model.positions == "learned":
                self.position_table = nn.Embedding(model.max_positions, width)
                self.register_buffer("places", torch.arange(length), persistent=False)
            elif model.positions == "sinusoidal":
                turn = angles(width)
                self.register_buffer("sinusoids", torch.cat([turn.sin(), turn.cos()], dim=-1).float(), persistent=False)
            self.stack = nn.Sequential(*(Block() for _ in range(model.num_layers)))
            self.last_norm = norm(width, eps=_NORM_EPSILON)
            self.output = nn.Linear(width, vocab_size)
            if model.tie_embeddings:
                self.output.weight = self.embedding.weight

        def forward(self, inputs_BT, state):
            x_BTD = self.embedding(inputs_BT)
            if model.positions == "learned":
                x_BTD = x_BTD + self.position_table(self.places)
            elif model.positions == "sinusoidal":
                x_BTD = x_BTD * width**0.5 + self.sinusoids
            return self.output(self.last_norm(self.stack(x_BTD))), []

    return TransformerLanguageModel()


def state_dict(params: Any, model: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters under the peer's names and in its layout: nn.Linear keeps [out, in], and gates stand in our order."""
    table = params["embedding"]["table"]
    named = {
        "embedding.weight": table,
        "output.weight": table if model.tie_embeddings else params["output"]["kernel"].T,
        "output.bias": params["output"]["bias"],
    }
    if model.architecture in RECURRENT:
        places = [(module, layer) for module, (_, count) in enumerate(_modules(model)) for layer in range(count)]
        for i, (module, layer) in enumerate(places):
            ours = params["stack"][f"layer_{i}"]
            second = np.zeros_like(ours["bias"])
            if model.architecture == "gru":
                second[-len(ours["recurrent_bias"]) :] = ours["recurrent_bias"]
            named |= {
                f"stack.{module}.weight_ih_l{layer}": ours["input_kernel"].T,
                f"stack.{module}.weight_hh_l{layer}": ours["recurrent_kernel"].T,
                f"stack.{module}.bias_ih_l{layer}": ours["bias"],
                f"stack.{module}.bias_hh_l{layer}": second,
            }
    else:
        stack = params["stack"]
        named |= _layer("last_norm", stack["last_norm"])
        if model.positions == "learned":
            named["position_table.weight"] = stack["position_table"]
        for i in range(model.num_layers):
            ours, prefix = stack[f"layer_{i}"], f"stack.{i}"
            for name in ("attention_norm", "feed_forward_norm"):
                named |= _layer(f"{prefix}.{name}", ours[name])
            for name, part in ours["feed_forward"].items():
                named |= _layer(f"{prefix}.feed_forward.{name}", part)
            named |= _layer(f"{prefix}.attention.outward", ours["attention"]["outward"])
            three = [ours["attention"][name] for name in ("query", "key", "value")]
            joined = {leaf: np.concatenate([part[leaf] for part in three], axis=-1) for leaf in ("kernel", "bias")}
            named |= _layer(f"{prefix}.attention.query_key_value", joined)
    return {name: np.asarray(value) for name, value in named.items()}


def _layer(name, part):
    """Weight and bias (if any) of a linear layer or a norm."""
    named = {f"{name}.weight": part["kernel"].T if "kernel" in part else part["scale"]}
    return named | ({f"{name}.bias": part["bias"]} if "bias" in part else {})
