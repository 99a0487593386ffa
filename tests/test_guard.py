"""The guards of a job: whom they take for lost, and what they say of a child that nobody foresaw to end."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from launch import guard
from launch.guard import Peers


@pytest.fixture
def three(tmp_path):
    """A job of three processes on this host; all have given a sign of life, and the first has read them."""
    peers = [Peers(tmp_path, index, 3, "job") for index in range(3)]
    for one in peers:
        one.beat()
    peers[0].look()
    return peers


def looks(peers, number, alive):
    """The first looks so often, each time after those named have given a sign of life."""
    for _ in range(number):
        for index in alive:
            peers[index].beat()
        peers[0].look()


def test_who_gives_signs_of_life_is_not_lost(three):
    looks(three, 3 * guard._SILENT, alive=[1, 2])
    assert three[0].failed() is None


def test_who_gives_none_for_long_is_lost(three):
    looks(three, guard._SILENT - 1, alive=[1])
    assert three[0].failed() is None
    looks(three, 1, alive=[1])
    what, code = three[0].failed()
    assert (
        code == 1 and what.startswith("process 2 of 3 (host ") and what.endswith("is lost: it has given no sign of life for 20 s")
    )


def test_a_pause_is_forgiven(three):
    looks(three, guard._SILENT - 1, alive=[1])
    looks(three, guard._SILENT - 1, alive=[2])
    assert three[0].failed() is None


def test_a_sign_that_cannot_be_written_is_a_silence(three, tmp_path):
    """As a full disk makes one; it ends nobody at once."""
    (tmp_path / "job" / "1.json").unlink()
    (tmp_path / "job" / "1.json").mkdir()
    looks(three, guard._SILENT - 1, alive=[1, 2])
    assert three[0].failed() is None
    (tmp_path / "job" / "1.json").rmdir()
    looks(three, guard._SILENT, alive=[1, 2])
    assert three[0].failed() is None


def test_signs_that_another_job_has_removed_come_again(three, tmp_path):
    """Before it was refused, since this one holds the folder."""
    Peers(tmp_path, 0, 3, "refused")
    looks(three, 2 * guard._SILENT, alive=[1, 2])
    assert three[0].failed() is None


def test_who_never_gave_one_may_look_elsewhere(tmp_path):
    """Another workdir, which this process does not see."""
    peers = Peers(tmp_path, 0, 2, "job")
    for _ in range(guard._SILENT):
        assert peers.failed() is None
        peers.look()
    assert peers.failed() == ("process 1 of 2 is lost: it has given no sign of life for 20 s, or has another --workdir", 1)


@pytest.mark.parametrize(
    "ended, told",
    [(0, None), (143, ("ended with exit code 143", 143)), (1, ("ended with exit code 1", 1)), (-9, ("was killed by SIGKILL", 1))],
)
def test_who_has_ended_says_how(three, ended, told):
    three[2].beat(ended)
    looks(three, 2 * guard._SILENT, alive=[1])  # whoever has ended is silent, and not lost for that
    found = three[0].failed()
    assert (found is None) == (told is None)
    if told:
        assert found[0].startswith("process 2 of 3 (host ") and (found[0].endswith(told[0]), found[1]) == (True, told[1])


def test_a_new_job_forgets_the_old(tmp_path):
    Peers(tmp_path, 1, 2, "old").beat(1)
    new = Peers(tmp_path, 0, 2, "new")
    new.look()
    assert new.failed() is None and [path.name for path in tmp_path.iterdir()] == ["new"]


_VERB = """
import os, sys, time
from jax.errors import JaxRuntimeError
from launch import command, guard
from lm import processes
from lm.errors import Preempted, UserError

guard._BEAT = 0.05
processes.join = lambda *meeting: {meet}
workdir = sys.argv.pop()

def main(overrides):
    guard.join(workdir, None, None, None)
    {last}

command.run(main, "A verb.")
"""


@pytest.mark.parametrize(
    "last, code, sentences",
    [
        ("print('done')", 0, []),
        ("raise JaxRuntimeError('RESOURCE_EXHAUSTED: no memory')", 1, ["killed by SIGABRT", "RESOURCE_EXHAUSTED: no memory"]),
        ("raise KeyError('a fault')", 1, ["KeyError: 'a fault'"]),
        ("os.kill(os.getpid(), 9)", 1, ["killed by SIGKILL"]),
        ("os.kill(os.getppid(), 15), time.sleep(60)", 1, ["killed by SIGTERM"]),
        ("raise UserError('one sentence')", 1, ["one sentence"]),
        ("raise Preempted(7)", 143, ["stopped by SIGTERM after step 7"]),
    ],
)
def test_a_guard_ends_as_its_child(tmp_path, last, code, sentences):
    done = called(tmp_path, "None", last)  # a job of one process
    assert done.returncode == code, done.stderr
    assert all(sentence in done.stderr for sentence in sentences)
    assert "\\n" not in done.stderr  # an account of several lines is told in lines


def test_processes_that_do_not_meet(tmp_path):
    """JAX aborts then."""
    done = called(tmp_path, "os.abort()", "")
    assert done.returncode == 1
    assert done.stderr.startswith("-c: the processes of this job did not meet; ") and done.stderr.count("\n") == 1


def called(tmp_path, meet, last):
    script = _VERB.replace("{meet}", meet).replace("{last}", last)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert list((tmp_path / ".processes").glob("*.log")) == []
    return done
