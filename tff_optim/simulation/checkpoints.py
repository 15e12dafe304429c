"""Checkpoints of a run: the files of its states, and whether they are unchanged."""

import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator

import tensorflow_federated as tff

from tff_optim.core.types import Process, State
from tff_optim.resident import ResidentCheckpoints, ResidentProcess, leaves
from tff_optim.simulation import old_runs

_KEPT = 2


class Checkpoints:
    """States by round, saved by `ResidentCheckpoints`, or by TFF for other processes.

    Each save returns a digest of its files, which reveals files that were changed, exchanged or added.

    Args:
      process: The process whose states are saved.
      path: The folder, created if missing.
      accept_changes: Whether the states may be of another process.

    Raises:
      OSError: If the folder cannot be created.
    """

    def __init__(self, process: Process, path: str, *, accept_changes: bool):
        os.makedirs(path, exist_ok=True)
        self._path = path
        self._manager: tff.program.ProgramStateManager
        if isinstance(process, ResidentProcess):
            self._prefix = "version_"
            self._manager = ResidentCheckpoints(
                process, path, keep=_KEPT, accept_changes=accept_changes
            )
        else:
            self._type = process.initialize.type_signature.result.member
            self._prefix = "program_state_"
            self._manager = tff.program.FileProgramStateManager(
                path, self._prefix, keep_total=_KEPT, keep_first=False
            )

    async def save(self, state: State, number: int) -> str:
        """Saves the state after a round; returns the digest of its files."""
        await self._manager.save(state, number)
        return _digest(self._path_of(number))

    async def load(self, number: int, structure: State) -> State:
        """Loads the state after a round."""
        try:
            return await self._manager.load(number, structure)
        except (TypeError, ValueError) as error:  # TFF's errors for other names
            earlier = old_runs.renamed(structure, leaves.EARLIER)
            try:
                loaded = await self._manager.load(number, earlier)
            except (TypeError, ValueError):
                raise error from None  # which has the names of today
            today = {before: now for now, before in leaves.EARLIER.items()}
            state = old_runs.renamed(loaded, today)
            leaves.as_arrays(leaves.flatten(state, self._type), self._type)  # compares
            return state

    def digest(self, number: int) -> str:
        """A digest of the files of a round."""
        return _digest(self._path_of(number))

    def found(self) -> list[int]:
        """The rounds that have an entry, even a damaged one."""
        numbers = re.compile(re.escape(self._prefix) + "(0|[1-9][0-9]*)", re.ASCII)
        matches = map(numbers.fullmatch, os.listdir(self._path))
        return sorted(int(match[1]) for match in matches if match)

    def fault(self, number: int, digest: str) -> str:
        """The fault of a round's files; empty if they are as they were saved."""
        path = self._path_of(number)
        try:
            if not os.path.lexists(path):
                return f"{os.path.basename(path)} is missing"
            if _digest(path) != digest:
                return f"{os.path.basename(path)} is not as it was saved"
        except OSError as error:
            return f"{os.path.basename(path)} cannot be read ({error.strerror})"
        return ""

    def clear(self, saved: Collection[int], killed: Collection[int]) -> list[str]:
        """Removes or renames all entries but the states that count.

        Args:
          saved: The rounds whose states count.
          killed: The rounds whose states a kill may have left, whole or not; they are removed.

        Returns:
          The names of the other entries, which are renamed to `left_out_...`.
        """
        own = {self._name(number): number for number in self.found()}
        renamed = []
        for name in sorted(os.listdir(self._path)):
            path = os.path.join(self._path, name)
            if not name.startswith(self._prefix) or own.get(name) in saved:
                continue
            unfinished = re.fullmatch(r"[0-9]+_temp[0-9]+", name.removeprefix(self._prefix))
            if os.path.isdir(path) and (unfinished or own.get(name) in killed):
                shutil.rmtree(path)
            else:
                os.rename(path, os.path.join(self._path, f"left_out_{uuid.uuid4().hex[:8]}_{name}"))
                renamed.append(name)
        return renamed

    def _name(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def _path_of(self, number: int) -> str:
        return os.path.join(self._path, self._name(number))


def _digest(folder: str) -> str:
    """A digest of the names and contents of all files of a folder."""
    found = hashlib.sha256()
    for path in _files(folder):
        found.update(os.path.relpath(path, folder).encode(errors="surrogateescape") + b"\0")
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _files(folder: str) -> Iterator[str]:
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            yield from _files(path)
        elif stat.S_ISREG(mode):
            yield path
        else:
            raise OSError(0, f"{name} is not a file", path)  # reading a pipe would wait
