"""Locks between programs, which the kernel releases when their owner ends, in whatever way."""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator

from tff_optim.resident import forks


@contextlib.contextmanager
def locked(path: str) -> Iterator[bool]:
    """Holds the lock of a file, which is created if missing.

    Args:
      path: The file. While it is locked, it names the owner.

    Yields:
      True; or False, after a warning, if the file system has no locks.

    Raises:
      BlockingIOError: If another program, or another part of this one, has it; `strerror` says which.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    forks.keep_here(fd)
    mine = False
    try:
        mine = _take(fd, path)
        yield mine
    finally:
        if mine and forks.is_kept(fd):
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child just forked may still have it open
        forks.close(fd)


def _take(fd: int, path: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 200, 0).decode(errors="replace") or "Another process"
        raise BlockingIOError(errno.EWOULDBLOCK, owner) from None
    except OSError as error:
        warnings.warn(
            f"{os.path.dirname(path)} is on a file system without locks ({error.strerror}): make "
            "sure that no other run writes there.",
            stacklevel=2,
        )
        return False
    with contextlib.suppress(OSError):  # the disk may be full, and the name is for messages only
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"Process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return True
