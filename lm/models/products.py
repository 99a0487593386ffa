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
    """Whether `times` makes the product in parts: of one row, in float32, on a CPU, with a matrix that is not small.

    Args:
      x: [..., D].
      matrix: [D, F], or [F, D] with contracted 1.
      contracted: the matrix's axis that is summed over.
    """
    one_row = x.size == x.shape[-1] and x.dtype == matrix.dtype == jnp.float32 and jax.default_backend() == "cpu"
    return one_row and matrix.ndim == 2 and matrix.size >= _SMALLEST and matrix.shape[contracted] % _PARTS == 0


def dot_general(x: Array, matrix: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None):
    """`jax.lax.dot_general`, as `nn.Dense` calls it, of x [..., D] and a matrix [D, F]: [..., F], in parts the same to rounding.

    Of one row each number of the matrix is read for two operations, so what counts is how fast memory is read. XLA's CPU backend
    leaves that to one thread unless the matrix has millions of numbers; the parts of a sum over D it gives to several. Where a
    gradient is needed it is made whole: a recurrence that trains on one row is slower in parts.
    """
    if dimension_numbers == _dimensions(x) and by_parts(x, matrix):
        return _in_parts(x, matrix, precision, preferred_element_type)
    return jax.lax.dot_general(x, matrix, dimension_numbers, precision, preferred_element_type)


def _dimensions(x):
    return ((x.ndim - 1,), (0,)), ((), ())


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _in_parts(x, matrix, *options):
    x_P1D, matrix_PDF = x.reshape(_PARTS, 1, -1), matrix.reshape(_PARTS, -1, matrix.shape[1])
    products_P1F = jax.lax.dot_general(x_P1D, matrix_PDF, (((2,), (1,)), ((0,), (0,))), *options)
    return products_P1F.sum(axis=0).reshape(*x.shape[:-1], -1)


@_in_parts.defjvp
def _in_parts_jvp(precision, preferred_element_type, primals, tangents):
    def whole(x, matrix):
        return jax.lax.dot_general(x, matrix, _dimensions(x), precision, preferred_element_type)

    return jax.jvp(whole, primals, tangents)


def times(x: Array, matrix: Array, **options: Any) -> Array:
    """x @ matrix, [..., F], of x [..., D] and a matrix [D, F]; options and parts as of `dot_general`."""
    return dot_general(x, matrix, _dimensions(x), **options)


# What is multiplied by a matrix of its own in a model: as nn.Dense.
Dense = functools.partial(nn.Dense, dot_general=dot_general)
