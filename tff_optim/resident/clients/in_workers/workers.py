"""The workers of a process: started, replaced and ended."""

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from tff_optim.resident.clients.in_workers import handover
from tff_optim.resident.clients.in_workers import worker as worker_lib
from tff_optim.resident.clients.in_workers.connection import Connection, ConnectionCutError
from tff_optim.resident.errors import WorkerLostError

_T = TypeVar("_T")


class Workers:
    """The workers of a process, started when they are first needed, and again when one is lost.

    Args:
      targets: Each worker's `'host:port'`, or None for one to be started here.
      heartbeat: Seconds between two checks of a worker while it computes.
      start_timeout: Seconds that a worker has to start.
    """

    def __init__(self, targets: Sequence[str | None], heartbeat: float, start_timeout: float):
        self._targets = targets
        self._heartbeat = heartbeat
        self._start_timeout = start_timeout
        self._connections: list[Connection | None] = [None] * len(targets)
        self._starting = threading.RLock()  # a handler of signals may call `close`
        self._closed = False

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def name(self) -> str:
        """The workers and whether they run, for messages."""
        return ", ".join(map(_describe, self._targets, self._connections))

    def connection(self, index: int) -> Connection:
        """Returns the connection to a worker, which is started if necessary."""
        with self._starting:
            if self._closed:
                raise RuntimeError("This `ResidentProcess` was closed.")
            known = self._connections[index]
            if known is None or known.lost:
                known = self._connections[index] = self._started(self._targets[index])
            return known

    def _started(self, target: str | None) -> Connection:
        worker: worker_lib.Worker
        if target is None:
            worker = worker_lib.LocalWorker(self._start_timeout)
        else:
            worker = worker_lib.RemoteWorker(target, self._start_timeout)
        new = Connection(worker, self._heartbeat)
        try:
            new.finish(new.start(lambda: handover.look_for_files(new)))
        except BaseException:
            new.close()
            raise
        return new

    def run(self, attempt: Callable[[], _T]) -> _T:
        """Runs a round, again if a connection was cut, and once more if a worker was lost.

        Workers keep nothing between rounds, so a lost one costs only time. After Ctrl-C the next round
        has fresh workers, since the old ones first finish the clients that they have started, however
        long that takes.

        Raises:
          WorkerLostError: If a second worker was lost, or the connection was cut again and again.
        """
        lost = False
        deadline = None
        while True:
            try:
                return attempt()
            except ConnectionCutError as error:
                deadline = deadline or time.monotonic() + self._heartbeat
                if time.monotonic() > deadline:
                    raise WorkerLostError(
                        f"{error} It was cut again each time the round was run again, for "
                        f"{self._heartbeat:g} seconds. {_KEPT}"
                    ) from error
                time.sleep(0.2)
            except WorkerLostError as error:
                if lost:
                    raise WorkerLostError(
                        f"{error} It is the second one in this round, which may need more memory "
                        f"than there is: `clients_at_once` bounds it. {_KEPT}"
                    ) from error
                lost = True
                warnings.warn(f"{error} The round is run again in a new one. {_KEPT}", stacklevel=4)
            except Exception:
                raise
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        with self._starting:
            for index, known in enumerate(self._connections):
                if known is not None:
                    known.close()
                self._connections[index] = None

    def close(self) -> None:
        """Ends the local workers and closes the connections."""
        self._closed = True
        self._leave()


_KEPT = "No state is lost: states are in the Python process."


def _describe(target: str | None, known: Connection | None) -> str:
    if known is None:
        return (
            "a local worker, not started" if target is None else f"worker {target}, not connected"
        )
    return f"{known.worker.name}, lost" if known.lost else known.worker.name
