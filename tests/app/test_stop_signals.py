from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.stop_signals import STOP_SIGNALS, interrupts_held_back


@pytest.fixture(autouse=True)
def nothing_ignored() -> Iterator[None]:
    """A shell without job control starts what is in its background with SIGINT ignored, and nohup does so with SIGHUP."""
    ignored = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is signal.SIG_IGN]
    for signum in ignored:
        signal.signal(signum, signal.SIG_DFL)
    yield
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_interrupts_take_effect_after_the_block_not_in_it(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    finished = False
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        signal.raise_signal(signum)
        signal.raise_signal(signum)
        finished = True
    assert finished
    assert signal.getsignal(signum) is before
    with interrupts_held_back():
        pass


def test_error_in_the_block_is_not_replaced_by_the_interrupt() -> None:
    with pytest.raises(ZeroDivisionError), interrupts_held_back():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


_BLOCKED = """
import subprocess, sys
from app.stop_signals import stop_signals_blocked
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
echo = [sys.executable, "-c", "print(input())"]
with stop_signals_blocked():
    code = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    inside = subprocess.Popen([sys.executable, "-c", code, *echo], **pipes)
outside = subprocess.Popen(["sleep", "600"], **pipes)
print("ready", flush=True)
sys.stdin.readline()
print(inside.communicate("answer")[0].strip(), inside.returncode, outside.wait())
"""


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_what_started_in_the_block_outlives_a_signal_to_everybody(signum: signal.Signals) -> None:
    """And so does its child; what starts after the block ends by the same signal, and the process itself handles it."""
    code = f"import signal; signal.signal({int(signum)}, lambda *_: None)\n{_BLOCKED}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signum)
    said, _ = process.communicate("\n", timeout=300)
    assert said.split() == ["answer", "0", str(-signum)]
    assert process.returncode == 0


_ORPHANS = """
import subprocess, sys, time
from app.stop_signals import kill_descendants
parent = "import subprocess as s; print(s.Popen(['sleep', '600'], stdout=s.DEVNULL).pid, flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
grandchild = int(child.stdout.readline())
with kill_descendants():
    child.communicate("\\n")
    orphan_runs = subprocess.run(["kill", "-0", str(grandchild)]).returncode == 0
    later = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(grandchild, orphan_runs, later.poll())
later.kill()
"""


def test_what_lost_its_parent_is_killed_too_and_what_came_later_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", _ORPHANS], capture_output=True, text=True, check=True, timeout=300)
    pid, orphan_runs, later = done.stdout.split()
    assert (orphan_runs, later) == ("True", "None")
    give_up = time.monotonic() + 60
    while is_running(int(pid)):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while its file is open
        return False
    return state != "Z"  # nobody may be there to collect it


_GROUPS = """
import json, os, subprocess
from app.stop_signals import process_group_of_its_own
before = os.getpgrp()
with process_group_of_its_own():
    inside = subprocess.Popen(["sleep", "600"])
group = os.getpgid(inside.pid)
inside.kill()
print(json.dumps([before, group, os.getpgrp()]))
"""


@pytest.mark.parametrize("leads", [True, False])
def test_a_signal_to_our_group_does_not_reach_what_was_started_apart(leads: bool) -> None:
    """Both as the leader of a group (a shell's job) and as a member of one (below make)."""
    command = [sys.executable, "-c", _GROUPS]
    if not leads:
        command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(command, process_group=0, capture_output=True, text=True, check=True)
    before, inside, after = json.loads(done.stdout)
    assert before == after
    assert inside != before


def test_a_session_leader_stays_where_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GROUPS], start_new_session=True, capture_output=True, text=True, check=True
    )
    before, inside, after = json.loads(done.stdout)
    assert before == inside == after
