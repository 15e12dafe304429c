"""The batches of many clients as a few tensors, and the order in which clients take steps together."""

import math
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
    """The batches of a group of clients at one leaf of their data, and the order to take them in.

    Clients whose next batches have equal shapes take a step together. A batch is never padded: it is
    its client's graph that takes the mean over its rows.

    Attributes:
      rows: For each part of a batch, that part of all batches, one below the other.
      starts: For each part, the row where each batch begins.
      shapes: For each part, its shape at each step.
      ends: Where each step's clients end in `clients`.
      clients: The clients of all steps.
      batches: The batch of each of them.
      everyone: At each step, whether all clients take it, in their order.
    """

    rows: list[Any]
    starts: list[Any]
    shapes: list[Any]
    ends: Any
    clients: Any
    batches: Any
    everyone: Any


class Reader:
    """Reads the data sets of clients.

    Args:
      element_type: The type of their elements.
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
        """What `__call__` returns."""
        numbers = tf.TensorSpec([None], tf.int32)
        return Batches(
            [tf.TensorSpec([None, *_row_shape(spec)], spec.dtype) for spec in self._specs],
            [numbers for _ in self._specs],
            [tf.TensorSpec([None, spec.shape.rank], tf.int32) for spec in self._specs],
            numbers,
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
          most_bytes: After how many no further client is read.

        Returns:
          The batches, and of how many clients they are.
        """
        rows, shapes, counts = self._read(tf.stack(data), tf.constant(most_bytes, tf.int64))
        sizes = shapes.numpy()
        ranks = [spec.shape.rank for spec in self._specs]
        starts = []
        for spec, shape in zip(self._specs, _split(sizes, ranks), strict=True):
            of_rows = shape[:, :1] if _is_by_rows(spec) else shape
            starts.append(_starts(np.prod(of_rows, axis=1, dtype=np.int32)))
        return _arranged(list(rows), starts, sizes, ranks, counts.numpy()), int(tf.size(counts))

    def _some(
        self, data: tf.Tensor, most_bytes: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """The rows of all batches of clients, the batches' shapes, and how many each client has."""

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
        """One for the rows of each part, and one for the batches' shapes."""
        rows = [_array(spec.dtype, [None, *_row_shape(spec)]) for spec in self._specs]
        return [*rows, _array(tf.int32, [None, sum(spec.shape.rank for spec in self._specs)])]

    def _of_client(self, data: tf.Tensor) -> list[tf.Tensor]:
        """The rows of all batches of a client, and the batches' shapes."""
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
        """The same, of all batches as one padded element."""
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
        """The same, by an iterator."""
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
    """What gives all rows, and what gives those that are used."""
    return lambda: tf.identity(rows), lambda: tf.boolean_mask(rows, used)


def _array(dtype: tf.DType, shape: Sequence[int | None]) -> tf.TensorArray:
    return tf.TensorArray(dtype, 0, True, element_shape=shape, infer_shape=False)


def from_arrays(
    clients: ArrayClients, device: str, first: int, most: int, most_bytes: int
) -> tuple[Batches, int]:
    """Gathers the batches of some clients whose data are in arrays.

    Args:
      clients: The cohort.
      device: Where the arrays are.
      first: The first of the clients.
      most: How many at most.
      most_bytes: After how many no further client is taken.

    Returns:
      The batches, and of how many clients they are.
    """
    arrays = clients.arrays.on(device)
    order, bounds = clients.batches.order, clients.batches.order_bounds
    row = sum(array.dtype.size * math.prod(array.shape[1:]) for array in arrays)
    rows_before = bounds[:-1][first : first + most] - bounds[first]
    number = int(np.count_nonzero(rows_before * row < most_bytes))
    begins = clients.batches.cut_bounds[first : first + number + 1]
    cuts = clients.batches.cuts[begins[0] : begins[-1]]
    counts = np.diff(begins) - 1
    is_begin = np.ones(len(cuts), bool)
    is_begin[begins[1:] - begins[0] - 1] = False
    at = np.flatnonzero(is_begin)
    starts = cuts[at] + np.repeat(rows_before[:number], counts)
    sizes = cuts[at + 1] - cuts[at]
    shapes = np.concatenate(
        [np.broadcast_to([0, *array.shape[1:]], [len(at), array.shape.rank]) for array in arrays], 1
    )
    ranks = [array.shape.rank for array in arrays]
    shapes[:, np.cumsum(ranks) - ranks] = sizes[:, np.newaxis]
    some = tf.constant(order[bounds[first] : bounds[first + number]])
    rows = [tf.gather(array, some) for array in arrays]
    return _arranged(rows, [starts] * len(arrays), shapes, ranks, counts), number


def _is_by_rows(spec: tf.TensorSpec) -> bool:
    return spec.shape.rank > 0 and spec.shape[1:].is_fully_defined()


def _row_shape(spec: tf.TensorSpec) -> list[int]:
    """The shape of a row; a part of which more than its first size is unknown is kept in numbers."""
    return spec.shape[1:].as_list() if _is_by_rows(spec) else []


def _split(shapes: np.ndarray, ranks: list[int]) -> list[np.ndarray]:
    """The shapes of each part."""
    return np.split(shapes, np.cumsum(ranks)[:-1], axis=1)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _arranged(
    rows: list[Any],
    starts: list[np.ndarray],
    shapes: np.ndarray,
    ranks: list[int],
    counts: np.ndarray,
) -> Batches:
    """Puts the batches of clients in the order in which they are taken.

    Args:
      rows: For each part, that part of all batches.
      starts: For each part, the row where each batch begins.
      shapes: Of each batch, the sizes of all parts.
      ranks: How many of them belong to each part.
      counts: The number of batches of each client.
    """
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    steps = _steps(kind_of, counts)
    clients = [who for who, _ in steps]
    taken = [which for _, which in steps]
    at_steps = kinds[[kind_of[which[0]] for which in taken]].reshape(len(steps), -1)
    everyone = [np.array_equal(who, np.arange(len(counts))) for who in clients]
    return Batches(
        rows,
        [tf.constant(x, tf.int32) for x in starts],
        [tf.constant(x, tf.int32) for x in _split(at_steps, ranks)],
        tf.constant(np.cumsum([len(who) for who in clients]), tf.int32),
        tf.constant(np.concatenate([*clients, np.zeros(0)]), tf.int32),
        tf.constant(np.concatenate([*taken, np.zeros(0)]), tf.int32),
        tf.constant(everyone, tf.bool, [len(steps)]),
    )


def _steps(kinds: np.ndarray, counts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The steps of a group: who takes it, and which batches they take.

    Each client takes its batches in their order. Of those that could be next, a step takes the kind
    that most clients wait for.

    Args:
      kinds: The kind of each batch, one client's after the other's.
      counts: The number of batches of each client.
    """
    ends = np.cumsum(counts)
    following = ends - counts
    steps = []
    while (waiting := np.flatnonzero(following < ends)).size:
        wanted = kinds[following[waiting]]
        clients = waiting[wanted == np.argmax(np.bincount(wanted))]
        steps.append((clients, following[clients].copy()))
        following[clients] += 1
    return steps
