"""Signals that ask for an end, and who sees them: the process that started Ray alone, and not amid Ray's start or end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

# What means "stop" here: Ctrl-C, a process manager, the terminal that was closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C or SIGTERM amid Ray's start or end would leave processes behind: they take effect after the block."""
    received: list[int] = []
    signals = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]  # nohup stays nohup
    previous = {signum: signal.signal(signum, lambda signum, frame: received.append(signum)) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """What starts in the block, and what that starts, never sees them: only this process ends Ray, in the right order.

    A process manager may send them to every process of the service at once (systemd, unless KillMode=mixed). Ray itself does
    this with SIGINT alone. HAProxy takes the block away for itself, and on SIGTERM drops its connections.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def process_group_of_its_own() -> Iterator[None]:
    """What starts in the block is in a process group of its own.

    A signal to our whole group (`kill %1`, `timeout`, process managers) would otherwise end HAProxy, and what was accepted
    would be lost. A session's leader cannot change groups; nothing is done.
    """
    ours = os.getpgrp()
    leader = subprocess.Popen(["sleep", "600"], process_group=0)  # a group to go to
    try:
        try:
            os.setpgid(0, leader.pid)
        except PermissionError:
            yield
            return
        try:
            yield
        finally:
            try:
                os.setpgid(0, ours)
            except PermissionError:  # it is gone with its last process
                os.setpgid(0, 0)
    finally:
        leader.kill()
        leader.wait()


@contextlib.contextmanager
def kill_descendants() -> Iterator[None]:
    """What runs below this process at the block's begin and still at its end is killed, whoever is its parent by then."""
    handles = []
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))  # this very process, should the number be given away meanwhile
    try:
        yield
    finally:
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


def _descendants() -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return family - {os.getpid()}
