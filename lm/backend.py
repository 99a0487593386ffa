"""The start of JAX's backend: memory that is kept, compiled programs that are kept, one sentence where a platform is missing."""

import ctypes
import hashlib
import pathlib
import platform
import sys

import jax

from lm.errors import UserError
from lm.files import user_cache


def keep_freed_memory() -> bool:
    """Tells glibc to keep big freed buffers instead of returning them to the kernel; True if it took the settings.

    XLA's CPU client allocates a step's buffers anew each step. By default glibc maps and unmaps the big ones, and the page
    faults cost a small model about half of its time (`python -m launch.benchmark --allocator=system` shows it). All threads
    allocate from one arena: the others would unmap a heap as soon as it is empty, whatever the threshold.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim_threshold, mmap_threshold, arena_max, largest = -1, -3, -8, (1 << 31) - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # not glibc
    settings = {mmap_threshold: 1 << 30, trim_threshold: largest, arena_max: 1}
    return all(mallopt(parameter, value) for parameter, value in settings.items())


def give_back_freed_memory() -> None:
    """Tells glibc to return to the kernel what is free, wherever in the heap it lies; elsewhere does nothing."""
    if sys.platform.startswith("linux"):
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


def start(allocator: str = "tuned", compile_cache: pathlib.Path | None = None) -> None:
    """Starts JAX's backend; on a CPU with allocator "tuned", glibc's thresholds are set first.

    What is compiled is kept, so that a second start, also of an interrupted run, takes seconds less. JAX's own variables go
    before: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

    Args:
      allocator: "tuned" or "system".
      compile_cache: folder for what is compiled; None: in the user's cache.

    Raises:
      UserError: the platform asked for by JAX_PLATFORMS is not there.
    """
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax asserts that some backend came up
        asked, told = jax.config.jax_platforms, str(error).strip().splitlines()
        raise UserError(
            f"JAX cannot start {asked!r}, which JAX_PLATFORMS asks for{f': {told[0]}' if told else ''}; install the extra for it "
            "(pip install -e '.[cuda]' or '.[tpu]') or set JAX_PLATFORMS=cpu"
        ) from None
    if backend == "cpu" and allocator == "tuned":
        keep_freed_memory()
    if compile_cache is not None or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache or user_cache() / "compiled" / _processor_sha256()[:12]))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor_sha256() -> str:
    """Tells processors apart: code for a CPU must not be run by another that shares the user's folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(features)]).encode()).hexdigest()
