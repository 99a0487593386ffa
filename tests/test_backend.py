"""The start of JAX's backend: what glibc is told before XLA's threads are there."""

import ctypes
import pathlib
import subprocess
import sys

import pytest

_REPORT = """
import ctypes, sys
import jax, jax.numpy as jnp
from lm import backend

backend.start()
step = jax.jit(lambda x: jnp.sin(x @ x).sum())
for _ in range(3):
    jax.block_until_ready(step(jnp.ones((512, 512))))
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")
def test_all_threads_allocate_from_one_arena(tmp_path):
    # Another arena would return a step's buffers to the kernel after each step, and take them anew for the next.
    subprocess.run([sys.executable, "-c", _REPORT, tmp_path / "arenas.xml"], check=True, cwd=pathlib.Path(__file__).parents[1])
    assert (tmp_path / "arenas.xml").read_text().count("<heap nr=") == 1
