"""Selections of weights by path, rank or a function."""

from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from tff_optim.core import leaves, patterns
from tff_optim.core.messages import refusal, shown
from tff_optim.core.types import Specs

# A regular expression, searched for in the path; the largest rank; a function of path and spec; all.
Where: TypeAlias = str | int | Callable[[str, tf.TensorSpec], bool] | None


def check(name: str, where: object) -> None:
    """Raises `TypeError` or `ValueError` unless the argument `name` is a `Where`."""
    is_keras = type(where).__module__.partition(".")[0] == "keras"  # can be called, on a tensor
    if isinstance(where, str):
        patterns.check(name, where)
    elif isinstance(where, int) and not isinstance(where, bool):
        if where < 0:
            raise refusal(name, "be a rank of at least 0", shown(where))
    elif where is not None and (is_keras or not callable(where)):
        rule = "be a regular expression, a rank, a function of path and spec, or None"
        raise refusal(name, rule, shown(where), error=TypeError)


def selects(where: Where, path: str, spec: tf.TensorSpec) -> bool:
    """Whether the weights at `path`, of shape and dtype `spec`, are selected.

    Example:
      >>> selects("bias|norm", "norm_1/gamma", tf.TensorSpec([3]))
      True
      >>> [selects(1, "0", tf.TensorSpec(shape)) for shape in ([], [3], [3, 4])]
      [True, True, False]
    """
    if where is None:
        return True
    if isinstance(where, str):
        return patterns.search(where, path)
    if isinstance(where, int):
        return bool(spec.shape.rank <= where)
    return bool(where(path, spec))


def check_used(
    name: str, where: Where, specs: Specs, cure: str = "", *, not_all: bool = False
) -> None:
    """Raises `ValueError` if none of the weights is selected, or all of them with `not_all`."""
    named = leaves.named_leaves(specs)
    # A lone scalar is what TFF initializes an optimizer with when it only wants its hparams.
    if where is None or (len(named) == 1 and named[0][1].shape.rank == 0):
        return
    selected = [path for path, spec in named if selects(where, path, spec)]
    if not selected or (not_all and len(selected) == len(named)):
        rule = "select at least one tensor of weights" + (", and not all" if not_all else "")
        raise refusal(
            name, rule, f"{shown(where)} and the paths {shown([path for path, _ in named])}", cure
        )
