"""The arguments of Keras' own optimizers, schedules, regularizers and constraints.

Keras checks few of them. A string as `beta_1` fails in the first step, NaN as the norm of a constraint
makes all weights NaN, and a `clipnorm` of 0 does not clip. A name of an argument means the same in all
classes.
"""

import inspect
import math
from collections.abc import Mapping

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core import comparison
from tff_optim.core.messages import refusal, shown
from tff_optim.core.numbers import (
    FINITE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    UNIT,
    Interval,
    Schedule,
    checked_number,
)
from tff_optim.core.tracing import eager_world
from tff_optim.core.types import Json, Value

# Arguments that count: a 2 must not become 2.0.
_COUNTS = ("decay_steps", "first_decay_steps", "warmup_steps", "boundaries")
# Steps at which a schedule must give a rate: one that overflows does not come back.
_STEPS = (0, 1, 10, 1000, 10**6, 10**9)
_PACKAGE = __name__.partition(".")[0]


@attrs.frozen
class _Argument:
    """The values of an argument: of one Python type, numbers of an interval, lists, or None."""

    words: str
    allowed: Interval | None = None
    types: tuple[type, ...] = (int, float)
    optional: bool = False
    several: bool = False
    most: int = 100
    schedule: bool = False


def _number(allowed: Interval, words: str = "", **options: Value) -> _Argument:
    allowed = attrs.evolve(allowed, words=allowed.words + words)
    return _Argument(allowed.words, allowed, **options)


_FLAG = _Argument("True or False", types=(bool,))
_RATES_AND_SIZES = (
    "epsilon epsilon_1 epsilon_2 beta initial_accumulator_value l1_regularization_strength "
    "l2_regularization_strength l2_shrinkage_regularization_strength initial_learning_rate "
    "end_learning_rate warmup_steps decay_rate power alpha m_mul factor min_value max_value"
)
_FLAGS = "nesterov amsgrad centered relative_step use_ema jit_compile staircase cycle"

ARGUMENTS: Mapping[str, _Argument] = {
    name: argument
    for names, argument in (
        ("learning_rate", _number(NON_NEGATIVE, " or a schedule", schedule=True)),
        (_RATES_AND_SIZES, _number(NON_NEGATIVE)),
        ("weight_decay warmup_target l1 l2", _number(NON_NEGATIVE, " or None", optional=True)),
        ("clip_threshold decay_steps first_decay_steps t_mul", _number(POSITIVE)),
        ("clipnorm clipvalue global_clipnorm", _number(POSITIVE, " or None", optional=True)),
        ("beta_1 beta_2 rho", _number(FRACTION)),
        ("momentum ema_momentum rate", _number(UNIT)),
        ("beta_2_decay learning_rate_power", _number(FINITE)),
        (_FLAGS, _FLAG),
        (
            "ema_overwrite_frequency",
            _Argument(
                "a whole number of at least 0 or None", NON_NEGATIVE, types=(int,), optional=True
            ),
        ),
        # Keras nests a branch for each boundary: 100 take 40 s to trace, 200 are too deep for Python.
        ("boundaries", _Argument("a list of numbers of at least 0", NON_NEGATIVE, several=True)),
        (
            "values",
            _Argument("a list of numbers of at least 0", NON_NEGATIVE, several=True, most=101),
        ),
        ("name", _Argument("a string or None", types=(str,), optional=True)),
        ("mode", _Argument("a string", types=(str,))),
        (
            "axis",
            _Argument("a whole number or a list of them", FINITE, types=(int,), several=True),
        ),
    )
    for name in names.split()
}


def package_of(cls: type) -> str:
    """The top-level package that defines `cls`."""
    return cls.__module__.partition(".")[0]


def of_keras(cls: type) -> bool:
    """Whether Keras defines `cls`."""
    return package_of(cls) == "keras"


def parameters(cls: Value) -> dict[str, inspect.Parameter]:
    """The named parameters of the constructor of `cls`."""
    found = comparison.parameters(cls)
    return {p.name: p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _argument_of(cls: type, name: str) -> _Argument | None:
    """The argument of this name in Keras' own class among the bases of `cls`."""
    for base in cls.__mro__:
        if of_keras(base) and name in parameters(base):
            return ARGUMENTS.get(name)
    return ARGUMENTS[name] if name == "learning_rate" else None


def interval_of(cls: type, name: str) -> Interval:
    """The allowed numbers for the argument `name` of `cls`."""
    argument = _argument_of(cls, name)
    return FINITE if argument is None or argument.allowed is None else argument.allowed


def check_argument(cls: type, name: str, value: object) -> None:
    """Raises `TypeError` or `ValueError` unless `cls` can work with `value`."""
    if isinstance(value, tf.Tensor) and tf.is_symbolic_tensor(value):
        return  # its value is not known
    if isinstance(value, np.ndarray | np.generic | tf.Tensor | tf.Variable):
        value = np.asarray(value).tolist()
    argument = _argument_of(cls, name)
    if argument is None:
        if isinstance(value, float):
            checked_number(cls.__name__, name, value, FINITE)
        return
    if (value is None and argument.optional) or (
        argument.schedule and isinstance(value, Schedule | Mapping)
    ):
        return
    values = value if argument.several and isinstance(value, list | tuple) else [value]
    if len(values) > argument.most:
        raise refusal(
            f"`{name}` of `{cls.__name__}`", f"have at most {argument.most} elements", len(values)
        )
    for one in values:
        if not isinstance(one, argument.types) or (isinstance(one, bool) and argument is not _FLAG):
            raise TypeError(
                f"`{name}` of `{cls.__name__}` must be {argument.words}; found {shown(value)}."
            )
        if argument.allowed is not None:
            checked_number(cls.__name__, name, one, argument.allowed)


def as_given_in_json(cls: type, name: str, value: Json) -> Json:
    """A number of JSON, which may lack its decimal point, as `cls` takes it.

    Schedules of Keras compute with integers where a rate is one, and fail.
    """
    argument = _argument_of(cls, name)
    if argument is None or float not in argument.types or name in _COUNTS:
        return value
    if isinstance(value, list):
        return [as_given_in_json(cls, name, item) for item in value]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole else value


def check_object(value: Value) -> None:
    """Raises unless the class of a Keras object can work with its arguments.

    A number that a subclass adds must only be finite. The rates of a schedule of Keras or of this
    package are tried up to step 1e9.
    """
    cls = type(value)
    try:
        config = value.get_config()
    except NotImplementedError:  # a subclass need not be serializable
        config = {}
    for name, argument in config.items():
        check_argument(cls, name, argument)
    if isinstance(value, Schedule) and package_of(cls) in ("keras", _PACKAGE):
        _check_rates(value)


def _check_rates(schedule: tf.keras.optimizers.schedules.LearningRateSchedule) -> None:
    name = type(schedule).__name__
    with eager_world(), tf.init_scope():
        for step in _STEPS:
            try:
                rate = float(schedule(tf.constant(step, tf.int64)))
            except (TypeError, ValueError, tf.errors.OpError) as error:
                raise ValueError(
                    f"The schedule `{name}` must give a rate at every step; found that it fails at "
                    f"step {step}: {shown(str(error))}."
                ) from error
            if not math.isfinite(rate) or rate < 0:
                raise ValueError(
                    f"The schedule `{name}` must give a finite rate of at least 0 at every step; "
                    f"found {rate} at step {step}. A schedule that grows needs an end, such as the "
                    "`end_learning_rate` of `PolynomialDecay`."
                )
