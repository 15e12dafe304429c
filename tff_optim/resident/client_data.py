"""Checks the data of a process's clients, and makes data sets of lists."""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.resident import data_cures, leaves
from tff_optim.resident.clients.arrays import ArrayClients


def data_of_client(client_type: tff.Type) -> tuple[tff.Type, bool]:
    """The type of a client's data, and whether the paths of a client state come with it."""
    if isinstance(client_type, tff.StructType):
        members = dict(tff.structure.iter_elements(client_type))
        if list(members) == ["data", "client"]:
            return members["data"], True
    return client_type, False


class ClientData:
    """Checks and converts the data of one process's clients, wherever they train.

    It takes the data that plain TFF takes: a `tf.data.Dataset` of batches, or a list of batches, which
    becomes a data set in the dtypes of the process. A batch in a list is a mapping in any order, a tuple
    or a list. Its parts are arrays, tensors or Python numbers.

    It refuses conversions that change values, which plain TFF makes silently: strings or fractions to
    whole numbers, whole numbers that are too large, None as a batch.

    Example:
      >>> taken = ClientData(tff.SequenceType(tff.TensorType(np.float32, [None, 2])))
      >>> taken([[[1, 2], [3, 4]], [[5, 6]]], "ann").element_spec
      TensorSpec(shape=(None, 2), dtype=tf.float32, name=None)
      >>> data = tf.data.Dataset.from_tensor_slices(np.ones([4, 2], np.float32))
      >>> taken(data.batch(2), "bob") is not None
      True
      >>> taken(data, "bob")
      Traceback (most recent call last):
        ...
      TypeError: The data of client 'bob' must be batches of float32[?,2]; found a data set of
      float32[2]. The elements are examples and no batches: The element has 1 dimension and not
      2. Give `dataset.batch(32)`.

    Args:
      data_type: The type of one client's data in the process. Parts that are no `tff.SequenceType` are
        left to TFF.
    """

    def __init__(self, data_type: tff.Type):
        self._type = data_type
        self._accepted: set[tuple[str, int]] = set()  # `element_spec` and type

    def __call__(self, data: Any, client: Any) -> Any:
        """The data of a client, for the process.

        Args:
          data: A `tf.data.Dataset` or a list of batches, with the paths of the client's state if it
            keeps one.
          client: The client's id or position, for the message.

        Raises:
          TypeError: If the process does not take the data. The message names the client, what was
            found, and what to give instead.
        """
        of_client, keeps_state = data_of_client(self._type)
        if not keeps_state:
            return self._taken(data, of_client, client)
        if not isinstance(data, Mapping) or list(data) != ["data", "client"]:
            raise TypeError(
                f"The data of client {client!r} must come with the place of its state, since the "
                f"clients of this process keep one; found {_outline(data)}. Give what `with "
                "store.cohort(ids, data) as cohort:` yields, of `store = "
                "aggregators.ClientStates(ids)`, or train with `simulation.run(..., "
                "client_states=aggregators.ClientStates)`."
            )
        taken = self._taken(data["data"], of_client, client)
        return collections.OrderedDict(data=taken, client=data["client"])

    def cohort(self, cohort: Sequence[Any]) -> Sequence[Any]:
        """The data of several clients, as above; data in arrays stay there.

        Raises:
          TypeError: If the process does not take the data of a client.
        """
        if isinstance(cohort, ArrayClients) and isinstance(self._type, tff.SequenceType):
            if cohort:
                self.check_arrays(cohort.arrays.element_spec, cohort.ids[0])
            return cohort
        return [self(data, client) for client, data in enumerate(cohort)]

    def check_arrays(self, element_spec: Any, client: Any) -> None:
        """Raises `TypeError` if batches of arrays are not what the process takes."""
        wanted = data_of_client(self._type)[0]
        if not isinstance(wanted, tff.SequenceType):
            return
        if _key(element_spec, wanted.element) in self._accepted:
            return
        try:
            empty = tf.nest.map_structure(
                lambda spec: tf.zeros([0, *spec.shape[1:]], spec.dtype), element_spec
            )
            dataset = tf.data.Dataset.from_tensor_slices(empty).batch(1)
            self._taken(dataset, wanted, client)
        except TypeError as error:
            told = str(error).partition(" Give `")[0].replace("a data set of", "arrays that make")
            raise TypeError(f"{told} Give `ClientArrays` such arrays.") from None

    def _taken(self, data: Any, data_type: tff.Type, client: Any) -> Any:
        if isinstance(data_type, tff.StructType):
            parts = leaves.flatten(data, data_type, "client_data")
            types = (leaf.type for leaf in leaves.leaves_of(data_type))
            taken = [
                self._taken(part, of_part, client)
                for part, of_part in zip(parts, types, strict=True)
            ]
            return leaves.pack(taken, data_type)
        if not isinstance(data_type, tff.SequenceType):
            return data
        wanted = data_type.element
        try:
            if isinstance(data, list):
                return _dataset_of(data_cures.arrays_of_list(data, wanted), wanted)
            if not isinstance(data, tf.data.Dataset):
                data_cures.refuse(data, wanted)
            key = _key(data.element_spec, wanted)
            if key not in self._accepted:
                data_cures.check_dataset(data, wanted)
                self._accepted.add(key)
            return data
        except data_cures.Unlike as problem:
            raise TypeError(
                f"The data of client {client!r} must be batches of {wanted}; found "
                f"{_outline(data)}. {problem}"
            ) from None


def _key(element_spec: Any, wanted: tff.Type) -> tuple[str, int]:
    return repr(element_spec), id(wanted)


def explain(error: BaseException, data: Iterable[tuple[Any, Any]]) -> None:
    """Raises a better error if a round failed because a worker cannot call Python.

    Args:
      error: The round's error.
      data: Clients and their data.

    Raises:
      TypeError: If a client's data call functions of the Python process; the message names the client.
    """
    if not any("No OpKernel was registered" in str(one) for one in (error, error.__cause__)):
        return
    for client, one in data:
        if isinstance(one, Mapping):
            one = one.get("data")  # comes with the paths of a state
        if isinstance(one, tf.data.Dataset) and data_cures.calls_python(one):
            raise TypeError(
                f"The data of client {client!r} must be those that a worker can read; found "
                f"{_outline(one)}. {data_cures.OF_PYTHON} Give `list(dataset)`."
            ) from error


def _dataset_of(batches: list[list[Any]], wanted: tff.Type) -> tf.data.Dataset:
    """A data set of batches, whose sizes may differ."""
    if not batches:
        return _dataset_of([_nothing(wanted)], wanted).take(0)
    # One piece for each run of batches of equal size: often all but the last one.
    pieces = []
    for _, same in itertools.groupby(batches, key=lambda arrays: [one.shape for one in arrays]):
        stacked = iter([np.stack(arrays) for arrays in zip(*same, strict=True)])
        pieces.append(tf.data.Dataset.from_tensor_slices(_packed(stacked, wanted)))
    return functools.reduce(tf.data.Dataset.concatenate, pieces)


def _nothing(wanted: tff.Type) -> list[np.ndarray]:
    """A batch of no examples."""
    return [
        np.zeros([size or 0 for size in leaf.type.shape or ()], leaf.dtype.as_numpy_dtype)
        for leaf in leaves.leaves_of(wanted)
    ]


def _packed(values: Iterator[Any], wanted: tff.Type) -> Any:
    """Packs values into the containers in which TFF keeps the order of names."""
    packed = leaves.structured(values, wanted)
    is_part = not isinstance(packed, tff.structure.Struct)
    return packed if is_part else tff.structure.to_odict_or_tuple(packed)


def _outline(data: Any) -> str:
    if isinstance(data, tf.data.Dataset):
        try:
            return f"a data set of {tff.types.tensorflow_to_type(data.element_spec)}"
        except TypeError:  # TFF knows no such elements
            return f"a data set of {data.element_spec}"
    if isinstance(data, np.ndarray | tf.Tensor):
        return f"an array of shape {list(data.shape)}"
    if isinstance(data, list | tuple | Mapping):
        return f"a {type(data).__name__} of {len(data)}"
    return shown(data)
