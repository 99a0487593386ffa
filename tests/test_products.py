"""Products with a matrix: in parts and whole against NumPy, and which are made in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.products import Dense, by_parts, times

RNG = np.random.default_rng(0)
ONE_ROW = [(1, 512), (1, 1, 512), (512,)]


def factors(shape, width=384):
    return RNG.standard_normal(shape, np.float32), RNG.standard_normal((shape[-1], width), np.float32)


@pytest.mark.parametrize("shape", [*ONE_ROW, (2, 512), (3, 1, 512), (1, 511), (1, 64)])
def test_a_product_and_its_gradients_are_those_of_numpy(shape):
    x, matrix = factors(shape)
    out, backward = jax.vjp(jax.jit(times), x, matrix)
    cotangent = RNG.standard_normal(out.shape, np.float32)
    exact_x, exact_matrix, exact_cotangent = (a.astype(np.float64) for a in (x, matrix, cotangent))
    rows_x, rows_cotangent = exact_x.reshape(-1, shape[-1]), exact_cotangent.reshape(-1, matrix.shape[1])
    found = [out, *backward(jnp.asarray(cotangent))]
    want = [exact_x @ exact_matrix, exact_cotangent @ exact_matrix.T, rows_x.T @ rows_cotangent]
    for one, exact in zip(found, want, strict=True):
        assert one.shape == exact.shape
        np.testing.assert_allclose(one, exact, rtol=0, atol=max(matrix.shape) * np.finfo(np.float32).eps * np.abs(exact).max())


@pytest.mark.parametrize("shape", ONE_ROW)
def test_one_row_is_made_in_parts(shape):
    x, matrix = factors(shape)
    assert by_parts(x, matrix) and "[2,256,384]" in str(jax.make_jaxpr(times)(x, matrix))
    assert "[2,256,384]" not in str(jax.make_jaxpr(functools.partial(jax.vjp, times))(x, matrix))  # where a gradient is needed


@pytest.mark.parametrize(
    "shape, width, dtype",
    [
        ((2, 512), 384, "float32"),
        ((2, 1, 512), 384, "float32"),
        ((1, 511), 384, "float32"),
        ((1, 512), 127, "float32"),
        ((1, 512), 384, "bfloat16"),
    ],
)
def test_more_rows_an_odd_sum_a_small_matrix_and_half_precision_are_made_whole(shape, width, dtype):
    x, matrix = (factor.astype(dtype) for factor in factors(shape, width))
    assert not by_parts(x, matrix) and f"[2,{shape[-1] // 2},{width}]" not in str(jax.make_jaxpr(times)(x, matrix))
    assert times(x, matrix).dtype == dtype


def test_another_device_makes_them_whole(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not by_parts(*factors((1, 512)))


def test_a_dense_layer_multiplies_so_too():
    x = factors((1, 1, 512))[0]
    layer = Dense(384)
    params = layer.init(jax.random.key(0), x)
    assert "[2,256,384]" in str(jax.make_jaxpr(layer.apply)(params, x))
    want = x @ np.asarray(params["params"]["kernel"], np.float64) + params["params"]["bias"]
    np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)
