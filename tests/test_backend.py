"""The start of JAX's backend: what glibc is told before XLA's threads are there, and what it gets back after a state is made."""

import ctypes
import pathlib
import subprocess
import sys

import pytest

_FAULTS = """
import ctypes, resource, sys
from lm.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (4 << 20, 20 << 20):
        for _ in range(20):
            buffer = libc.malloc(size)
            ctypes.memset(buffer, 1, size)
            libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults()
print(faults())
"""
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

_MAKES = """
import jax, jax.numpy as jnp
from lm.backend import start
from lm.parallel import Placement

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def make():
    square = jax.random.uniform(jax.random.key(0), (8192, 4096))
    return square @ square[0]

start()
placement = Placement(1)
jax.block_until_ready(placement.make_state(lambda: jnp.ones(8) + 1))
before = resident()
made = jax.block_until_ready(placement.make_state(make))
print(resident() - before)
"""


pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")


def test_big_buffers_that_are_freed_are_kept():
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], check=True, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True
    )
    assert int(done.stdout) < 1_000  # mapped anew each time they cost 120,000


def test_all_threads_allocate_from_one_arena(tmp_path):
    # Another arena would return a step's buffers to the kernel after each step, and take them anew for the next.
    subprocess.run([sys.executable, "-c", _REPORT, tmp_path / "arenas.xml"], check=True, cwd=pathlib.Path(__file__).parents[1])
    assert (tmp_path / "arenas.xml").read_text().count("<heap nr=") == 1


def test_what_a_state_is_made_in_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", _MAKES], check=True, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True
    )
    assert int(done.stdout) < 8192 * 4096 * 4 / 1024 / 2  # KiB: half of the matrix that the state is a product of
