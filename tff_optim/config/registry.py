"""The classes that a configuration may name."""

import inspect
from types import ModuleType

from tff_optim import projections, regularizers, transforms
from tff_optim.core.messages import shown
from tff_optim.keras_objects.arguments import package_of
from tff_optim.keras_objects.classes import CONSTRAINT, REGULARIZER
from tff_optim.transforms.interface import GradientTransform

_PACKAGE = __name__.partition(".")[0]
_registered: dict[str, type[GradientTransform]] = {}


def _public(module: ModuleType, base: type) -> dict[str, type]:
    """Classes of `base` that `module` shows under their own names (aliases are left out)."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and not inspect.isabstract(value)
        and value.__name__ == name
    }


def register_transform(cls: type[GradientTransform]) -> type[GradientTransform]:
    """Class decorator that lets configurations name a transform of another package.

    The name joins the top-level package and the class: `mypackage.Median`. It can stand among the
    transforms and among the regularizers. To be written to a configuration, the class must be an attrs
    class or have a `get_config()` that returns its constructor's arguments. To be read from one, its
    package must be among the `trusted_packages`.

    Args:
      cls: A subclass of `tff_optim.transforms.GradientTransform`.

    Returns:
      `cls`.

    Raises:
      TypeError: If `cls` is not such a class.
      ValueError: If another class has the name.

    Example:
      >>> import tensorflow as tf
      >>> import tff_optim
      >>> @tff_optim.register_transform
      ... class Halve(tff_optim.transforms.GradientTransform):
      ...     def initialize(self, specs):
      ...         return ()
      ...
      ...     def next(self, state, weights, gradients):
      ...         return state, tf.nest.map_structure(lambda g: g / 2, gradients)
      >>> any(name.endswith(".Halve") for name in tff_optim.list_transforms())
      True
    """
    if not isinstance(cls, type) or not issubclass(cls, GradientTransform):
        raise TypeError(
            f"`cls` must be a subclass of tff_optim.transforms.GradientTransform; found {shown(cls)}."
        )
    name = f"{package_of(cls)}.{cls.__qualname__}"
    known = _registered.get(name)
    # A module that is loaded once more, as notebooks do, brings the same class as a new object.
    if known is not None and known.__module__ != cls.__module__:
        raise ValueError(
            f"`cls` must have a name of its own; found {name}, which {known.__module__} has "
            "registered. Rename one of them."
        )
    _registered[name] = cls
    return cls


def list_transforms() -> dict[str, type]:
    """Classes by name that a configuration may use as `transforms`, registered ones included.

    Example:
      >>> "Adam" in list_transforms()
      True
    """
    return _public(transforms, GradientTransform) | _registered


def list_regularizers() -> dict[str, type]:
    """Classes by name that a configuration may use as `regularizers`, of this package and Keras.

    Example:
      >>> [name for name in list_regularizers() if name in ("FedProx", "L2")]
      ['FedProx', 'L2']
    """
    own = _public(regularizers, GradientTransform)
    return own | REGULARIZER.classes | _registered


def list_projections() -> dict[str, type]:
    """Classes by name that a configuration may use as `projection`, of this package and Keras.

    Example:
      >>> [name for name in list_projections() if name in ("Box", "NonNeg")]
      ['Box', 'NonNeg']
    """
    own = {name: getattr(projections, name) for name in ("Box", "Ball", "Simplex")}
    return own | CONSTRAINT.classes


def name_of(cls: type) -> str:
    """The name under which a configuration lists a part of this class.

    Raises:
      ValueError: If it is not among those that may be named.
    """
    for names in (list_transforms(), list_regularizers(), list_projections()):
        for name, known in names.items():
            if known is cls:
                return name
    raise ValueError(
        "`optimizer` must have parts that a configuration can name; found one of "
        f"{cls.__module__}.{cls.__qualname__}. Decorate transforms with "
        "`tff_optim.register_transform`; subclass tf.keras.constraints.Constraint for a projection."
    )
