"""Our models in PyTorch, as its users write them, and our parameters under their names; torch is imported in functions only."""

import functools
from typing import Any

import numpy as np

from lm.config import RECURRENT, Config, ModelConfig, layer_dims

_NORM_EPSILON = 1e-6


def build(config: Config, vocab_size: int, length: int):
    """A torch.nn.Module: inputs_BT, state -> logits_BTV, state. Its parameters are torch's own until `state_dict` is loaded.

    Args:
      length: of the longest text.
    """
    return _recurrent(config, vocab_size) if config.model.architecture in RECURRENT else _transformer(config, vocab_size, length)


def _modules(model: ModelConfig) -> list[tuple[int, int]]:
    """(width, layers) of each torch module: one for all layers if they are equally wide and nothing is dropped in them or between
    them, else one each."""
    widths = layer_dims(model)
    joined = len(set(widths)) == 1 and not model.dropout_rate and not model.weight_drop_rate
    return [(widths[0], len(widths))] if joined else [(width, 1) for width in widths]


def _recurrent(config, vocab_size):
    import torch
    from torch import nn
    from torch.nn import functional as F

    model = config.model
    rates = [model.embedding_dropout_rate, *[model.dropout_rate] * (len(_modules(model)) - 1), model.output_dropout_rate]
    recurrence = getattr(torch, f"rnn_{model.activation}" if model.architecture == "rnn" else model.architecture)
    options = {"nonlinearity": model.activation} if model.architecture == "rnn" else {}
    kind = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[model.architecture]

    class RecurrentLanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            width = model.embed_dim or layer_dims(model)[-1]
            self.embedding = nn.Embedding(vocab_size, width)
            self.stack = nn.ModuleList()
            for hidden_dim, num_layers in _modules(model):
                self.stack.append(kind(width, hidden_dim, num_layers, batch_first=True, **options))
                width = hidden_dim
            self.output = nn.Linear(width, vocab_size)
            if model.tie_embeddings:
                self.output.weight = self.embedding.weight

        def empty_state(self, num_samples):
            return None

        def drop(self, x_BTD, rate):
            """Dropout; a variational mask is one for all steps."""
            if not self.training or not rate:
                return x_BTD
            if not model.variational_dropout:
                return F.dropout(x_BTD, rate)
            return x_BTD * F.dropout(torch.ones_like(x_BTD[:, :1]), rate)

        def recur(self, layers, x_BTD, before):
            """A module's layers; with weight drop, its one layer on a matrix of which a part is zero."""
            if not self.training or not model.weight_drop_rate:
                return layers(x_BTD, before)
            weights = [layers.weight_ih_l0, F.dropout(layers.weight_hh_l0, model.weight_drop_rate)]
            weights += [layers.bias_ih_l0, layers.bias_hh_l0]
            if before is None:
                empty_1BH = x_BTD.new_zeros((1, len(x_BTD), layers.hidden_size))
                before = (empty_1BH, empty_1BH) if model.architecture == "lstm" else empty_1BH
            hidden_BTH, *last = recurrence(x_BTD, before, weights, True, 1, 0.0, True, False, True)
            return hidden_BTH, tuple(last) if model.architecture == "lstm" else last[0]

        def forward(self, inputs_BT, state):
            x_BTD, after = self.embedding(inputs_BT), []
            if self.training and model.word_dropout_rate:
                x_BTD = x_BTD * F.dropout(x_BTD.new_ones((vocab_size, 1)), model.word_dropout_rate)[inputs_BT]
            for layers, rate, before in zip(self.stack, rates, state or [None] * len(self.stack), strict=False):
                x_BTD, last = self.recur(layers, self.drop(x_BTD, rate), before)
                after.append(last)
            return self.output(self.drop(x_BTD, rates[-1])), after

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


def _transformer(config, vocab_size, length):
    import torch
    from torch import nn
    from torch.nn import functional as F

    model = config.model
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
            by_tanh = functools.partial(F.gelu, approximate="tanh")
            activation = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": by_tanh}[model.activation]
            return self.outward(activation(self.inward(x_BTD)))

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

        def rotate(self, x_BHTK, places):
            first, second = x_BHTK.chunk(2, dim=-1)
            sine, cosine = self.sine[places], self.cosine[places]
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

        def forward(self, x_BTD, places, cache):
            projected = self.query_key_value(x_BTD).unflatten(-1, (3, num_heads, width // num_heads))
            q_BHTK, k_BHTK, v_BHTK = projected.permute(2, 0, 3, 1, 4)
            if model.positions == "rotary":
                q_BHTK, k_BHTK = self.rotate(q_BHTK, places), self.rotate(k_BHTK, places)
            if cache is None:
                num_places = x_BTD.shape[1]
                mask = None if self.mask is None else self.mask[:num_places, :num_places]
                mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=mask is None)
            else:  # one token a call, which sees all that was kept
                k_BHTK, v_BHTK = (torch.cat([old, new], dim=2) for old, new in zip(cache, (k_BHTK, v_BHTK), strict=True))
                if model.attention_window is not None:
                    k_BHTK, v_BHTK = (x[:, :, -model.attention_window :] for x in (k_BHTK, v_BHTK))
                mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)
            return self.outward(mixed_BHTK.transpose(1, 2).flatten(2)), (k_BHTK, v_BHTK)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.feed_forward_norm = norm(width, eps=_NORM_EPSILON), norm(width, eps=_NORM_EPSILON)
            self.attention, self.feed_forward = Attention(), FeedForward()

        def forward(self, x_BTD, places, cache):
            mixed_BTD, cache = self.attention(self.attention_norm(x_BTD), places, cache)
            x_BTD = x_BTD + mixed_BTD
            return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), cache

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
            self.stack = nn.ModuleList(Block() for _ in range(model.num_layers))
            self.last_norm = norm(width, eps=_NORM_EPSILON)
            self.output = nn.Linear(width, vocab_size)
            if model.tie_embeddings:
                self.output.weight = self.embedding.weight

        def empty_state(self, num_samples):
            empty = self.embedding.weight.new_zeros((num_samples, num_heads, 0, width // num_heads))
            return 0, [(empty, empty)] * model.num_layers

        def forward(self, inputs_BT, state):
            """State None: texts that start here. Otherwise the number of tokens before, and their keys and values."""
            x_BTD = self.embedding(inputs_BT)
            before, caches = (0, [None] * model.num_layers) if state is None else state
            places = slice(before, before + inputs_BT.shape[1])
            if model.positions == "learned":
                x_BTD = x_BTD + self.position_table(self.places[places])
            elif model.positions == "sinusoidal":
                x_BTD = x_BTD * width**0.5 + self.sinusoids[places]
            kept = []
            for block, cache in zip(self.stack, caches, strict=True):
                x_BTD, cache = block(x_BTD, places, cache)
                kept.append(cache)
            after = [] if state is None else (before + inputs_BT.shape[1], kept)
            return self.output(self.last_norm(x_BTD)), after

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
