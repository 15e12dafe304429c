"""Training of a round's clients, in the Python process or in TFF's workers."""

from collections.abc import Sequence
from typing import Any, Protocol


class Clients(Protocol):
    """Trains the clients of a round, and adds up their updates."""

    @property
    def name(self) -> str:
        """The place where clients train, for messages."""

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Trains a cohort.

        Args:
          context: The leaves of the clients' context.
          client_data: The data of each client.

        Returns:
          The leaves of the aggregate.
        """

    def close(self) -> None:
        """Releases all resources; a running round ends."""
