"""How a loop gets the elements of a client's data.

An iterator hands elements over one by one, each through another thread. For small batches this takes
several times as long as training on them, and in a pipeline with a `map` making the iterator alone takes
milliseconds. Where possible, a client's whole data are therefore read as one element, and every element
is sliced from it: the same tensors in the same order.
"""

import os

import attrs
import tensorflow as tf

from tff_optim.core.types import Function, GraphFunction, Tensors

# Bytes of a client's data that are read in one go, while 32 clients train side by side.
MOST_BYTES = 8 << 20


@attrs.frozen
class Stacked:
    """The elements of a data set, stacked along a new first dimension, padded with zeros.

    Attributes:
      dtypes: The dtypes of an element's tensors.
      shapes: Their shapes; unknown sizes are None.
    """

    dtypes: list[tf.DType]
    shapes: list[tf.TensorShape]

    @property
    def are_possible(self) -> bool:
        """Whether elements differ at most in their number of rows."""
        return bool(self.dtypes) and all(
            dtype not in (tf.variant, tf.resource)
            and shape.rank is not None
            and shape[1:].is_fully_defined()
            for dtype, shape in zip(self.dtypes, self.shapes, strict=True)
        )

    @property
    def _of_rows(self) -> list[int]:
        """The positions of the tensors with an unknown number of rows."""
        return [i for i, shape in enumerate(self.shapes) if not shape.is_fully_defined()]

    @property
    def types(self) -> list[tf.DType]:
        """The dtypes of the shapes of tensors with unknown rows, and of the stacks."""
        return [*(tf.int32 for _ in self._of_rows), *self.dtypes]

    def fit(self, data: tf.Tensor) -> tf.Tensor:
        """Whether the number of a data set's elements is known, positive and small enough."""
        row = sum(
            dtype.size * (shape[1:].num_elements() if shape.rank else 1)
            for dtype, shape in zip(self.dtypes, self.shapes, strict=True)
        )
        number = tf.raw_ops.DatasetCardinality(input_dataset=data)  # negative if endless or unknown
        return (number > 0) & (number <= MOST_BYTES // max(row, 1))

    def read(self, data: tf.Tensor) -> list[tf.Tensor]:
        """Reads a data set that fits."""

        def with_rows(*element: tf.Tensor) -> list[tf.Tensor]:
            return [*(tf.shape(element[i]) for i in self._of_rows), *element]

        specs = [tf.TensorSpec(*spec) for spec in zip(self.shapes, self.dtypes, strict=True)]
        counted = _of_data_set(with_rows).get_concrete_function(*specs)
        shapes = [*(tf.TensorShape([self.shapes[i].rank]) for i in self._of_rows), *self.shapes]
        number = tf.raw_ops.DatasetCardinality(input_dataset=data)
        mapped = tf.raw_ops.MapDataset(
            input_dataset=data,
            other_arguments=[],
            f=counted,
            output_types=self.types,
            output_shapes=shapes,
            use_inter_op_parallelism=False,
            preserve_cardinality=True,
        )
        stacked_shapes = [tf.TensorShape([None]).concatenate(shape) for shape in shapes]
        batched = tf.raw_ops.PaddedBatchDatasetV2(
            input_dataset=mapped,
            batch_size=number,
            padded_shapes=[
                tf.constant([-1 if size is None else size for size in shape], tf.int64)
                for shape in shapes
            ],
            padding_values=[tf.zeros([], dtype) for dtype in self.types],
            drop_remainder=False,
            output_shapes=stacked_shapes,
        )
        return _in_some_thread(
            lambda: tf.raw_ops.DatasetToSingleElement(
                dataset=batched, output_types=self.types, output_shapes=stacked_shapes
            )
        )

    def nothing(self) -> list[tf.Tensor]:
        """The stacks of no element."""
        shapes = [*([self.shapes[i].rank] for i in self._of_rows), *self.shapes]
        return [
            tf.zeros([0, *(size or 0 for size in shape)], dtype)
            for shape, dtype in zip(shapes, self.types, strict=True)
        ]

    def following(self, iterator: tf.Tensor) -> tf.Tensor:
        """The next element of an iterator, as an optional."""
        return tf.raw_ops.IteratorGetNextAsOptional(
            iterator=iterator, output_types=self.dtypes, output_shapes=self.shapes
        )

    def number(self, held: Tensors) -> tf.Tensor:
        """The number of elements, int32."""
        return tf.shape(held[-1])[0]

    def element(self, held: Tensors, i: tf.Tensor) -> list[tf.Tensor]:
        """The tensors of one element."""
        counted = self._of_rows
        sizes, stacks = held[: len(counted)], held[len(counted) :]
        tensors = [tf.gather(stack, i) for stack in stacks]
        for position, of_element in zip(counted, sizes, strict=True):
            size = tf.gather(of_element, i)
            tensors[position] = tf.slice(tensors[position], [0] * self.shapes[position].rank, size)
        return tensors


def _of_data_set(function: Function) -> GraphFunction:
    """A function that data sets run as it is; any other is optimised anew for each data set."""
    return tf.function(
        function, autograph=False, experimental_attributes={"experimental_ints_on_device": True}
    )


def _in_some_thread(read: Function) -> list[tf.Tensor]:
    """Adds a reading operation for each core, of which each call runs one at random.

    All calls of one such operation run in one thread, one after the other.
    """
    threads = len(os.sched_getaffinity(0))
    number = tf.raw_ops.RandomUniformInt(
        shape=tf.constant([], tf.int32), minval=0, maxval=threads, seed=1, seed2=1
    )
    return tf.switch_case(number, [read] * threads)


def pack(held: Tensors) -> tf.Tensor:
    """Packs several tensors into one variant."""
    return tf.raw_ops.OptionalFromValue(components=held)


def unpack(packed: tf.Tensor, types: list[tf.DType]) -> list[tf.Tensor]:
    """The tensors that are packed into a variant."""
    return tf.raw_ops.OptionalGetValue(
        optional=packed, output_types=types, output_shapes=[tf.TensorShape(None)] * len(types)
    )
