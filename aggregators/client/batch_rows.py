"""The parts of a batch: some have a row for each example, others are shared by all examples."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import tensorflow as tf
import tree

from aggregators.core.checks import asserted
from aggregators.core.types import Batch

_T = TypeVar("_T")
_CURE = (
    'If all examples of a batch share a part, name it: `ExampleClipping(..., shared_parts=["{}"])`.'
)


def _parts(batch: Batch, shared: Sequence[str]) -> list[tuple[str, tf.Tensor, bool]]:
    """Each part's name, the part, and whether it has rows, in the order of `tf.nest.flatten`."""
    named = [("/".join(map(str, path)), part) for path, part in tree.flatten_with_path(batch)]
    return [(name, part, not any(_is_of(name, s) for s in shared)) for name, part in named]


def _is_of(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}/")


def check_parts(spec: Batch, shared: Sequence[str]) -> None:
    """Raises `ValueError` for a batch whose static shapes show parts without a row for each example.

    Such a part is a scalar, or its first dimension differs from the others', or is known where theirs
    is not: the number of examples differs between batches, so a known dimension does not count them.

    Args:
      spec: The batch: tensors, or their `tf.TensorSpec`s.
      shared: Names of the parts that examples share.
    """
    parts = _parts(spec, shared)
    names = [name for name, _, _ in parts]
    unknown = [s for s in shared if not any(_is_of(name, s) for name in names)]
    twice = sorted({name for name in names if names.count(name) > 1} & set(shared))
    if unknown or twice:
        raise ValueError(
            "`shared_parts` must name parts of a batch, one each, or structures of them; found "
            f"{(unknown or twice)[0]!r} in a batch of {', '.join(names)}."
        )
    rows = [(name, part.shape) for name, part, has_rows in parts if has_rows]
    if not rows:
        raise ValueError(
            "`shared_parts` must leave a part that has a row for each example; found all of "
            f"{', '.join(names)}."
        )
    dimensions = [shape[0] for _, shape in rows if shape.rank]
    usual = None if None in dimensions else max(dimensions, key=dimensions.count, default=None)
    found = [
        f"{name} of shape {shape}"
        for name, shape in rows
        if shape.rank == 0 or (shape.rank and shape[0] != usual)
    ]
    if found:
        raise ValueError(
            "`example_clipping` must be given batches whose parts have a row for each example, "
            f"{'any number' if usual is None else usual} of them; found {', '.join(found)}. "
            + _CURE.format(found[0].split(" ")[0])
            + " If it has a row for each example, say None for that dimension in the model's "
            "`input_spec`, as for the others."
        )


def count_rows(batch: Batch, shared: Sequence[str]) -> tuple[tf.Tensor, Batch]:
    """The number of a batch's examples.

    Args:
      batch: Tensors.
      shared: Names of the parts that examples share.

    Returns:
      int32, and the batch. If parts differ in their number of rows, using either ends the computation
      with an error that names the parts.
    """
    check_parts(batch, shared)
    with_rows = [(name, part) for name, part, has_rows in _parts(batch, shared) if has_rows]
    if all(part.shape.rank and part.shape[0] is not None for _, part in with_rows):
        return tf.shape(with_rows[0][1])[0], batch  # `check_parts` has compared them
    rule = "`example_clipping` must be given batches whose parts have a row for each example"
    return common_rows(rule, with_rows, _CURE.format("NAME"), batch)


def common_rows(
    rule: str, named: Sequence[tuple[str, tf.Tensor]], cure: str, value: _T
) -> tuple[tf.Tensor, _T]:
    """The number of rows that all of these tensors have.

    Args:
      rule: The beginning of the error message.
      named: The tensors, with their names.
      cure: The end of the error message.
      value: A structure of tensors that must not be used if the numbers differ.

    Returns:
      int32, and the structure. If the numbers differ, using either ends the computation with an error.
    """
    # A scalar of unknown rank has no first dimension to ask for.
    sizes = [tf.concat([tf.shape(part)[:1], [-1]], 0)[0] for _, part in named]
    found = [x for (name, _), size in zip(named, sizes, strict=True) for x in (f"{name}:", size)]
    message = [f"{rule}; found in", *found, f"rows (-1 for a scalar). {cure}"]
    same = tf.reduce_all(tf.equal(tf.stack(sizes), sizes[0])) & (sizes[0] >= 0)
    return asserted(same, message, (sizes[0], value))


def take_rows(batch: Batch, shared: Sequence[str], take: Callable[[tf.Tensor], tf.Tensor]) -> Batch:
    """The batch with `take` applied to each part that has rows; shared parts stay whole."""
    parts = _parts(batch, shared)
    taken = [take(part) if has_rows else part for _, part, has_rows in parts]
    return tf.nest.pack_sequence_as(batch, taken)
