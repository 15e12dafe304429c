"""The arguments of optax' factories: their allowed numbers, and the transformation that they make."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.core.messages import shown
from tff_optim.core.numbers import to_float
from tff_optim.core.types import Function, Named, Value
from tff_optim.hyperparameters import FINITE, FRACTION, NON_NEGATIVE, POSITIVE, UNIT, Interval

if TYPE_CHECKING:
    import optax

# A transformation, or a factory that makes one.
Given: TypeAlias = Value

_LR = tff.learning.optimizers.LEARNING_RATE_KEY
_OWNER = "build_optax_optimizer"

# The arguments of optax' own factories; a name means the same in each.
_INTERVALS: Mapping[str, Interval] = {
    **dict.fromkeys(("b1", "b2"), FRACTION),  # at 1 the bias correction gives NaN
    **dict.fromkeys(("decay", "rho", "momentum", "slow_step_size"), UNIT),
    **dict.fromkeys(("eps", "eps_root", "epsilon", "min_norm", "min_scale"), NON_NEGATIVE),
    **dict.fromkeys(("weight_decay", "weight_decay_rate", "noise_multiplier"), NON_NEGATIVE),
    **dict.fromkeys(("initial_accumulator_value", "initial_scale", "eta"), NON_NEGATIVE),
    **dict.fromkeys(("clipping", "max_delta", "max_norm", "l2_norm_clip"), POSITIVE),
}


def interval_of(transformation_or_factory: Given, name: str) -> Interval:
    """The allowed numbers of a factory's argument."""
    if name == _LR:
        return NON_NEGATIVE
    made = getattr(transformation_or_factory, "func", transformation_or_factory)
    if not str(getattr(made, "__module__", "")).startswith("optax.") or name not in _INTERVALS:
        return FINITE
    # A finished transformation has the numbers of `optax.inject_hyperparams`.
    parameter = inspect.signature(made).parameters.get(name) if callable(made) else None
    default = None if parameter is None else parameter.default
    # `optax.scale_by_sm3` has a `b2` of 1, which means no decay.
    is_unlike = isinstance(default, float) and default not in _INTERVALS[name]
    return FINITE if is_unlike else _INTERVALS[name]


def make(
    transformation_or_factory: Given, arguments: Mapping[str, Value]
) -> "optax.GradientTransformation":
    """The transformation itself, made by its factory if one is given."""
    import optax

    made = transformation_or_factory
    if not isinstance(made, optax.GradientTransformation | optax.MultiSteps):
        made = made(**arguments)
    if isinstance(made, optax.MultiSteps):
        made = made.gradient_transformation()
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError(
            "`transformation_or_factory` must be an optax.GradientTransformation or a callable that "
            f"returns one; found that it returned {shown(made)}."
        )
    return made


def bind(factory: Function, given: Mapping[str, Value]) -> Named:
    """All named arguments of a factory, defaults included; integers as floats where it takes floats."""
    signature = inspect.signature(factory)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise TypeError(
            "`kwargs` must be the arguments of `transformation_or_factory`, which takes "
            f"{signature}; found {sorted(given)}: {error}."
        ) from error
    arguments = {}
    for name, parameter in signature.parameters.items():
        if name in given:
            value = given[name]
            arguments[name] = to_float(value) if _takes_float(parameter) else value
        elif parameter.default is not parameter.empty:
            arguments[name] = parameter.default
    return {**arguments, **{name: given[name] for name in given if name not in arguments}}


def _takes_float(parameter: inspect.Parameter) -> bool:
    if parameter.name == _LR or isinstance(parameter.default, float):
        return True
    # `optax.adafactor` annotates a flag as float.
    return parameter.annotation is float and not isinstance(parameter.default, bool)


def check_argument(transformation_or_factory: Given, name: str, value: Value) -> Value:
    """Returns an argument of a factory, or raises if it is not an allowed number."""
    if isinstance(value, hyperparameters.Schedule):
        raise TypeError(
            f"`{name}` must be a number or an optax schedule; found the Keras schedule "
            f"{type(value).__name__}, which cannot be traced by jax. See `optax.schedules`."
        )
    parameter = inspect.signature(transformation_or_factory).parameters.get(name)
    is_number = isinstance(value, float | np.floating) or tf.is_tensor(value)
    is_wrong = isinstance(value, str | bytes | bool | list | tuple | Mapping)
    if is_number or (is_wrong and parameter is not None and _takes_float(parameter)):
        interval = interval_of(transformation_or_factory, name)
        return hyperparameters.checked(_OWNER, name, value, interval)
    return value
