"""Processes in TensorFlow of the Python process: all of a round, or the server's half of it."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.clients.in_workers.workers import Workers
from tff_optim.resident.graphs.imported import ImportedComputation, as_function
from tff_optim.resident.parts import RoundParts, no_grappler
from tff_optim.resident.place import Place, Source
from tff_optim.resident.server import ServerStep
from tff_optim.resident.state.references import Held
from tff_optim.resident.state.variables import OnDevice, VariableSets, plain

# Trains a cohort, wherever that is: the leaves of what clients are sent, and their data.
AddUp = Callable[[list[Any], Sequence[Any]], list[Any]]


class DevicePlace(Place):
    """A process whose state and server step are on a device of the Python process.

    Args:
      process: The learning process.
      parts: Its round.
      device: The device, or None to leave the placement to TensorFlow.
      add_up: What trains the clients.
      compile_step: Whether XLA compiles the server's step; None where it pays.
      workers: Where `add_up` trains them, if not here.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        parts: RoundParts,
        device: str | None,
        add_up: AddUp,
        compile_step: bool | None,
        workers: Workers | None = None,
    ):
        state_type = process.initialize.type_signature.result.member
        self._device = device
        self._sets = VariableSets(state_type, device)
        self._add_up = add_up
        self._workers = workers
        self._step = ServerStep(parts, self._sets, device, compile_step)
        self._prepare = as_function(ImportedComputation(parts.prepare, device))
        self._initialize = process.initialize
        self._functions: dict[Any, Any] = {}
        # The variables of a function's graph are for one call at a time.
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        """The device, and where the clients are."""
        here = f"the Python process's {self._device[1:] if self._device else 'TensorFlow'}"
        return here if self._workers is None else f"{here}, clients in {self._workers.name}"

    @property
    def workers(self) -> Workers | None:
        """Where clients are trained, if not here."""
        return self._workers

    def owns(self, held: Held) -> bool:
        """Whether a value is in variables of this place; raises if it is gone."""
        held.check()
        return isinstance(held, OnDevice) and held.sets is self._sets

    def initialize(self) -> Held:
        """Computes the initial state on the device."""
        computation = tff.backends.mapreduce.get_state_initialization_computation(
            self._initialize, grappler_config=no_grappler()
        )
        with self._lock:
            return self._sets.hold(self._function("initialize", computation)([]))

    def next(self, state: Source, client_data: Sequence[Any]) -> tuple[Held, Any]:
        """Runs a round."""
        with self._lock:
            held = self._taken_in(state)
            context = self._prepare(held.variables)
            total = self._add_up(context, client_data)
            new_state, metrics = self._step(held, total)
            return new_state, [plain(x) for x in metrics]

    def take_in(self, state: Source) -> Held:
        """Brings a state to the device."""
        return self._taken_in(state)

    def get(self, computation: Any, state: Source) -> list[Any]:
        """Calls an unplaced `S -> T` on the device and brings the result to Python."""
        function = self._function(computation, computation)
        with self._lock:
            return [plain(x) for x in function(self._taken_in(state).variables)]

    def set(self, computation: Any, state: Source, part: list[Any]) -> Held:
        """Calls an unplaced `<S, T> -> S` on the device with a `T` from Python."""
        part_type = computation.type_signature.parameter[1]
        tensors = [
            tf.convert_to_tensor(x, leaf.dtype)
            for x, leaf in zip(part, leaves.leaves_of(part_type), strict=True)
        ]
        function = self._function(computation, computation)
        with self._lock:
            return self._sets.hold(function([*self._taken_in(state).variables, *tensors]))

    def save(self, state: Source, prefix: str) -> None:
        """Writes a checkpoint."""
        if isinstance(state, OnDevice):
            leaves.write_checkpoint(prefix, self._sets.leaves, state.variables)
        else:
            arrays = state.fetch() if isinstance(state, Held) else state
            leaves.write_checkpoint(prefix, self._sets.leaves, arrays)

    def load(self, prefix: str) -> Held:
        """Reads a checkpoint."""
        return self._sets.hold(leaves.read_checkpoint(prefix, self._sets.leaves))

    def close(self) -> None:
        """Lets go of the states, and ends the workers."""
        self._sets.close()
        self._functions.clear()
        if self._workers is not None:
            self._workers.close()

    def _taken_in(self, state: Source) -> OnDevice:
        if isinstance(state, OnDevice) and self.owns(state):
            return state
        return self._sets.hold(state.fetch() if isinstance(state, Held) else state)

    def _function(self, key: Any, computation: Any) -> Any:
        if self._sets.closed:
            raise RuntimeError("This `ResidentProcess` was closed.")
        if key not in self._functions:
            self._functions[key] = as_function(ImportedComputation(computation, self._device))
        return self._functions[key]
