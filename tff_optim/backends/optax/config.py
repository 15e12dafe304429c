"""Optimizers of optax as entries of a configuration, and back from them."""

import functools
import inspect
from collections.abc import Mapping

from tff_optim.backends.common import (
    OptimizerKind,
    arguments_from_json,
    names_and_device,
    names_and_device_to_json,
)
from tff_optim.backends.optax.optimizer import OptaxOptimizer, build_optax_optimizer
from tff_optim.core import comparison, entries
from tff_optim.core.entries import Described, Entry
from tff_optim.core.messages import shown
from tff_optim.core.types import Function, Json, Value
from tff_optim.keras_objects import as_json as keras_objects

# Factories of optax whose annotations do not say that they return a transformation.
_UNANNOTATED = ("MultiSteps", "scale_by_factored_rms")


def _factories() -> dict[str, Function]:
    """The public factories of optax that return a transformation, by name."""
    import optax
    import optax.contrib

    return {
        prefix + name: value
        for prefix, module in (("", optax), ("contrib.", optax.contrib))
        for name, value in vars(module).items()
        if not name.startswith("_") and _makes_a_transformation(name, value)
    }


def _makes_a_transformation(name: str, value: Value) -> bool:
    function = getattr(value, "func", value)  # `optax.nadam` is a partial
    if not callable(value) or not str(getattr(function, "__module__", "")).startswith("optax."):
        return False
    try:
        told = inspect.signature(value).return_annotation
    except (TypeError, ValueError):
        return False
    return "GradientTransformation" in str(told) or name in _UNANNOTATED


def _to_json(optimizer: OptaxOptimizer) -> dict[str, Json]:
    made = optimizer.transformation_or_factory
    key = comparison.key(made)  # a copy of a partial is another object
    names = [name for name, factory in _factories().items() if comparison.key(factory) == key]
    if not names:
        raise ValueError(
            "`transformation_or_factory` must be a public factory of optax to be written to a "
            f"configuration; found {shown(optimizer)}. Give the factory and its arguments, as in "
            "`build_optax_optimizer(optax.adam, learning_rate=0.1)`. No configuration can hold a "
            "finished transformation or a function of your own."
        )
    arguments = {}
    for name, value in optimizer.arguments.items():
        try:
            arguments[name] = keras_objects.to_json(value, name)
        except ValueError as error:
            raise ValueError(
                f"{error} Give a number, a text or a list of such. No configuration can hold an "
                "argument that is a function, a schedule or a transformation."
            ) from error
    return {
        "transformation": names[0],
        "arguments": arguments,
        **names_and_device_to_json(optimizer),
    }


def _from_json(entry: Entry, fields: Mapping[str, Entry]) -> Described:
    name = fields["transformation"]
    factories = name.build(_factories)
    if not isinstance(name.value, str) or name.value not in factories:
        kind = ValueError if isinstance(name.value, str) else TypeError
        known = entries.suggestion(str(name.value), factories)
        name.refuse(f"be the name of a public factory of optax{known}", kind)
    build = functools.partial(build_optax_optimizer, factories[name.value])
    given = arguments_from_json(fields, build_optax_optimizer)
    return Described(entry, build, names_and_device(fields) | given)


KIND = OptimizerKind(
    name="optax",
    cls=OptaxOptimizer,
    to_json=_to_json,
    from_json=_from_json,
    names=("transformation", "arguments", "weight_names", "device"),
    required=("transformation",),
)
