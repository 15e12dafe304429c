"""Training of clients whose data are in arrays, in one loop that reads no data set."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import tensorflow as tf
from tensorflow.python.eager.wrap_function import VariableHolder, WrappedFunction

from tff_optim.core.devices import device_scope
from tff_optim.resident import leaves
from tff_optim.resident.clients.arrays import ArrayClients
from tff_optim.resident.clients.in_process.batches import cut
from tff_optim.resident.clients.in_process.evaluation import Tensors, add, evaluate, loop
from tff_optim.resident.clients.in_process.program import (
    SCAN,
    NoProgramError,
    Operation,
    Program,
    kinds,
    parted,
    simplified_across_loops,
)
from tff_optim.resident.clients.in_process.recording import record
from tff_optim.resident.graphs.imported import call_as_it_is, spec_of
from tff_optim.resident.parts import RoundParts

_MOST_BYTES = 64 << 20  # of rows that are gathered at a time
# On a CPU TensorFlow uses oneDNN's kernels of these if it visits the forward operation first. In a loop
# it may visit them first, and then uses slower kernels.
_NOT_IN_LOOPS = {"LRNGrad", "MaxPoolGrad"}


class OneByOne:
    """Adds clients' updates to an aggregate.

    Operations and their order are those of the clients' graph, so results are equal to the bit.

    Args:
      parts: The round.
      device: Where the clients' operations go.
      at_once: The largest number of clients that train at once.

    Raises:
      NoProgramError: If no program can stand for the clients' graph.
    """

    def __init__(self, parts: RoundParts, device: str, at_once: int):
        data_type, context_type = parts.work.type_signature.parameter
        if len(leaves.leaves_of(data_type)) > 1:
            raise NoProgramError("more than one data set of a client")
        work, accumulate = record(parts.work), record(parts.accumulate)
        if work.checks or accumulate.checks:
            raise NoProgramError("checks, whose messages a program does not have")
        if odd := _NOT_IN_LOOPS & kinds(work.program.operations):
            raise NoProgramError(f"{min(odd)}, which a loop computes with another kernel")
        self._device, self._at_once = device, at_once
        self._total = total = [spec_of(leaf) for leaf in leaves.leaves_of(parts.aggregate_type)]
        context = [spec_of(leaf) for leaf in leaves.leaves_of(context_type)]
        self._accumulate = accumulate.program
        num_updates = len(self._accumulate.inputs) - len(total)
        self._client = simplified_across_loops(work.program.first(num_updates, False))
        specs = [
            total,
            context,
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, 1], tf.int32),
            tf.TensorSpec([None], tf.int64),
            _specs_of_rows(data_type),
        ]
        self._add = _function(self._added, specs)

    def __call__(
        self, total: list[Any], context: list[Any], clients: ArrayClients, some: range
    ) -> list[Any]:
        """Adds the work of some clients to a total.

        Args:
          total: The leaves of an aggregate.
          context: The leaves of the clients' context.
          clients: The cohort.
          some: The positions of the clients.
        """
        arrays = clients.arrays.on(self._device)
        first = some.start
        while first < some.stop:
            order, edges, counts = cut(clients, first, some.stop - first, _MOST_BYTES)
            with tf.device("/CPU:0"):
                ends = tf.constant([0, *counts.cumsum()], tf.int32)
                given = [ends, tf.constant(edges[:, None]), tf.constant(order)]
            # Grappler would change the rounding.
            total = call_as_it_is(self._add, [*total, *context, *given, *arrays], self._total)
            first += len(counts)
        return total

    def _added(
        self,
        total: list[tf.Tensor],
        context: list[tf.Tensor],
        ends: tf.Tensor,
        edges: tf.Tensor,
        order: tf.Tensor,
        arrays: list[tf.Tensor],
    ) -> list[tf.Tensor]:
        """Builds the graph.

        Args:
          total: The aggregate before.
          context: The clients' context.
          ends: Where each client's batches begin in `edges`, and the end.
          edges: Where each batch begins in `order`, and the end.
          order: The rows of the clients' batches in the arrays.
          arrays: The rows of all clients.
        """
        with device_scope(self._device):
            once, each = parted(self._client)
            found = dict(zip(self._client.inputs, context, strict=True))
            add(once.operations, found)
            uses = list(each.uses)
            # Constants of the sum must be outside of the loop, too.
            constant, summing = parted(self._accumulate, self._accumulate.inputs)
            constants: Tensors = {}
            add(constant.operations, constants)
            used = list(summing.uses)
            given = [
                edges,
                [tf.gather(array, order) for array in arrays],
                [found[value] for value in uses],
            ]

            def of_client(*given: Any) -> list[tf.Tensor]:
                with device_scope(self._device):
                    return _client(each, uses, *given)

            inlined = _function(of_client, [*given, *[tf.TensorSpec([], tf.int32)] * 2])
            # Kept, since the loop calls it by its name alone.
            self._work = work = WrappedFunction(
                inlined.graph, VariableHolder(), {"_noinline": True}
            )
            specs = [tf.TensorSpec(x.shape, x.dtype) for x in work.outputs]
            zero, one = tf.constant(0), tf.constant(1)
            outside = [constants[value] for value in used]

            def turn(state: list[tf.Tensor], others: list[Any]) -> list[tf.Tensor]:
                at, *total = state
                _, ends, zero, one, given, outside = others
                following = at + one
                span = [
                    tf.raw_ops.GatherV2(params=ends, indices=i, axis=zero) for i in (at, following)
                ]
                # A function, whose operations are another thread's, for a loop's are all in one.
                # By its name: TensorFlow cannot tell the shapes in a function with a `loop`.
                update = call_as_it_is(work.name, tf.nest.flatten([given, span]), specs)
                known = dict(zip(used, outside, strict=True))
                return [following, *evaluate(summing, [*total, *update], known)]

            results = loop(
                lambda state, others: state[0] < others[0],
                turn,
                [zero, *total],
                [tf.size(ends) - 1, ends, zero, one, given, outside],
                self._at_once,
            )[1:]
            work.add_to_graph(tf.compat.v1.get_default_graph())
            return results


@attrs.frozen
class _Shared:
    """Tensors that are the same in all iterations of a client's loops.

    Attributes:
      zero: 0.
      one: 1.
      stride: [1].
      edges: Where each batch begins in `rows`, and the end.
      rows: The rows of all clients.
    """

    zero: tf.Tensor
    one: tf.Tensor
    stride: tf.Tensor
    edges: tf.Tensor
    rows: list[tf.Tensor]


def _function(build: Callable[..., Any], arguments: list[Any]) -> Any:
    """A function of arguments like these, without control dependencies, which `loop` does not allow."""
    flat = tf.nest.flatten(arguments)
    return tf.compat.v1.wrap_function(
        lambda *given: build(*tf.nest.pack_sequence_as(arguments, given)),
        [tf.TensorSpec(x.shape, x.dtype) for x in flat],
    )


def _client(
    program: Program,
    uses: list[Any],
    edges: tf.Tensor,
    rows: list[tf.Tensor],
    values: list[tf.Tensor],
    *span: tf.Tensor,
) -> list[tf.Tensor]:
    """Adds a client's program.

    Args:
      program: The program.
      uses: The values that it uses from outside.
      edges: Where each batch begins in `rows`, and the end.
      rows: The rows of all clients.
      values: The tensors that `uses` stand for.
      *span: Where the client's batches begin in `edges`, and their end.
    """
    shared = _Shared(tf.constant(0), tf.constant(1), tf.constant([1]), edges, rows)
    found = dict(zip(uses, values, strict=True))
    for one in program.operations:
        if one.kind == SCAN:
            found.update(zip(one.outputs, _scan(one, found, shared, span), strict=True))
        else:
            add([one], found)
    return [found[value] for value in program.outputs]


def _scan(
    one: Operation, found: Tensors, shared: _Shared, span: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Adds a loop over the batches of a client."""
    (body,) = one.programs
    used = list(body.uses)
    num_batch = len(body.inputs) - len(one.inputs)

    def turn(state: list[tf.Tensor], others: list[Any]) -> list[tf.Tensor]:
        at, *state = state
        _, shared, values = others
        following = at + shared.one
        begin, end = (
            tf.raw_ops.GatherV2(params=shared.edges, indices=i, axis=shared.zero)
            for i in (at, following)
        )
        batch = [
            tf.raw_ops.StridedSlice(input=rows, begin=begin, end=end, strides=shared.stride)
            for rows in shared.rows[:num_batch]
        ]
        known = dict(zip(used, values, strict=True))
        return [following, *evaluate(body, [*state, *batch], known)]

    begin, end = span
    return loop(
        lambda state, others: state[0] < others[0],
        turn,
        [begin, *(found[value] for value in one.inputs)],
        [end, shared, [found[value] for value in used]],
        1,
    )[1:]


def _specs_of_rows(data_type: Any) -> list[tf.TensorSpec]:
    """The specs of the arrays of clients' data, in the order of a data set's parts."""
    (sequence,) = leaves.leaves_of(data_type)
    element = sequence.type.element
    specs = [spec_of(leaf) for leaf in leaves.leaves_of(element)]
    return [
        tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
        for spec in tf.nest.flatten(leaves.pack(specs, element))
    ]
