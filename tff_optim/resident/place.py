"""What a place offers: the parts of a round, and room for the state."""

import abc
from collections.abc import Sequence
from typing import Any

from tff_optim.resident.state.references import Held

# A state that is held somewhere, or the leaves of a plain one, checked.
Source = Held | list[Any]


class Place(abc.ABC):
    """Where a process runs and its states live: in workers, or on a device of the Python process."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """How messages call it, with what runs there."""

    @abc.abstractmethod
    def owns(self, held: Held) -> bool:
        """Whether a value can be used here as it is; others are fetched and taken in."""

    @abc.abstractmethod
    def initialize(self) -> Held:
        """Computes the initial state."""

    @abc.abstractmethod
    def next(self, state: Source, client_data: Sequence[Any]) -> tuple[Held, Any]:
        """Runs a round; returns the new state and the metrics, in TFF's structures."""

    @abc.abstractmethod
    def take_in(self, state: Source) -> Held:
        """Brings a state here."""

    @abc.abstractmethod
    def get(self, computation: Any, state: Source) -> list[Any]:
        """Calls an unplaced `S -> T`; returns the leaves of the result."""

    @abc.abstractmethod
    def set(self, computation: Any, state: Source, part: list[Any]) -> Held:
        """Calls an unplaced `<S, T> -> S` with the leaves of a `T`."""

    @abc.abstractmethod
    def save(self, state: Source, prefix: str) -> None:
        """Writes a state as the TensorFlow checkpoint `prefix`."""

    @abc.abstractmethod
    def load(self, prefix: str) -> Held:
        """Reads a state from the checkpoint `prefix`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what runs for this place; states in it are gone."""
