"""Declares hyper-parameters as fields of frozen attrs classes.

The public names are those of `tff_optim.hyperparameters`.
"""

from typing import Any

import attrs
import tensorflow as tf

from tff_optim.core import comparison, entries
from tff_optim.core.hparam_values import STEP, Schedule, check_scalar
from tff_optim.core.intervals import (
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    Interval,
    checked_number,
    to_float,
)
from tff_optim.core.messages import shown
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects

_MARK = "tff_optim_hyperparameter"


def field(allowed: Interval, default: Any = attrs.NOTHING, *, traceable: bool = False) -> Any:
    """Declares a numeric hyper-parameter of a frozen attrs class.

    Args:
      allowed: The allowed numbers.
      default: The default value.
      traceable: Whether a scalar tensor of the computation that is being traced is taken too. Its
        value is checked where the computation runs.

    Returns:
      An attrs field that takes a number (an int or NumPy scalar becomes a float) or a Keras
      schedule, compares schedules by their configuration, and raises `TypeError` or `ValueError`
      for anything else. The number must be allowed as given and when rounded to float32. No field may
      be called `step`: the state counts its steps under that name.

    Example:
      >>> @attrs.frozen
      ... class Scale:
      ...     factor: float = field(POSITIVE, 1.0)
      >>> Scale(2)
      Scale(factor=2.0)
    """

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        name = type(owner).__name__
        if attribute.name == STEP:
            raise ValueError(
                f"`{STEP}` of `{name}` must have another name, for the state counts its steps under "
                "this one; found a hyper-parameter. Call it `step_size`, for example."
            )
        if traceable and tf.is_symbolic_tensor(value):
            check_scalar(name, attribute.name, value)
        elif isinstance(value, Schedule):
            keras_arguments.check_object(value)
        else:
            checked_number(name, attribute.name, value, allowed, " or a Keras schedule")

    return attrs.field(
        default=default,
        converter=to_float,
        validator=validate,
        eq=comparison.key,
        metadata={_MARK: allowed, entries.READER: keras_objects.rate_from_json},
    )


def constant(allowed: Interval, default: Any = attrs.NOTHING) -> Any:
    """Declares a number that stays as it was given: no schedule, not in the state.

    Example:
      >>> from tff_optim.hyperparameters import initialize
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = constant(POSITIVE, 2)
      >>> Part(), dict(initialize(Part()))
      (Part(number=2.0), {})
    """

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        checked_number(type(owner).__name__, attribute.name, value, allowed)

    return attrs.field(default=default, converter=to_float, validator=validate)


def fraction(default: Any = attrs.NOTHING) -> Any:
    """Declares a decay rate in [0, 1).

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = fraction(0.5)
      >>> Part(0.9)
      Part(number=0.9)
    """
    return field(FRACTION, default)


def positive(default: Any = attrs.NOTHING) -> Any:
    """Declares a number greater than 0.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = positive()
      >>> Part(1)
      Part(number=1.0)
    """
    return field(POSITIVE, default)


def non_negative(default: Any = attrs.NOTHING, *, traceable: bool = False) -> Any:
    """Declares a number of at least 0.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = non_negative(0)
      >>> Part()
      Part(number=0.0)
    """
    return field(NON_NEGATIVE, default, traceable=traceable)


def flag(default: bool) -> Any:
    """Declares a Python bool that shapes the graph.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = flag(False)
      >>> Part(True)
      Part(number=True)
    """

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(
                f"`{attribute.name}` of `{type(owner).__name__}` must be True or False; "
                f"found {shown(value)}."
            )

    return attrs.field(default=default, validator=validate)


def fields_of(part: Any) -> list[attrs.Attribute]:
    """The fields of a part that were declared with `field`."""
    if not attrs.has(type(part)):
        return []
    return [f for f in attrs.fields(type(part)) if _MARK in f.metadata]


def intervals(part: Any) -> dict[str, Interval]:
    """The hyper-parameters of `part` that were given as numbers, with what is allowed for each.

    Example:
      >>> from tff_optim import transforms
      >>> {name: allowed.words for name, allowed in intervals(transforms.Momentum(0.5)).items()}
      {'beta': 'a number in [0, 1)'}
    """
    return {
        f.name: f.metadata[_MARK]
        for f in fields_of(part)
        if not isinstance(getattr(part, f.name), Schedule)
    }


def has_schedule(part: Any) -> bool:
    """Whether a hyper-parameter of `part` is a schedule.

    Example:
      >>> from tff_optim import transforms
      >>> has_schedule(transforms.Momentum(0.5))
      False
    """
    return len(intervals(part)) < len(fields_of(part))
