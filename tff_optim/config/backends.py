"""Optimizers of Keras, optax and torch as entries of a configuration, and back from them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tff_optim.backends.keras import copies
from tff_optim.backends.keras.optimizer import KerasOptimizer, build_keras_optimizer
from tff_optim.backends.optax.optimizer import OptaxOptimizer, build_optax_optimizer
from tff_optim.backends.torch.optimizer import TorchOptimizer, build_torch_optimizer
from tff_optim.core import comparison, entries
from tff_optim.core.entries import Entry
from tff_optim.core.messages import shown
from tff_optim.keras_objects import as_json as keras_objects

# Factories of optax that do not say that they make a transformation.
_UNTOLD = ("MultiSteps", "scale_by_factored_rms")


def _place_to_json(optimizer: Any) -> dict[str, Any]:
    names = optimizer.weight_names
    return {"weight_names": None if names is None else [*names], "device": optimizer.device}


def _names_and_device(fields: Mapping[str, Entry]) -> dict[str, Any]:
    names = fields.get("weight_names")
    given = None if names is None or names.value is None else names.strings()
    return {"weight_names": given, "device": entries.device(fields)}


def _arguments(fields: Mapping[str, Entry], build: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a factory or class; none of those that `build` itself takes."""
    if "arguments" not in fields:
        return {}
    given = fields["arguments"]
    if not isinstance(given.value, dict):
        given.refuse("be a mapping", TypeError)
    own = {*inspect.signature(build).parameters} - {"learning_rate", "kwargs"}
    if taken := sorted(own & set(given.value)):
        given.at(taken[0]).refuse("be left out: it is no argument of the optimizer itself")
    return given.value


# ------------------------------------------------------------------------------------------- Keras


def keras_to_json(optimizer: KerasOptimizer) -> dict[str, Any]:
    """The entries of a Keras optimizer."""
    keras = optimizer.keras_optimizer
    keras_objects.to_json(
        optimizer.learning_rate, "learning_rate"
    )  # raises for a tensor of a computation
    return {
        "optimizer": keras_objects.object_to_json(keras),
        # Set by a method and missing from Keras' own configuration.
        "exclude_from_weight_decay": copies.excluded_patterns(keras),
        **_place_to_json(optimizer),
    }


def keras_from_json(fields: Mapping[str, Entry]) -> KerasOptimizer:
    """The optimizer of such entries."""
    keras = keras_objects.optimizer_from_json(fields["optimizer"])
    excluded = fields.get("exclude_from_weight_decay")
    if excluded is not None and excluded.strings(entries.MOST_PARTS):
        keras.exclude_from_weight_decay(var_names=excluded.value)
    return fields["optimizer"].build(build_keras_optimizer, keras, **_names_and_device(fields))


# ------------------------------------------------------------------------------------------- optax


def _factories() -> dict[str, Callable[..., Any]]:
    """What optax shows of factories that return a transformation, by name."""
    import optax
    import optax.contrib

    return {
        prefix + name: value
        for prefix, module in (("", optax), ("contrib.", optax.contrib))
        for name, value in vars(module).items()
        if not name.startswith("_") and _makes_a_transformation(name, value)
    }


def _makes_a_transformation(name: str, value: Any) -> bool:
    function = getattr(value, "func", value)  # `optax.nadam` is a partial
    if not callable(value) or not str(getattr(function, "__module__", "")).startswith("optax."):
        return False
    try:
        told = inspect.signature(value).return_annotation
    except (TypeError, ValueError):
        return False
    return "GradientTransformation" in str(told) or name in _UNTOLD


def optax_to_json(optimizer: OptaxOptimizer) -> dict[str, Any]:
    """The entries of an optimizer of optax."""
    made = optimizer.transformation_or_factory
    key = comparison.key(made)  # a copy of a partial is another object
    names = [name for name, factory in _factories().items() if comparison.key(factory) == key]
    if not names:
        raise ValueError(
            "`transformation_or_factory` must be a public factory of optax to be written to a "
            f"configuration; found {shown(optimizer)}. Give the factory and its arguments, as in "
            "`build_optax_optimizer(optax.adam, learning_rate=0.1)`; a transformation that is ready, "
            "or a function of your own, can be built by your program only."
        )
    arguments = {}
    for name, value in optimizer.arguments.items():
        try:
            arguments[name] = keras_objects.to_json(value, name)
        except ValueError as error:
            raise ValueError(
                f"{error} Give a number, a text or a list of such; an optimizer with a function, a "
                "schedule or a transformation among its arguments can be built by your program only."
            ) from error
    return {"transformation": names[0], "arguments": arguments, **_place_to_json(optimizer)}


def optax_from_json(fields: Mapping[str, Entry]) -> OptaxOptimizer:
    """The optimizer of such entries."""
    name = fields["transformation"]
    factories = name.build(_factories)
    if not isinstance(name.value, str) or name.value not in factories:
        kind = ValueError if isinstance(name.value, str) else TypeError
        known = entries.suggestion(str(name.value), factories)
        name.refuse(f"be the name of a public factory of optax{known}", kind)
    given = _arguments(fields, build_optax_optimizer)
    return fields["kind"].whole.build(
        build_optax_optimizer, factories[name.value], **_names_and_device(fields), **given
    )


# ------------------------------------------------------------------------------------------- torch


def torch_to_json(optimizer: TorchOptimizer) -> dict[str, Any]:
    """The entries of an optimizer of torch."""
    recipe = optimizer.recipe
    entry = {"optimizer": recipe["optimizer"], "arguments": {**recipe["arguments"]}}
    return entry | ({"lr_scheduler": recipe["scheduler"]} if recipe["scheduler"] else {})


def torch_from_json(fields: Mapping[str, Entry]) -> TorchOptimizer:
    """The optimizer of such entries."""
    scheduler = fields.get("lr_scheduler")
    if scheduler is not None and scheduler.value is not None:
        pair = scheduler.value
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict)):
            scheduler.refuse("be like ['StepLR', {'step_size': 10}]", TypeError)
    whole = fields["kind"].whole
    return whole.build(
        build_torch_optimizer,
        fields["optimizer"].value,
        python=whole.torch_python,
        trusted_packages=whole.trusted,
        lr_scheduler=None if scheduler is None else scheduler.value,
        **_arguments(fields, build_torch_optimizer),
    )
