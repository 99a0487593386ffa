"""Float64 NumPy references, forward and hand-derived backward, that the models are tested against.

Written from the papers' equations and from nothing else: no JAX, no automatic differentiation, no code of `lm`, so that an
error there cannot be repeated here. Time is an explicit loop and clarity goes before speed.

Every layer returns its result and, last, a function `backward` that turns the gradient of a scalar with respect to the
result into the gradients with respect to the parameters (a dict with the keys of `params`) and to the inputs. An elementwise
function returns its value and its derivative.

Shapes: B rows, T time, D input width, H hidden width (of a recurrent layer) or heads (of attention), K head width,
F feed-forward width; G = several gates of width H side by side.
"""

import numpy as np
from scipy.special import erf, expit

NORM_EPSILON = 1e-6
ROTARY_BASE = 10000.0


def rnn(params, x_BTD, h0_BH, activation):
    """Simple recurrent network (Elman, 1990): h_t = act(x_t W + h_{t-1} U + b).

    Args:
      params: input_kernel W [D, H], recurrent_kernel U [H, H], bias b [H].
      x_BTD: inputs.
      h0_BH: the carry before the first token.
      activation: "tanh" or "relu".

    Returns:
      h_BTH, the last h_BH, and backward(d_h_BTH, d_last_BH=None) -> (d_params, d_x_BTD, d_h0_BH).
    """
    if activation not in ("tanh", "relu"):
        raise ValueError(f"activation must be 'tanh' or 'relu', not {activation!r}")
    W, U, b = _float64(params, "input_kernel", "recurrent_kernel", "bias")
    x_BTD, h0_BH = _array(x_BTD), _array(h0_BH)
    num_rows, length, _ = x_BTD.shape

    states = [h0_BH]  # states[t] is the carry before token t
    for t in range(length):
        a_BH = x_BTD[:, t] @ W + states[t] @ U + b
        states.append(np.tanh(a_BH) if activation == "tanh" else np.maximum(a_BH, 0.0))

    def backward(d_h_BTH, d_last_BH=None):
        d_h_BTH = _array(d_h_BTH)
        d_W, d_U, d_b = np.zeros_like(W), np.zeros_like(U), np.zeros_like(b)
        d_x_BTD = np.zeros_like(x_BTD)
        d_carry_BH = np.zeros_like(h0_BH) if d_last_BH is None else _array(d_last_BH)
        for t in reversed(range(length)):
            h_BH = states[t + 1]
            slope_BH = 1.0 - h_BH**2 if activation == "tanh" else (h_BH > 0.0).astype(np.float64)
            d_a_BH = (d_h_BTH[:, t] + d_carry_BH) * slope_BH
            d_W += x_BTD[:, t].T @ d_a_BH
            d_U += states[t].T @ d_a_BH
            d_b += d_a_BH.sum(axis=0)
            d_x_BTD[:, t] = d_a_BH @ W.T
            d_carry_BH = d_a_BH @ U.T
        return {"input_kernel": d_W, "recurrent_kernel": d_U, "bias": d_b}, d_x_BTD, d_carry_BH

    return _over_time(states[1:], num_rows, U.shape[0]), states[-1], backward


def lstm(params, x_BTD, carry0, input_gate="free"):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997) with a forget gate (Gers et al., 2000), no peepholes.

    [i f g o] = [sig sig tanh sig](x_t W + h_{t-1} U + b),  c_t = f * c_{t-1} + i * g,  h_t = o * tanh(c_t).

    Args:
      params: input_kernel W [D, 4H], recurrent_kernel U [H, 4H], bias b [4H]; gates in the order i, f, g, o.
      x_BTD: inputs.
      carry0: (c0_BH, h0_BH), the carry before the first token.
      input_gate: "coupled" has no i of its own, but i = 1 - f (Greff et al., 2017), and gates f, g, o; "capped" has
        i = min(sig, 1 - f) (Melis et al., 2018).

    Returns:
      h_BTH, the last (c_BH, h_BH), and backward(d_h_BTH, d_last=None) -> (d_params, d_x_BTD, (d_c0_BH, d_h0_BH)),
      where d_last is (d_c_BH, d_h_BH).
    """
    W, U, b = _float64(params, "input_kernel", "recurrent_kernel", "bias")
    x_BTD = _array(x_BTD)
    c0_BH, h0_BH = _array(carry0[0]), _array(carry0[1])
    num_rows, length, _ = x_BTD.shape

    cells, states, gates = [c0_BH], [h0_BH], []  # cells[t] and states[t] are the carry before token t
    for t in range(length):
        a_BG = x_BTD[:, t] @ W + states[t] @ U + b
        if input_gate == "coupled":
            a_i_BH, (a_f_BH, a_g_BH, a_o_BH) = np.inf, np.split(a_BG, 3, axis=-1)
        else:
            a_i_BH, a_f_BH, a_g_BH, a_o_BH = np.split(a_BG, 4, axis=-1)
        i_BH, f_BH, g_BH, o_BH = expit(a_i_BH), expit(a_f_BH), np.tanh(a_g_BH), expit(a_o_BH)
        gates.append((i_BH, f_BH, g_BH, o_BH))
        written_BH = i_BH if input_gate == "free" else np.minimum(i_BH, 1.0 - f_BH)
        cells.append(f_BH * cells[t] + written_BH * g_BH)
        states.append(o_BH * np.tanh(cells[t + 1]))

    def backward(d_h_BTH, d_last=None):
        d_h_BTH = _array(d_h_BTH)
        d_W, d_U, d_b = np.zeros_like(W), np.zeros_like(U), np.zeros_like(b)
        d_x_BTD = np.zeros_like(x_BTD)
        d_c_carry_BH, d_h_carry_BH = np.zeros_like(c0_BH), np.zeros_like(h0_BH)
        if d_last is not None:
            d_c_carry_BH, d_h_carry_BH = _array(d_last[0]), _array(d_last[1])
        for t in reversed(range(length)):
            i_BH, f_BH, g_BH, o_BH = gates[t]
            tanh_c_BH = np.tanh(cells[t + 1])
            d_h_BH = d_h_BTH[:, t] + d_h_carry_BH
            # The cell is read twice: by h_t through the output gate, and by the next step's cell.
            d_c_BH = d_h_BH * o_BH * (1.0 - tanh_c_BH**2) + d_c_carry_BH
            # Where 1 - f is what is written, the forget gate has the input gate's gradient, turned round.
            is_free_BH = i_BH < 1.0 - f_BH if input_gate != "free" else np.ones(f_BH.shape, bool)
            written_BH = np.where(is_free_BH, i_BH, 1.0 - f_BH)
            d_a_i_BH = np.where(is_free_BH, d_c_BH * g_BH * i_BH * (1.0 - i_BH), 0.0)
            d_a_f_BH = d_c_BH * (cells[t] - np.where(is_free_BH, 0.0, g_BH)) * f_BH * (1.0 - f_BH)
            d_a_g_BH = d_c_BH * written_BH * (1.0 - g_BH**2)
            d_a_o_BH = d_h_BH * tanh_c_BH * o_BH * (1.0 - o_BH)
            d_a_own = [d_a_f_BH, d_a_g_BH, d_a_o_BH]
            d_a_BG = np.concatenate(d_a_own if input_gate == "coupled" else [d_a_i_BH, *d_a_own], axis=-1)
            d_W += x_BTD[:, t].T @ d_a_BG
            d_U += states[t].T @ d_a_BG
            d_b += d_a_BG.sum(axis=0)
            d_x_BTD[:, t] = d_a_BG @ W.T
            d_h_carry_BH = d_a_BG @ U.T
            d_c_carry_BH = d_c_BH * f_BH
        d_params = {"input_kernel": d_W, "recurrent_kernel": d_U, "bias": d_b}
        return d_params, d_x_BTD, (d_c_carry_BH, d_h_carry_BH)

    return _over_time(states[1:], num_rows, U.shape[0]), (cells[-1], states[-1]), backward


def mogrifier(params, x_BTD, carry0):
    """The LSTM above, before each step of which its input and its state gate each other (Melis et al., 2020).

    x <- 2 sig(h Q_1) * x, then h <- 2 sig(x R_2) * h, then x <- 2 sig(h Q_3) * x, and so on for every round.

    Args:
      params: those of the LSTM; mogrifier_1_kernel Q_1 [H, D], mogrifier_2_kernel R_2 [D, H] and so on, or in place of one of
        them mogrifier_1_left_kernel and mogrifier_1_right_kernel, whose product it is.
      x_BTD, carry0: as of the LSTM.

    Returns:
      As the LSTM.
    """
    rounds = sorted({int(name.split("_")[1]) for name in params if name.startswith("mogrifier")})
    factors = {
        number: _float64(params, *[n for n in sorted(params) if n.startswith(f"mogrifier_{number}_")]) for number in rounds
    }
    matrices = {number: found[0] if len(found) == 1 else found[0] @ found[1] for number, found in factors.items()}
    x_BTD = _array(x_BTD)
    length, carry, steps, outputs = x_BTD.shape[1], tuple(map(_array, carry0)), [], []
    for t in range(length):
        x_BD, (c_BH, h_BH), gates = x_BTD[:, t], carry, []
        for number in rounds:
            gate = expit((h_BH if number % 2 else x_BD) @ matrices[number])
            gates.append((gate, x_BD, h_BH))
            if number % 2:
                x_BD = 2 * gate * x_BD
            else:
                h_BH = 2 * gate * h_BH
        found, carry, backward = lstm(params, x_BD[:, None], (c_BH, h_BH))
        outputs.append(found[:, 0])
        steps.append((gates, backward))

    def backward(d_h_BTH, d_last=None):
        d_params = {name: np.zeros(np.shape(value)) for name, value in params.items()}
        d_x_BTD = np.zeros_like(x_BTD)
        d_carry = tuple(map(_array, d_last)) if d_last is not None else (0.0, 0.0)
        for t in reversed(range(length)):
            gates, of_lstm = steps[t]
            found, d_x, d_carry = of_lstm(_array(d_h_BTH)[:, t : t + 1], d_carry)
            for name, gradient in found.items():
                d_params[name] += gradient
            d_x_BD, (d_c_BH, d_h_BH) = d_x[:, 0], d_carry
            for number, (gate, x_BD, h_BH) in reversed(list(zip(rounds, gates, strict=True))):
                gated, gating, d_gated = (x_BD, h_BH, d_x_BD) if number % 2 else (h_BH, x_BD, d_h_BH)
                d_a = 2 * d_gated * gated * gate * (1 - gate)
                d_gated, d_gating = 2 * gate * d_gated, d_a @ matrices[number].T
                d_matrix = gating.T @ d_a
                if number % 2:
                    d_x_BD, d_h_BH = d_gated, d_h_BH + d_gating
                else:
                    d_x_BD, d_h_BH = d_x_BD + d_gating, d_gated
                if len(factors[number]) == 1:
                    d_params[f"mogrifier_{number}_kernel"] += d_matrix
                else:
                    left, right = factors[number]
                    d_params[f"mogrifier_{number}_left_kernel"] += d_matrix @ right.T
                    d_params[f"mogrifier_{number}_right_kernel"] += left.T @ d_matrix
            d_x_BTD[:, t], d_carry = d_x_BD, (d_c_BH, d_h_BH)
        return d_params, d_x_BTD, d_carry

    return _over_time(outputs, len(x_BTD), len(params["recurrent_kernel"])), carry, backward


def gru(params, x_BTD, h0_BH):
    """Gated recurrent unit (Cho et al., 2014), the form of cuDNN and torch that applies the reset gate after the matmul.

    r = sig(x Wr + h Ur + br),  z = sig(x Wz + h Uz + bz),  n = tanh(x Wn + bn + r * (h Un + b_hn)),  h' = (1 - z) * n + z * h.

    Args:
      params: input_kernel W [D, 3H], recurrent_kernel U [H, 3H], bias b [3H], gates in the order r, z, n;
        recurrent_bias b_hn [H], which the reset gate scales.
      x_BTD: inputs.
      h0_BH: the carry before the first token.

    Returns:
      h_BTH, the last h_BH, and backward(d_h_BTH, d_last_BH=None) -> (d_params, d_x_BTD, d_h0_BH).
    """
    W, U, b, b_hn = _float64(params, "input_kernel", "recurrent_kernel", "bias", "recurrent_bias")
    x_BTD, h0_BH = _array(x_BTD), _array(h0_BH)
    num_rows, length, _ = x_BTD.shape

    states, gates = [h0_BH], []  # states[t] is the carry before token t
    for t in range(length):
        from_x_r_BH, from_x_z_BH, from_x_n_BH = np.split(x_BTD[:, t] @ W + b, 3, axis=-1)
        from_h_r_BH, from_h_z_BH, from_h_n_BH = np.split(states[t] @ U, 3, axis=-1)
        from_h_n_BH = from_h_n_BH + b_hn
        r_BH = expit(from_x_r_BH + from_h_r_BH)
        z_BH = expit(from_x_z_BH + from_h_z_BH)
        n_BH = np.tanh(from_x_n_BH + r_BH * from_h_n_BH)
        gates.append((r_BH, z_BH, n_BH, from_h_n_BH))
        states.append((1.0 - z_BH) * n_BH + z_BH * states[t])

    def backward(d_h_BTH, d_last_BH=None):
        d_h_BTH = _array(d_h_BTH)
        d_W, d_U, d_b, d_b_hn = np.zeros_like(W), np.zeros_like(U), np.zeros_like(b), np.zeros_like(b_hn)
        d_x_BTD = np.zeros_like(x_BTD)
        d_carry_BH = np.zeros_like(h0_BH) if d_last_BH is None else _array(d_last_BH)
        for t in reversed(range(length)):
            r_BH, z_BH, n_BH, from_h_n_BH = gates[t]
            d_h_BH = d_h_BTH[:, t] + d_carry_BH
            d_a_n_BH = d_h_BH * (1.0 - z_BH) * (1.0 - n_BH**2)
            d_a_z_BH = d_h_BH * (states[t] - n_BH) * z_BH * (1.0 - z_BH)
            d_a_r_BH = d_a_n_BH * from_h_n_BH * r_BH * (1.0 - r_BH)
            # The candidate's recurrent part is seen through the reset gate, its input part is not.
            d_from_h_n_BH = d_a_n_BH * r_BH
            d_from_x_BG = np.concatenate([d_a_r_BH, d_a_z_BH, d_a_n_BH], axis=-1)
            d_from_h_BG = np.concatenate([d_a_r_BH, d_a_z_BH, d_from_h_n_BH], axis=-1)
            d_W += x_BTD[:, t].T @ d_from_x_BG
            d_U += states[t].T @ d_from_h_BG
            d_b += d_from_x_BG.sum(axis=0)
            d_b_hn += d_from_h_n_BH.sum(axis=0)
            d_x_BTD[:, t] = d_from_x_BG @ W.T
            d_carry_BH = d_from_h_BG @ U.T + d_h_BH * z_BH
        d_params = {"input_kernel": d_W, "recurrent_kernel": d_U, "bias": d_b, "recurrent_bias": d_b_hn}
        return d_params, d_x_BTD, d_carry_BH

    return _over_time(states[1:], num_rows, U.shape[0]), states[-1], backward


def minimal(params, x_BTD, h0_BH, kind):
    """minGRU and minLSTM (Feng et al., 2024), step by step, forward only.

    mingru: z = sig(x W_z + b), h' = (1 - z) * h + z * (x W_h + b). minlstm: f, i = sig(x W_f + b), sig(x W_i + b),
    h' = f / (f + i) * h + i / (f + i) * (x W_h + b).

    Args:
      params: input_kernel [D, 2H] (z, h) or [D, 3H] (f, i, h), bias.

    Returns:
      h_BTH, the last h_BH.
    """
    W, b = _float64(params, "input_kernel", "bias")
    h_BH, states = _array(h0_BH), []
    for t in range(x_BTD.shape[1]):
        a = _array(x_BTD)[:, t] @ W + b
        if kind == "mingru":
            a_z, new = np.split(a, 2, axis=-1)
            h_BH = (1 - expit(a_z)) * h_BH + expit(a_z) * new
        else:
            a_f, a_i, new = np.split(a, 3, axis=-1)
            f, i = expit(a_f), expit(a_i)
            h_BH = f / (f + i) * h_BH + i / (f + i) * new
        states.append(h_BH)
    return np.stack(states, axis=1), h_BH


def slstm(params, x_BTD, carry0):
    """sLSTM with one head (Beck et al., 2024, equations 8 to 14), with exponentials as they stand, forward only.

    [i f z o] = [exp sig tanh sig](x W + h U + b), c' = f c + i z, n' = f n + i, h' = o c' / n'.

    Args:
      params: input_kernel W [D, 4H], recurrent_kernel U [H, 4H], bias b [4H].
      carry0: (c_BH, n_BH, h_BH).

    Returns:
      h_BTH, the last (c_BH, n_BH, h_BH).
    """
    W, U, b = _float64(params, "input_kernel", "recurrent_kernel", "bias")
    (c_BH, n_BH, h_BH), states = map(_array, carry0), []
    for t in range(x_BTD.shape[1]):
        a_i, a_f, a_z, a_o = np.split(_array(x_BTD)[:, t] @ W + h_BH @ U + b, 4, axis=-1)
        c_BH = expit(a_f) * c_BH + np.exp(a_i) * np.tanh(a_z)
        n_BH = expit(a_f) * n_BH + np.exp(a_i)
        h_BH = expit(a_o) * c_BH / n_BH
        states.append(h_BH)
    return np.stack(states, axis=1), (c_BH, n_BH, h_BH)


def mlstm(params, x_BTD, carry0):
    """mLSTM (Beck et al., 2024, equations 19 to 27), step by step, with exponentials as they stand, forward only.

    C' = f C + i k v', n' = f n + i k, h' = sig(x W_o + b) * norm(q' C' / max(|n' q|, 1)) with k divided by sqrt(K).

    Args:
      params: {query,key,value,out_gate}_{kernel,bias} [D, H] and [H]; {write,forget}_gate_{kernel,bias} [D, N] and [N];
        scale [N, K] of the norm over each head.
      carry0: (C_BNKK, n_BNK).

    Returns:
      h_BTH, the last (C_BNKK, n_BNK).
    """
    params = {name: _array(value) for name, value in params.items()}
    x_BTD, (C, n) = _array(x_BTD), map(_array, carry0)
    num_heads, width = params["scale"].shape
    outputs = []
    for t in range(x_BTD.shape[1]):
        at = {name: x_BTD[:, t] @ params[f"{name}_kernel"] + params[f"{name}_bias"] for name in _OF_MLSTM}
        q, k, v = (at[name].reshape(-1, num_heads, width) for name in ("query", "key", "value"))
        k = k / np.sqrt(width)
        i, f = np.exp(at["write_gate"])[..., None], expit(at["forget_gate"])[..., None]
        C = f[..., None] * C + i[..., None] * k[..., :, None] * v[..., None, :]
        n = f * n + i * k
        size = np.maximum(np.abs((n * q).sum(axis=-1)), 1.0)
        read = np.einsum("bnk,bnkv->bnv", q, C) / size[..., None]
        centred = read - read.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + NORM_EPSILON) * params["scale"]
        outputs.append(expit(at["out_gate"]) * normed.reshape(len(x_BTD), -1))
    return np.stack(outputs, axis=1), (C, n)


_OF_MLSTM = ("query", "key", "value", "out_gate", "write_gate", "forget_gate")


def attention(params, x_BTD, num_heads, window=None, rotary=False):
    """Causal multi-head scaled dot-product self-attention (Vaswani et al., 2017).

    softmax(q k' / sqrt(K)) v for each head, where token t sees the positions max(0, t - window + 1) .. t.

    Args:
      params: query_kernel, key_kernel, value_kernel, out_kernel [D, D] and query_bias, key_bias, value_bias, out_bias [D];
        head j owns the columns j K .. (j + 1) K - 1 of the first three and the same rows of out_kernel.
      x_BTD: inputs.
      num_heads: H; K = D / H.
      window: how many positions a token sees, itself included; None for all up to itself.
      rotary: turn queries and keys by their position (Su et al., 2021) before they meet.

    Returns:
      y_BTD, the weights [B, H, T (query), T (key)], and backward(d_y_BTD) -> (d_params, d_x_BTD).
    """
    W_q, W_k, W_v, W_o = _float64(params, "query_kernel", "key_kernel", "value_kernel", "out_kernel")
    b_q, b_k, b_v, b_o = _float64(params, "query_bias", "key_bias", "value_bias", "out_bias")
    x_BTD = _array(x_BTD)
    num_rows, length, width = x_BTD.shape
    if width % num_heads:
        raise ValueError(f"width {width} is not divisible by {num_heads} heads")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    head_dim = width // num_heads
    scale = 1.0 / np.sqrt(head_dim)
    by_head = (num_rows, length, num_heads, head_dim)

    q_BTHK = (x_BTD @ W_q + b_q).reshape(by_head)
    k_BTHK = (x_BTD @ W_k + b_k).reshape(by_head)
    v_BTHK = (x_BTD @ W_v + b_v).reshape(by_head)
    if rotary:
        q_BTHK, k_BTHK = _rotate(q_BTHK, +1.0), _rotate(k_BTHK, +1.0)

    def visible(t):
        return slice(0 if window is None else max(0, t - window + 1), t + 1)

    weights_BHTT = np.zeros((num_rows, num_heads, length, length))
    mixed_BTHK = np.zeros(by_head)
    for row, head, t in np.ndindex(num_rows, num_heads, length):
        seen = visible(t)
        scores = scale * (k_BTHK[row, seen, head] @ q_BTHK[row, t, head])
        exponentials = np.exp(scores - scores.max())
        weights_BHTT[row, head, t, seen] = exponentials / exponentials.sum()
        mixed_BTHK[row, t, head] = weights_BHTT[row, head, t, seen] @ v_BTHK[row, seen, head]
    mixed_BTD = mixed_BTHK.reshape(x_BTD.shape)
    y_BTD = mixed_BTD @ W_o + b_o

    def backward(d_y_BTD):
        d_y_BTD = _array(d_y_BTD)
        d_mixed_BTHK = (d_y_BTD @ W_o.T).reshape(by_head)
        d_q_BTHK, d_k_BTHK, d_v_BTHK = np.zeros(by_head), np.zeros(by_head), np.zeros(by_head)
        for row, head, t in np.ndindex(num_rows, num_heads, length):
            seen = visible(t)
            weights = weights_BHTT[row, head, t, seen]
            d_mixed = d_mixed_BTHK[row, t, head]
            d_weights = v_BTHK[row, seen, head] @ d_mixed
            d_scores = weights * (d_weights - weights @ d_weights)
            d_v_BTHK[row, seen, head] += np.outer(weights, d_mixed)
            d_q_BTHK[row, t, head] = scale * (d_scores @ k_BTHK[row, seen, head])
            d_k_BTHK[row, seen, head] += scale * np.outer(d_scores, q_BTHK[row, t, head])
        if rotary:  # a rotation's transpose is the rotation the other way
            d_q_BTHK, d_k_BTHK = _rotate(d_q_BTHK, -1.0), _rotate(d_k_BTHK, -1.0)

        d_params = {"out_kernel": _kernel_gradient(mixed_BTD, d_y_BTD), "out_bias": d_y_BTD.sum(axis=(0, 1))}
        d_x_BTD = np.zeros_like(x_BTD)
        for name, kernel, d_BTHK in (("query", W_q, d_q_BTHK), ("key", W_k, d_k_BTHK), ("value", W_v, d_v_BTHK)):
            d_BTD = d_BTHK.reshape(x_BTD.shape)
            d_params[f"{name}_kernel"] = _kernel_gradient(x_BTD, d_BTD)
            d_params[f"{name}_bias"] = d_BTD.sum(axis=(0, 1))
            d_x_BTD += d_BTD @ kernel.T
        return d_params, d_x_BTD

    return y_BTD, weights_BHTT, backward


def layer_norm(params, x_BTD):
    """Layer normalisation (Ba et al., 2016): scale * (x - mean) / sqrt(variance + epsilon) + bias, over the last axis.

    Args:
      params: scale [D], bias [D].
      x_BTD: inputs.

    Returns:
      y_BTD and backward(d_y_BTD) -> (d_params, d_x_BTD).
    """
    scale_D, bias_D = _float64(params, "scale", "bias")
    x_BTD = _array(x_BTD)
    centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
    inverse_BT1 = 1.0 / np.sqrt((centred_BTD**2).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    normal_BTD = centred_BTD * inverse_BT1

    def backward(d_y_BTD):
        d_y_BTD = _array(d_y_BTD)
        d_normal_BTD = d_y_BTD * scale_D
        # The mean and the variance depend on x as well: what they absorb is taken out again.
        d_x_BTD = inverse_BT1 * (
            d_normal_BTD
            - d_normal_BTD.mean(axis=-1, keepdims=True)
            - normal_BTD * (d_normal_BTD * normal_BTD).mean(axis=-1, keepdims=True)
        )
        return {"scale": (d_y_BTD * normal_BTD).sum(axis=(0, 1)), "bias": d_y_BTD.sum(axis=(0, 1))}, d_x_BTD

    return normal_BTD * scale_D + bias_D, backward


def rms_norm(params, x_BTD):
    """Root mean square normalisation (Zhang & Sennrich, 2019): scale * x / sqrt(mean(x^2) + epsilon), over the last axis.

    Args:
      params: scale [D].
      x_BTD: inputs.

    Returns:
      y_BTD and backward(d_y_BTD) -> (d_params, d_x_BTD).
    """
    (scale_D,) = _float64(params, "scale")
    x_BTD = _array(x_BTD)
    inverse_BT1 = 1.0 / np.sqrt((x_BTD**2).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    normal_BTD = x_BTD * inverse_BT1

    def backward(d_y_BTD):
        d_y_BTD = _array(d_y_BTD)
        d_normal_BTD = d_y_BTD * scale_D
        d_x_BTD = inverse_BT1 * (d_normal_BTD - normal_BTD * (d_normal_BTD * normal_BTD).mean(axis=-1, keepdims=True))
        return {"scale": (d_y_BTD * normal_BTD).sum(axis=(0, 1))}, d_x_BTD

    return normal_BTD * scale_D, backward


def looked_up_attention(params, x_BTD, num_heads, window=None, qk_norm=False, rotary=False):
    """Attention whose keys are looked up by content and by distance (Dai et al., 2019, section 3.3), forward only.

    score(t, s) = ((q_t + u) k_s + (q_t + v) W_r sinusoids(t - s)) / sqrt(K) where distance_kernel is given; else q_t k_s /
    sqrt(K). With qk_norm each head's q and k are divided by their root mean square and multiplied with a scale (Henry et al.,
    2020, with the norm of Zhang & Sennrich, 2019), before they are turned where that is asked for.

    Args:
      params: as of `attention`; distance_kernel W_r [D, D], content_bias u and distance_bias v [H, K]; query_scale and
        key_scale [K].

    Returns:
      y_BTD, the weights [B, H, T (query), T (key)].
    """
    params = {name: _array(value) for name, value in params.items()}
    x_BTD = _array(x_BTD)
    num_rows, length, width = x_BTD.shape
    by_head = num_rows, length, num_heads, width // num_heads

    def projected(name):
        return (x_BTD @ params[f"{name}_kernel"] + params[f"{name}_bias"]).reshape(by_head)

    q, k, v = projected("query"), projected("key"), projected("value")
    if qk_norm:
        q, k = (
            z / np.sqrt(np.mean(z**2, axis=-1, keepdims=True) + NORM_EPSILON) * params[scale]
            for z, scale in ((q, "query_scale"), (k, "key_scale"))
        )
    if rotary:
        q, k = _rotate(q, +1.0), _rotate(k, +1.0)
    weights, mixed = np.zeros((num_rows, num_heads, length, length)), np.zeros(by_head)
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    for row, head, t in np.ndindex(num_rows, num_heads, length):
        seen = range(0 if window is None else max(0, t - window + 1), t + 1)
        scores = []
        for s in seen:
            if "distance_kernel" in params:
                sinusoids = np.concatenate([np.sin((t - s) * frequencies), np.cos((t - s) * frequencies)])
                r = (sinusoids @ params["distance_kernel"]).reshape(num_heads, -1)[head]
                by_content = (q[row, t, head] + params["content_bias"][head]) @ k[row, s, head]
                scores.append(by_content + (q[row, t, head] + params["distance_bias"][head]) @ r)
            else:
                scores.append(q[row, t, head] @ k[row, s, head])
        exponentials = np.exp((np.array(scores) - max(scores)) / np.sqrt(by_head[-1]))
        weights[row, head, t, list(seen)] = exponentials / exponentials.sum()
        mixed[row, t, head] = weights[row, head, t, list(seen)] @ v[row, list(seen), head]
    return mixed.reshape(x_BTD.shape) @ params["out_kernel"] + params["out_bias"], weights


def feed_forward(params, x_BTD, activation):
    """Position-wise feed-forward network: act(x W_in + b_in) W_out + b_out (Vaswani et al., 2017), or SwiGLU (Shazeer, 2020).

    SwiGLU is (silu(x W_gate) * (x W_in)) W_out, without biases.

    Args:
      params: in_kernel [D, F], in_bias [F], out_kernel [F, D], out_bias [D];
        for "swiglu": gate_kernel [D, F], in_kernel [D, F], out_kernel [F, D].
      x_BTD: inputs.
      activation: "relu", "gelu" (exact), "gelu_tanh" (its approximation) or "swiglu".

    Returns:
      y_BTD and backward(d_y_BTD) -> (d_params, d_x_BTD).
    """
    if activation == "swiglu":
        return _swiglu(params, x_BTD)
    value_and_slope = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh}[activation]
    W_in, b_in, W_out, b_out = _float64(params, "in_kernel", "in_bias", "out_kernel", "out_bias")
    x_BTD = _array(x_BTD)
    inner_BTF, slope_BTF = value_and_slope(x_BTD @ W_in + b_in)

    def backward(d_y_BTD):
        d_y_BTD = _array(d_y_BTD)
        d_a_BTF = (d_y_BTD @ W_out.T) * slope_BTF
        d_params = {
            "in_kernel": _kernel_gradient(x_BTD, d_a_BTF),
            "in_bias": d_a_BTF.sum(axis=(0, 1)),
            "out_kernel": _kernel_gradient(inner_BTF, d_y_BTD),
            "out_bias": d_y_BTD.sum(axis=(0, 1)),
        }
        return d_params, d_a_BTF @ W_in.T

    return inner_BTF @ W_out + b_out, backward


def relu(x):
    """max(x, 0) and its derivative, taken as 0 at 0."""
    x = _array(x)
    return np.maximum(x, 0.0), (x > 0.0).astype(np.float64)


def gelu(x):
    """Exact GELU (Hendrycks & Gimpel, 2016), x Phi(x) with the normal distribution function Phi, and its derivative."""
    x = _array(x)
    distribution = 0.5 * (1.0 + erf(x / np.sqrt(2.0)))
    density = np.exp(-0.5 * x**2) / np.sqrt(2.0 * np.pi)
    return x * distribution, distribution + x * density


def gelu_tanh(x):
    """GELU's tanh approximation (Hendrycks & Gimpel, 2016), x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), and its derivative."""
    x = _array(x)
    tanh = np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))
    inner_slope = np.sqrt(2.0 / np.pi) * (1.0 + 3.0 * 0.044715 * x**2)
    return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * inner_slope


def silu(x):
    """x sig(x), also called swish (Ramachandran et al., 2017), and its derivative."""
    x = _array(x)
    sigmoid = expit(x)
    return x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid)


def _swiglu(params, x_BTD):
    W_gate, W_in, W_out = _float64(params, "gate_kernel", "in_kernel", "out_kernel")
    x_BTD = _array(x_BTD)
    gate_BTF, slope_BTF = silu(x_BTD @ W_gate)
    linear_BTF = x_BTD @ W_in
    inner_BTF = gate_BTF * linear_BTF

    def backward(d_y_BTD):
        d_y_BTD = _array(d_y_BTD)
        d_inner_BTF = d_y_BTD @ W_out.T
        d_a_gate_BTF = d_inner_BTF * linear_BTF * slope_BTF
        d_linear_BTF = d_inner_BTF * gate_BTF
        d_params = {
            "gate_kernel": _kernel_gradient(x_BTD, d_a_gate_BTF),
            "in_kernel": _kernel_gradient(x_BTD, d_linear_BTF),
            "out_kernel": _kernel_gradient(inner_BTF, d_y_BTD),
        }
        return d_params, d_a_gate_BTF @ W_gate.T + d_linear_BTF @ W_in.T

    return inner_BTF @ W_out, backward


def _rotate(x_BTHK, direction):
    """Rotary embedding (Su et al., 2021): turns each pair (j, j + K/2) at position t by the angle t * base^(-2j/K).

    The pairing by halves is GPT-NeoX's; the paper pairs neighbours, which is the same up to a permutation of the width.
    """
    _, length, _, head_dim = x_BTHK.shape
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head width, not {head_dim}")
    half = head_dim // 2
    turned_BTHK = np.zeros_like(x_BTHK)
    for t in range(length):
        for j in range(half):
            angle = direction * t * ROTARY_BASE ** (-2.0 * j / head_dim)
            first_BH, second_BH = x_BTHK[:, t, :, j], x_BTHK[:, t, :, j + half]
            turned_BTHK[:, t, :, j] = first_BH * np.cos(angle) - second_BH * np.sin(angle)
            turned_BTHK[:, t, :, j + half] = first_BH * np.sin(angle) + second_BH * np.cos(angle)
    return turned_BTHK


def _kernel_gradient(x_BTD, d_y_BTF):
    """The gradient [D, F] of a kernel that is applied to every row and position."""
    return np.einsum("btd,btf->df", x_BTD, d_y_BTF)


def _over_time(states, num_rows, width):
    """A list of T states [B, H] as one array [B, T, H], also when T is 0."""
    return np.stack(states, axis=1) if states else np.zeros((num_rows, 0, width))


def _array(x):
    # A copy: who perturbs a parameter in place must not change what `backward` remembers.
    return np.array(x, dtype=np.float64)


def _float64(params, *names):
    """The named parameters, in this order; a parameter that is missing is a KeyError."""
    return tuple(_array(params[name]) for name in names)
