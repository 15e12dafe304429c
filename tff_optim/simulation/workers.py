"""Ends TFF's own workers with this program, even if it is killed."""

import functools
import glob
import os
import subprocess

from tff_optim.resident import forks

# A shell waits for the pipe at its input to close, which the kernel does when this program ends, in
# whatever way. Another process may have the worker's number by then, but not its start time.
_WATCH = 'read _; [ "$(cut -d" " -f22 "/proc/$1/stat")" = "$2" ] && kill -9 "$1"'

_watched: dict[tuple[int, str], subprocess.Popen] = {}


def watch() -> None:
    """Makes the workers that TFF has started so far end with this program.

    TFF leaves them running if the program is killed. Those of a `ResidentProcess`, which watches them,
    are in sessions of their own. Without `/proc` this does nothing.
    """
    for pid in _children():
        try:
            is_tffs = os.readlink(f"/proc/{pid}/exe").endswith("/worker_binary")
            if not is_tffs or os.getsid(pid) != os.getsid(0):
                continue
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                started = file.read().split()[21]
        except OSError:  # it has ended
            continue
        if (pid, started) not in _watched:
            _watched[pid, started] = subprocess.Popen(
                ["/bin/sh", "-c", _WATCH, "watch", str(pid), started],
                stdin=_pipe(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


@functools.cache
def _pipe() -> int:
    """The reading end of a pipe whose writing end only this program has."""
    reading, writing = os.pipe()
    forks.keep_here(reading)
    forks.keep_here(writing)
    return reading


def _children() -> list[int]:
    found: list[int] = []
    for path in glob.glob("/proc/self/task/*/children"):
        try:
            with open(path, encoding="ascii") as file:
                found += map(int, file.read().split())
        except OSError:  # the thread has ended
            continue
    return found
