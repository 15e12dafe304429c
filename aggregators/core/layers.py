"""Layers: groups of a model's tensors that are weighed together, and their names."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import attrs
import tensorflow as tf
import tensorflow_federated as tff
import tree

from aggregators.core.checks import is_whole
from aggregators.core.types import Structure, Tensors

Layers = str | Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
Groups = tuple[tuple[int, ...], ...]

_WAYS = (
    '`layers` must be "tensor", "layer", "model", or groups of tensor positions such as '
    '[(0, 1), (2, 3)] or {"hidden": (0, 1), "output": (2, 3)}'
)


@attrs.frozen
class ModelLayers:
    """The tensors of an update, in the order of `tf.nest.flatten`, and the layers they make up.

    Attributes:
      structure: The update's structure, of `tf.TensorSpec`s.
      by_name: The positions of each layer's tensors, by the layer's name, in the layers' order.
      sample_size: How many clients the measurements list one by one.
    """

    structure: Structure
    by_name: Mapping[str, tuple[int, ...]]
    sample_size: int = 0

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """Shape and dtype of every tensor."""
        return tf.nest.flatten(self.structure)

    @property
    def groups(self) -> Groups:
        """Positions of each layer's tensors."""
        return tuple(self.by_name.values())

    @property
    def names(self) -> tuple[str, ...]:
        """One name per layer."""
        return tuple(self.by_name)

    def zeros(self) -> tuple[tf.Tensor, ...]:
        """Zeros with the shape and dtype of every tensor."""
        return tuple(tf.zeros(spec.shape, spec.dtype) for spec in self.specs)

    def pack(self, tensors: Tensors) -> Structure:
        """Gives flat tensors the structure of the update."""
        return tf.nest.pack_sequence_as(self.structure, list(tensors))

    def named(self, by_layer: tf.Tensor) -> tf.Tensor | OrderedDict[str, tf.Tensor]:
        """The number (or row of numbers) of each layer by name; of a single layer, the number itself."""
        values = tf.unstack(by_layer, len(self.by_name), axis=-1)
        return OrderedDict(zip(self.by_name, values)) if len(values) > 1 else values[0]


def layers_of_type(
    layers: Layers, value_type: tff.Type, names: Sequence[str] | None = None
) -> ModelLayers:
    """The layers of an update of this TFF type; see `resolve_layers`.

    Names of tensors are their paths in the type if `names` is None.
    """
    structure = tff.types.type_to_tf_tensor_specs(value_type)
    if names is None:
        names = [name or "0" for name in names_in_type(value_type)]
    return ModelLayers(structure, resolve_layers(layers, names))


def names_in_type(value_type: tff.Type) -> list[str]:
    """The paths of the tensors in a TFF type, such as `a/0`; the path of a lone tensor is empty."""
    structure = tff.types.type_to_tf_tensor_specs(value_type)
    return ["/".join(map(str, path)) for path, _ in tree.flatten_with_path(structure)]


def names_of_variables(variables: Sequence[tf.Variable]) -> list[str]:
    """The variables' names without `:0`; duplicates get their position as a suffix."""
    names = [variable.name.split(":")[0] for variable in variables]
    found = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
    # Besides two variables `a`, a third may itself be called `a_1`.
    return found if len(set(found)) == len(found) else [f"{n}_{i}" for i, n in enumerate(names)]


def resolve_layers(layers: Layers, names: Sequence[str]) -> OrderedDict[str, tuple[int, ...]]:
    """Turns a description of layers into groups of tensor positions.

    Positions count the tensors in the order of `tf.nest.flatten`: list order, and sorted keys in
    dictionaries.

    Args:
      layers: `"tensor"` (every tensor is its own layer), `"layer"` (tensors whose names agree up to the
        last `/`, such as kernel and bias of a Keras layer), `"model"` (all tensors are one layer), or
        groups of positions, with or without names.
      names: The tensors' names.

    Returns:
      The positions of each layer by its name. Every position is in exactly one layer.

    Raises:
      ValueError: If `layers` is none of these, or a position is missing, repeated or out of range.

    Example:
      >>> dict(resolve_layers("layer", ["a/kernel", "a/bias", "b/kernel"]))
      {'a': (0, 1), 'b': (2,)}
      >>> dict(resolve_layers([(0, 1), (2,)], ["0", "1", "2"]))
      {'0+1': (0, 1), '2': (2,)}
    """
    number = len(names)
    if number < 1:
        raise ValueError("A model must have at least one tensor to make up layers; found none.")
    check_layers(layers)
    if layers == "tensor":
        return OrderedDict((name, (position,)) for position, name in enumerate(names))
    if layers == "model":
        return OrderedDict(model=tuple(range(number)))
    if layers == "layer":
        owners = [name.rpartition("/")[0] for name in names]
        if not all(owners):
            raise ValueError(
                '`layers="layer"` must be used with tensors named after layers, such as dense/kernel; '
                f"found {list(names)}. A functional model keeps no names: give groups of positions."
            )
        return OrderedDict(
            (owner, tuple(i for i, other in enumerate(owners) if other == owner))
            for owner in dict.fromkeys(owners)
        )
    if isinstance(layers, Mapping):
        named = [(str(name), tuple(int(i) for i in group)) for name, group in layers.items()]
    else:
        named = [("", tuple(int(i) for i in group)) for group in layers]
    positions = sorted(position for _, group in named for position in group)
    if positions != list(range(number)):
        raise ValueError(
            f"`layers` must hold each of the {number} tensor positions 0 to {number - 1} exactly "
            f"once; found {layers!r}. Give tensors that matter less a group of their own."
        )
    keys = [name or "+".join(names[i] for i in group) for name, group in named]
    if len(set(keys)) != len(keys):
        raise ValueError(f"`layers` must have a name of its own for each layer; found {keys}.")
    return OrderedDict(zip(keys, (group for _, group in named), strict=True))


def check_layers(layers: Layers) -> None:
    """Raises `ValueError` for layers that no model can have."""
    if isinstance(layers, str):
        if layers not in ("tensor", "layer", "model"):
            raise ValueError(f"{_WAYS}; found {layers!r}.")
        return
    try:
        groups = [
            list(group) for group in (layers.values() if isinstance(layers, Mapping) else layers)
        ]
    except TypeError:
        groups = [[]]
    positions = [position for group in groups for position in group]
    is_valid = all(is_whole(position) and position >= 0 for position in positions)
    if not groups or not all(groups) or not is_valid or len(set(positions)) != len(positions):
        raise ValueError(f"{_WAYS}, none empty and none repeated; found {layers!r}.")
