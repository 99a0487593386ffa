"""Workers: each side of a comparison in a process of its own, so that neither shares the other's threads, memory or settings."""

import contextlib
import functools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lm.errors import UserError


class Worker:
    """A process that holds one object and calls its methods when told to; idle in between.

    Usable as a context manager, which ends the process.
    """

    def __init__(self, make: Callable[..., Any], *args, environment: Mapping[str, str] | None = None, **options):
        """Starts the process and makes the object there.

        Args:
          make: importable; called with the arguments and options; its result has a method `close`.
          environment: variables that the process is started with, beside those of this one.

        Raises:
          UserError: as `make` raises it there.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, functools.partial(make, *args, **options)), daemon=True)
        with changed_environment(environment or {}):
            self._process.start()
        there.close()
        try:
            self._receive()
        except BaseException:
            self._process.join()
            raise

    def call(self, method: str, *args) -> Any:
        """What the object's method returns.

        Raises:
          UserError: as the method raises it; or the process died.
        """
        self._connection.send((method, args))
        return self._receive()

    def _receive(self):
        try:
            value, error = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            if code == -signal.SIGKILL:
                raise UserError(
                    "a process that measures was killed, as happens where memory runs out; make config.data.batch_size or the "
                    "model smaller"
                ) from None
            raise UserError(f"a process that measures ended with exit code {code}; what it said stands above") from None
        if error is not None:
            raise error
        return value

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc_info) -> None:
        self._connection.close()  # ends the loop there
        self._process.join()


def _serve(connection, make):
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the other side has closed, or both were interrupted
        try:
            made = make()
        except Exception as error:
            connection.send((None, _told(error)))
            return
        with contextlib.closing(made):
            connection.send((None, None))
            while True:
                method, arguments = connection.recv()
                try:
                    connection.send((getattr(made, method)(*arguments), None))
                except Exception as error:
                    connection.send((None, _told(error)))


def _told(error):
    """The error to hand on: in one sentence where a device's memory ran out; what no one foresaw is shown with its place here."""
    if "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError":
        return UserError("the device's memory ran out; make config.data.batch_size or the model smaller")
    if isinstance(error, UserError):
        return error
    traceback.print_exception(error)
    return RuntimeError(f"{type(error).__name__}: {error}")  # not itself: what cannot be pickled would end the process


@contextlib.contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment, and afterwards puts back what was there."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
