"""Where the clients of a round are trained: in the Python process, or in workers of TFF."""

from collections.abc import Sequence
from typing import Any, Protocol


class Clients(Protocol):
    """What trains the clients of a round, and adds up what they return."""

    @property
    def name(self) -> str:
        """How messages call the place."""

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Trains a cohort.

        Args:
          context: The leaves of what the clients are sent.
          client_data: What each client has.

        Returns:
          The leaves of the aggregate.
        """

    def close(self) -> None:
        """Gives back what was taken; a round that is running ends."""
