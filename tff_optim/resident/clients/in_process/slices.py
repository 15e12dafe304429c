"""Data sets whose batches are rows of tensors that the Python process holds.

A pipeline such as `tf.data.Dataset.from_tensor_slices(arrays).batch(20)` cuts tensors into rows, each a
tensor of its own, and stacks the rows again. For small models this takes longer than training. If a
pipeline does nothing else, clients get rows of the tensors, as clients in arrays do. The batches are
the same, and so are the results, to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.resident.clients.arrays import ArrayClients, Arrays, Batches
from tff_optim.resident.graphs.elements import MOST_BYTES


@attrs.frozen
class Rows:
    """The elements of a data set.

    Attributes:
      parts: The tensors, with equal numbers of rows.
      order: The rows, in the order of the elements.
      cuts: Where in `order` each batch begins, and the end; None if each row is an element.
      spec: The data set's `element_spec`.
    """

    parts: list[tf.Tensor]
    order: np.ndarray
    cuts: np.ndarray | None
    spec: Any


def rows_of(cohort: Sequence[Any]) -> list[Rows] | None:
    """The batches of each client; None unless all are such pipelines, with rows of one shape."""
    found: list[Rows] = []
    for data in cohort:
        rows = _elements(data)
        rows = None if rows is None else _in_batches(rows)
        if rows is None or _kinds(rows) != _kinds(found[0] if found else rows):
            return None
        found.append(rows)
    return found


def joined(clients: Sequence[Rows]) -> ArrayClients:
    """Some clients as clients in arrays."""
    lengths = [len(client.parts[0]) for client in clients]
    shifts = np.cumsum([0, *lengths])
    with tf.device("/CPU:0"):
        parts = [tf.concat(part, 0) for part in zip(*(client.parts for client in clients))]
    orders = [client.order + shift for client, shift in zip(clients, shifts)]
    cuts = [client.cuts for client in clients if client.cuts is not None]
    bounds = (np.cumsum([0, *map(len, one)]) for one in (orders, cuts))
    order_bounds, cut_bounds = bounds
    batches = Batches(np.concatenate(orders), order_bounds, np.concatenate(cuts), cut_bounds)
    return ArrayClients.of(range(len(clients)), Arrays(parts, clients[0].spec), batches)


def _fit(parts: Sequence[tf.Tensor], number: int) -> bool:
    """Whether so many rows may be copied: of tensors, or of all batches."""
    row = sum(part.dtype.size * part.shape[1:].num_elements() for part in parts)
    return number * row <= MOST_BYTES


def _kinds(rows: Rows) -> list[Any]:
    return [(part.dtype, part.shape[1:]) for part in rows.parts]


def _elements(data: Any) -> Rows | None:
    """The elements of a data set; None if its pipeline has other steps."""
    kind = type(data).__name__
    if kind in ("_TensorSliceDataset", "_TensorDataset"):
        return _of_tensors(data, kind == "_TensorDataset")
    if kind == "_ConcatenateDataset":
        return _concatenated(*map(_elements, data._input_datasets))
    below = _elements(data._input_dataset) if kind in _STEPS else None
    return None if below is None else _STEPS[kind](below, data)


def _of_tensors(data: Any, are_one: bool) -> Rows | None:
    """The rows of tensors, or whole tensors as one element."""
    tensors = data._tensors
    if not all(isinstance(spec, tf.TensorSpec) for spec in tf.nest.flatten(data.element_spec)):
        return None  # ragged or sparse
    if any(map(tf.is_symbolic_tensor, tensors)):
        return None
    if are_one:
        with tf.device("/CPU:0"):
            tensors = [tf.expand_dims(tensor, 0) for tensor in tensors]  # which copies nothing
    if not _fit(tensors, len(tensors[0])):
        return None
    return Rows(tensors, np.arange(len(tensors[0])), None, data.element_spec)


def _batched(rows: Rows, data: Any) -> Rows | None:
    if rows.cuts is not None:
        return None
    size, number = int(data._batch_size), len(rows.order)
    if bool(data._drop_remainder):
        number -= number % size
    cuts = np.append(np.arange(0, number, size), number)
    return Rows(rows.parts, rows.order[:number], cuts, data.element_spec)


def _taken(rows: Rows, data: Any) -> Rows:
    count = int(data._count)
    return _between(rows, None, None if count < 0 else count)


def _skipped(rows: Rows, data: Any) -> Rows:
    count = int(data._count)
    return _between(rows, len(rows.order) if count < 0 else count, None)


def _between(rows: Rows, first: int | None, last: int | None) -> Rows:
    """The elements from `first` to before `last`."""
    if rows.cuts is None:
        return attrs.evolve(rows, order=rows.order[first:last])
    number = len(rows.cuts) - 1
    begin, end, _ = slice(first, last).indices(number)
    cuts = rows.cuts[begin : end + 1]
    return attrs.evolve(rows, order=rows.order[cuts[0] : cuts[-1]], cuts=cuts - cuts[0])


def _repeated(rows: Rows, data: Any) -> Rows | None:
    count = int(data._count)
    if count < 0 or not _fit(rows.parts, count * len(rows.order)):
        return None
    order, cuts = np.tile(rows.order, count), rows.cuts
    if cuts is not None:
        shifts = len(rows.order) * np.arange(count)
        cuts = np.append(0, (shifts[:, np.newaxis] + cuts[1:]).reshape(-1))
    return attrs.evolve(rows, order=order, cuts=cuts)


def _concatenated(first: Rows | None, second: Rows | None) -> Rows | None:
    if first is None or second is None:
        return None
    if first.cuts is not None or second.cuts is not None or _kinds(first) != _kinds(second):
        first, second = _in_batches(first), _in_batches(second)
        if first is None or second is None or _kinds(first) != _kinds(second):
            return None
    number = max(len(first.order) + len(second.order), len(first.parts[0]) + len(second.parts[0]))
    if not _fit(first.parts, number):
        return None
    with tf.device("/CPU:0"):
        parts = [tf.concat(both, 0) for both in zip(first.parts, second.parts, strict=True)]
    order = np.append(first.order, second.order + len(first.parts[0]))
    cuts = None
    if first.cuts is not None and second.cuts is not None:
        cuts = np.append(first.cuts, second.cuts[1:] + first.cuts[-1])
    return Rows(parts, order, cuts, first.spec)


def _in_batches(rows: Rows) -> Rows | None:
    """The same elements as batches of their own rows; None if they have no rows."""
    if rows.cuts is not None:
        return rows
    if any(part.shape.rank < 2 for part in rows.parts):
        return None
    sizes = {part.shape[1] for part in rows.parts}
    if len(sizes) > 1 or not all(sizes):
        return None
    (size,) = sizes
    with tf.device("/CPU:0"):
        parts = [tf.reshape(part, [-1, *part.shape[2:]]) for part in rows.parts]
    order = (rows.order[:, np.newaxis] * size + np.arange(size)).reshape(-1)
    return Rows(parts, order, size * np.arange(len(rows.order) + 1), rows.spec)


_STEPS: dict[str, Callable[[Rows, Any], Rows | None]] = {
    "_BatchDataset": _batched,
    "_TakeDataset": _taken,
    "_SkipDataset": _skipped,
    "_RepeatDataset": _repeated,
    "_PrefetchDataset": lambda rows, data: rows,
    "_OptionsDataset": lambda rows, data: rows,
}
