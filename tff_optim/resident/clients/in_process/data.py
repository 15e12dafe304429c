"""Clients' data as tensors of the Python process."""

import math

import tensorflow as tf
import tensorflow_federated as tff
from tensorflow.core.framework import dataset_options_pb2

from tff_optim.core.types import ClientDataset, Leaf
from tff_optim.resident import leaves
from tff_optim.resident.graphs.elements import MOST_BYTES
from tff_optim.resident.graphs.imported import spec_of


class ClientTensors:
    """Lists the tensors of clients' data, with data sets as variants.

    Args:
      data_type: The type of a client's data.
    """

    def __init__(self, data_type: tff.Type):
        self._type = data_type
        self._leaves = leaves.leaves_of(data_type)
        self.specs = [spec_of(leaf) for leaf in self._leaves]

    def of(self, data: ClientDataset, kept: list[tf.data.Dataset]) -> list[tf.Tensor]:
        """Lists the tensors of one client.

        Args:
          data: A data set, or a structure of data sets and tensors, as `ClientData` returns it.
          kept: A list that takes up the data sets. A variant does not keep the Python functions of its
            pipeline alive.

        Raises:
          TypeError: If the process does not take a tensor.
        """
        values = leaves.flatten(data, self._type, "client_data")
        return [
            self._tensor(value, leaf, kept)
            for value, leaf in zip(values, self._leaves, strict=True)
        ]

    def _tensor(self, value: Leaf, leaf: leaves.Leaf, kept: list[tf.data.Dataset]) -> tf.Tensor:
        if leaf.is_tensor:
            (array,) = leaves.as_arrays([value], leaf.type, "client_data")
            return tf.convert_to_tensor(array, leaf.dtype)
        kept.append(value)
        return _as_it_is(value)


def _as_it_is(dataset: tf.data.Dataset) -> tf.Tensor:
    """The variant of a pipeline, without optimisation unless its author asked for it.

    For every client TensorFlow would look for a faster form of the pipeline and for the best number of
    threads. That takes 1 to 5 ms, which a pipeline of a few batches never earns back.

    The number of elements is hidden where there may be too many to read in one go.
    """
    given = dataset.options()
    options = dataset_options_pb2.Options()
    if given.autotune.enabled is None:
        options.autotune_options.enabled = False
    if given.experimental_optimization.apply_default_optimizations is None:
        options.optimization_options.apply_default_optimizations = False
    specs = tf.nest.flatten(dataset.element_spec)
    variant = tf.data.experimental.to_variant(dataset)
    types, shapes = [spec.dtype for spec in specs], [spec.shape for spec in specs]
    number = int(tf.raw_ops.DatasetCardinality(input_dataset=variant))
    if number > 0 and number * _bytes_of_element(dataset, specs) > MOST_BYTES:
        variant = tf.raw_ops.ConcatenateDataset(
            input_dataset=variant,
            another_dataset=_none_of_unknown_number(types, shapes),
            output_types=types,
            output_shapes=shapes,
        )
    # `dataset.with_options` takes 0.2 ms, ten times as long.
    return tf.raw_ops.OptionsDataset(
        input_dataset=variant,
        serialized_options=options.SerializeToString(),
        output_types=types,
        output_shapes=shapes,
    )


def _bytes_of_element(dataset: tf.data.Dataset, specs: list[tf.TensorSpec]) -> float:
    """The size of an element with as many rows as the pipeline's last `batch` gives."""
    size = 0.0
    for spec in specs:
        if spec.shape.rank is None or not spec.shape[1:].is_fully_defined():
            return math.inf
        is_known = spec.shape.is_fully_defined()
        rows = 1.0 if is_known else _rows_of_batch(dataset)
        size += rows * spec.dtype.size * math.prod(n for n in spec.shape if n is not None)
    return size


def _rows_of_batch(dataset: tf.data.Dataset) -> float:
    """The batch size of a pipeline; infinity if it is unknown."""
    if hasattr(dataset, "_batch_size"):
        return int(dataset._batch_size)
    rows = _known_rows(dataset)
    if rows is not None:
        return rows
    inputs = dataset._inputs()
    if len(inputs) == 1 and _known_rows(inputs[0]) is not None:
        return math.inf  # a function gives as many as it likes
    return max(map(_rows_of_batch, inputs), default=math.inf)


def _known_rows(dataset: tf.data.Dataset) -> int | None:
    """The number of rows of every element; None if it is unknown."""
    shapes = [spec.shape for spec in tf.nest.flatten(dataset.element_spec)]
    if not all(shape.is_fully_defined() for shape in shapes):
        return None
    return max((shape[0] for shape in shapes if shape.rank), default=1)


def _none_of_unknown_number(types: list[tf.DType], shapes: list[tf.TensorShape]) -> tf.Tensor:
    """A data set without elements, whose number TensorFlow does not know."""
    empty = [tf.zeros([0, *(n or 0 for n in shape)], dtype) for dtype, shape in zip(types, shapes)]
    source = tf.raw_ops.TensorDataset(components=empty, output_shapes=[x.shape for x in empty])
    return tf.raw_ops.UnbatchDataset(input_dataset=source, output_types=types, output_shapes=shapes)
