"""A scan over time in which the gradient of a matrix is one product over all steps, after the backward scan."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.products import times

Array = jax.Array
Product = Callable[[str, Array], Array]  # name, value -> value @ kernels[name] + shifts[name] at this step, float32
Step = Callable[..., tuple[Any, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_products(
    step: Step,
    recover: Callable[..., Mapping[str, Array]] | None,
    kernels: Mapping[str, Array],
    shifts_T: Mapping[str, Array],
    inputs_T: Any,
    state: Any,
    fixed_T: Any,
    constants: Any,
) -> tuple[Array, Any]:
    """Scans a step that multiplies with the same matrices every time.

    The scan's own derivative would add up a matrix at every step. Here a product's arguments are kept, and its gradients come
    through what is added to it; one matmul over all steps and rows makes the matrix's gradient of both.

    Args:
      step: (product, state, input, fixed, constants) -> state, output; it must use each product once.
      recover: (outputs, first state, fixed, constants) -> the arguments of all products, time first, where that is cheaper than
        to keep them in the scan; None: it is not.
      kernels: matrices [D, G] by name.
      shifts_T: for each matrix what is added to its products, [T, B, G] (a bias, or what is known before the scan).
      inputs_T: further inputs, time first.
      state: before the first step.
      fixed_T, constants: what has no gradient: inputs, time first, and what is the same at all steps.

    Returns:
      The outputs, time first, and the state after the last step.
    """
    return _run(step, False, kernels, shifts_T, inputs_T, state, fixed_T, constants)[0]


def _run(step, keeps, kernels, shifts_T, inputs_T, state, fixed_T, constants):
    """Outputs and state; and, if it keeps them, the arguments of all products, [T, B, D] by name."""

    def one(state, at_t):
        shifts, inputs, fixed = at_t
        arguments = {}

        def product(name, value):
            value = value.astype(kernels[name].dtype)
            if keeps:
                arguments[name] = value
            return times(value, kernels[name]).astype(jnp.float32) + shifts[name].astype(jnp.float32)

        state, output = step(product, state, inputs, fixed, constants)
        return state, (output, arguments)

    state, (outputs_T, arguments_T) = jax.lax.scan(one, state, (shifts_T, inputs_T, fixed_T))
    return (outputs_T, state), arguments_T


def _forward(step, recover, kernels, shifts_T, inputs_T, state, fixed_T, constants):
    def run(shifts_T, inputs_T, state):
        return _run(step, recover is None, kernels, shifts_T, inputs_T, state, fixed_T, constants)

    found, backward, arguments_T = jax.vjp(run, shifts_T, inputs_T, state, has_aux=True)
    if recover is not None:
        arguments_T = recover(found[0], state, fixed_T, constants)
    return found, (backward, arguments_T)


def _backward(step, recover, saved, cotangents):
    del step, recover
    backward, arguments_T = saved
    d_shifts_T, d_inputs_T, d_state = backward(cotangents)

    def d_kernel(name):
        argument_ND, d_product_NG = (x.reshape(-1, x.shape[-1]) for x in (arguments_T[name], d_shifts_T[name]))
        return jnp.einsum("nd,ng->dg", argument_ND, d_product_NG.astype(argument_ND.dtype))

    return {name: d_kernel(name) for name in arguments_T}, d_shifts_T, d_inputs_T, d_state, None, None


scan_products.defvjp(_forward, _backward)
