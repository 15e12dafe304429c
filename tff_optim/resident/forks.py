"""What a forked child of this Python process must not keep, or use."""

import contextlib
import os


class ForkedError(RuntimeError):
    """A forked child uses what belongs to its parent."""


# Locks and pipes by which others see that this process is still there.
_fds: set[int] = set()


def keep_here(fd: int) -> None:
    """Has a file descriptor closed in every child that is forked from now on."""
    _fds.add(fd)


def close(fd: int) -> None:
    """Closes a file descriptor that `keep_here` was told of, unless a fork has closed it."""
    if fd in _fds:
        _fds.discard(fd)
        os.close(fd)


def is_kept(fd: int) -> bool:
    """Whether this process still has what `keep_here` was told of; a forked child has not."""
    return fd in _fds


def check_owner(what: str, owner: int) -> None:
    """Raises a `ForkedError` where a forked child uses what belongs to its parent.

    Args:
      what: How the message calls it.
      owner: The id of the process that it belongs to.
    """
    if os.getpid() != owner:
        raise ForkedError(
            f"{what} belongs to process {owner}, and this is process {os.getpid()}, a fork of it, "
            "where neither TensorFlow nor the connection to a worker can be used. Build another in "
            "a process that is started anew (`multiprocessing.get_context('spawn')`)."
        )


def _forget() -> None:
    for fd in _fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    _fds.clear()


os.register_at_fork(after_in_child=_forget)
