"""The clients of a round in the Python process, a few in one TensorFlow function."""

import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import tracing
from tff_optim.resident import leaves
from tff_optim.resident.in_process.imported import ImportedComputation
from tff_optim.resident.parts import RoundParts


class Cohort:
    """Trains clients side by side, and adds up what they return in their order.

    Args:
      parts: The round.
      device: Where the clients' operations go; None to leave it to TensorFlow.
      at_once: How many clients one function trains; None for about two to a core, such that the
        first cohort falls into equal groups where it can.
    """

    def __init__(self, parts: RoundParts, device: str | None, at_once: int | None):
        work = ImportedComputation(parts.work, device)
        accumulate = ImportedComputation(parts.accumulate, device)
        zero = ImportedComputation(parts.zero, device)
        data_type, _ = parts.work.type_signature.parameter
        self._data_type = data_type
        self._at_once = at_once
        # Each client of a function has variables of its own: nothing is shared between them.
        lanes: list[Any] = []
        self._lanes = lanes
        self._make_lane = lambda: (work.make_variables(), accumulate.make_variables())
        num_parameters = len(accumulate.parameter)
        zero_variables = zero.make_variables()

        def begin() -> list[Any]:
            return zero([], zero_variables)

        def add(total: list[Any], context: list[Any], clients: list[list[Any]]) -> list[Any]:
            updates = [
                work([*data, *context], lanes[i][0])[: num_parameters - len(total)]
                for i, data in enumerate(clients)
            ]
            for i, update in enumerate(updates):
                total = accumulate([*total, *update], lanes[i][1])
            return total

        self._begin = tracing.function(begin, autograph=False)
        self._add = tracing.function(add, autograph=False, reduce_retracing=True)

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort.

        Args:
          context: The leaves of what the clients are sent.
          client_data: What each client has.
        """
        total = self._begin()
        kept: list[tf.data.Dataset] = []
        waiting = [client_tensors(data, self._data_type, kept) for data in client_data]
        if self._at_once is None:
            self._at_once = size_of_groups(len(waiting), 2 * (os.cpu_count() or 1))
        while len(self._lanes) < self._at_once:
            self._lanes.append(self._make_lane())
        while waiting:
            # Two functions are traced at most, whatever the size of a cohort: of a group, and of
            # one client. Each costs a second where the model's graph is large.
            number = self._at_once if len(waiting) >= self._at_once else 1
            total = self._add(total, context, waiting[:number])
            del waiting[:number]
        return total


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


def client_tensors(data: Any, data_type: tff.Type, kept: list[tf.data.Dataset]) -> list[Any]:
    """Lists the tensors of a client's data, data sets as variants.

    Args:
      data: A data set, list of batches, or structure of them.
      data_type: Its type.
      kept: Takes up the data sets: a variant does not keep Python's functions in its pipeline.

    Raises:
      TypeError: It is not what the process takes.
    """
    return [
        _tensor(value, leaf, kept)
        for value, leaf in zip(
            leaves.flatten(data, data_type, "client_data"), leaves.leaves_of(data_type), strict=True
        )
    ]


def _tensor(value: Any, leaf: leaves.Leaf, kept: list[tf.data.Dataset]) -> tf.Tensor:
    if leaf.is_tensor:
        (array,) = leaves.as_arrays(value, leaf.type, "client_data")
        return tf.convert_to_tensor(array, leaf.dtype)
    element_type = leaf.type.element
    if isinstance(value, tf.data.Dataset):
        found = tff.types.tensorflow_to_type(value.element_spec)
        if not element_type.is_assignable_from(found):
            raise TypeError(
                f"`client_data` must hold data sets of {element_type} at {leaf.name}; found one "
                f"of {found}. Batch and map it as the model's `input_spec` says."
            )
        kept.append(_as_it_is(value))
        return tf.data.experimental.to_variant(kept[-1])
    if not isinstance(value, list | tuple):
        raise TypeError(
            f"`client_data` must hold a `tf.data.Dataset` or a list of batches at {leaf.name}; "
            f"found {type(value).__name__}."
        )
    batches = [leaves.as_arrays(batch, element_type, "client_data") for batch in value]
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in leaves.leaves_of(element_type)]
    # A data set's variant has no structure: a tuple is as good as the batches' own.
    kept.append(
        tf.data.Dataset.from_generator(lambda: map(tuple, batches), output_signature=tuple(specs))
    )
    return tf.data.experimental.to_variant(kept[-1])


def _as_it_is(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Leaves a pipeline as its author wrote it, unless he asked for more.

    TensorFlow looks for a faster form of every client's pipeline, and for the best number of
    threads: 1 to 5 ms for each client, which a pipeline of a few batches never earns back.
    """
    given = dataset.options()
    options = tf.data.Options()
    if given.autotune.enabled is None:
        options.autotune.enabled = False
    if given.experimental_optimization.apply_default_optimizations is None:
        options.experimental_optimization.apply_default_optimizations = False
    return dataset.with_options(options)
