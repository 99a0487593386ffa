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
    allocate from one arena, if this comes before their first allocation: the others would unmap a heap as soon as it is empty,
    whatever the threshold.
    """
    trim_threshold, mmap_threshold = -1, -3
    return _share_one_arena() and _glibc("mallopt", trim_threshold, (1 << 31) - 1) and _glibc("mallopt", mmap_threshold, 1 << 30)


def give_back_freed_memory() -> None:
    """Tells glibc to return to the kernel what is free, wherever in the heap it lies; elsewhere does nothing."""
    _glibc("malloc_trim", 0)


def _share_one_arena() -> bool:
    arena_max = -8
    return _glibc("mallopt", arena_max, 1)


def _glibc(function: str, *arguments: int) -> bool:
    """Calls a function of glibc; whether it says that it did what was asked: False where there is another C library."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(getattr(ctypes.CDLL(None), function, lambda *_: 0)(*arguments))


def start(allocator: str = "tuned", compile_cache: pathlib.Path | None = None) -> None:
    """Starts JAX's backend, whose CPU gets one step at a time; allocator "tuned" is one arena that on a CPU keeps what is freed.

    What is compiled is kept, so that a second start, also of an interrupted run, takes seconds less. JAX's own variables go
    before: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

    Args:
      allocator: "tuned" or "system".
      compile_cache: folder for what is compiled; None: in the user's cache.

    Raises:
      UserError: the platform asked for by JAX_PLATFORMS is not there.
    """
    if allocator == "tuned":
        _share_one_arena()  # a thread keeps the arena of its first allocation, and the backend starts its threads at once
    # Of steps that a CPU has been given ahead each would hold its temporary memory; to give them one by one costs nothing seen.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
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
