"""The server's half of a process: its state in variables on a device, and what is computed of it."""

import logging
import threading

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core import tracing
from tff_optim.core.devices import device_scope
from tff_optim.core.types import Computation, Leaves, Value
from tff_optim.resident import leaves
from tff_optim.resident import parts as parts_lib
from tff_optim.resident.graphs.imported import ImportedComputation
from tff_optim.resident.state.variables import (
    CLOSED,
    OnDevice,
    Variables,
    VariableSets,
    plain,
)

# Below, a step takes no longer than XLA's call; of many small tensors, compiling takes seconds.
_COMPILED_FROM_BYTES = 4 << 20
_COMPILED_FROM_BYTES_A_TENSOR = 1 << 20


class Server:
    """The server of a process.

    Args:
      process: The learning process.
      parts: Its round.
      device: Where the state is, and where operations go.
      compile_step: Whether XLA compiles the server's step; None where it pays.
      exact: Whether computations are optimised as plain TFF's compiler does, and nowhere else, so
        that results are plain TFF's to the bit.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        parts: parts_lib.RoundParts,
        device: str,
        compile_step: bool | None,
        exact: bool,
    ):
        state_type = process.initialize.type_signature.result.member
        self._device = device
        self._exact = exact
        self._initialize = process.initialize
        self._sets = VariableSets(state_type, device)
        if compile_step is None and exact:
            compile_step = False
        report, update = map(self._imported, (parts.report, parts.update))
        self._step: Value = ServerStep(report, update, self._sets, device, compile_step)
        self._prepare: Value = self._imported(parts.prepare)
        self.leaves = self._sets.leaves
        self._functions: dict[Computation, ImportedComputation] = {}
        self._building = threading.RLock()

    def initialize(self) -> OnDevice:
        """Computes the initial state."""
        return self._sets.hold(self._function(self._initialize)([]))

    def take_in(self, state: OnDevice | Leaves) -> OnDevice:
        """Brings a state, of another process or plain, into variables of this one."""
        if isinstance(state, OnDevice):
            return state if state.sets is self._sets else self._sets.hold(state.variables)
        return self._sets.hold(state)

    def prepare(self, held: OnDevice) -> Leaves:
        """Computes what the clients are sent."""
        return self._prepare(held.variables)

    def step(self, held: OnDevice, total: Leaves) -> tuple[OnDevice, Leaves]:
        """Computes the new state and the metrics from a cohort's aggregate."""
        new = self._sets.take()
        metrics = self._step(held.variables, new, total)
        return self._sets.state(new), [plain(x) for x in metrics]

    def get(self, computation: Computation, held: OnDevice) -> Leaves:
        """Calls an unplaced `S -> T` and brings the result to Python."""
        return [plain(x) for x in self._function(computation)(held.variables)]

    def set(self, computation: Computation, held: OnDevice, part: Leaves) -> OnDevice:
        """Calls an unplaced `<S, T> -> S` with a `T` from Python."""
        part_type = computation.type_signature.parameter[1]
        tensors = [
            tf.convert_to_tensor(x, leaf.dtype)
            for x, leaf in zip(part, leaves.leaves_of(part_type), strict=True)
        ]
        return self._sets.hold(self._function(computation)([*held.variables, *tensors]))

    def merging(self, merge: Computation) -> ImportedComputation:
        """Returns `<A, A> -> A` as a function of the leaves of two aggregates."""
        return self._imported(merge)

    def write(self, state: OnDevice | Leaves, prefix: str) -> None:
        """Writes a state as the TensorFlow checkpoint `prefix`."""
        values = state.variables if isinstance(state, OnDevice) else state
        leaves.write_checkpoint(prefix, self._sets.leaves, values)

    def read(self, prefix: str) -> OnDevice:
        """Reads a state from the checkpoint `prefix`."""
        return self._sets.hold(leaves.read_checkpoint(prefix, self._sets.leaves))

    def close(self) -> None:
        """Lets go of the states and of the functions."""
        self._sets.close()
        self._functions.clear()
        self._prepare = self._step = _gone

    def _imported(self, computation: Computation) -> ImportedComputation:
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
                self._functions[computation] = self._imported(unplaced)
            return self._functions[computation]


def _gone(*unused: Value) -> Value:
    raise RuntimeError(CLOSED)


class ServerStep:
    """`<S, A> -> <S, M>`, the aggregation's report and the update of the state.

    Args:
      report: `A -> R`.
      update: `<S, R> -> <S, M>`.
      sets: Where states are.
      device: Where the operations go.
      compiled: Whether XLA compiles the step; None where the state is large, in few tensors, and
        XLA can.
    """

    def __init__(
        self,
        report: ImportedComputation,
        update: ImportedComputation,
        sets: VariableSets,
        device: str,
        compiled: bool | None,
    ):
        self._leaves = sets.leaves
        self._device = device
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

    def __call__(self, old: Variables, new: Variables, total: Leaves) -> Leaves:
        """Takes a step from one set of variables into another; returns the metrics."""
        # XLA makes no variables itself.
        made = [part.make_variables() if self.compiled else None for part in self._parts]
        metrics = self._run(list(old), list(new), total, made)
        _check_devices(self._leaves, new, self._device)
        return metrics

    def _run(self, *arguments: Value) -> Leaves:
        with device_scope(self._device):
            if self.compiled:
                try:
                    return self._xla(*arguments)
                except tf.errors.OpError as error:
                    if self._must:
                        raise
                    self.compiled = False
                    logging.getLogger(__name__).info("XLA cannot compile this step: %s", error)
            return self._plain(*arguments)


def _is_large(sets: VariableSets) -> bool:
    least = max(_COMPILED_FROM_BYTES, _COMPILED_FROM_BYTES_A_TENSOR * len(sets.leaves))
    return leaves.num_bytes(sets.type) >= least


def _check_devices(names: list[leaves.Leaf], variables: Variables, device: str) -> None:
    """Raises unless every tensor is in the memory of the device."""
    for leaf, variable in zip(names, variables, strict=True):
        # TensorFlow keeps integers and texts of a GPU's steps in the host's memory.
        if not leaf.dtype.is_floating:
            continue
        place = variable.device
        if not place.endswith(f"/device:{device[1:]}"):
            raise RuntimeError(
                f"The server state must be on {device}, but {leaf.name} is on {place}. The "
                "optimizer places its tensors itself: remove its own device setting."
            )
