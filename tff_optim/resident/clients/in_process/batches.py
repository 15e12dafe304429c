"""The batches of many clients as a few tensors, and the order in which clients take steps together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core import tracing
from tff_optim.resident import leaves
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
        self._read = tracing.function(self._all, autograph=False).get_concrete_function(
            tf.TensorSpec([None], tf.variant)
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

    def __call__(self, data: Sequence[tf.Tensor]) -> Batches:
        """Reads all batches of some clients.

        Args:
          data: The variant of each client's data set.
        """
        rows, shapes, counts = self._read(tf.stack(data))
        ranks = [spec.shape.rank for spec in self._specs]
        of_parts = np.split(shapes.numpy(), np.cumsum(ranks)[:-1], axis=1)
        starts = []
        for spec, part in zip(self._specs, of_parts, strict=True):
            sizes = part[:, :1] if _is_by_rows(spec) else part
            starts.append(_starts(np.prod(sizes, axis=1, dtype=np.int32)))
        kinds, of_batches = np.unique(shapes.numpy(), axis=0, return_inverse=True)
        steps = _steps(of_batches.reshape(-1), counts.numpy())
        clients = [clients for clients, _ in steps]
        everyone = [np.array_equal(x, np.arange(len(data))) for x in clients]
        taken = [batches for _, batches in steps]
        step_kinds = kinds[[of_batches.reshape(-1)[batches[0]] for batches in taken]]
        return Batches(
            list(rows),
            [tf.constant(x, tf.int32) for x in starts],
            [
                tf.constant(x, tf.int32, [len(steps), rank])
                for x, rank in zip(
                    np.split(step_kinds, np.cumsum(ranks)[:-1], axis=1), ranks, strict=True
                )
            ],
            tf.constant(np.cumsum([len(x) for x in clients]), tf.int32),
            tf.constant(np.concatenate([*clients, np.zeros(0)]), tf.int32),
            tf.constant(np.concatenate([*taken, np.zeros(0)]), tf.int32),
            tf.constant(everyone, tf.bool, [len(steps)]),
        )

    def _all(self, data: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """The rows of all batches of all clients, the batches' shapes, and each client's number."""
        dtypes = [spec.dtype for spec in self._specs]
        shapes = [spec.shape for spec in self._specs]

        def array(dtype: tf.DType, shape: Sequence[int | None]) -> tf.TensorArray:
            return tf.TensorArray(dtype, 0, True, element_shape=shape, infer_shape=False)

        def of_client(client: tf.Tensor, done: tf.Tensor, counts: Any, *arrays: Any) -> Any:
            iterator = tf.raw_ops.AnonymousIteratorV3(output_types=dtypes, output_shapes=shapes)
            made = tf.raw_ops.MakeIterator(dataset=data[client], iterator=iterator)

            def following() -> tf.Tensor:
                return tf.raw_ops.IteratorGetNextAsOptional(
                    iterator=iterator, output_types=dtypes, output_shapes=shapes
                )

            def take(optional: tf.Tensor, at: tf.Tensor, *arrays: Any) -> Any:
                parts = tf.raw_ops.OptionalGetValue(
                    optional=optional, output_types=dtypes, output_shapes=shapes
                )
                size = tf.concat([tf.shape(part) for part in parts], 0)
                flat = [
                    part if _is_by_rows(spec) else tf.reshape(part, [-1])
                    for part, spec in zip(parts, self._specs, strict=True)
                ]
                written = [x.write(at, y) for x, y in zip(arrays, [*flat, size], strict=True)]
                with tf.control_dependencies(parts):
                    return following(), at + 1, *written

            with tf.control_dependencies([made]):
                first = following()
            _, end, *arrays = tf.while_loop(
                lambda optional, *unused: tf.raw_ops.OptionalHasValue(optional=optional),
                take,
                [first, done, *arrays],
            )
            return client + 1, end, counts.write(client, end - done), *arrays

        zero = tf.constant(0)
        ranks = sum(spec.shape.rank for spec in self._specs)
        arrays = [array(spec.dtype, [None, *_row_shape(spec)]) for spec in self._specs]
        _, _, counts, *arrays, sizes = tf.while_loop(
            lambda client, *unused: client < tf.shape(data)[0],
            of_client,
            [zero, zero, array(tf.int32, []), *arrays, array(tf.int32, [ranks])],
        )
        return [x.concat() for x in arrays], sizes.stack(), counts.stack()


def _is_by_rows(spec: tf.TensorSpec) -> bool:
    return spec.shape.rank > 0 and spec.shape[1:].is_fully_defined()


def _row_shape(spec: tf.TensorSpec) -> list[int]:
    """The shape of a row; a part of which more than its first size is unknown is kept in numbers."""
    return spec.shape[1:].as_list() if _is_by_rows(spec) else []


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


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
