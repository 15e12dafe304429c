"""The directory of client states, which belongs to one store alone."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Collection, Iterable

from aggregators.client.state_table import UNFINISHED, few

_TABLE = "states.sqlite"
_SHARED = "/dev/shm"
_OWN = {"lock", _TABLE, _TABLE + UNFINISHED, f"{_TABLE}{UNFINISHED}-journal"}
_PARTS = (".index", ".data-00000-of-00001")  # the files of a checkpoint written in one go

# A forked child closes these: it would hold the lock, or the memory, of a parent that has ended.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class Folder:
    """TensorFlow checkpoints in a locked directory, in memory if no path is given.

    Args:
      path: The directory, created if missing. None for one in memory, which is removed when this
        process ends, in whatever way.

    Attributes:
      table: The path of the table.

    Raises:
      OSError: If the directory cannot be used.
      ValueError: If the directory has other files and no store.
      RuntimeError: If another store has it open.
    """

    def __init__(self, path: str | None):
        self._remover: _Remover | None = None
        if path is None:
            self._remover = _Remover()
            path = os.path.join(self._remover.path, "states")
        self._path = path
        self.table = os.path.join(self._path, _TABLE)
        os.makedirs(self._path, exist_ok=True)
        found = set(os.listdir(self._path))
        if _TABLE not in found and found - _OWN:
            raise ValueError(
                f"`path` must be a directory of its own; found {few(found - _OWN)} in {path}, and no "
                "store. Choose another, such as a new one below it."
            )
        self._lock = _locked(self._path)

    def __str__(self) -> str:
        return self._path if self._remover is None else "memory"

    def at(self, name: str) -> str:
        """The path of a state."""
        return os.path.join(self._path, name)

    def has(self, name: str) -> bool:
        """Whether a state has been written."""
        return all(os.path.isfile(self.at(name + part)) for part in _PARTS)

    def without(self, names: Iterable[str]) -> set[str]:
        """The states that have not been written; those that have are flushed to the disk."""
        missing = set()
        for name in names:
            for part in _PARTS:
                try:
                    self._sync(self.at(name + part))
                except FileNotFoundError:
                    missing.add(name)
        self._sync(self._path)
        return missing

    def keep_only(self, names: Collection[str], token: str) -> None:
        """Deletes all other states of the store."""
        parts = "|".join(map(re.escape, _PARTS))
        made = re.compile(rf"(\d+-\d+-{token}-[0-9a-f]{{8}})({parts})(\.tempstate\d+)?")
        for file in os.listdir(self._path):
            found = made.fullmatch(file)
            if found and (found[1] not in names or found[3]):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.at(file))

    def close(self) -> None:
        """Releases the lock."""
        with contextlib.suppress(OSError):  # a child just forked may still hold it
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        _held.discard(self._lock)
        os.close(self._lock)
        if self._remover is not None:
            self._remover.close()

    def _sync(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if self._remover is None:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Remover:
    """A directory in memory, and a small process that removes it when this one ends.

    States lie one level below. A client still at work in a worker then cannot recreate the directory,
    since TensorFlow creates one level only.
    """

    def __init__(self) -> None:
        where = _SHARED if os.access(_SHARED, os.W_OK) else None
        self.path = tempfile.mkdtemp(prefix="client-states-", dir=where)
        reads, self._pipe = os.pipe()
        _held.add(self._pipe)
        try:
            self._process = subprocess.Popen(
                # It waits until the other end of the pipe is closed, and gets no signal sent to this
                # process's group. It removes twice, since a client at work may write in between.
                ["/bin/sh", "-c", 'cat; rm -rf -- "$0"; rm -rf -- "$0"', self.path],
                stdin=reads,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            _held.discard(self._pipe)
            os.close(self._pipe)
            shutil.rmtree(self.path)
            raise
        finally:
            os.close(reads)

    def close(self) -> None:
        _held.discard(self._pipe)
        os.close(self._pipe)
        self._process.wait()


def _locked(path: str) -> int:
    """Locks the directory and returns the lock's descriptor."""
    descriptor = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RuntimeError(
            f"`path` must be open in one place at a time; found {path} in use. Close the other "
            "`ClientStates`, or take another directory."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{path} is on a file system without locks ({error.strerror}): make sure that no other "
            "`ClientStates` has it open.",
            stacklevel=4,
        )
    _held.add(descriptor)
    return descriptor
