"""Leaf by leaf: checks, casts and maps over structures of weights, gradients and slots."""

import collections
from collections.abc import Callable, Mapping

import tensorflow as tf
import tree

from tff_optim.core.messages import at, refusal, shown
from tff_optim.core.types import Number, Specs, Structure

# Half-precision leaves are computed in float32: a squared gradient of 1e-3 is already zero in
# float16, and the division that follows would blow up.
_HALF = (tf.float16, tf.bfloat16)


def compute_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype in which a leaf of `dtype` is computed: float32 for half precision."""
    return tf.float32 if dtype in _HALF else dtype


def compute_specs(specs: Specs) -> Structure:
    """`specs` in the dtypes that leaves are computed in."""
    return tf.nest.map_structure(lambda s: tf.TensorSpec(s.shape, compute_dtype(s.dtype)), specs)


def widen(leaf: tf.Tensor | None) -> tf.Tensor | None:
    """`leaf` in the dtype that it is computed in."""
    return None if leaf is None else tf.cast(leaf, compute_dtype(leaf.dtype))


def dense(gradient: tf.Tensor | tf.IndexedSlices | None, weight: tf.Tensor) -> tf.Tensor | None:
    """`gradient` as a dense tensor, or `None`; repeated rows of `tf.IndexedSlices` are added up."""
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.convert_to_tensor(gradient.values)
        # The sum over repeated rows is taken in float32 too, not only what follows.
        slices = tf.IndexedSlices(
            widen(rows), gradient.indices, tf.constant(weight.shape.as_list(), tf.int32)
        )
        return tf.cast(tf.convert_to_tensor(slices), rows.dtype)
    return None if gradient is None else tf.convert_to_tensor(gradient)


def number(value: Number, dtype: tf.DType) -> tf.Tensor:
    """A Python, NumPy or tensor scalar in `dtype`; the only place that casts a constant."""
    return tf.cast(value, dtype) if tf.is_tensor(value) else tf.constant(value, dtype)


def zeros(specs: Specs) -> Structure:
    """Zeros of the shapes and dtypes of `specs`."""
    return tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), specs)


def named_leaves(structure: Structure) -> list[tuple[str, Structure]]:
    """Pairs of a leaf's path (`dense/kernel`, `0`; empty for a lone leaf) and the leaf."""
    # `tree` orders leaves as `tf.nest` does, and knows their paths.
    return [
        ("/".join(str(key) for key in path), leaf)
        for path, leaf in tree.flatten_with_path(structure)
    ]


def names_of(structure: Structure) -> list[str]:
    """The names of the leaves: their paths, or `weight` for a lone leaf."""
    return [path or "weight" for path, _ in named_leaves(structure)]


def check_paths(structure: Structure, name: str) -> None:
    """Raises `ValueError` if two leaves have the same path: states hold slots by path."""
    seen: set[str] = set()
    for path, _ in named_leaves(structure):
        if path in seen:
            raise ValueError(
                f"`{name}` must have paths that differ when joined by '/'; found "
                f"{shown(path)} twice. Rename a key that has a '/' in it."
            )
        seen.add(path)


def spec_of(leaf: Structure) -> tf.TensorSpec:
    """Shape and dtype of a tensor, a NumPy array (what a restored state holds) or a number."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        leaf = tf.constant(leaf)  # a plain number, in the dtype that TensorFlow gives it
    return tf.TensorSpec(leaf.shape, leaf.dtype)


def _describe(leaf: Structure) -> str:
    if leaf is None:
        return "None"
    if isinstance(leaf, tf.IndexedSlices):
        return f"rows {_describe(leaf.values)} of a tensor of shape {leaf.shape}"
    spec = spec_of(leaf)
    return f"{spec.dtype.name}{spec.shape}"


def check_same_structure(
    found: Structure, expected: Structure, name: str, expected_name: str
) -> None:
    """Raises `ValueError` unless `found` is nested as `expected` is; tuples may stand for lists."""
    if _paths(found) != _paths(expected):
        raise refusal(
            name, f"be nested as {expected_name}: expected {_outline(expected)}", _outline(found)
        )


def _paths(structure: Structure) -> list[tuple[str, ...]]:
    return [tuple(map(str, path)) for path, _ in tree.flatten_with_path(structure)]


def _outline(structure: Structure) -> str:
    if not tf.nest.is_nested(structure):
        return _describe(structure)
    return shown(tf.nest.map_structure(_describe, structure))


def check_like(found: Structure, expected: Structure, name: str, expected_name: str) -> None:
    """Raises `ValueError` unless `found` has the nesting, shapes and dtypes of `expected`.

    Leaves of `expected` and `found` that are both `None` match; nothing else matches `None`.
    """
    check_same_structure(found, expected, name, expected_name)
    for (path, a), (_, b) in zip(named_leaves(found), named_leaves(expected), strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None or not spec_of(a).is_compatible_with(spec_of(b)):
            raise refusal(
                at(name, path), f"match {expected_name}: expected {_describe(b)}", _describe(a)
            )


def check_specs(specs: Specs, floating: bool = False) -> None:
    """Raises `ValueError` unless weights have paths of their own, known shapes and, if asked, floats."""
    check_paths(specs, "specs")
    for path, spec in named_leaves(specs):
        if not spec.shape.is_fully_defined() or (floating and not spec.dtype.is_floating):
            kind = "a floating dtype and a known shape" if floating else "a known shape"
            raise ValueError(
                f"{at('specs', path)} must have {kind}, since the state is made of it; found "
                f"{spec.dtype.name}{spec.shape}."
            )


def read_gradients(gradients: Structure, weights: Structure) -> Structure:
    """`gradients` nested as `weights` is: tensors, `tf.IndexedSlices`, or None.

    Args:
      gradients: As a caller gives them: in tuples for lists, as arrays or numbers.
      weights: A structure of tensors.

    Raises:
      ValueError: If structure, shapes or dtypes are not those of `weights`, all are None, or two
        weights have one path.
    """
    check_paths(weights, "weights")
    check_same_structure(gradients, weights, "gradients", "`weights`")
    flat = [
        g if g is None or isinstance(g, tf.IndexedSlices) else tf.convert_to_tensor(g)
        for g in tf.nest.flatten(gradients)
    ]
    if flat and all(g is None for g in flat):
        raise ValueError(
            "`gradients` must not be None for every weight; found only None. Is the loss computed "
            "from these weights?"
        )
    for (path, weight), gradient in zip(named_leaves(weights), flat, strict=True):
        if gradient is not None and not spec_of(gradient).is_compatible_with(spec_of(weight)):
            raise ValueError(
                f"{at('gradients', path)} must match `weights`: expected {_describe(weight)}; "
                f"found {_describe(gradient)}."
            )
    return tf.nest.pack_sequence_as(weights, flat)


def check_keys(found: Structure, expected: list[str], name: str) -> None:
    """Raises `ValueError` unless `found` is a mapping with just the keys `expected`."""
    if not isinstance(found, Mapping):
        raise refusal(name, "be a mapping", type(found).__name__)
    if set(found) != set(expected):
        missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise ValueError(
            f"`{name}` must have the entries {shown(expected)}; found missing {shown(missing)}, "
            f"unknown {shown(unknown)}. It may come from another optimizer."
        )


def check_slots(state: Mapping[str, Structure], expected: Mapping[str, tf.TensorSpec]) -> None:
    """Raises `ValueError` unless `slots` of a state are those that the weights need, by name."""
    name = "slots` of `state"
    check_keys(state["slots"], list(expected), name)
    for path, spec in expected.items():
        found = spec_of(state["slots"][path])
        if not found.is_compatible_with(spec):
            raise ValueError(
                f"{at(name, path)} must be {_describe(spec)} for these weights; found "
                f"{_describe(found)}. It may come from another model."
            )


def map_leaves(
    function: Callable[..., tuple[tf.Tensor, ...]],
    gradients: Structure,
    slots: Mapping[str, Structure],
) -> tuple[Structure, "collections.OrderedDict[str, Structure]"]:
    """Applies `function` to each gradient and its slots.

    Args:
      function: From a gradient and its slots, in the order of `slots`, to the new gradient and
        the new slots. It is not called where the gradient is `None`: that leaf's slots stay.
      gradients: A structure of tensors or `None`.
      slots: Structures like `gradients`, by name.

    Returns:
      The new gradients and the new slots.

    Raises:
      ValueError: If a slot does not have the nesting, shapes and dtypes of `gradients`.
    """
    flat_slots = []
    for name, slot in slots.items():
        check_same_structure(slot, gradients, f"{name}` of `state", "`gradients`")
        flat_slots.append(tf.nest.flatten(slot))
        for (path, g), s in zip(named_leaves(gradients), flat_slots[-1], strict=True):
            if g is not None and not spec_of(s).is_compatible_with(spec_of(g)):
                raise ValueError(
                    f"{at(f'{name}` of `state', path)} must match the gradient: expected "
                    f"{_describe(g)}; found {_describe(s)}. It may come from another model."
                )
    results = []
    for gradient, *leaf_slots in zip(tf.nest.flatten(gradients), *flat_slots, strict=True):
        results.append(
            (gradient, *leaf_slots) if gradient is None else function(gradient, *leaf_slots)
        )
    columns = list(zip(*results, strict=True)) or [()] * (1 + len(slots))
    new_gradients, *new_slots = (
        tf.nest.pack_sequence_as(gradients, list(column)) for column in columns
    )
    return new_gradients, collections.OrderedDict(zip(slots, new_slots, strict=True))
