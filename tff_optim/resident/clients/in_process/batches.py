"""Batches of many clients in a few tensors, and the order in which clients take steps together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core import tracing
from tff_optim.resident import leaves
from tff_optim.resident.clients.arrays import ArrayClients
from tff_optim.resident.graphs.elements import Stacked
from tff_optim.resident.graphs.imported import spec_of


class Batches(NamedTuple):
    """The batches of a group of clients at one leaf of their data, in the order of the steps.

    Clients whose next batches have equal shapes take a step together. Batches are never padded, since
    a client's graph takes means over all rows.

    Attributes:
      rows: For each part of a batch, the rows of all batches.
      bounds: For each part, the row where each step begins, and the end.
      shapes: For each part, the shape of a batch at each step.
      ends: For each step, where its clients end in `clients`.
      clients: The clients of all steps.
      everyone: At each step, whether all clients take it, in their order.
    """

    rows: list[Any]
    bounds: list[Any]
    shapes: list[Any]
    ends: Any
    clients: Any
    everyone: Any


class Reader:
    """Reads clients' data sets.

    Args:
      element_type: The type of an element.
    """

    def __init__(self, element_type: tff.Type):
        specs = [spec_of(leaf) for leaf in leaves.leaves_of(element_type)]
        # In the order of a data set's variant.
        self._specs: list[tf.TensorSpec] = tf.nest.flatten(leaves.pack(specs, element_type))
        self._read = tracing.function(self._some, autograph=False).get_concrete_function(
            tf.TensorSpec([None], tf.variant), tf.TensorSpec([], tf.int64)
        )

    @property
    def specs(self) -> Batches:
        """The specs of the batches that `__call__` returns."""
        numbers = tf.TensorSpec([None], tf.int32)
        return Batches(
            [tf.TensorSpec([None, *_row_shape(spec)], spec.dtype) for spec in self._specs],
            [numbers for _ in self._specs],
            [tf.TensorSpec([None, spec.shape.rank], tf.int32) for spec in self._specs],
            numbers,
            numbers,
            tf.TensorSpec([None], tf.bool),
        )

    def __call__(
        self, data: Sequence[tf.Tensor], most_bytes: int = tf.int64.max
    ) -> tuple[Batches, int]:
        """Reads all batches of some clients.

        Args:
          data: The variant of each client's data set.
          most_bytes: The size of data after which no further client is read.

        Returns:
          The batches, and the number of clients that were read.
        """
        rows, shapes, counts = self._read(tf.stack(data), tf.constant(most_bytes, tf.int64))
        sizes = shapes.numpy()
        ranks = [spec.shape.rank for spec in self._specs]
        lengths = [
            np.prod(shape[:, :1] if _is_by_rows(spec) else shape, axis=1, dtype=np.int32)
            for spec, shape in zip(self._specs, _split(sizes, ranks), strict=True)
        ]
        steps = _Steps(sizes, counts.numpy())
        orders = [steps.rows(_starts(one), one) for one in lengths]
        in_order = [tf.gather(part, order) for part, order in zip(rows, orders, strict=True)]
        return steps.batches(in_order, lengths, ranks), int(tf.size(counts))

    def _some(
        self, data: tf.Tensor, most_bytes: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """The rows of all batches, the batches' shapes, and the number of batches of each client."""

        def of_client(client: tf.Tensor, size: tf.Tensor, counts: Any, *arrays: Any) -> Any:
            found = self._of_client(data[client])
            size += sum(tf.size(part, tf.int64) * part.dtype.size for part in found)
            written = [x.write(client, y) for x, y in zip(arrays, found, strict=True)]
            return client + 1, size, counts.write(client, tf.shape(found[-1])[0]), *written

        _, _, counts, *arrays = tf.while_loop(
            lambda client, size, *unused: (client < tf.shape(data)[0]) & (size < most_bytes),
            of_client,
            [tf.constant(0), tf.constant(0, tf.int64), _array(tf.int32, []), *self._arrays()],
        )
        *rows, shapes = (x.concat() for x in arrays)
        return rows, shapes, counts.stack()

    def _arrays(self) -> list[tf.TensorArray]:
        """An array for the rows of each part, and one for the batches' shapes."""
        rows = [_array(spec.dtype, [None, *_row_shape(spec)]) for spec in self._specs]
        return [*rows, _array(tf.int32, [None, sum(spec.shape.rank for spec in self._specs)])]

    def _of_client(self, data: tf.Tensor) -> list[tf.Tensor]:
        """The rows of a client's batches, and the batches' shapes."""
        stacked = Stacked([x.dtype for x in self._specs], [x.shape for x in self._specs])
        known = all(_is_by_rows(x) or x.shape.is_fully_defined() for x in self._specs)
        if not (known and stacked.are_possible):
            return self._one_by_one(data)
        found = tf.cond(
            stacked.fit(data),
            lambda: self._at_once(stacked.read(data)),
            lambda: self._one_by_one(data),
        )
        return tf.nest.flatten(found)

    def _at_once(self, held: list[tf.Tensor]) -> list[tf.Tensor]:
        """What `_of_client` returns, from all batches as one padded element."""
        sizes = iter(held[: len(held) - len(self._specs)])  # of parts with an unknown size
        stacks = held[len(held) - len(self._specs) :]
        rows, shapes = [], []
        for spec, stack in zip(self._specs, stacks, strict=True):
            flat = tf.reshape(stack, [-1, *_row_shape(spec)])
            shape = tf.repeat(tf.shape(stack)[tf.newaxis, 1:], tf.shape(stack)[0], 0)
            if not spec.shape.is_fully_defined():
                shape = next(sizes)
                used = tf.reshape(tf.sequence_mask(shape[:, 0], tf.shape(stack)[1]), [-1])
                flat = tf.cond(tf.reduce_all(used), *_unless(flat, used))
            rows.append(flat)
            shapes.append(shape)
        return [*rows, tf.concat(shapes, 1)]

    def _one_by_one(self, data: tf.Tensor) -> list[tf.Tensor]:
        """What `_of_client` returns, read by an iterator."""
        dtypes = [spec.dtype for spec in self._specs]
        shapes = [spec.shape for spec in self._specs]
        iterator = tf.raw_ops.AnonymousIteratorV3(output_types=dtypes, output_shapes=shapes)
        made = tf.raw_ops.MakeIterator(dataset=data, iterator=iterator)

        def following() -> tf.Tensor:
            return tf.raw_ops.IteratorGetNextAsOptional(
                iterator=iterator, output_types=dtypes, output_shapes=shapes
            )

        def take(optional: tf.Tensor, at: tf.Tensor, *arrays: Any) -> Any:
            parts = tf.raw_ops.OptionalGetValue(
                optional=optional, output_types=dtypes, output_shapes=shapes
            )
            shape = tf.concat([tf.shape(part) for part in parts], 0)
            flat = [
                part if _is_by_rows(spec) else tf.reshape(part, [-1])
                for part, spec in zip(parts, self._specs, strict=True)
            ]
            written = [
                x.write(at, y) for x, y in zip(arrays, [*flat, shape[tf.newaxis]], strict=True)
            ]
            with tf.control_dependencies(parts):
                return following(), at + 1, *written

        with tf.control_dependencies([made]):
            first = following()
        _, _, *arrays = tf.while_loop(
            lambda optional, *unused: tf.raw_ops.OptionalHasValue(optional=optional),
            take,
            [first, tf.constant(0), *self._arrays()],
        )
        return [x.concat() for x in arrays]


def _unless(rows: tf.Tensor, used: tf.Tensor) -> tuple[Any, Any]:
    """Two branches: all rows, and the used rows alone."""
    return lambda: tf.identity(rows), lambda: tf.boolean_mask(rows, used)


def _array(dtype: tf.DType, shape: Sequence[int | None]) -> tf.TensorArray:
    return tf.TensorArray(dtype, 0, True, element_shape=shape, infer_shape=False)


class Cut(NamedTuple):
    """The batches of some clients whose data are in arrays.

    Attributes:
      order: The rows of the arrays, in the order in which the clients take them.
      edges: int32 `[batches + 1]`: where each batch begins in `order`, and the end.
      counts: The number of batches of each client.
    """

    order: np.ndarray
    edges: np.ndarray
    counts: np.ndarray


def cut(clients: ArrayClients, first: int, most: int, most_bytes: int) -> Cut:
    """Cuts the rows of some clients into batches.

    Args:
      clients: The cohort.
      first: The position of the first client.
      most: The largest number of clients.
      most_bytes: The size of data after which no further client is taken.
    """
    batches, bounds = clients.batches, clients.batches.order_bounds
    rows_before = bounds[:-1][first : first + most] - bounds[first]
    number = int(np.count_nonzero(rows_before * clients.arrays.row_bytes < most_bytes))
    begins = batches.cut_bounds[first : first + number + 1]
    counts = np.diff(begins) - 1
    # Each client's cuts begin with a 0, the end of the client before.
    is_begin = np.ones(begins[-1] - begins[0], bool)
    is_begin[begins[1:] - begins[0] - 1] = False
    starts = batches.cuts[begins[0] : begins[-1]][is_begin] + np.repeat(
        rows_before[:number], counts
    )
    order = batches.order[bounds[first] : bounds[first + number]]
    return Cut(order, np.append(starts, len(order)).astype(np.int32), counts)


def from_arrays(
    clients: ArrayClients, device: str, first: int, most: int, most_bytes: int
) -> tuple[Batches, int]:
    """Gathers the batches of some clients whose data are in arrays.

    Args:
      clients: The cohort.
      device: The device of the arrays.
      first: The position of the first client.
      most: The largest number of clients.
      most_bytes: The size of data after which no further client is taken.

    Returns:
      The batches, and the number of clients.
    """
    arrays = clients.arrays.on(device)
    order, edges, counts = cut(clients, first, most, most_bytes)
    ranks = [array.shape.rank for array in arrays]
    sizes = np.diff(edges)
    shapes = np.concatenate(
        [np.broadcast_to([0, *x.shape[1:]], [len(sizes), x.shape.rank]) for x in arrays], 1
    ).astype(np.int32)
    shapes[:, np.cumsum(ranks) - ranks] = sizes[:, np.newaxis]
    steps = _Steps(shapes, counts)
    some = tf.constant(order[steps.rows(edges[:-1], sizes)])
    rows = [tf.gather(array, some) for array in arrays]
    return steps.batches(rows, [sizes] * len(rows), ranks), len(counts)


def _is_by_rows(spec: tf.TensorSpec) -> bool:
    return spec.shape.rank > 0 and spec.shape[1:].is_fully_defined()


def _row_shape(spec: tf.TensorSpec) -> list[int]:
    """The shape of a row. Parts with further unknown sizes are kept as single numbers."""
    return spec.shape[1:].as_list() if _is_by_rows(spec) else []


def _split(shapes: np.ndarray, ranks: list[int]) -> list[np.ndarray]:
    """The shapes of each part."""
    return np.split(shapes, np.cumsum(ranks)[:-1], axis=1)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


class _Steps:
    """The steps of a group of clients: who takes each step, and with which batches.

    Each client takes its batches in order. A step is for the batch shape that most clients wait for.

    Args:
      shapes: The sizes of all parts of each batch, one client after the other.
      counts: The number of batches of each client.
    """

    def __init__(self, shapes: np.ndarray, counts: np.ndarray):
        self._kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
        self._kind_of = kind_of.reshape(-1)
        ends = np.cumsum(counts)
        following = ends - counts
        clients, taken, self._everyone = [], [], []
        while (waiting := np.flatnonzero(following < ends)).size:
            wanted = self._kind_of[following[waiting]]
            some = waiting[wanted == np.argmax(np.bincount(wanted))]
            clients.append(some)
            taken.append(following[some])
            self._everyone.append(len(some) == len(counts))
            following[some] += 1
        self._ends = np.cumsum([0, *map(len, clients)])
        self._clients, self._taken = (
            np.concatenate([np.zeros(0, int), *one]) for one in (clients, taken)
        )

    def rows(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The rows of all batches in the order of the steps, if batches begin at `starts`."""
        lengths = lengths[self._taken]
        shifts = starts[self._taken] - _starts(lengths)
        return np.repeat(shifts, lengths) + np.arange(lengths.sum())

    def batches(self, rows: list[Any], lengths: list[np.ndarray], ranks: list[int]) -> Batches:
        """The batches.

        Args:
          rows: The rows of each part, in the order of the steps.
          lengths: For each part, the number of rows of each batch.
          ranks: The number of sizes in `shapes` that belong to each part.
        """
        shapes = self._kinds[self._kind_of[self._taken[self._ends[:-1]]]]
        bounds = [np.append(0, np.cumsum(one[self._taken]))[self._ends] for one in lengths]
        return Batches(
            rows,
            [tf.constant(one, tf.int32) for one in bounds],
            [tf.constant(one, tf.int32) for one in _split(shapes, ranks)],
            tf.constant(self._ends[1:], tf.int32),
            tf.constant(self._clients, tf.int32),
            tf.constant(self._everyone, tf.bool, [len(self._everyone)]),
        )
