"""A guard for each of several processes that train together: it says in one sentence which of them was lost.

JAX ends a process whose job has lost another one with a dump of its stack, or lets it wait. So each process of a job is two:
the guard, which knows nothing of JAX, and its child, which trains. The guards watch each other through files in the workdir.
"""

import collections
import contextlib
import ctypes
import json
import logging
import os
import pathlib
import platform
import secrets
import select
import shutil
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

from lm.errors import UserError
from lm.files import write_atomically

_FOLDER = ".processes"  # in the workdir
_BEAT = 1.0  # seconds between a guard's signs of life, and between its looks at those of the others
_SILENT = 20  # looks without a new sign, and a process is lost
_GRACE = 10  # looks that a child may take to end by itself after another one has

_is_child = False


def join(workdir: str, coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Goes on in a child that has met the other processes; this one becomes its guard, and never returns.

    Args:
      workdir: of the run, the same folder in all processes.
      coordinator_address, num_processes, process_id: None: the scheduler tells JAX.

    Raises:
      UserError: in the child, that they did not meet; in the guard, that a process was lost.
    """
    global _is_child
    folder = pathlib.Path(workdir) / _FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        account = folder / f"{platform.node()}-{os.getpid()}.log"
        account.touch()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror}); give a folder that can be") from None
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _guard(child, reading, folder, account)
    _is_child = True
    _end_with_parent()
    _move_output(account)
    from lm import processes

    processes.join(coordinator_address, num_processes, process_id)
    token = f"{processes.agreed(secrets.randbits(31)):08x}"
    os.write(writing, json.dumps({"index": processes.index(), "number": processes.number(), "token": token}).encode())
    os.close(writing)


def leave(code: int) -> NoReturn:
    """Ends the process; one of many that has failed does not wait for the others, as JAX would."""
    if _is_child and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end_with_parent():
    """On Linux a child that has lost its guard is killed."""
    parent_dies = 1
    getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(parent_dies, signal.SIGKILL)


def _move_output(account):
    """What JAX's C++ prints goes to a file; what Python prints stays where it was."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
    for handler in logging.getLogger("lm").handlers:
        handler.setStream(sys.stderr)
    with account.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.excepthook = _tell_and_leave


def _tell_and_leave(kind, error, trace):
    """An error that nobody foresaw: JAX's own may be the loss of another process, which the guard can tell better."""
    text = "".join(traceback.format_exception(kind, error, trace))
    os.write(2, text.encode())
    if kind.__name__ == "JaxRuntimeError":
        os.kill(os.getpid(), signal.SIGABRT)
    sys.stderr.write(text)
    leave(1)


class Peers:
    """The signs of life of a job's processes: each one's file, which its guard renews."""

    def __init__(self, folder: pathlib.Path, index: int, number: int, token: str):
        """Takes the place of the process `index` of `number`; the folder is the same for all, the token new for each job."""
        self._folder, self._index, self._number = folder / token, index, number
        self._beats, self._silent = 0, collections.Counter()
        self._seen: dict[int, dict[str, Any]] = {other: {} for other in range(number) if other != index}
        self._folder.mkdir(exist_ok=True)
        if index == 0:  # what jobs before this one have left
            for other in folder.iterdir():
                if other.is_dir() and other != self._folder:
                    shutil.rmtree(other, ignore_errors=True)

    def beat(self, ended: int | None = None) -> None:
        """Renews this process's sign of life, or says how it ended; one that cannot be written is a silence like others."""
        self._beats += 1
        sign = {"host": platform.node(), "process": os.getpid(), "beats": self._beats, "ended": ended}
        with contextlib.suppress(UserError):
            write_atomically(self._folder / f"{self._index}.json", json.dumps(sign))

    def look(self) -> None:
        """Reads those of the others."""
        for index, seen in self._seen.items():
            sign = self._read(index) or seen
            self._silent[index] = 0 if sign != seen else self._silent[index] + 1
            self._seen[index] = sign

    def _read(self, index):
        try:
            return json.loads((self._folder / f"{index}.json").read_text())
        except (OSError, ValueError):
            return None

    def failed(self) -> tuple[str, int] | None:
        """A process that ended other than well, or is silent: which, in words, and the exit code for all; None if all is well."""
        for index, sign in self._seen.items():
            name = f"process {index} of {self._number}" + (f" (host {sign['host']})" if sign else "")
            ended = sign.get("ended")
            if ended is not None and ended < 0:
                return f"{name} was killed by {signal.Signals(-ended).name}", 1
            if ended:
                return f"{name} ended with exit code {ended}", ended
            if ended is None and self._silent[index] >= _SILENT:
                elsewhere = "" if sign else ", or has another --workdir"
                return f"{name} is lost: it has given no sign of life for {_SILENT * _BEAT:.0f} s{elsewhere}", 1
        return None


def _guard(child, reading, folder, account) -> NoReturn:
    """Waits for the child to end, and ends it where another process of the job has failed."""

    def terminate(*_):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    ended, peers = None, None
    while peers is None:
        ended, told = _ended(child), _told(reading)
        if told:
            peers = Peers(folder, **told)
        elif ended == -signal.SIGABRT:  # how JAX ends a process that has waited in vain, after five minutes
            account.unlink()
            raise UserError(
                "the processes of this job did not meet; start the same command on every host, and see that each can reach "
                "--coordinator_address, or the first host of the scheduler's job"
            )
        elif ended is not None:
            _leave_as(ended, account)
        else:
            time.sleep(_BEAT / 10)
    failing = waiting = 0  # looks since another process failed, or this one's child was aborted
    while True:
        ended = _ended(child) if ended is None else ended
        aborted = ended == -signal.SIGABRT and waiting < _SILENT + _GRACE  # perhaps since another one is lost
        peers.beat(None if aborted else ended)
        if ended is not None and not aborted:
            _leave_as(ended, account)
        peers.look()
        failed = peers.failed()
        if failed and (aborted or failing >= _GRACE):
            what, code = failed
            if ended is None:
                os.kill(child, signal.SIGKILL)
            account.unlink()  # and no sign of this end, which the others would take for its cause
            if code == 1:
                raise UserError(f"{what}; the same command, also on another number of hosts, goes on from the last checkpoint")
            leave(code)
        failing, waiting = failing + bool(failed), waiting + aborted
        time.sleep(_BEAT)


def _ended(child):
    """The exit code of the child, minus the signal that killed it; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _told(reading):
    """What the child has told of the job, if it has."""
    return json.loads(os.read(reading, 1 << 10) or "null") if select.select([reading], [], [], 0)[0] else None


def _leave_as(ended, account) -> NoReturn:
    """Ends as the child did; where nobody foresaw that, with the end of its own account of it."""
    text = account.read_text(errors="replace")
    account.unlink()
    if ended >= 0:
        leave(ended)
    for line in [line for line in text.splitlines() if line.strip()][-20:]:
        print(line, file=sys.stderr)
    raise UserError(f"this process was killed by {signal.Signals(-ended).name}; the same command goes on")
