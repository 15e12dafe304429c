"""The best round so far, and its state, which is kept besides the last ones."""

import math
from collections.abc import Mapping, Sequence

from tff_optim.core.types import Json, State
from tff_optim.simulation.checkpoints import Checkpoints
from tff_optim.simulation.goals import Goal
from tff_optim.simulation.history import Kept
from tff_optim.simulation.records import Record
from tff_optim.simulation.threads import wait

FOLDER = "best"


class Best:
    """The best round of a run so far, and its state.

    The state stays in memory until the last state is saved too, so the best round always counts after a
    kill. Two are kept in files: those that were best when each of the two last states was saved.

    Args:
      goal: The metric that decides.
      checkpoints: The files of the states; None to keep them in memory only.

    Attributes:
      round: The best round so far; None before the first.
    """

    def __init__(self, goal: Goal, checkpoints: Checkpoints | None):
        self._goal, self._checkpoints = goal, checkpoints
        self.round: int | None = None
        self._value, self._state = -math.inf, None
        self._saved: int | None = None
        self._seen = False

    def take_up(self, saved: int | None, records: Sequence[Record]) -> None:
        """Resumes after some rounds.

        Args:
          saved: The best of these rounds, whose state is in a file; None for none.
          records: The records of these rounds.
        """
        for record in records:
            self._seen = self._seen or self._goal.name in record
            if record["round"] == saved:
                self.round = self._saved = saved
                self._value = self._goal.value(record)

    def see(self, number: int, record: Mapping[str, Json], state: State) -> None:
        """Takes a round into account; of equally good rounds the first is the best.

        Raises:
          ValueError: If the round lacks the metric.
        """
        if not self._seen:
            self._goal.check("keep_best", {"round": number, **record})
        self._seen = self._seen or self._goal.name in record
        value = self._goal.value(record)
        if value > self._value:
            self.round, self._value, self._state = number, value, state

    async def save(self) -> Record:
        """Saves the best state if it is new; returns its round and its files' digest, or nothing."""
        if self._checkpoints is None or self.round is None or self.round == self._saved:
            return {}
        digest = await self._checkpoints.save(self._state, self.round)
        self._saved, self._state = self.round, None  # it is loaded in the end
        return {"best": self.round, "files": digest}

    def kept(self, structure: State) -> Kept | None:
        """The best round with its state; None if no round has had a finite number.

        Args:
          structure: A state with the structure of the one to load.
        """
        if self.round is None:
            return None
        state = self._state
        if state is None:
            assert self._checkpoints is not None
            state = wait(self._checkpoints.load(self.round, structure))
        return Kept(self.round, self._goal.sign * self._value, state)
