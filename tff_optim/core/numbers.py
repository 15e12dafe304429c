"""The values of hyper-parameters: allowed intervals, checks, and changes in a state.

The public names are those of `tff_optim.hyperparameters`.
"""

import collections
import math
from collections.abc import Collection, Mapping

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core import leaves
from tff_optim.core.messages import at, refusal, shown
from tff_optim.core.types import Declared, Hparams, Number, State, Structure

Schedule = tf.keras.optimizers.schedules.LearningRateSchedule
STEP = "step"


@attrs.frozen
class Interval:
    """An interval of finite numbers.

    Attributes:
      words: The rule in words, for messages.
      lower: The lower end.
      upper: The upper end.
      open_lower: Whether the lower end itself is excluded.
      open_upper: Whether the upper end itself is excluded.

    Example:
      >>> 1.0 in Interval("a number in [0, 1)", 0.0, 1.0, open_upper=True)
      False
    """

    words: str
    lower: float = -math.inf
    upper: float = math.inf
    open_lower: bool = False
    open_upper: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and bool(self.holds(value))

    def holds(self, value: Number) -> Number:
        """Whether a finite number, or each element of a tensor, is in the interval."""
        above = value > self.lower if self.open_lower else value >= self.lower
        below = value < self.upper if self.open_upper else value <= self.upper
        return above & below


FINITE = Interval("a finite number")
NON_NEGATIVE = Interval("a number of at least 0", lower=0.0)
POSITIVE = Interval("a number greater than 0", lower=0.0, open_lower=True)
FRACTION = Interval("a number in [0, 1)", lower=0.0, upper=1.0, open_upper=True)
UNIT = Interval("a number in [0, 1]", lower=0.0, upper=1.0)


def single(value: float) -> float:
    """`value` in TensorFlow's float32, in which subnormal numbers are 0."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return rounded if abs(rounded) >= np.finfo(np.float32).tiny else 0.0


def to_float(value: Number) -> Number:
    """Integers and NumPy scalars as Python floats; anything else as it is, for a later check."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return math.inf if value > 0 else -math.inf
    return value


def checked_number(
    owner: str, name: str, value: object, allowed: Interval, also: str = ""
) -> float:
    """Returns a number as a Python float, after checking it.

    Args:
      owner: The owner of the hyper-parameter, for the message.
      name: The name of the hyper-parameter, for the message.
      value: A Python or NumPy number.
      allowed: The allowed numbers, as given and when rounded to float32.
      also: Other values that the caller takes, for the message: " or a Keras schedule".

    Raises:
      TypeError: If `value` is not a number.
      ValueError: If it is not finite or not allowed.

    Example:
      >>> checked_number("Adam", "beta_1", np.float32(0.5), FRACTION)
      0.5
    """
    number = to_float(value)
    rule = f"`{name}` of `{owner}` must be {allowed.words}{also}; found {shown(value)}"
    if not isinstance(number, float):
        raise TypeError(f"{rule}. Give a Python or NumPy number.")
    if number not in allowed:
        raise ValueError(f"{rule}.")
    kept = single(number)
    if kept not in allowed:
        raise ValueError(f"{rule}, which is {kept!r} when rounded to float32.")
    return number


def constant(allowed: Interval, default: object = attrs.NOTHING) -> Declared:
    """Declares a number that never changes: no schedule, not in the state.

    Example:
      >>> attrs.make_class("Part", {"size": constant(POSITIVE, 2)})()
      Part(size=2.0)
    """

    def validate(owner: object, attribute: attrs.Attribute, value: object) -> None:
        checked_number(type(owner).__name__, attribute.name, value, allowed)

    return attrs.field(default=default, converter=to_float, validator=validate)


def check_scalar(owner: str, name: str, value: tf.Tensor) -> None:
    """Raises `ValueError` unless a tensor is one real number."""
    if value.shape.rank != 0 or not (value.dtype.is_floating or value.dtype.is_integer):
        raise ValueError(
            f"`{name}` of `{owner}` must be one real number if it is a tensor; found "
            f"{value.dtype.name}{value.shape}."
        )


def checked_where_run(owner: str, name: str, value: tf.Tensor, allowed: Interval) -> tf.Tensor:
    """A scalar tensor of a graph, which checks its value where the graph is run."""
    check_scalar(owner, name, value)
    number = tf.cast(value, tf.float32)
    good = tf.math.is_finite(number) & allowed.holds(number)
    message = f"`{name}` of `{owner}` must be {allowed.words}; found:"
    with tf.control_dependencies([tf.debugging.Assert(good, [message, value])]):
        return tf.identity(value)


def checked(owner: str, name: str, value: Number, allowed: Interval) -> Number:
    """A value that a hyper-parameter is set to: a Python float, or a tensor if it is one of a graph.

    Raises:
      TypeError: If it is neither a number nor a tensor.
      ValueError: If it is not allowed, or a tensor is not a scalar.

    Example:
      >>> checked("Momentum", "beta", np.float16(0.5), FRACTION)
      0.5
    """
    if tf.is_symbolic_tensor(value):
        return checked_where_run(owner, name, value, allowed)
    if isinstance(value, Schedule):
        raise TypeError(
            f"`{name}` of `{owner}` must be set to a number or a tensor; found a schedule. Give "
            "schedules when the optimizer is built."
        )
    if tf.is_tensor(value):
        check_scalar(owner, name, value)
        value = value.numpy()
    return checked_number(owner, name, value, allowed)


def in_dtype_of(value: Number, number: Number) -> Number:
    """`value`, a number or scalar tensor, in the dtype of `number`: a tensor or a NumPy scalar.

    Example:
      >>> in_dtype_of(2, np.float16(0.5)).dtype
      dtype('float16')
    """
    dtype = leaves.spec_of(number).dtype
    return tf.cast(value, dtype) if tf.is_tensor(value) else dtype.as_numpy_dtype(value)


def update(
    state: State,
    hparams: Mapping[str, Number],
    intervals: Mapping[str, Interval],
    owner: str,
) -> Hparams:
    """Returns `state` with some of its numbers set; every `set_hparams` uses it.

    Args:
      state: A mapping that holds the numbers by name, and possibly more.
      hparams: New values by name: Python or NumPy numbers, or scalar tensors. The others stay as they
        are.
      intervals: The names that may be set, and the allowed numbers for each.
      owner: The owner of the hyper-parameters, for messages.

    Returns:
      An `OrderedDict`, in which every number keeps its dtype in `state`.

    Raises:
      TypeError: If a value is neither a number nor a tensor.
      ValueError: If a name is unknown, a number is not allowed, or a tensor is not a scalar.

    Example:
      >>> state = collections.OrderedDict(beta=np.float32(0.5), step=np.int64(3))
      >>> float(update(state, {"beta": 0.25}, {"beta": FRACTION}, "Momentum")["beta"])
      0.25
    """
    check_names(hparams, intervals, owner)
    new_state = collections.OrderedDict(state)
    for name, value in hparams.items():
        value = checked(owner, name, value, intervals[name])
        new_state[name] = in_dtype_of(value, state[name])
    return new_state


def complete(known: Structure, given: Structure, path: str = "") -> Structure:
    """Completes the hyper-parameters of a process.

    TFF's own processes take only all of them, each in its own dtype.

    Args:
      known: The result of the process's `get_hparams`: numbers in mappings.
      given: Some of them, in the same mappings: Python or NumPy numbers of any width.
      path: Their path, for messages.

    Returns:
      All of them, structured and typed like `known`.

    Raises:
      TypeError: If a value is not a number.
      ValueError: If a name is unknown, or a number is not finite or not whole where it must be.

    Example:
      >>> known = {"finalizer": {"learning_rate": np.float32(1.0), "beta_1": np.float64(0.5)}}
      >>> complete(known, {"finalizer": {"learning_rate": 2}})["finalizer"]["learning_rate"].dtype
      dtype('float32')
    """
    where = at("hparams", path)
    if isinstance(known, Mapping):
        if not isinstance(given, Mapping):
            raise refusal(where, "be a mapping", shown(given), error=TypeError)
        if unknown := [name for name in given if name not in known]:
            raise refusal(where, f"hold some of {', '.join(known) or 'nothing'}", shown(unknown))
        return collections.OrderedDict(
            (
                key,
                complete(value, given[key], f"{path}/{key}".lstrip("/")) if key in given else value,
            )
            for key, value in known.items()
        )
    old = np.asarray(known)
    if old.ndim or old.dtype.kind not in "fiu":
        return given  # not a number: TFF compares its type
    number = to_float(given.numpy() if isinstance(given, tf.Tensor) else given)
    if not isinstance(number, float):
        raise refusal(where, "be a number", shown(given), error=TypeError)
    if old.dtype.kind != "f":
        if not math.isfinite(number) or number != int(number):
            raise refusal(where, "be a whole number", shown(given))
        return old.dtype.type(int(number))
    with np.errstate(over="ignore"):
        new = old.dtype.type(number)
    if not np.isfinite(new):
        raise refusal(where, f"be a finite number in {old.dtype}", shown(given))
    return new


def check_names(hparams: Mapping[str, Number], known: Collection[str], owner: str) -> None:
    """Raises `ValueError` unless `hparams` is a mapping from some of the names in `known`.

    Example:
      >>> check_names({"gamma": 0.5}, {"beta": FRACTION}, "Momentum")
      Traceback (most recent call last):
        ...
      ValueError: `hparams` of `Momentum` must hold some of beta; found ...
    """
    if not isinstance(hparams, Mapping):
        raise refusal(
            f"`hparams` of `{owner}`", "be a mapping from names to numbers", shown(hparams)
        )
    if unknown := [name for name in hparams if name not in known]:
        raise ValueError(
            f"`hparams` of `{owner}` must hold some of {', '.join(known) or 'nothing'}; found "
            f"{', '.join(map(str, unknown))}. All else is fixed when the optimizer is built."
        )
