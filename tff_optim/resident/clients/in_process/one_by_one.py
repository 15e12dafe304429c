"""Training of clients whose data are in arrays, in one loop without calls and data sets."""

from collections.abc import Sequence
from typing import Any

import attrs
import tensorflow as tf

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
        # Unlike a `tf.function`, it adds no control dependencies, which these loops do not allow.
        self._add = tf.compat.v1.wrap_function(
            lambda *flat: self._added(*tf.nest.pack_sequence_as(specs, flat)),
            tf.nest.flatten(specs),
        )

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
            shared = _Shared(
                zero=tf.constant(0),
                one=tf.constant(1),
                stride=tf.constant([1]),
                edges=edges,
                rows=[tf.gather(array, order) for array in arrays],
                values=[found[value] for value in uses],
                constants=[constants[value] for value in used],
            )

            def turn(state: list[tf.Tensor], others: list[Any]) -> list[tf.Tensor]:
                at, *total = state
                _, ends, shared = others
                following = at + shared.one
                span = [_element(ends, i, shared) for i in (at, following)]
                update = _client(each, uses, shared, span)
                outside = dict(zip(used, shared.constants, strict=True))
                return [following, *evaluate(summing, [*total, *update], outside)]

            return loop(
                lambda state, others: state[0] < others[0],
                turn,
                [shared.zero, *total],
                [tf.size(ends) - 1, ends, shared],
                self._at_once,
            )[1:]


@attrs.frozen
class _Shared:
    """Tensors that are the same in all iterations of the loops.

    Attributes:
      zero: 0.
      one: 1.
      stride: [1].
      edges: Where each batch begins in `rows`, and the end.
      rows: The rows of all clients.
      values: Values from outside that a client's program uses.
      constants: Values from outside that the sum uses.
    """

    zero: tf.Tensor
    one: tf.Tensor
    stride: tf.Tensor
    edges: tf.Tensor
    rows: list[tf.Tensor]
    values: list[tf.Tensor]
    constants: list[tf.Tensor]


def _client(
    program: Program, uses: list[Any], shared: _Shared, span: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Adds a client's program. `uses` lists the shared values, and `span` bounds its batches."""
    found = dict(zip(uses, shared.values, strict=True))
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
        _, shared = others
        following = at + shared.one
        begin, end = (_element(shared.edges, i, shared) for i in (at, following))
        batch = [
            tf.raw_ops.StridedSlice(input=rows, begin=begin, end=end, strides=shared.stride)
            for rows in shared.rows[:num_batch]
        ]
        values = dict(zip(used, shared.values, strict=True))
        return [following, *evaluate(body, [*state, *batch], values)]

    begin, end = span
    return loop(
        lambda state, others: state[0] < others[0],
        turn,
        [begin, *(found[value] for value in one.inputs)],
        [end, attrs.evolve(shared, values=[found[value] for value in used])],
        1,
    )[1:]


def _element(tensor: tf.Tensor, i: tf.Tensor, shared: _Shared) -> tf.Tensor:
    return tf.raw_ops.GatherV2(params=tensor, indices=i, axis=shared.zero)


def _specs_of_rows(data_type: Any) -> list[tf.TensorSpec]:
    """The specs of the arrays of clients' data, in the order of a data set's parts."""
    (sequence,) = leaves.leaves_of(data_type)
    element = sequence.type.element
    specs = [spec_of(leaf) for leaf in leaves.leaves_of(element)]
    return [
        tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
        for spec in tf.nest.flatten(leaves.pack(specs, element))
    ]
