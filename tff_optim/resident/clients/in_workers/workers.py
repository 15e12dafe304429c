"""The workers of a process: started, replaced and ended."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tff_optim.resident import forks
from tff_optim.resident.clients.in_workers import handover
from tff_optim.resident.clients.in_workers import worker as worker_lib
from tff_optim.resident.clients.in_workers.connection import Host, through_cuts
from tff_optim.resident.errors import WorkerLostError

_T = TypeVar("_T")


class Workers:
    """The workers of a process, started when they are first needed, and again when one is lost.

    Args:
      targets: For each worker its `'host:port'`, or None for one to be started here.
      heartbeat: Seconds between two looks at a worker while it computes.
      start_timeout: Seconds that a worker has to start.
      hold_states: Whether the first one holds states: then losing it is an error.
    """

    def __init__(
        self,
        targets: Sequence[str | None],
        heartbeat: float,
        start_timeout: float,
        hold_states: bool,
    ):
        self._targets = targets
        self._heartbeat = heartbeat
        self._start_timeout = start_timeout
        self._hosts: list[Host | None] = [None] * len(targets)
        self._hold_states = hold_states
        self._owner = os.getpid()
        self._starting = threading.RLock()
        self._closed = False
        self._interrupted = False

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def name(self) -> str:
        """How messages call them, with what runs."""
        return ", ".join(map(_describe, self._targets, self._hosts))

    def running(self) -> list[Host]:
        """Lists the workers that have been started and not been lost."""
        return [host for host in self._hosts if host is not None and host.lost is None]

    def host(self, index: int) -> Host:
        """Returns a worker, started if need be, once for all threads."""
        forks.check_owner("This `ResidentProcess`", self._owner)
        with self._starting:
            return self._started(index)

    def _started(self, index: int) -> Host:
        if self._closed:
            raise RuntimeError("This `ResidentProcess` was closed.")
        host = self._hosts[index]
        if host is None or host.lost is not None:
            target = self._targets[index]
            worker: worker_lib.Worker
            if target is None:
                worker = worker_lib.LocalWorker(self._start_timeout)
            else:
                worker = worker_lib.RemoteWorker(target, self._start_timeout)
            host = self._hosts[index] = Host(worker, self._heartbeat)
            new = host

            async def look() -> None:
                await handover.look_for_files(new.own_executor())

            try:
                host.run(look)
            except BaseException:
                host.close()
                self._hosts[index] = None
                raise
        return host

    def persist(self, attempt: Callable[[], _T]) -> _T:
        """Tries again where a cut connection, or a lost worker without state, costs only time."""
        try:
            return through_cuts(attempt, self._heartbeat)
        except WorkerLostError:
            home, *others = self._hosts
            if self._hold_states and home is not None and home.lost is not None:
                raise
            without_state = others if self._hold_states else self._hosts
            if not any(host is not None and host.lost is not None for host in without_state):
                raise
        return through_cuts(attempt, self._heartbeat)

    def run_round(self, attempt: Callable[[], _T]) -> _T:
        """Does the same for a round, which Ctrl-C may break off."""
        with self._starting:
            if self._interrupted:
                self._replace_busy()
                self._interrupted = False
        try:
            return self.persist(attempt)
        except KeyboardInterrupt:
            self._interrupted = True
            raise

    def _replace_busy(self) -> None:
        """Leaves local workers that a round was broken off in.

        Such a worker first finishes the clients that it has begun with. States are brought to
        Python; what it does not give within the heartbeat is lost.
        """
        for index, host in enumerate(self._hosts):
            if host is None or host.lost is not None or self._targets[index] is not None:
                continue
            deadline = time.monotonic() + self._heartbeat
            kept = [
                resident.rescue(deadline - time.monotonic()) for resident in list(host.residents)
            ]
            if not all(kept):
                host.lost = worker_lib.lost(
                    host.worker,
                    f"a round in it was broken off, and it stayed busy for {self._heartbeat:g} "
                    "seconds",
                )
            self._hosts[index] = None
            host.close()

    def close(self) -> None:
        """Ends the local workers and closes the connections."""
        if os.getpid() != self._owner:
            return  # a forked child, where the lock may be held by a thread that is not there
        self._closed = True
        with self._starting:
            for host in self._hosts:
                if host is not None:
                    host.close()


def _describe(target: str | None, host: Host | None) -> str:
    if host is None:
        return (
            "a local worker, not started" if target is None else f"worker {target}, not connected"
        )
    return f"{host.worker.name}, lost" if host.lost is not None else host.worker.name
