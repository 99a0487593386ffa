"""Batches made ahead of their use, in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


def prefetch(make: Callable[[int], Any], first: int, last: int, depth: int) -> Iterator[Any]:
    """Yields `make(step)` for first <= step < last, made ahead in a thread.

    Args:
      make: step -> batch, already on the device.
      depth: batches to hold ready; 0 makes each when it is asked for.
    """
    if depth == 0:
        yield from map(make, range(first, last))
        return
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for step in range(first, last):
                if stop.is_set():
                    return
                put((make(step), None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
