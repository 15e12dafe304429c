"""Reductions: how clients' values become one, in pieces and in any order.

`Reduction` is the four functions of `tff.federated_aggregate` as one value that can be tested,
combined and handed around. `federated_reduce` is the primitive of the same name that TFF dropped.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks

_NO_MERGE = (
    "This reduction was given no `merge`, so it cannot join the results of several workers or "
    "sub-rounds. Give one: a function of two accumulators that returns one."
)


def _unchanged(value: Any) -> Any:
    return value


@attrs.frozen
class Reduction:
    """A fold over clients.

    `accumulate` and `merge` must agree: folding some clients, folding the others and merging the
    two accumulators must give what folding all would. `reduction_from_merge` makes that so.

    Attributes:
      zero: Function of nothing that returns the accumulator of no clients: constant tensors.
      accumulate: `(accumulator, value) -> accumulator`.
      merge: `(accumulator, accumulator) -> accumulator`; None if there is no such function, and
        then the reduction works on one worker only, and says so elsewhere.
      report: `accumulator -> result`.
      lift: `value -> accumulator` of that client alone, if `accumulate` is `merge` after it; else
        None. Lets clients lift their own values; see `of_lifted`.

    All are functions of TensorFlow operations.

    Example:
      >>> largest = reduction_from_merge(lambda: float("-inf"), lambda x: x, tf.maximum)
      >>> largest.accumulate(largest.zero(), tf.constant(3.0)).numpy()
      3.0
    """

    zero: Callable[[], Any] = attrs.field(validator=checks.validated(checks.function, "()"))
    accumulate: Callable[[Any, Any], Any] = attrs.field(
        validator=checks.validated(checks.function, "(accumulator, value)")
    )
    merge: Callable[[Any, Any], Any] | None = attrs.field(
        validator=checks.validated(checks.function, "(accumulator, accumulator)", optional=True)
    )
    report: Callable[[Any], Any] = attrs.field(
        default=_unchanged, validator=checks.validated(checks.function, "(accumulator)")
    )
    lift: Callable[[Any], Any] | None = attrs.field(
        default=None, validator=checks.validated(checks.function, "(value)", optional=True)
    )


def reduction_from_merge(
    zero: Callable[[], Any],
    lift: Callable[[Any], Any],
    merge: Callable[[Any, Any], Any],
    report: Callable[[Any], Any] = _unchanged,
) -> Reduction:
    """Makes a `Reduction` whose `accumulate(a, x)` is `merge(a, lift(x))`.

    The default TFF runtime never calls `merge`, so one written apart from `accumulate` is only
    ever run where clients are spread over workers. Here every run of either runs both.

    Args:
      zero: Function of nothing: the accumulator of no clients, which merging leaves unchanged.
      lift: Turns one client's value into the accumulator of that client alone.
      merge: Joins two accumulators; associative.
      report: Turns the last accumulator into the result.

    Returns:
      A `Reduction`.

    Example:
      >>> count = reduction_from_merge(lambda: 0, lambda x: 1, tf.add)
      >>> int(count.accumulate(count.accumulate(count.zero(), 5.0), 7.0))
      2
    """
    checks.function("merge", merge, "(accumulator, accumulator)")
    checks.function("lift", lift, "(value)")
    return Reduction(zero, lambda total, value: merge(total, lift(value)), merge, report, lift)


def of_lifted(reduction: Reduction) -> Reduction:
    """The same reduction over values that the clients have lifted: accumulating is merging.

    One graph less to trace, to optimize and to send, wherever a process is built and first run.

    Args:
      reduction: A `Reduction` that has a `lift`.

    Returns:
      A `Reduction` over what `lift` returns.
    """
    return Reduction(reduction.zero, reduction.merge, reduction.merge, reduction.report)  # type: ignore[arg-type]


def zip_reductions(**reductions: Reduction) -> Reduction:
    """Runs several reductions in one pass.

    Args:
      **reductions: The reductions, by name.

    Returns:
      A reduction over dictionaries: each value is a mapping from the names to what each takes, and
      the result one from the names to what each gives. It has a `merge` if all of them have, and
      a `lift` if all of them have.

    Example:
      >>> add = reduction_from_merge(lambda: 0.0, lambda x: x, tf.add)
      >>> both = zip_reductions(a=add, b=add)
      >>> float(both.accumulate(both.zero(), {"a": 1.0, "b": 2.0})["b"])
      2.0
    """
    if not reductions:
        raise ValueError("`zip_reductions` must have at least one reduction by name; found none.")
    for name, part in reductions.items():
        checks.instance(name, part, Reduction)

    def each(call: Callable[[str, Reduction], Any]) -> OrderedDict[str, Any]:
        return OrderedDict((name, call(name, part)) for name, part in reductions.items())

    def merge(a: Any, b: Any) -> Any:
        return each(lambda name, part: part.merge(a[name], b[name]))  # type: ignore[misc]

    def lift(value: Any) -> Any:
        return each(lambda name, part: part.lift(value[name]))  # type: ignore[misc]

    return Reduction(
        zero=lambda: each(lambda name, part: part.zero()),
        accumulate=lambda total, value: each(
            lambda name, part: part.accumulate(total[name], value[name])
        ),
        merge=None if any(part.merge is None for part in reductions.values()) else merge,
        report=lambda total: each(lambda name, part: part.report(total[name])),
        lift=None if any(part.lift is None for part in reductions.values()) else lift,
    )


def federated_reduce(value: Any, zero: Any, op: Any = None, merge: Any = None) -> Any:
    """Folds clients' values one by one: `<{T}@CLIENTS, U, (<U, T> -> U)> -> U@SERVER`.

    ```
    result = op(... op(op(zero, x_1), x_2) ..., x_n)
    ```

    For use inside a `tff.federated_computation`.

    Args:
      value: Value placed at `tff.CLIENTS`.
      zero: What to start from: a structure of constants; a computation of no arguments that
        returns one, or what calling it gives. Its type is `U`. Or a `Reduction`, which brings all
        that follows, and a report.
      op: Function of TensorFlow operations or `tff.Computation`, `(U, T) -> U`.
      merge: Function or computation `(U, U) -> U` that joins two folds, each started from `zero`.
        Without one, the reduction works on one worker, and a second worker or sub-round raises an
        error that says so.

    Returns:
      The fold (of a `Reduction`, what it reports), placed at `tff.SERVER`.

    Raises:
      TypeError: If `value` is not placed at clients, a type does not fit, or `op` is missing, or
        given beside a `Reduction`.

    Example:
      >>> import numpy as np
      >>> @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
      ... def largest(x):
      ...     return federated_reduce(x, np.float32(-np.inf), tf.maximum, merge=tf.maximum)
      >>> str(largest.type_signature)
      '({float32}@CLIENTS -> float32@SERVER)'
      >>> add = reduction_from_merge(lambda: 0.0, lambda x: x, tf.add)
      >>> @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
      ... def total(x):
      ...     return federated_reduce(x, add)
      >>> str(total.type_signature)
      '({float32}@CLIENTS -> float32@SERVER)'
    """
    value = tff.to_value(value, None)
    member = _client_member(value)
    first = "op"
    if isinstance(zero, Reduction):
        if op is not None or merge is not None:
            raise TypeError(
                "`op` and `merge` must be left out beside a `Reduction`, which brings its own; found "
                f"{op!r} and {merge!r}."
            )
        start = tff.tensorflow.computation(lambda: zero.zero())()
        # Of values that were lifted, and in no words of a caller who has never said "accumulate".
        first = "merge" if zero.accumulate is zero.merge else "accumulate"
        op, report, wrap, merge = zero.accumulate, zero.report, _bare, zero.merge
    else:
        report, wrap = _unchanged, tf.function
        start = _start(zero)
    total = start.type_signature
    accumulate = _checked(first, op, (total, member), total, wrap)
    same = merge is op and member.is_equivalent_to(total)
    joined = accumulate if same else _merge_computation(merge, total, wrap)
    reported = tff.tensorflow.computation(lambda total: report(total), total)
    return tff.federated_aggregate(value, start, accumulate, joined, reported)


def _start(zero: Any) -> Any:
    """A value of TFF that is not placed, of what was given for one."""
    if isinstance(zero, tff.framework.ConcreteComputation):
        if zero.type_signature.parameter is not None:
            raise TypeError(
                "`zero` must be a computation of no arguments or a structure of constants; "
                f"found a computation of type {zero.type_signature}."
            )
        return zero()
    made = [x for x in tf.nest.flatten(zero) if isinstance(x, tff.Value)]
    placed = [x.type_signature for x in made if isinstance(x.type_signature, tff.FederatedType)]
    if placed:
        raise TypeError(
            f"`zero` must not be placed, as what is known everywhere; found {placed[0]}. Give the "
            "constant itself, or a computation that returns it."
        )
    if made:
        return tff.to_value(zero, None)
    return tff.tensorflow.computation(lambda: tf.nest.map_structure(tf.convert_to_tensor, zero))()


def _client_member(value: Any) -> Any:
    """Returns T of a `{T}@CLIENTS`."""
    signature = value.type_signature
    if not isinstance(signature, tff.FederatedType) or signature.placement is not tff.CLIENTS:
        raise TypeError(
            f"`value` must be placed at tff.CLIENTS; found {signature}. "
            "Join a structure of placed values with `tff.federated_zip` first."
        )
    return signature.member


def _checked(
    argument: str,
    function: Any,
    parameter: tuple[Any, Any],
    result: Any,
    wrap: Callable[[Any], Any] = tf.function,
) -> Any:
    """Makes a computation of `function` and checks that it takes and returns these types."""
    if not callable(function):
        raise TypeError(
            f"`{argument}` must be a function of TensorFlow operations or a tff.Computation; "
            f"found {function!r}."
        )
    if isinstance(function, tff.framework.ConcreteComputation):
        takes = function.type_signature.parameter
        if takes is None or not takes.is_assignable_from(tff.to_type(parameter)):
            raise TypeError(
                f"`{argument}` must take {tff.to_type(parameter)}; found that it takes {takes}. "
                "Its first argument is the type of `zero`."
            )
        computation = function
    else:
        # The lambda since TFF takes no functions with default arguments, as most of TensorFlow's own
        # have, and of one argument since names of two would make TFF wrap every call once more;
        # `tf.function` around it is for the control flow that people write in Python.
        computation = tff.tensorflow.computation(
            wrap(lambda pair: function(pair[0], pair[1])), tff.to_type(parameter)
        )
    returns = computation.type_signature.result
    if not result.is_assignable_from(returns):
        raise TypeError(
            f"`{argument}` must return the type of `zero`, {result}; found that it returns "
            f"{returns}. Cast or reshape one of them."
        )
    return computation


def _bare(function: Any) -> Any:
    """No `tf.function`: a `Reduction` is TensorFlow operations, and half the graph without it."""
    return function


def _merge_computation(merge: Any, total: Any, wrap: Callable[[Any], Any] = tf.function) -> Any:
    if merge is not None:
        return _checked("merge", merge, (total, total), total, wrap)

    def refuse(a: Any, b: Any) -> Any:
        del b  # both are of one type, and neither is right
        with tf.control_dependencies([tf.debugging.Assert(False, [_NO_MERGE])]):
            return tf.nest.map_structure(tf.identity, a)

    return tff.tensorflow.computation(refuse, [total, total])
