"""The start of JAX's backend: memory that is kept, compiled programs that are kept, one sentence where a platform is missing."""

import hashlib
import pathlib
import platform

import jax

from lm.allocator import keep_freed_memory, share_one_arena
from lm.errors import UserError
from lm.files import user_cache


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
        share_one_arena()  # a thread keeps the arena of its first allocation, and the backend starts its threads at once
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
