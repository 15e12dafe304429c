"""A directory of numbered versions, each written atomically, by one run at a time."""

import contextlib
import os
import re
import shutil
import stat
import threading
import uuid
import warnings
from collections.abc import Collection, Iterator

import tensorflow_federated as tff

from tff_optim.resident import locks
from tff_optim.resident.errors import CheckpointError

_PREFIX = "version_"
_NAME = re.compile(r"version_(0|[1-9][0-9]{0,18})")
_UNFINISHED = "unfinished_"
_DAMAGED = "damaged_"
_LOCK = ".lock"
_LARGEST = 2**63 - 1


def check_version(version: object) -> int:
    """Returns a version as a Python integer.

    Raises:
      TypeError: If it is not a whole number.
      ValueError: If it is negative, or above 2**63 - 1.
    """
    try:
        if isinstance(version, bool):
            raise TypeError
        number = int(version.__index__())  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        raise TypeError(
            f"`version` must be a whole number, such as the round's; found {version!r}."
        ) from None
    if not 0 <= number <= _LARGEST:
        raise ValueError(f"`version` must be from 0 to 2**63 - 1; found {number}.")
    return number


class VersionDirectory:
    """Versions `version_N`, each a directory that is written under another name and renamed when whole.

    One run writes at a time, under a lock that the kernel releases when its process ends. A writer that
    finds a version that it has neither saved nor seen by `look` is the second run in this directory. It
    is refused, and the first one goes on.

    Args:
      path: The directory; if missing, it is created for its owner alone.
      keep: How many of the newest versions are kept; None for all.
    """

    def __init__(self, path: str, keep: int | None):
        self.path = path
        self._keep = keep
        self._writing = threading.Lock()
        os.makedirs(path, mode=0o700, exist_ok=True)
        self._seen = -1
        self.look()

    def versions(self) -> list[int]:
        """Lists the numbers of the versions, oldest first, even of damaged ones."""
        matches = map(_NAME.fullmatch, os.listdir(self.path))
        return sorted(n for m in matches if m and (n := int(m.group(1))) <= _LARGEST)

    def odd_names(self) -> list[str]:
        """Lists entries named like a version, but without a whole number in ASCII digits."""
        versions = {f"{_PREFIX}{n}" for n in self.versions()}
        return sorted(
            entry
            for entry in os.listdir(self.path)
            if entry.startswith(_PREFIX) and entry not in versions
        )

    def path_of(self, version: int) -> str:
        """The directory of a version."""
        return os.path.join(self.path, f"{_PREFIX}{version}")

    def look(self) -> None:
        """Accepts the newest version, so that the next save may follow it."""
        self._seen = max(self.versions(), default=-1)

    @contextlib.contextmanager
    def new(self, version: int, damaged: Collection[int] = ()) -> Iterator[str]:
        """Yields an empty directory, which becomes the version if the block does not raise.

        Args:
          version: The number of the version.
          damaged: Versions that do not count; those that are not below this one are renamed.

        Raises:
          tff.program.ProgramStateExistsError: If the version exists.
          ValueError: If it is below the newest one.
          CheckpointError: If another run saves there.
        """
        with self._lock() as alone:
            newest = max((v for v in self.versions() if v not in damaged), default=-1)
            self._check_new(version, newest)
            if alone:
                self._remove_unfinished()
            unfinished = os.path.join(self.path, _UNFINISHED + uuid.uuid4().hex)
            try:
                os.mkdir(unfinished, 0o700)
                yield unfinished
                for number in damaged:
                    if number >= version:
                        self._set_aside(number)
                try:
                    os.rename(unfinished, self.path_of(version))
                except OSError as error:
                    if os.path.lexists(self.path_of(version)):
                        raise self._of_another(version) from error
                    raise
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            self._seen = version
            if self._keep is not None:
                self._prune(damaged)

    def remove_all(self) -> None:
        """Removes all versions, damaged ones too."""
        with self._lock() as alone:
            for version in self.versions():
                self._remove(self.path_of(version))
            for entry in os.listdir(self.path):
                if entry.startswith(_DAMAGED):
                    self._remove(os.path.join(self.path, entry))
            if alone:
                self._remove_unfinished()
            self._seen = -1

    def _check_new(self, version: int, newest: int) -> None:
        if newest > self._seen:
            raise self._of_another(newest)
        if os.path.lexists(self.path_of(version)) and version <= newest:
            raise tff.program.ProgramStateExistsError(version=version, path=self.path)
        if version <= newest:
            raise ValueError(
                f"`version` must be above the newest in {self.path}, {newest}; found {version}. "
                "To go on from an earlier version, save to another directory."
            )

    def _of_another(self, version: int) -> CheckpointError:
        seen = "none" if self._seen < 0 else str(self._seen)
        return CheckpointError(
            f"Another run has saved version {version} to {self.path} since this one last looked "
            f"there, when the newest was {seen}. The other run goes on; nothing of this one was "
            "written. Give each run a directory of its own, or go on from the other's state with "
            "`resume`."
        )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """Keeps other writers away; yields False if the file system has no locks."""
        with self._writing, contextlib.ExitStack() as stack:
            try:
                alone = stack.enter_context(locks.locked(os.path.join(self.path, _LOCK)))
            except BlockingIOError as error:
                raise CheckpointError(
                    f"{error.strerror} is saving to {self.path} at this moment: it goes on, and "
                    "nothing of this run was written. Give each run a directory of its own."
                ) from None
            yield alone

    def _prune(self, damaged: Collection[int]) -> None:
        assert self._keep is not None
        for old in [v for v in self.versions() if v not in damaged][: -self._keep]:
            try:
                self._remove(self.path_of(old))
            except OSError as error:
                warnings.warn(
                    f"Version {old} in {self.path} is too old and cannot be removed: {error}.",
                    stacklevel=2,
                )

    def _set_aside(self, version: int) -> None:
        # Kept for anyone who wants to know what happened to it.
        if os.path.lexists(self.path_of(version)):
            name = f"{_DAMAGED}{_PREFIX}{version}_{uuid.uuid4().hex[:8]}"
            os.rename(self.path_of(version), os.path.join(self.path, name))

    def _remove(self, path: str) -> None:
        # Renamed first: a partly removed version would still look like one.
        doomed = os.path.join(self.path, _UNFINISHED + uuid.uuid4().hex)
        os.rename(path, doomed)
        _delete(doomed)

    def _remove_unfinished(self) -> None:
        for entry in os.listdir(self.path):
            if entry.startswith(_UNFINISHED):
                with contextlib.suppress(OSError):
                    _delete(os.path.join(self.path, entry))


def _delete(path: str) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.remove(path)
