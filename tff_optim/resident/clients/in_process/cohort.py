"""The clients of a round in the Python process, a few in one TensorFlow function."""

import threading
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2

from tff_optim import tracing
from tff_optim.resident import leaves
from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.in_process.data import ClientTensors
from tff_optim.resident.graphs.imported import ImportedComputation, as_function, spec_of
from tff_optim.resident.parts import RoundParts


class InProcess:
    """Trains clients side by side, and adds up what they return in their order.

    Args:
      parts: The round.
      device: Where the clients' operations go.
      at_once: How many clients one function trains at most; None to choose by cores and memory.
    """

    def __init__(self, parts: RoundParts, device: str, at_once: int | None):
        self._device = device
        self._work = ImportedComputation(parts.work, device, apart=True)
        self._accumulate = ImportedComputation(parts.accumulate, device, apart=True)
        self._zero = as_function(ImportedComputation(parts.zero, device))
        data_type, context_type = parts.work.type_signature.parameter
        self._data = ClientTensors(data_type)
        self._context = [spec_of(leaf) for leaf in leaves.leaves_of(context_type)]
        self._total = [spec_of(leaf) for leaf in leaves.leaves_of(parts.aggregate_type)]
        self._most = at_once or sizes.at_once(context_type, per_core=2, small=32)
        num_updates = len(self._accumulate.parameter) - len(self._total)
        self._trained = _unless_left_out(self._work, _any_values, num_updates)
        self._added = _unless_left_out(self._accumulate, _first_values, len(self._total))
        # Each client of a function has variables of its own: nothing is shared between them.
        self._lanes: list[Any] = []
        self._functions: dict[int, Any] = {}
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """The device."""
        return f"the Python process's {self._device[1:]}"

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort."""
        kept: list[tf.data.Dataset] = []
        clients = [self._data.of(data, kept) for data in client_data]
        total = self._zero([])
        if not clients:
            return total
        size = sizes.of_function(len(clients), self._most, self._functions)
        function = self._function(size)
        for begin in range(0, len(clients), size):
            if self._closed.is_set():
                raise RuntimeError("This `ResidentProcess` was closed.")
            group = clients[begin : begin + size]
            number = tf.constant(len(group))
            total = function(total, context, group + clients[:1] * (size - len(group)), number)
        return total

    def close(self) -> None:
        """Ends the round after the clients that are being trained, and lets go of variables."""
        self._closed.set()
        self._functions.clear()
        self._lanes.clear()

    def _function(self, size: int) -> Any:
        """A function that adds the work of some clients, the first of `size`, to a total."""
        if size in self._functions:
            return self._functions[size]
        while len(self._lanes) < size:
            self._lanes.append((self._work.make_variables(), self._accumulate.make_variables()))
        lanes = self._lanes[:size]

        def add(
            total: list[Any], context: list[Any], clients: list[list[Any]], number: tf.Tensor
        ) -> list[Any]:
            here = [i < number for i in range(size)]
            updates = [
                self._trained(there, [*data, *context], variables)
                for there, data, (variables, _) in zip(here, clients, lanes, strict=True)
            ]
            for there, update, (_, variables) in zip(here, updates, lanes, strict=True):
                total = self._added(there, [*total, *update], variables)
            return total

        # The concrete function, since a call of the other takes 1.5 ms to find it.
        self._functions[size] = tracing.function(add, autograph=False).get_concrete_function(
            self._total,
            self._context,
            [self._data.specs] * size,
            tf.TensorSpec([], tf.int32),
        )
        return self._functions[size]


def _any_values(arguments: Sequence[tf.Tensor], results: list[tf.TensorSpec]) -> list[tf.Tensor]:
    return [leaves.any_value(spec.shape, spec.dtype) for spec in results]


def _first_values(arguments: Sequence[tf.Tensor], results: list[tf.TensorSpec]) -> list[tf.Tensor]:
    return [tf.identity(x) for x in arguments[: len(results)]]


def _unless_left_out(computation: ImportedComputation, otherwise: Any, num_results: int) -> Any:
    """Makes `<bool, T, variables> -> U`: a computation of a `T`, or else `otherwise`."""
    variables = [tf.TensorSpec([], tf.resource)] * computation.num_variables
    specs = [*map(spec_of, computation.parameter), *variables]
    split = len(computation.parameter)
    results = list(map(spec_of, computation.result[:num_results]))

    def then(*given: Any) -> list[Any]:
        return computation.call(given[:split], given[split:])[:num_results]

    def instead(*given: Any) -> list[Any]:
        return otherwise(given[:split], results)

    branches = [
        tracing.function(branch, autograph=False, input_signature=specs).get_concrete_function()
        for branch in (then, instead)
    ]

    def call(there: tf.Tensor, arguments: list[Any], variables: list[tf.Variable]) -> list[Any]:
        found = tf.raw_ops.If(
            cond=there,
            input=[*arguments, *(v.handle for v in variables)],
            Tout=[spec.dtype for spec in results],
            then_branch=branches[0],
            else_branch=branches[1],
            output_shapes=[spec.shape for spec in results],
        )
        # As `tf.cond` does: what is left out costs nothing then, and may be on several devices.
        found[0].op._set_attr("_lower_using_switch_merge", attr_value_pb2.AttrValue(b=True))
        return list(found)

    return call
