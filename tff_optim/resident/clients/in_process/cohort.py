"""The clients of a round in the Python process, a few in one TensorFlow function."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff
from tensorflow.core.framework import dataset_options_pb2

from tff_optim import tracing
from tff_optim.resident import leaves
from tff_optim.resident import parts as parts_lib
from tff_optim.resident.graphs.imported import ImportedComputation, spec_of
from tff_optim.resident.parts import RoundParts


class Cohort:
    """Trains clients side by side, and adds up what they return in their order.

    Args:
      parts: The round.
      device: Where the clients' operations go; None to leave it to TensorFlow.
      at_once: How many clients one function trains; None for about two to a core, 32 where the
        model is small, such that the first cohort falls into equal groups where it can.
    """

    def __init__(self, parts: RoundParts, device: str | None, at_once: int | None):
        self._work = ImportedComputation(parts.work, device, several=True)
        self._accumulate = ImportedComputation(parts.accumulate, device, several=True)
        zero = ImportedComputation(parts.zero, device)
        zero_variables = zero.make_variables()
        data_type, context_type = parts.work.type_signature.parameter
        self._data = ClientTensors(data_type)
        self._context = [spec_of(leaf) for leaf in leaves.leaves_of(context_type)]
        self._total = [spec_of(leaf) for leaf in zero.result]
        self._about = parts_lib.clients_at_once(context_type, least=2, most=32)
        self._at_once = at_once
        # Each client of a function has variables of its own: nothing is shared between them.
        self._variables: list[Any] = []
        self._groups: dict[int, Any] = {}
        self._begin = tracing.function(lambda: zero([], zero_variables), autograph=False)

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort.

        Args:
          context: The leaves of what the clients are sent.
          client_data: What each client has.
        """
        total = self._begin()
        kept: list[tf.data.Dataset] = []
        waiting = [self._data.of(data, kept) for data in client_data]
        if self._at_once is None:
            self._at_once = size_of_groups(len(waiting), self._about)
        while waiting:
            # Two functions are traced at most, whatever the size of a cohort: of a group, and of
            # one client. Each costs a second where the model's graph is large.
            number = self._at_once if len(waiting) >= self._at_once else 1
            total = self._group(number)(total, context, waiting[:number])
            del waiting[:number]
        return total

    def _group(self, number: int) -> Any:
        """A function that adds the work of some clients to a total."""
        if number not in self._groups:
            while len(self._variables) < number:
                self._variables.append(
                    (self._work.make_variables(), self._accumulate.make_variables())
                )
            lanes = self._variables[:number]
            num_updates = len(self._accumulate.parameter) - len(self._total)

            def add(total: list[Any], context: list[Any], clients: list[list[Any]]) -> list[Any]:
                updates = [
                    self._work([*data, *context], variables)[:num_updates]
                    for data, (variables, _) in zip(clients, lanes, strict=True)
                ]
                for update, (_, variables) in zip(updates, lanes, strict=True):
                    total = self._accumulate([*total, *update], variables)
                return total

            # The concrete function, since a call of the other takes 1.5 ms to find it.
            self._groups[number] = tracing.function(add, autograph=False).get_concrete_function(
                self._total, self._context, [self._data.specs] * number
            )
        return self._groups[number]


def size_of_groups(number: int, about: int) -> int:
    """Chooses the size of the groups in which a cohort is trained.

    Args:
      number: Clients in the cohort.
      about: The size that is wanted.

    Returns:
      The size nearest to it, by ratio, in which groups are equal; `about` if none is within a
      factor of two.

    Example:
      >>> [size_of_groups(number, 4) for number in (100, 10, 7, 11, 1)]
      [4, 5, 7, 4, 4]
    """
    equal = [size for size in range((about + 1) // 2, 2 * about + 1) if number % size == 0]
    return min(equal, key=lambda size: max(size / about, about / size), default=about)


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
