"""The C library's allocator: whether it keeps big buffers that are freed, or returns them to the kernel."""

import ctypes
import sys


def keep_freed_memory() -> bool:
    """Tells glibc to keep big freed buffers instead of returning them to the kernel; True if it took the settings.

    XLA's CPU client allocates a step's buffers anew each step. By default glibc maps and unmaps the big ones, and the page
    faults cost a small model a fifth of its time or more (`python -m launch.benchmark --allocator=system` shows it). All threads
    allocate from one arena, if this comes before their first allocation: the others would unmap a heap as soon as it is empty,
    whatever the threshold.
    """
    trim_threshold, mmap_threshold = -1, -3
    # The second is all that an older glibc takes. Without either the first threshold must stay: set alone, it maps all big ones.
    maps_few = any(_glibc("mallopt", mmap_threshold, size) for size in (1 << 30, 1 << 25))
    return share_one_arena() and maps_few and _glibc("mallopt", trim_threshold, (1 << 31) - 1)


def share_one_arena() -> bool:
    """Tells glibc to allocate for all threads from one arena, as `keep_freed_memory` does; True if it took the setting."""
    arena_max = -8
    return _glibc("mallopt", arena_max, 1)


def give_back_freed_memory() -> None:
    """Tells glibc to return to the kernel what is free, wherever in the heap it lies; elsewhere does nothing."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> bool:
    """Calls a function of glibc; whether it says that it did what was asked: False where there is another C library."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(getattr(ctypes.CDLL(None), function, lambda *_: 0)(*arguments))
