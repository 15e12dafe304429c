"""A client's program for many clients at once."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.parallel_for.pfor import PFor, wrap

from tff_optim.resident.clients.in_process.batches import Batches
from tff_optim.resident.clients.in_process.evaluation import Tensors, add, evaluate
from tff_optim.resident.clients.in_process.program import (
    SCAN,
    WHILE,
    NoProgramError,
    Operation,
    Program,
    Value,
    parted,
    simplified,
)

# What TensorFlow has no vectorised form of, or a wrong one, as operations that it has a right one of.


def _l2_loss(one: Operation, x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(x * x) / 2


def _segment_sum(one: Operation, x: tf.Tensor, segments: tf.Tensor) -> tf.Tensor:
    return tf.math.unsorted_segment_sum(x, segments, segments[-1] + 1)


def _segment_max(one: Operation, x: tf.Tensor, segments: tf.Tensor) -> tf.Tensor:
    number = segments[-1] + 1
    largest = tf.math.unsorted_segment_max(x, segments, number)
    rows = tf.math.unsorted_segment_sum(tf.ones_like(segments), segments, number)
    rows = tf.reshape(rows, tf.concat([[number], tf.ones([tf.rank(x) - 1], number.dtype)], 0))
    return tf.where(rows > 0, largest, tf.zeros_like(largest))  # of nothing it is 0


def _unsorted_segments(one: Operation, x: tf.Tensor, segments: tf.Tensor, number: tf.Tensor) -> Any:
    # Rows of negative segments count for nothing. TensorFlow's count for the client before.
    segments = tf.where(segments < 0, tf.cast(number, segments.dtype), segments)
    return getattr(tf.raw_ops, one.kind)(data=x, segment_ids=segments, num_segments=number + 1)[
        :number
    ]


def _scatter_add(one: Operation, x: tf.Tensor, indices: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    if indices.shape.rank is None or indices.shape[-1] != 1:
        raise NoProgramError(f"{one.kind} ({one.name}) at several indices")
    rows = tf.reshape(indices, [-1])
    by = tf.reshape(by, tf.concat([[-1], tf.shape(x)[1:]], 0))
    return x + tf.math.unsorted_segment_sum(by, rows, tf.shape(x)[0])


def _size(one: Operation, x: tf.Tensor) -> tf.Tensor:
    # TensorFlow's divides by the number of clients, of which a branch may have none.
    return tf.reduce_prod(tf.shape(x, one.outputs[0].dtype))


def _squeeze(one: Operation, x: tf.Tensor) -> tf.Tensor | None:
    # Without axes, TensorFlow's takes away the dimension of the clients too, if there is one client.
    if one.attributes["squeeze_dims"].list.i:
        return None
    shape = tf.shape(x)
    return tf.reshape(x, tf.boolean_mask(shape, shape != 1))


def _one_slice(one: Operation, x: tf.Tensor, begin: tf.Tensor, *unused: tf.Tensor) -> Any:
    """`x[i]` with an `i` that may differ between clients."""
    if begin.op.type == "Const" or begin.shape != [1] or one.attributes["shrink_axis_mask"].i != 1:
        return None
    i = begin[0]
    return tf.gather(x, tf.where(i < 0, i + tf.shape(x, begin.dtype)[0], i))


_OTHER_FORMS: dict[str, Callable[..., Any]] = {
    "StridedSlice": _one_slice,
    "L2Loss": _l2_loss,
    "Size": _size,
    "Squeeze": _squeeze,
    "SegmentSum": _segment_sum,
    "SegmentMax": _segment_max,
    "TensorScatterAdd": _scatter_add,
    **dict.fromkeys(
        [f"UnsortedSegment{name}" for name in ("Max", "Min", "Prod", "Sum")], _unsorted_segments
    ),
}


class SideBySide:
    """A client's program for many clients at once.

    The part that all clients share is computed once. The rest is vectorised: each step of a loop over
    data, and each piece between such loops.

    Args:
      program: The program of one client.
      stacked: For each input, whether each client has its own.
    """

    def __init__(self, program: Program, stacked: Sequence[bool]):
        program = simplified(program)
        self._program = program
        self._stacked = [v for v, own in zip(program.inputs, stacked, strict=True) if own]
        self._once, each = parted(program, self._stacked)
        self._varying = set(self._stacked).union(*(one.outputs for one in each.operations))
        pieces: list[list[Operation]] = [[]]
        for one in each.operations:
            if one.kind == SCAN:
                pieces += [[one], []]
            else:
                pieces[-1].append(one)
        self._pieces = [piece for piece in pieces if piece]

    def __call__(
        self, inputs: Sequence[tf.Tensor], batches: Mapping[int, Batches], number: tf.Tensor
    ) -> list[tf.Tensor]:
        """Adds the program to the current graph.

        Args:
          inputs: The inputs; those that differ between clients are stacked.
          batches: The batches at each leaf of the clients' data.
          number: The number of clients.

        Returns:
          The results, stacked over clients.
        """
        found = dict(zip(self._program.inputs, inputs, strict=True))
        add(self._once.operations, found)
        for i, piece in enumerate(self._pieces):
            if piece[0].kind == SCAN:
                source = piece[0].source
                assert source is not None
                found.update(self._scan(piece[0], batches[source], number, found))
                continue
            later = set(self._program.outputs).union(
                *(one.uses for after in self._pieces[i + 1 :] for one in after)
            )
            made = [value for one in piece for value in one.outputs if value in later]
            used = set().union(*(one.uses for one in piece)) & found.keys()
            given = [value for value in used if value in self._varying]
            results = _vectorised(Program(tuple(given), tuple(piece), tuple(made)), found)(
                number, [found[value] for value in given]
            )
            found.update(zip(made, results, strict=True))
        return [
            found[value] if value in self._varying else _repeated(found[value], number)
            for value in self._program.outputs
        ]

    def _scan(
        self, one: Operation, batches: Batches, number: tf.Tensor, found: Tensors
    ) -> dict[Value, tf.Tensor]:
        (body,) = one.programs
        num_state = len(one.inputs)
        start = [
            found[value] if value in self._varying else _repeated(found[value], number)
            for value in one.inputs
        ]
        own = [value for value in body.uses if value in self._varying]
        program = Program((*body.inputs, *own), body.operations, body.outputs)
        step = _vectorised(program, found)
        others = [found[value] for value in own]
        state_shapes = [tf.TensorShape([None]).concatenate(x.shape[1:]) for x in start]

        def turn(at: tf.Tensor, first: tf.Tensor, *state: tf.Tensor) -> Any:
            last = batches.ends[at]
            clients, everyone = batches.clients[first:last], batches.everyone[at]

            def chosen(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
                if not tensors:
                    return []
                return tf.nest.flatten(
                    tf.cond(
                        everyone,
                        lambda: [tf.identity(x) for x in tensors],
                        lambda: [tf.gather(x, clients) for x in tensors],
                    )
                )

            number = tf.size(clients)
            shapes = [value.shape for value in body.inputs[num_state:]]
            parts = parts_of_step(batches, at, number, shapes)
            new = step(number, [*chosen(state), *parts, *chosen(others)])
            after = tf.nest.flatten(
                tf.cond(
                    everyone,
                    lambda: [tf.identity(x) for x in new],
                    lambda: [
                        tf.tensor_scatter_nd_update(x, clients[:, tf.newaxis], y)
                        for x, y in zip(state, new, strict=True)
                    ],
                )
            )
            return at + 1, last, *map(tf.ensure_shape, after, state_shapes)

        zero = tf.constant(0)
        _, _, *after = tf.while_loop(
            lambda at, *unused: at < tf.size(batches.ends),
            turn,
            [zero, zero, *start],
            shape_invariants=[zero.shape, zero.shape, *state_shapes],
        )
        return dict(zip(one.outputs, after, strict=True))


def parts_of_step(
    batches: Batches, at: tf.Tensor, number: tf.Tensor, shapes: Sequence[tf.TensorShape]
) -> list[tf.Tensor]:
    """The parts of the batches in a step.

    Args:
      batches: All batches.
      at: The step.
      number: The number of clients that take it.
      shapes: The shapes of a batch's parts, as far as they are known.
    """
    every = zip(batches.rows, batches.bounds, batches.shapes)
    return [
        tf.ensure_shape(
            tf.reshape(rows[bounds[at] : bounds[at + 1]], tf.concat([[number], sizes[at]], 0)),
            tf.TensorShape([None]).concatenate(shape),
        )
        for shape, (rows, bounds, sizes) in zip(shapes, every)
    ]


def sum_over(
    accumulate: Program, total: Sequence[tf.Tensor], updates: Sequence[tf.Tensor], number: tf.Tensor
) -> list[tf.Tensor]:
    """Adds the updates of many clients to an aggregate.

    If `accumulate` adds a value to each part of the aggregate, this adds the values' sums over clients.
    Otherwise it evaluates `accumulate` for one client after the other.

    Args:
      accumulate: `<A, U> -> A`.
      total: The leaves of an `A`.
      updates: The leaves of a `U`, stacked over clients.
      number: The number of clients.
    """
    summands = _summands(accumulate, len(total))
    if summands is not None:
        added = SideBySide(summands, [True] * len(updates))(updates, {}, number)
        return [x + tf.reduce_sum(y, 0) for x, y in zip(total, added, strict=True)]

    def turn(client: tf.Tensor, *aggregate: tf.Tensor) -> Any:
        new = evaluate(accumulate, [*aggregate, *(x[client] for x in updates)], {})
        return client + 1, *new

    zero = tf.constant(0)
    shapes = [value.shape for value in accumulate.inputs[: len(total)]]
    return list(
        tf.while_loop(
            lambda client, *unused: client < number,
            turn,
            [zero, *total],
            shape_invariants=[zero.shape, *shapes],
        )[1:]
    )


def _summands(accumulate: Program, num_total: int) -> Program | None:
    """`U` to the values that `accumulate` adds to the leaves of `A`; None if it does anything else."""
    total, updates = accumulate.inputs[:num_total], accumulate.inputs[num_total:]
    made_by = {value: one for one in accumulate.operations for value in one.outputs}
    added = []
    for before, after in zip(total, accumulate.outputs, strict=True):
        one = made_by.get(after)
        if one is None or one.kind not in ("Add", "AddV2"):
            return None
        others = [value for value in one.inputs if value is not before]
        if len(others) != 1 or not (before.dtype.is_floating or before.dtype.is_integer):
            return None
        added += others
    program = Program(updates, accumulate.operations, tuple(added))
    return None if program.uses else program


def _vectorised(program: Program, found: Mapping[Value, Any]) -> Callable[..., list[tf.Tensor]]:
    """`program` as a function of a number of clients and of stacked inputs."""

    def call(number: tf.Tensor, stacked: list[tf.Tensor]) -> list[tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        before = set(graph.get_operations())
        client = tf.compat.v1.placeholder_with_default(0, [])
        inputs = [tf.compat.v1.placeholder(x.dtype, x.shape[1:]) for x in stacked]
        try:
            results = [tf.identity(x) for x in evaluate(program, inputs, found, _OTHER_FORMS)]
            operations = set(graph.get_operations()) - before
            # What `tf.vectorized_map` is made of. That would gather its arguments, one copy for each
            # step.
            converter = PFor(client, number, operations, fallback_to_while_loop=False)
            for one, all_of_them in zip(inputs, stacked, strict=True):
                converter._add_conversion(one, wrap(all_of_them, True))
            return [converter.convert(result) for result in results]
        except NoProgramError:
            raise
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise NoProgramError(_found(error, program)) from error

    return call


def _found(error: Exception, program: Program) -> str:
    """Names the operation that TensorFlow cannot vectorise, from its message."""
    text = str(error)
    for pattern in (r"No pfor vectorization defined for (\w+)", r"of op '(\w+)' expected"):
        if match := re.search(pattern, text):
            return f"{match[1]} of each client's own values"
    loops = [f"{one.kind} ({one.name})" for one in program.operations if one.kind == WHILE]
    told = text.splitlines()[0] if text else repr(error)
    return f"{' or '.join(loops) or 'an operation'} that it cannot: {told}"


def _repeated(tensor: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    result = tf.broadcast_to(tensor, tf.concat([[number], tf.shape(tensor)], 0))
    return tf.ensure_shape(result, tf.TensorShape([None]).concatenate(tensor.shape))
