"""Resources of this Python process that a forked child must not keep or use."""

import contextlib
import os


class ForkedError(RuntimeError):
    """A forked child uses an object that belongs to its parent."""


# Locks and pipes that show other processes that this one is still alive.
_fds: set[int] = set()


def keep_here(fd: int) -> None:
    """Closes a file descriptor in every child that is forked from now on."""
    _fds.add(fd)


def close(fd: int) -> None:
    """Closes a file descriptor of `keep_here`, unless a fork has already closed it."""
    if fd in _fds:
        _fds.discard(fd)
        os.close(fd)


def is_kept(fd: int) -> bool:
    """Whether this process still has a file descriptor of `keep_here`; a forked child has not."""
    return fd in _fds


def check_owner(what: str, owner: int) -> None:
    """Raises a `ForkedError` if a forked child uses an object of its parent.

    Args:
      what: The object, in words.
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
