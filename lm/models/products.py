"""Products with a matrix, which a CPU makes in parts where only one row meets it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array

_PARTS = 2  # more are not faster, also because XLA gives those of small matrices to one thread again
_SMALLEST = 1 << 16  # float32 numbers, 256 KiB, which a core's own cache holds


def by_parts(x: Array, matrix: Array, contracted: int = 0) -> bool:
    """Whether `times` makes the product in parts: of one row, in float32, on a CPU, with a matrix that is not small."""
    one_row = x.size == x.shape[-1] and x.dtype == matrix.dtype == jnp.float32 and jax.default_backend() == "cpu"
    return one_row and matrix.ndim == 2 and matrix.size >= _SMALLEST and matrix.shape[contracted] % _PARTS == 0


def dot_general(x: Array, matrix: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None):
    """`jax.lax.dot_general` of x [..., D] and a matrix [D, F], as `nn.Dense` calls it; to rounding the same in parts.

    Of one row each number of the matrix is read for two operations, so what counts is how fast memory is read. XLA's CPU backend
    leaves that to one thread unless the matrix has millions of numbers; the parts of a sum over D it gives to several.
    """
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or not by_parts(x, matrix):
        return jax.lax.dot_general(x, matrix, dimension_numbers, **options)
    x_P1D, matrix_PDF = x.reshape(_PARTS, 1, -1), matrix.reshape(_PARTS, -1, matrix.shape[1])
    products_P1F = jax.lax.dot_general(x_P1D, matrix_PDF, (((2,), (1,)), ((0,), (0,))), **options)
    return products_P1F.sum(axis=0).reshape(*x.shape[:-1], -1)


def times(x: Array, matrix: Array, **options: Any) -> Array:
    """x @ matrix, [..., D] by [D, F]; see `dot_general`."""
    return dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), **options)


Dense = functools.partial(nn.Dense, dot_general=dot_general)
