"""Layers: which tensors of a model are weighed together."""

from collections.abc import Sequence

Layers = str | Sequence[Sequence[int]]
Groups = tuple[tuple[int, ...], ...]


def resolve_layers(layers: Layers, num_tensors: int) -> Groups:
    """Turns a description of layers into groups of tensor positions.

    Positions count the tensors in the order of `tf.nest.flatten`: list order, and sorted keys in
    dictionaries.

    Args:
      layers: `"tensor"` (every tensor is a layer of its own), `"model"` (one layer of all tensors),
        or groups of positions, such as `[(0, 1), (2, 3)]` for two layers of a kernel and a bias.
      num_tensors: The number of tensors in the model.

    Returns:
      One tuple of positions per layer. Every position is in exactly one of them.

    Raises:
      ValueError: If `layers` is none of these, or a position is missing, repeated or out of range.

    Example:
      >>> resolve_layers([(0, 1), (2,)], 3)
      ((0, 1), (2,))
    """
    if num_tensors < 1:
        raise ValueError("A model needs at least one tensor to have layers; found none.")
    if isinstance(layers, str):
        if layers == "tensor":
            return tuple((position,) for position in range(num_tensors))
        if layers == "model":
            return (tuple(range(num_tensors)),)
        raise ValueError(
            '`layers` must be "tensor", "model" or groups of tensor positions; '
            f"found {layers!r}. Write groups as [(0, 1), (2, 3)]."
        )
    check_groups(layers)
    groups = tuple(tuple(int(position) for position in group) for group in layers)
    positions = sorted(position for group in groups for position in group)
    if positions != list(range(num_tensors)):
        raise ValueError(
            f"`layers` must hold each of the {num_tensors} tensor positions 0 to {num_tensors - 1} "
            f"exactly once; found {groups}. Give tensors that matter less a group of their own."
        )
    return groups


def check_groups(layers: Layers) -> None:
    """Raises `ValueError` for layers that no model can have; needs no number of tensors."""
    if isinstance(layers, str):
        resolve_layers(layers, 1)
        return
    try:
        groups = [list(group) for group in layers]
    except TypeError:
        groups = [[]]
    positions = [position for group in groups for position in group]
    if (
        not groups
        or not all(groups)
        or not all(isinstance(position, int) for position in positions)
        or len(set(positions)) != len(positions)
        or min(positions) < 0
    ):
        raise ValueError(
            "`layers` must be groups of tensor positions, none empty and none repeated; "
            f"found {layers!r}. Write them as [(0, 1), (2, 3)]."
        )
