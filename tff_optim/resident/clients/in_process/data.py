"""What clients have, as tensors of the Python process."""

from typing import Any

import tensorflow as tf
import tensorflow_federated as tff
from tensorflow.core.framework import dataset_options_pb2

from tff_optim.resident import leaves
from tff_optim.resident.graphs.imported import spec_of


class ClientTensors:
    """Lists the tensors of what clients have, data sets as variants.

    Args:
      data_type: The type of what a client has.
    """

    def __init__(self, data_type: tff.Type):
        self._type = data_type
        self._leaves = leaves.leaves_of(data_type)
        self._accepted: dict[str, Any] = {}
        self.specs = [spec_of(leaf) for leaf in self._leaves]

    def of(self, data: Any, kept: list[tf.data.Dataset]) -> list[Any]:
        """Lists the tensors of one client.

        Args:
          data: A data set, list of batches, or structure of them.
          kept: Takes up the data sets: a variant does not keep Python's functions in its pipeline.

        Raises:
          TypeError: It is not what the process takes.
        """
        values = leaves.flatten(data, self._type, "client_data")
        return [
            self._tensor(value, leaf, kept)
            for value, leaf in zip(values, self._leaves, strict=True)
        ]

    def _tensor(self, value: Any, leaf: leaves.Leaf, kept: list[tf.data.Dataset]) -> tf.Tensor:
        if leaf.is_tensor:
            (array,) = leaves.as_arrays(value, leaf.type, "client_data")
            return tf.convert_to_tensor(array, leaf.dtype)
        if isinstance(value, tf.data.Dataset):
            self._check_elements(value.element_spec, leaf)
            kept.append(value)
            return _as_it_is(value)
        if not isinstance(value, list | tuple):
            raise TypeError(
                f"`client_data` must hold a `tf.data.Dataset` or a list of batches at {leaf.name}; "
                f"found {type(value).__name__}."
            )
        element_type = leaf.type.element
        batches = [leaves.as_arrays(batch, element_type, "client_data") for batch in value]
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in leaves.leaves_of(element_type)]
        # A data set's variant has no structure: a tuple is as good as the batches' own.
        kept.append(
            tf.data.Dataset.from_generator(
                lambda: map(tuple, batches), output_signature=tuple(specs)
            )
        )
        return tf.data.experimental.to_variant(kept[-1])

    def _check_elements(self, element_spec: Any, leaf: leaves.Leaf) -> None:
        if self._accepted.get(leaf.name) == element_spec:
            return  # as that of the client before
        found = tff.types.tensorflow_to_type(element_spec)
        if not leaf.type.element.is_assignable_from(found):
            raise TypeError(
                f"`client_data` must hold data sets of {leaf.type.element} at {leaf.name}; found "
                f"one of {found}. Batch and map it as the model's `input_spec` says."
            )
        self._accepted[leaf.name] = element_spec


def _as_it_is(dataset: tf.data.Dataset) -> tf.Tensor:
    """The variant of a pipeline, left as its author wrote it, unless he asked for more.

    TensorFlow looks for a faster form of every client's pipeline, and for the best number of
    threads: 1 to 5 ms for each client, which a pipeline of a few batches never earns back.
    """
    given = dataset.options()
    options = dataset_options_pb2.Options()
    if given.autotune.enabled is None:
        options.autotune_options.enabled = False
    if given.experimental_optimization.apply_default_optimizations is None:
        options.optimization_options.apply_default_optimizations = False
    specs = tf.nest.flatten(dataset.element_spec)
    # What `dataset.with_options` does takes 0.2 ms, ten times as long.
    return tf.raw_ops.OptionsDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        serialized_options=options.SerializeToString(),
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
    )
