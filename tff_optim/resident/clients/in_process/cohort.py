"""The clients of a round in the Python process, in one loop of TensorFlow."""

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tff_optim.core import tracing
from tff_optim.core.devices import device_scope
from tff_optim.resident import leaves
from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.arrays import ArrayClients
from tff_optim.resident.clients.in_process import slices
from tff_optim.resident.clients.in_process.data import ClientTensors
from tff_optim.resident.clients.in_process.one_by_one import OneByOne
from tff_optim.resident.clients.in_process.program import NoProgramError
from tff_optim.resident.graphs.imported import ImportedComputation, call_as_it_is, spec_of
from tff_optim.resident.parts import RoundParts

_logger = logging.getLogger(__name__)


class InProcess:
    """Trains clients, some at a time, and adds up their updates in the order of the cohort.

    Args:
      parts: The round.
      device: Where the clients' operations go.
      at_once: The largest number of clients that train at once; None to choose by cores and memory.
    """

    def __init__(self, parts: RoundParts, device: str, at_once: int | None):
        self._parts, self._device = parts, device
        self._zero = ImportedComputation(parts.zero, device)
        self._data = ClientTensors(parts.work.type_signature.parameter[0])
        self._most = at_once or sizes.at_once(parts.context_type, per_core=2, small=32)
        # Functions that add the work of some clients to a total.
        self._of_arrays: Any = None
        self._of_data_sets: Any = None
        try:
            self._of_arrays = OneByOne(parts, device, min(self._most, sizes.cores()))
        except NoProgramError as error:
            self._why_not = error.found
            self._of_data_sets = self._adding()
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """The device."""
        return f"the Python process's {self._device[1:]}"

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort."""
        in_arrays = isinstance(client_data, ArrayClients)
        of_arrays, rows = self._of_arrays, None  # which `close` takes from `self`
        if of_arrays is None and in_arrays:
            _logger.info("Clients in arrays train as data sets; found %s.", self._why_not)
        elif of_arrays is not None and not in_arrays:
            rows = slices.rows_of(client_data)
        total = self._zero([])
        positions = range(len(client_data))
        # Between two calls Ctrl-C gets through.
        for some in sizes.split(positions, math.ceil(len(client_data) / self._most)):
            if self._closed.is_set():
                raise RuntimeError("This `ResidentProcess` was closed.")
            if rows is not None:
                clients = slices.joined([rows[i] for i in some])
                total = of_arrays(total, context, clients, range(len(some)))
            elif in_arrays and of_arrays is not None:
                total = of_arrays(total, context, client_data, some)
            else:
                total = self._add_data_sets(total, context, [client_data[i] for i in some])
        return total

    def close(self) -> None:
        """Releases the functions. A running round ends after the clients in training."""
        self._closed.set()
        self._of_arrays = self._of_data_sets = None

    def _add_data_sets(self, total: list[Any], context: list[Any], clients: list[Any]) -> list[Any]:
        if self._of_data_sets is None:
            self._of_data_sets = self._adding()
        kept: list[tf.data.Dataset] = []
        with tf.device("/CPU:0"):
            tensors = [self._data.of(data, kept) for data in clients]
            packed = tf.stack([tf.raw_ops.OptionalFromValue(components=one) for one in tensors])
        return self._of_data_sets(total, context, packed)

    def _adding(self) -> Any:
        """Builds the function that adds the work of some packed clients to a total."""
        parts = self._parts
        work = ImportedComputation(parts.work, self._device, apart=True)
        accumulate = ImportedComputation(parts.accumulate, self._device, apart=True)
        context = [spec_of(leaf) for leaf in leaves.leaves_of(parts.context_type)]
        zero = [spec_of(leaf) for leaf in leaves.leaves_of(parts.aggregate_type)]
        num_updates = len(accumulate.parameter) - len(zero)
        specs = self._data.specs

        def add(total: list[Any], context: list[Any], clients: Any) -> Any:
            def add_one(number: tf.Tensor, total: list[Any]) -> tuple[tf.Tensor, list[Any]]:
                with tf.device("/CPU:0"):
                    data = tf.raw_ops.OptionalGetValue(
                        optional=clients[number],
                        output_types=[spec.dtype for spec in specs],
                        output_shapes=[spec.shape for spec in specs],
                    )
                with device_scope(self._device):
                    update = work([*data, *context])[:num_updates]
                    return number + 1, accumulate([*total, *update])

            with device_scope(self._device):
                return tf.while_loop(
                    lambda number, _: number < tf.shape(clients)[0],
                    add_one,
                    [0, total],
                    [tf.TensorShape([]), [x.shape for x in total]],
                    parallel_iterations=self._most,
                )[1]

        function = tracing.function(add, autograph=False).get_concrete_function(
            zero, context, tf.TensorSpec([None], tf.variant)
        )

        def call(total: list[Any], context: list[Any], clients: tf.Tensor) -> list[tf.Tensor]:
            # Calling a concrete function takes longer, and optimises the loop.
            return call_as_it_is(function, [*total, *context, clients], zero)

        return call
