"""Values in a worker."""

from typing import Any

from tff_optim.resident.clients.in_workers import handover
from tff_optim.resident.clients.in_workers.connection import Executor
from tff_optim.resident.errors import WorkerLostError
from tff_optim.resident.forks import ForkedError
from tff_optim.resident.state.references import CLOSED, Held


class Resident(Held):
    """A value in a worker; dropping the last reference to it frees its memory there.

    Args:
      carrier: What moves values of its type.
      executor: The executor that holds it.
      value: TFF's handle of it.
    """

    def __init__(self, carrier: handover.Carrier, executor: Executor, value: Any):
        super().__init__(carrier.type, carrier.leaves)
        self.carrier = carrier
        self.executor = executor
        self.value = value
        self.rescued: list[Any] | None = None
        executor.host.residents.add(self)

    @property
    def where(self) -> str:
        """How messages call the worker."""
        return self.executor.host.worker.name

    def fetch(self) -> list[Any]:
        """Brings all leaves to Python."""
        if self.rescued is not None:
            return list(self.rescued)
        self.check()
        return self.executor.host.run(
            lambda: handover.fetch(self.carrier, self.executor, self.value)
        )

    def check(self) -> None:
        """Raises if the worker was closed or lost, and the value with it."""
        if self.rescued is not None:
            return
        try:
            self.executor.host.check()
        except (WorkerLostError, ForkedError):
            raise
        except RuntimeError as error:
            raise RuntimeError(CLOSED) from error

    def rescue(self, seconds: float) -> bool:
        """Brings the value to Python for good, before its worker is left.

        Returns:
          Whether the worker gave it within some seconds.
        """
        call = self.executor.host.start(
            lambda: handover.fetch(self.carrier, self.executor, self.value)
        )
        if not call.done.wait(max(seconds, 0.0)) or call.error is not None:
            call.abandoned = True
            return False
        self.rescued = call.result
        self.value = None
        return True
