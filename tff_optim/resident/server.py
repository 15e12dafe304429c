"""The server's half of a process: its state in variables on a device, and computations on it."""

import logging
import os
import threading
from collections.abc import Sequence

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core import tracing
from tff_optim.core.devices import device_scope
from tff_optim.core.types import Computation, Leaves, State, Value
from tff_optim.resident import forks, leaves
from tff_optim.resident import parts as parts_lib
from tff_optim.resident.graphs.imported import ImportedComputation
from tff_optim.resident.state.references import Reference
from tff_optim.resident.state.variables import (
    CLOSED,
    OnDevice,
    Variables,
    VariableSets,
    plain,
)

# A smaller step takes no longer than a call to XLA. Many small tensors take seconds to compile.
_COMPILED_FROM_BYTES = 4 << 20
_COMPILED_FROM_BYTES_A_TENSOR = 1 << 20


class Server:
    """The server of a process.

    A state goes from `ResidentProcess.next` to `take_in`, which brings it into variables (`flatten`,
    and for a plain one `as_arrays` and `hold`), and from there to `prepare` and `step`.

    Args:
      process: The learning process.
      parts: The parts of its round.
      device: The device of the state and of operations.
      compile_step: Whether XLA compiles the server's step; None where it pays.
      exact: Whether to optimise computations exactly as plain TFF's compiler does, so that results are
        plain TFF's to the bit.

    Attributes:
      owner: The id of the Python process that it belongs to.
      closed: Whether it was closed.
      prepare: Function from the variables of a state to the leaves that are sent to clients.
      step: See `ServerStep`.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        parts: parts_lib.RoundParts,
        device: str,
        compile_step: bool | None,
        exact: bool,
    ):
        self.owner, self.closed = os.getpid(), False
        self._device = device
        self._exact = exact
        self._initialize = process.initialize
        self._sets = VariableSets(process.initialize.type_signature.result.member, device)
        if compile_step is None and exact:
            compile_step = False
        report, update = map(self.imported, (parts.report, parts.update))
        self.step: Value = ServerStep(report, update, self._sets, device, compile_step)
        self.prepare: Value = self.imported(parts.prepare)
        self._functions: dict[Computation, ImportedComputation] = {}
        self._building = threading.RLock()

    def check_open(self) -> None:
        """Raises if the process was closed, or belongs to another Python process."""
        forks.check_owner("This `ResidentProcess`", self.owner)
        if self.closed:
            raise RuntimeError(
                "This `ResidentProcess` was closed. Use it inside of its `with` block, or build "
                "another one and go on from a checkpoint or a plain state."
            )

    def initialize(self) -> OnDevice:
        """Computes the initial state."""
        self.check_open()
        return self._sets.hold(self._function(self._initialize)([]))

    def take_in(self, state: State) -> OnDevice:
        """Finds the variables of a state; copies a state from elsewhere into new ones.

        Raises:
          TypeError: If it is not a state of the process.
        """
        self.check_open()
        found = leaves.flatten(state, self._sets.type)
        held = found[0].held if found and isinstance(found[0], Reference) else None
        if (
            held is not None
            and held.sets is self._sets
            and all(
                isinstance(x, Reference) and x.held is held and x.index == i
                for i, x in enumerate(found)
            )
        ):
            return held
        return self._sets.hold(leaves.as_arrays(found, self._sets.type))

    def get(self, computation: Computation, state: State) -> Leaves:
        """Calls an unplaced `S -> T` and brings the result to Python."""
        held = self.take_in(state)  # keeps its variables from being reused before they are read
        return [plain(x) for x in self._function(computation)(held.variables)]

    def set(self, computation: Computation, state: State, part: Leaves) -> OnDevice:
        """Calls an unplaced `<S, T> -> S` with a `T` from Python."""
        held = self.take_in(state)
        part_type = computation.type_signature.parameter[1]
        tensors = [
            tf.convert_to_tensor(x, leaf.dtype)
            for x, leaf in zip(part, leaves.leaves_of(part_type), strict=True)
        ]
        return self._sets.hold(self._function(computation)([*held.variables, *tensors]))

    def write(self, held: OnDevice, prefix: str) -> None:
        """Writes a state as the TensorFlow checkpoint `prefix`."""
        leaves.write_checkpoint(prefix, self._sets.leaves, held.variables)

    def read(self, prefix: str, names: Sequence[str]) -> OnDevice:
        """Reads a state from the checkpoint `prefix`, whose leaves have some names there."""
        return self._sets.hold(leaves.read_checkpoint(prefix, self._sets.leaves, names))

    def close(self) -> None:
        """Releases the states and the functions."""
        self._sets.close()
        self._functions.clear()
        self.prepare = self.step = _gone

    def imported(self, computation: Computation) -> ImportedComputation:
        """Makes a computation without placements a function of leaves on the device."""
        if self._exact:
            computation = parts_lib.compile_native(computation)
        return ImportedComputation(computation, self._device)

    def _function(self, computation: Computation) -> ImportedComputation:
        with self._building:
            if computation not in self._functions:
                unplaced = computation
                if computation is self._initialize:
                    unplaced = tff.backends.mapreduce.get_state_initialization_computation(
                        computation, grappler_config=parts_lib.no_grappler()
                    )
                self._functions[computation] = self.imported(unplaced)
            return self._functions[computation]


def _gone(*unused: Value) -> Value:
    raise RuntimeError(CLOSED)


class ServerStep:
    """`<S, A> -> <S, M>`: the aggregation's report and the update of the state.

    Args:
      report: `A -> R`.
      update: `<S, R> -> <S, M>`.
      sets: The variables of states.
      device: The device of the operations.
      compiled: Whether XLA compiles the step. None compiles it if the state is large, in few tensors,
        and XLA can compile it.
    """

    def __init__(
        self,
        report: ImportedComputation,
        update: ImportedComputation,
        sets: VariableSets,
        device: str,
        compiled: bool | None,
    ):
        self._sets, self._device = sets, device
        self._must = compiled is True
        self.compiled = _is_large(sets) if compiled is None else compiled
        self._parts = (report, update)
        num_state = len(sets.leaves)

        def step(
            old: list[tf.Variable], new: list[tf.Variable], total: Leaves, inner: Value
        ) -> Leaves:
            result = report(total, inner[0])
            output = update([*[v.read_value() for v in old], *result], inner[1])
            for variable, value in zip(new, output[:num_state], strict=True):
                variable.assign(value)
            return output[num_state:]

        self._plain = step
        self._xla = tracing.function(step, autograph=False, jit_compile=True)

    def __call__(self, held: OnDevice, total: Leaves) -> tuple[OnDevice, Leaves]:
        """Computes the new state and the metrics from a cohort's aggregate."""
        new = self._sets.take()
        # XLA cannot make variables.
        made = [part.make_variables() if self.compiled else None for part in self._parts]
        arguments = list(held.variables), list(new), total, made
        with device_scope(self._device):
            try:
                metrics = (self._xla if self.compiled else self._plain)(*arguments)
            except tf.errors.OpError as error:
                if self._must or not self.compiled:
                    raise
                self.compiled = False
                logging.getLogger(__name__).info("XLA cannot compile this step: %s", error)
                metrics = self._plain(*arguments)
        _check_devices(self._sets.leaves, new, self._device)
        return self._sets.state(new), [plain(x) for x in metrics]


def _is_large(sets: VariableSets) -> bool:
    least = max(_COMPILED_FROM_BYTES, _COMPILED_FROM_BYTES_A_TENSOR * len(sets.leaves))
    return leaves.num_bytes(sets.type) >= least


def _check_devices(names: list[leaves.Leaf], variables: Variables, device: str) -> None:
    """Raises unless every tensor is in the memory of the device."""
    for leaf, variable in zip(names, variables, strict=True):
        # TensorFlow keeps integers and strings of a GPU's steps in the host's memory.
        if not leaf.dtype.is_floating:
            continue
        place = variable.device
        if not place.endswith(f"/device:{device[1:]}"):
            raise RuntimeError(
                f"The server state must be on {device}, but {leaf.name} is on {place}. The "
                "optimizer places its tensors itself: remove its own device setting."
            )
