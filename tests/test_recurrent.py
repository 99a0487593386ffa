"""The recurrent layers against NumPy and PyTorch, forward and backward, and what must hold of the stack however a text is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn

from lm.models import recurrent
from lm.models.recurrent import RecurrentLayer, RecurrentStack

CELLS = {  # name, activation and input gate; gates; arrays of the carry
    "rnn": (("rnn", "tanh", None), 1, 1),
    "relu": (("rnn", "relu", None), 1, 1),
    "lstm": (("lstm", None, "free"), 4, 2),
    "coupled": (("lstm", None, "coupled"), 3, 2),
    "capped": (("lstm", None, "capped"), 4, 2),
    "gru": (("gru", None, None), 3, 1),
    "mogrifier": (("lstm", None, None), 4, 2),
    "low-rank mogrifier": (("lstm", None, None), 4, 2),
}
MOGRIFIERS = {
    "mogrifier": {"mogrifier_rounds": 3},
    "low-rank mogrifier": {"mogrifier_rounds": 4, "mogrifier_rank": 2},
}
B, T, D, H = 3, 7, 4, 5
ZEROS = nn.initializers.zeros  # parameters are always given


def assert_close(found, expected, share=2e-6):
    """Two trees of equal structure, leaf by leaf, to that share of the leaf's largest entry.

    float32 against float64: each entry is a sum of some dozens of products, rounded at 6e-8 of the largest of them.
    """
    found, expected = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        tolerance = share * np.max(np.abs(want), initial=1)
        np.testing.assert_allclose(leaf, want, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def random_params(rng, kind, width_in=D, width=H):
    num_gates, scale = CELLS[kind][1], 0.3 if kind == "relu" else 0.6  # relu states must not grow with every step
    shapes = {
        "input_kernel": (width_in, num_gates * width),
        "recurrent_kernel": (width, num_gates * width),
        "bias": (num_gates * width,),
    }
    if kind == "gru":
        shapes["recurrent_bias"] = (width,)
    fields = MOGRIFIERS.get(kind, {})
    for number in range(1, fields.get("mogrifier_rounds", 0) + 1):
        ends, rank = ((width, width_in) if number % 2 else (width_in, width)), fields.get("mogrifier_rank")
        if rank is None:
            shapes[f"mogrifier_{number}_kernel"] = ends
        else:
            shapes[f"mogrifier_{number}_left_kernel"] = ends[0], rank
            shapes[f"mogrifier_{number}_right_kernel"] = rank, ends[1]
    return {name: rng.normal(0, scale, shape).astype(np.float32) for name, shape in shapes.items()}


def random_state(rng, kind, rows=B, width=H):
    return tuple(rng.normal(0, 0.7, (rows, width)).astype(np.float32) for _ in range(CELLS[kind][2]))


def reference(kind, params, x_BTD, state):
    """The NumPy layer behind one signature: hidden, state (a tuple), backward(d_hidden, d_state) -> d_params, d_x, d_state."""
    (name, activation, input_gate), _, _ = CELLS[kind]
    if kind in MOGRIFIERS:
        return references.mogrifier(params, x_BTD, state)
    if name == "lstm":
        return references.lstm(params, x_BTD, state, input_gate)
    if kind == "gru":
        hidden, last, backward = references.gru(params, x_BTD, state[0])
    else:
        hidden, last, backward = references.rnn(params, x_BTD, state[0], activation)

    def backward_tuple(d_hidden, d_state):
        d_params, d_x, d_first = backward(d_hidden, d_state[0])
        return d_params, d_x, (d_first,)

    return hidden, (last,), backward_tuple


def layer_of(kind):
    name, *variant = CELLS[kind][0]
    return RecurrentLayer(name, H, ZEROS, ZEROS, *variant, **MOGRIFIERS.get(kind, {}))


@functools.cache
def compiled_layer(kind):
    """(params, x, state, valid, starts, d_hidden, d_state) -> (hidden, state), (d_params, d_x, d_state); time first."""
    layer = layer_of(kind)

    @jax.jit
    def run(params, x_TBD, state, valid_TB, starts_TB, d_hidden, d_state):
        def forward(params, x_TBD, state):
            return layer.apply({"params": params}, x_TBD, state, valid_TB, starts_TB, False)

        result, backward = jax.vjp(forward, params, x_TBD, state)
        return result, backward((d_hidden, d_state))

    return run


@pytest.fixture
def case(rng):
    """Everything random that a comparison of a layer needs."""

    def make(kind):
        x_TBD = rng.normal(size=(T, B, D)).astype(np.float32)
        d_hidden_TBH = rng.normal(size=(T, B, H)).astype(np.float32)
        return random_params(rng, kind), x_TBD, random_state(rng, kind), d_hidden_TBH, random_state(rng, kind)

    return make


@pytest.mark.parametrize("kind", CELLS)
def test_layer_and_gradients_equal_numpy(case, kind):
    params, x, state, d_hidden, d_state = case(kind)
    (hidden, after), gradients = compiled_layer(kind)(params, x, state, None, None, d_hidden, d_state)
    want_hidden, want_after, backward = reference(kind, params, x.swapaxes(0, 1), state)
    assert_close((hidden.swapaxes(0, 1), after), (want_hidden, want_after))
    d_params, d_x, d_first = backward(d_hidden.swapaxes(0, 1), d_state)
    assert_close(gradients, (d_params, d_x.swapaxes(0, 1), d_first))


@pytest.mark.parametrize("kind", CELLS)
def test_without_a_gradient_a_layer_equals_numpy_too(case, kind):
    params, x, state, _, _ = case(kind)
    hidden, after = jax.jit(layer_of(kind).apply, static_argnums=5)({"params": params}, x, state, None, None, False)
    want_hidden, want_after, _ = reference(kind, params, x.swapaxes(0, 1), state)
    assert_close((hidden.swapaxes(0, 1), after), (want_hidden, want_after))


@pytest.mark.parametrize("kind", CELLS)
def test_masked_layer_and_gradients_equal_numpy_document_by_document(case, kind):
    """Valid tokens only, emptied at starts: each document alone through the reference, its gradients added up."""
    params, x, state, d_hidden, d_state = case(kind)
    # Row 0: padding inside and at the end, two starts; row 1: padding first; row 2: one document, nothing carried in.
    valid_BT = np.array([[1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    starts_BT = np.array([[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]], bool)
    d_hidden *= valid_BT.T[..., None]  # at padding the layer repeats its state, which the reference knows nothing of
    (hidden, after), gradients = compiled_layer(kind)(params, x, state, valid_BT.T, starts_BT.T, d_hidden, d_state)

    want_after, want_d_state = [np.zeros((CELLS[kind][2], B, H)) for _ in range(2)]
    want_d_params, want_d_x = jax.tree.map(lambda p: np.zeros(p.shape), params), np.zeros(x.shape)
    for row in range(B):
        times = np.flatnonzero(valid_BT[row])
        documents = np.split(times, np.flatnonzero(starts_BT[row][times]))
        for number, document in enumerate(documents):
            first = tuple(s[row : row + 1] * (number == 0) for s in state)
            last_document = number == len(documents) - 1
            found, last, backward = reference(kind, params, x[document, row][None], first)
            assert_close(hidden[document, row], found[0])
            d_last = tuple(d[row : row + 1] * last_document for d in d_state)
            d_params, d_x, d_first = backward(d_hidden[document, row][None], d_last)
            want_d_params = jax.tree.map(np.add, want_d_params, d_params)
            want_d_x[document, row] = d_x[0]
            if number == 0:
                want_d_state[:, row] = np.stack(d_first)[:, 0]
            if last_document:
                want_after[:, row] = np.stack(last)[:, 0]
    assert_close(np.stack(after), want_after)
    assert_close((gradients[0], gradients[1], np.stack(gradients[2])), (want_d_params, want_d_x, want_d_state))


def plain_scan(step, dtype="float32"):
    """The scan of `step(arguments, input, state) -> state` over valid tokens, emptied at starts, as what JAX can derive."""

    def run(arguments, inputs_T, state, valid_TB, starts_TB):
        def masked(state, at_t):
            inputs, valid_B, starts_B = at_t
            state = jax.tree.map(lambda s: jnp.where(starts_B[:, None], 0, s), state)
            new = step(arguments, inputs, state)
            new = jax.tree.map(lambda n, s: jnp.where(valid_B[:, None], n, s), new, state)
            return new, new[-1].astype(dtype)

        state, hidden_TBH = jax.lax.scan(masked, state, (inputs_T, valid_TB, starts_TB))
        return hidden_TBH, state

    return run


def values_and_gradients(runs, arguments, cotangents):
    """Of each of the functions of the arguments: what it gives, and what that hands back."""

    def of_all(arguments, cotangents):
        derived = [jax.vjp(run, *arguments) for run in runs]
        return [(found, backward(cotangents)) for found, backward in derived]

    return jax.jit(of_all)(arguments, cotangents)


def random_masks(rng):
    valid = rng.random((T, B)) < 0.7
    return valid, valid & (rng.random((T, B)) < 0.4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_hand_made_gradient_equals_the_scans_own(rng, kind, is_scaled, dtype):
    """`recur` gathers the recurrent matrix's gradient in one product; the plain scan's derivative is the other way to it."""
    cell = recurrent.cell(CELLS[kind][0][0])
    scale = rng.choice([0, 2], (B, H)).astype(np.float32) if is_scaled else None
    gates = rng.normal(size=(T, B, cell.num_gates * H)).astype(np.float32)
    params = random_params(rng, kind)
    bias = rng.normal(size=(cell.num_gates * H)).astype(np.float32)
    masks = random_masks(rng)
    cotangents = jnp.asarray(rng.normal(size=(T, B, H)), dtype), random_state(rng, kind)  # also where there is padding
    arguments = (gates, jnp.asarray(params["recurrent_kernel"], dtype), bias, random_state(rng, kind))

    def step(kernel_and_bias, gates_BG, state):
        kernel, bias = kernel_and_bias
        hidden = (state[-1] if scale is None else state[-1] * scale).astype(dtype)
        return cell.step(gates_BG, jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32) + bias, state)

    def by_scan(gates, kernel, bias, state):
        return plain_scan(step, dtype)((kernel, bias), gates, state, *masks)

    def by_hand(*arguments):
        return recurrent.recur(cell, *arguments, scale, *masks)

    found, expected = values_and_gradients((by_hand, by_scan), arguments, cotangents)
    assert_close(found, expected, 2e-6 if dtype == "float32" else 2**-6)  # bfloat16 rounds at 2**-9


def test_a_mogrifier_drops_from_its_state_before_the_gating(rng):
    """With the gradient of a plain scan, also where texts start and pads stand."""
    cell = recurrent.cell("lstm")
    scale = rng.choice([0, 2], (B, H)).astype(np.float32)
    shapes = {"gates": (D + H, 4 * H), "1": (H, D), "2": (D, H), "3": (H, D)}
    kernels = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    bias, x = rng.normal(size=4 * H).astype(np.float32), rng.normal(size=(T, B, D)).astype(np.float32)
    masks = random_masks(rng)
    arguments = x, kernels, bias, random_state(rng, "lstm")
    cotangents = rng.normal(size=(T, B, H)).astype(np.float32), random_state(rng, "lstm")

    def step(kernels_and_bias, x_BD, state):
        kernels, bias = kernels_and_bias
        hidden_BH = state[-1] * scale
        x_BD *= 2 * jax.nn.sigmoid(hidden_BH @ kernels["1"])
        hidden_BH *= 2 * jax.nn.sigmoid(x_BD @ kernels["2"])
        x_BD *= 2 * jax.nn.sigmoid(hidden_BH @ kernels["3"])
        return cell.step(0.0, x_BD @ kernels["gates"][:D] + hidden_BH @ kernels["gates"][D:] + bias, state)

    def by_scan(x, kernels, bias, state):
        return plain_scan(step)((kernels, bias), x, state, *masks)

    def ours(*arguments):
        return recurrent.recur_mogrified(cell, *arguments, scale, *masks)

    assert_close(*values_and_gradients((ours, by_scan), arguments, cotangents))


# --- PyTorch


@pytest.mark.parametrize("kind", ["rnn", "relu", "lstm", "gru"])
def test_stack_and_gradients_equal_torch(rng, kind):
    torch = pytest.importorskip("torch")
    (name, activation, _), _, num_states = CELLS[kind]
    options = {"nonlinearity": activation} if activation else {}
    theirs = getattr(torch.nn, name.upper())(D, H, num_layers=2, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():  # small enough that no step amplifies the error of XLA's tanh, 2e-7
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.3, tuple(parameter.shape)).astype(np.float32)))  # as ours start

    def ours_of(array, i):
        """Torch's layer i, parameters or gradients, under our names; `bias_ih` and `bias_hh` stay apart."""
        return {
            part: array(getattr(theirs, f"{part}_l{i}")).astype(np.float32)
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }

    params = {}
    for i in range(2):
        own = ours_of(lambda p: p.detach().numpy(), i)
        bias = own["bias_ih"] + own["bias_hh"]  # one bias does where torch has two; only the GRU's candidate needs both
        params[f"layer_{i}"] = {"input_kernel": own["weight_ih"].T, "recurrent_kernel": own["weight_hh"].T, "bias": bias}
        if kind == "gru":
            params[f"layer_{i}"]["bias"] = np.concatenate([bias[: 2 * H], own["bias_ih"][2 * H :]])
            params[f"layer_{i}"]["recurrent_bias"] = own["bias_hh"][2 * H :]

    x = rng.normal(size=(B, T, D)).astype(np.float32)
    carry = {f"layer_{i}": random_state(rng, kind) for i in range(2)}
    d_hidden = rng.normal(size=(B, T, H)).astype(np.float32)
    d_carry = {f"layer_{i}": random_state(rng, kind) for i in range(2)}

    # torch has (h, c), we (c, h); one array over layers against a tuple for each layer
    def to_torch(carry):
        arrays = [
            torch.from_numpy(np.stack([carry[f"layer_{i}"][s] for i in range(2)]).astype(float))
            for s in reversed(range(num_states))
        ]
        return tuple(arrays) if num_states == 2 else arrays[0]

    def from_torch(arrays):
        arrays = [a.detach().numpy() for a in (arrays if num_states == 2 else (arrays,))]
        return {f"layer_{i}": tuple(a[i] for a in reversed(arrays)) for i in range(2)}

    x_torch, first = torch.from_numpy(x.astype(float)).requires_grad_(), to_torch(carry)
    for array in first if num_states == 2 else (first,):
        array.requires_grad_()
    hidden_torch, after_torch = theirs(x_torch, first)
    outputs = [hidden_torch, *(after_torch if num_states == 2 else (after_torch,))]
    d_after = to_torch(d_carry)
    torch.autograd.backward(outputs, [torch.from_numpy(d_hidden.astype(float)), *(d_after if num_states == 2 else (d_after,))])

    stack = RecurrentStack(name, (H, H), ZEROS, ZEROS, activation)

    @jax.jit
    def run(params, x, carry, cotangents):
        result, backward = jax.vjp(lambda *given: stack.apply({"params": given[0]}, *given[1:]), params, x, carry)
        return result, backward(cotangents)

    (hidden, after), (d_params, d_x, d_first) = run(params, x, carry, (d_hidden, d_carry))
    assert_close((hidden, after), (hidden_torch.detach().numpy(), from_torch(after_torch)))
    grad_first = tuple(a.grad for a in first) if num_states == 2 else first.grad
    assert_close((d_x, d_first), (x_torch.grad.numpy(), from_torch(grad_first)))
    for i in range(2):
        own = ours_of(lambda p: p.grad.numpy(), i)
        want = {"input_kernel": own["weight_ih"].T, "recurrent_kernel": own["weight_hh"].T, "bias": own["bias_ih"]}
        if kind == "gru":
            want["recurrent_bias"] = own["bias_hh"][2 * H :]
        assert_close(d_params[f"layer_{i}"], want)


# --- the stack


WIDTHS = (6, 4, 5)  # all different, and different from D


@functools.cache
def stack_of(kind):
    """A stack with a width for each layer, its parameters, and its forward pass compiled per shape of tokens."""
    name, *variant = CELLS[kind][0]
    stack = RecurrentStack(name, WIDTHS, ZEROS, ZEROS, *variant, **MOGRIFIERS.get(kind, {}))
    rng = np.random.default_rng(3)
    params = {
        f"layer_{i}": random_params(rng, kind, before, width)
        for i, (before, width) in enumerate(zip((D, *WIDTHS), WIDTHS, strict=False))
    }
    run = jax.jit(lambda x_BTD, carry, segments_BT: stack.apply({"params": params}, x_BTD, carry, segments_BT=segments_BT))
    return stack, params, run


def random_carry(rng, kind, rows=B):
    return {f"layer_{i}": random_state(rng, kind, rows, width) for i, width in enumerate(WIDTHS)}


STACKS = ["relu", "lstm", "gru", "low-rank mogrifier"]


@pytest.mark.parametrize("kind", STACKS)
def test_layers_of_unequal_width_are_the_layers_one_after_the_other(rng, kind):
    stack, params, run = stack_of(kind)
    x, carry = rng.normal(size=(B, 12, D)).astype(np.float32), random_carry(rng, kind)
    hidden, after = run(x, carry, None)
    want, want_after = x, {}
    for i in range(len(WIDTHS)):
        want, want_after[f"layer_{i}"], _ = reference(kind, params[f"layer_{i}"], want, carry[f"layer_{i}"])
    assert_close((hidden, after), (want, want_after))
    empty = stack.initial_carry(B, None)
    assert jax.tree.map(np.shape, empty) == jax.tree.map(np.shape, after)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(empty))


@pytest.mark.parametrize("kind", STACKS)
def test_any_cut_of_a_text_equals_all_at_once(rng, kind):
    """Segments of 1, 3 and 4 tokens, and step by step. Only the order of float32 sums inside a matmul may differ, hence 1e-5."""
    _, _, run = stack_of(kind)
    x, carry = rng.normal(size=(B, 12, D)).astype(np.float32), random_carry(rng, kind)
    hidden, after = run(x, carry, None)
    for lengths in ([1, 3, 4, 1, 3], [1] * 12):
        parts, state, start = [], carry, 0
        for length in lengths:
            part, state = run(x[:, start : start + length], state, None)
            parts.append(part)
            start += length
        np.testing.assert_allclose(np.concatenate(parts, axis=1), hidden, rtol=0, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state, after)


def test_no_carry_means_empty_and_returns_none(rng):
    stack, _, run = stack_of("lstm")
    x = rng.normal(size=(B, 12, D)).astype(np.float32)
    hidden, after = run(x, None, None)
    assert after is None
    np.testing.assert_array_equal(hidden, run(x, stack.initial_carry(B, None), None)[0])


@pytest.mark.parametrize("kind", STACKS)
def test_padding_changes_nothing(rng, kind):
    """Padding before, between and after: the carry as if it were not there, and what it holds cannot matter at all."""
    _, _, run = stack_of(kind)
    segments = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0], [1] * 12, [0] * 12], np.int32)
    x, carry = rng.normal(size=(B, 12, D)).astype(np.float32), random_carry(rng, kind)
    other = np.where(segments[..., None] > 0, x, rng.normal(0, 1e3, x.shape).astype(np.float32))
    hidden, after = run(x, carry, segments)
    hidden_other, after_other = run(other, carry, segments)
    np.testing.assert_array_equal(np.asarray(hidden)[segments > 0], np.asarray(hidden_other)[segments > 0])
    jax.tree.map(np.testing.assert_array_equal, after, after_other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), after, carry)  # nothing but padding

    step, state = [], carry
    for t in np.flatnonzero(segments[0]):
        part, state = run(x[:, t : t + 1], state, None)
        step.append(part[0, 0])
    np.testing.assert_allclose(np.asarray(hidden)[0, segments[0] > 0], step, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-5), after, state)


@pytest.mark.parametrize("kind", STACKS)
def test_packed_documents_equal_each_document_alone(rng, kind):
    _, params, run = stack_of(kind)
    segments = np.array([[1, 1, 2, 2, 2, 0, 3, 3, 3, 3, 0, 0], [5] * 4 + [2] * 8, [0, 7, 7, 0, 7, 9, 0, 9, 0, 0, 9, 4]], np.int32)
    x, carry = rng.normal(size=(B, 12, D)).astype(np.float32), random_carry(rng, kind)
    hidden, after = (jax.tree.map(np.asarray, tree) for tree in run(x, carry, segments))
    for row in range(B):
        for document in dict.fromkeys(segments[row][segments[row] > 0]):
            where = segments[row] == document
            alone, state = x[row, where][None], {}
            for i, width in enumerate(WIDTHS):
                first = tuple(s[row : row + 1] for s in carry[f"layer_{i}"])
                if document != segments[row][segments[row] > 0][0]:  # what was carried in belongs to the first document
                    first = tuple(np.zeros((1, width)) for _ in first)
                alone, state[f"layer_{i}"], _ = reference(kind, params[f"layer_{i}"], alone, first)
            assert_close(hidden[row, where], alone[0])
        assert_close(jax.tree.map(lambda s, row=row: s[row : row + 1], after), state)


# --- dropout


RATES = {
    "embedding_dropout_rate": 0.4,
    "dropout_rate": 0.4,
    "output_dropout_rate": 0.4,
    "weight_drop_rate": 0.3,
    "state_dropout_rate": 0.3,
}


@functools.cache
def dropped_stack(variational):
    """x [B, T, D], rows -> hidden of a two-layer LSTM with every dropout on; gradients of a sum of it to x and parameters."""
    stack = RecurrentStack("lstm", WIDTHS[:2], ZEROS, ZEROS, variational=variational, **RATES)
    params = {name: layer for name, layer in stack_of("lstm")[1].items() if name != "layer_2"}

    @jax.jit
    def run(x, rows_B):
        def total(x, params):
            rngs = {"dropout": jax.random.key(5)}
            hidden, _ = stack.apply({"params": params}, x, rows_B=rows_B, train=True, rngs=rngs)
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.grad(total, argnums=(0, 1), has_aux=True)(x, params)

    return run


@pytest.fixture(params=[False, True], ids=["each step", "variational"], scope="module")
def dropped(request):
    """Sixteen rows at once, and each of the first eight alone."""
    x = np.random.default_rng(1).normal(size=(16, 12, D)).astype(np.float32)
    run = dropped_stack(request.param)
    alone = [run(x[row : row + 1], np.array([row])) for row in range(8)]
    return request.param, *jax.tree.map(np.asarray, (run(x, np.arange(16)), alone))


def test_dropout_masks_over_time_and_rows(dropped):
    """What enters and leaves the stack: where the gradient to the input, or the hidden state, is exactly zero."""
    variational, ((d_x, _), hidden), _ = dropped
    for kept in (d_x != 0, hidden != 0):
        independent = kept[:, 0] if variational else kept
        assert abs(kept.mean() - 0.6) < 5 * (0.6 * 0.4 / independent.size) ** 0.5
        assert len(np.unique(kept, axis=0)) > 5  # rows have masks of their own
        constant = np.all(kept == kept[:, :1], axis=(1, 2))
        assert constant.all() if variational else not constant.any()
    assert not np.array_equal((d_x != 0)[..., :4], hidden != 0)


def test_dropout_between_layers_is_constant_over_time_where_variational(dropped):
    """With one row, an input of the second layer that is dropped at every step leaves a row of its matrix without gradient."""
    variational, _, alone = dropped
    dropped_RH = np.stack([np.all(d_params["layer_1"]["input_kernel"] == 0, axis=1) for (_, d_params), _ in alone])
    assert abs(dropped_RH.mean() - 0.4) < 5 * (0.4 * 0.6 / dropped_RH.size) ** 0.5 if variational else not dropped_RH.any()
    assert not variational or len(np.unique(dropped_RH, axis=0)) > 3


def test_weight_drop_drops_entries_for_all_rows_and_steps(dropped):
    """An entry that is dropped has exactly no gradient, which 16 rows and 12 steps with masks of their own would never give."""
    _, ((_, d_params), _), alone = dropped
    zero = np.concatenate([np.ravel(layer["recurrent_kernel"] == 0) for layer in d_params.values()])
    assert abs(zero.mean() - 0.3) < 5 * (0.3 * 0.7 / zero.size) ** 0.5
    assert np.all(d_params["layer_0"]["input_kernel"] != 0) and np.all(d_params["layer_0"]["bias"] != 0)
    for (_, d_alone), _ in alone:  # the mask is not keyed by rows: what is dropped for all is dropped for each
        assert np.all((d_alone["layer_0"]["recurrent_kernel"] == 0) >= (d_params["layer_0"]["recurrent_kernel"] == 0))


def test_dropout_depends_on_the_global_row_only(dropped):
    _, ((d_x, _), hidden), alone = dropped
    for row, ((d_x_alone, _), hidden_alone) in enumerate(alone):
        np.testing.assert_array_equal(hidden_alone[0] == 0, hidden[row] == 0)
        # Kept values come from matmuls with fewer rows, which may add in another order.
        np.testing.assert_allclose(hidden_alone[0], hidden[row], rtol=0, atol=1e-6)
        np.testing.assert_allclose(d_x_alone[0], d_x[row], rtol=0, atol=1e-5)


def test_weight_drop_scales_what_it_keeps():
    """One-hot states make the recurrent matrix itself visible."""
    kernel = np.random.default_rng(0).uniform(1, 2, (20, 20)).astype(np.float32)
    params = {"input_kernel": np.zeros((1, 20), np.float32), "recurrent_kernel": kernel, "bias": np.zeros(20, np.float32)}
    layer = RecurrentLayer("rnn", 20, ZEROS, ZEROS, "relu", weight_drop_rate=0.25)
    rngs = {"dropout": jax.random.key(1)}
    hidden, _ = layer.apply({"params": params}, jnp.zeros((1, 20, 1)), (jnp.eye(20),), None, None, True, rngs=rngs)
    kept = np.asarray(hidden[0]) != 0
    np.testing.assert_allclose(hidden[0], np.where(kept, kernel / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / 400) ** 0.5


def test_state_dropout_has_one_mask_a_row_for_all_steps():
    """States that are handed on as they are: after t steps each entry is 0 or (1 / 0.75)^t, by its global row."""
    params = {
        "input_kernel": np.zeros((1, 20), np.float32),
        "recurrent_kernel": np.eye(20, dtype=np.float32),
        "bias": np.zeros(20),
    }
    layer = RecurrentLayer("rnn", 20, ZEROS, ZEROS, "relu", state_dropout_rate=0.25)

    def run(rows_B):
        state, rngs = (jnp.ones((len(rows_B), 20)),), {"dropout": jax.random.key(1)}
        x_TBD = jnp.zeros((4, len(rows_B), 1))
        return np.asarray(layer.apply({"params": params}, x_TBD, state, None, None, True, rows_B, rngs=rngs)[0])

    hidden_TBH = run(np.arange(30))
    kept_BH = hidden_TBH[0] != 0
    for t, hidden_BH in enumerate(hidden_TBH, 1):
        np.testing.assert_allclose(hidden_BH, np.where(kept_BH, 0.75**-t, 0), rtol=1e-6)
    assert abs(kept_BH.mean() - 0.75) < 5 * (0.25 * 0.75 / kept_BH.size) ** 0.5
    assert len(np.unique(kept_BH, axis=0)) > 25
    np.testing.assert_array_equal(run(np.array([7]))[:, 0], hidden_TBH[:, 7])


def test_with_skip_connections_the_output_is_the_sum_of_the_layers(rng):
    """Each layer still reads the one before it alone."""
    x, names = rng.normal(size=(B, 12, D)).astype(np.float32), ("layer_0", "layer_1", "layer_2")
    params = {name: random_params(rng, "lstm", D if name == "layer_0" else H) for name in names}
    carry = {name: random_state(rng, "lstm") for name in names}
    stack = RecurrentStack("lstm", (H, H, H), ZEROS, ZEROS, input_gate="free", skip_connections=True)
    hidden, after = stack.apply({"params": params}, x, carry)
    layer, total, want_after = x, 0, {}
    for name in names:
        layer, want_after[name], _ = reference("lstm", params[name], layer, carry[name])
        total = total + layer
    assert_close((hidden, after), (total, want_after))


def test_a_projection_follows_the_last_layer(rng):
    x, (_, params, run) = rng.normal(size=(B, 12, D)).astype(np.float32), stack_of("lstm")
    kernel_HD = rng.normal(size=(WIDTHS[-1], D)).astype(np.float32)
    stack = RecurrentStack("lstm", WIDTHS, ZEROS, ZEROS, projected_dim=D)
    hidden, _ = stack.apply({"params": {**params, "projection": {"kernel": kernel_HD}}}, x)
    np.testing.assert_allclose(hidden, run(x, None, None)[0] @ kernel_HD, rtol=0, atol=2e-6)


def test_the_last_dropout_comes_before_a_projection(rng):
    """And penalties of activations see what the layer made, not what was projected."""
    x, params = rng.normal(size=(B, 5, D)).astype(np.float32), stack_of("lstm")[1]
    kernel_HD = rng.normal(size=(WIDTHS[-1], D)).astype(np.float32)
    stack = RecurrentStack("lstm", WIDTHS, ZEROS, ZEROS, projected_dim=D, output_dropout_rate=0.5)
    variables, rngs = {"params": {**params, "projection": {"kernel": kernel_HD}}}, {"dropout": jax.random.key(1)}
    rows_B = np.arange(B, dtype=np.int32)
    (hidden, _), sown = stack.apply(variables, x, rows_B=rows_B, train=True, rngs=rngs, mutable=["intermediates"])
    last, dropped = (sown["intermediates"][name][0] for name in ("last_hidden_BTH", "dropped_hidden_BTH"))
    assert last.shape == dropped.shape == (B, 5, WIDTHS[-1]) and np.any(dropped == 0) and np.all(last != 0)
    np.testing.assert_allclose(hidden, dropped @ kernel_HD, rtol=0, atol=2e-6)


def test_dropout_is_off_outside_training(rng):
    x = rng.normal(size=(B, 12, D)).astype(np.float32)
    _, params, run = stack_of("lstm")
    stack = RecurrentStack("lstm", WIDTHS, ZEROS, ZEROS, variational=True, **RATES)
    hidden, _ = jax.jit(lambda x: stack.apply({"params": params}, x, train=False))(x)
    np.testing.assert_array_equal(hidden, run(x, None, None)[0])
