"""Folder: what a run keeps in its directory, or in memory alone."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import ResidentCheckpoints, ResidentProcess
from tff_optim.simulation import same_run
from tff_optim.simulation.records import RecordFile
from tff_optim.simulation.threads import wait

_FILES = ("rounds.csv", "clients.csv", "checkpoints", "tensorboard")


class Folder:
    """The records, curves and checkpoints of one run; `close` it in the end.

    Args:
      path: The directory; None to keep the records in memory alone.

    Attributes:
      path: As given.
      saved: The round of the newest checkpoint; None if there is none.
      rounds: A record for each round.
      clients: A record for each client of each round.
      checkpoints: A `tff.program.ProgramStateManager`; None without a directory.
    """

    def __init__(self, path: str | None):
        self.path = path
        self.saved: int | None = None
        self.checkpoints: tff.program.ProgramStateManager | None = None
        self._board: Any = None
        self._rounds, self._clients = RecordFile(None), RecordFile(None)

    def go_on(
        self, run: Mapping[str, Any], process: Any, ids: Sequence[Any], *, resume: bool | str
    ) -> None:
        """Finds what the same run has left in the directory, or prepares it for a new one.

        Args:
          run: What makes a run the same run; see `same_run.describe`.
          process: Whose states are saved.
          ids: Of all clients.
          resume: Whether to go on with what is there; "changed" if it may differ.

        Raises:
          ValueError: The directory holds another run.
        """
        assert self.path is not None
        same_run.check(self.path, dict(run), resume=resume, files=_FILES)
        self.checkpoints = _checkpoints(
            process, os.path.join(self.path, "checkpoints"), accept_changes=resume == "changed"
        )
        versions = wait(self.checkpoints.get_versions())
        self.saved = max(versions) if versions else None
        self._rounds = RecordFile(os.path.join(self.path, "rounds.csv"), self.saved)
        self._clients = RecordFile(os.path.join(self.path, "clients.csv"), self.saved)
        by_name = {str(client): client for client in ids}
        for record in self._clients.records:  # a file holds ids as texts
            record["client"] = by_name.get(record["client"], record["client"])
        self._board = tf.summary.create_file_writer(os.path.join(self.path, "tensorboard"))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A record for each round."""
        return self._rounds.records

    @property
    def clients(self) -> list[dict[str, Any]]:
        """A record for each client of each round."""
        return self._clients.records

    async def add(
        self, number: int, record: Mapping[str, Any], of_clients: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keeps what a round has shown."""
        await self._clients.release(of_clients, number)
        await self._rounds.release([record], number)
        if self._board is not None:
            with self._board.as_default(step=number):
                for name, number_or_text in record.items():
                    if not isinstance(number_or_text, str):
                        tf.summary.scalar(name, number_or_text)
            self._board.flush()

    def save(self, state: Any, number: int) -> None:
        """Saves the state after a round, unless it is saved already."""
        if self.checkpoints is None:
            return
        if number not in (wait(self.checkpoints.get_versions()) or []):
            wait(self.checkpoints.save(state, number))

    def close(self) -> None:
        """Ends writing."""
        if self._board is not None:
            self._board.close()


def _checkpoints(
    process: Any, path: str, *, accept_changes: bool
) -> tff.program.ProgramStateManager:
    if isinstance(process, ResidentProcess):
        return ResidentCheckpoints(process, path, keep=2, accept_changes=accept_changes)
    return tff.program.FileProgramStateManager(path, keep_total=2, keep_first=False)
