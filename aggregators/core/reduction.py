"""Reductions: how clients' values become one, in pieces and in any order.

`federated_reduce` is the operator of that name that TFF dropped. A `Reduction` is its form in a rule: a
value that can be tested, combined and passed around.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks
from aggregators.core.types import Part, Reduced, Structure

Accumulator: TypeAlias = Structure
# A function of two arguments in TensorFlow operations, or a computation of TFF.
Function: TypeAlias = Callable[[Structure, Structure], Structure] | tff.Computation

_NO_MERGE = (
    "This reduction was given no `merge`, so it cannot join the results of several workers or "
    "sub-rounds. Give one: a function of two accumulators that returns one."
)


def _unchanged(value: Structure) -> Structure:
    return value


@attrs.frozen
class Reduction:
    """How clients' values become one: each is lifted, all are merged, the total is reported.

    ```
    result = report(merge(... merge(merge(zero, lift(x_1)), lift(x_2)) ..., lift(x_n)))
    ```

    `merge` must be associative, and `zero` its neutral element. Workers and sub-rounds merge their own
    clients first, and then their totals are merged.

    Attributes:
      zero: `() -> accumulator` of no clients: constant tensors. A dimension of 0 may grow:
        `tf.zeros([0, 3])` starts an accumulator with any number of rows.
      merge: `(accumulator, accumulator) -> accumulator`.
      lift: `value -> accumulator` of one client, which runs on that client; by default the value
        itself.
      report: `accumulator -> result`; by default the accumulator itself.

    All are functions of TensorFlow operations.

    Example:
      >>> largest = Reduction(lambda: float("-inf"), tf.maximum)
      >>> largest.merge(largest.zero(), largest.lift(tf.constant(3.0))).numpy()
      3.0
    """

    zero: Callable[[], Accumulator] = attrs.field(validator=checks.validated(checks.function, "()"))
    merge: Callable[[Accumulator, Accumulator], Accumulator] = attrs.field(
        validator=checks.validated(checks.function, "(accumulator, accumulator)")
    )
    lift: Callable[[Part], Accumulator] = attrs.field(
        default=_unchanged, validator=checks.validated(checks.function, "(value)")
    )
    report: Callable[[Accumulator], Reduced] = attrs.field(
        default=_unchanged, validator=checks.validated(checks.function, "(accumulator)")
    )

    @property
    def of_lifted(self) -> "Reduction":
        """The same reduction for values that clients have lifted."""
        return attrs.evolve(self, lift=_unchanged)


def zip_reductions(**reductions: Reduction) -> Reduction:
    """Runs several reductions in one pass.

    Args:
      **reductions: The reductions, by name.

    Returns:
      A reduction of dictionaries: a value maps each name to that reduction's value, and the result maps
      it to that reduction's result.

    Raises:
      ValueError: If no reduction is given.
      TypeError: If one of them is no `Reduction`.

    Example:
      >>> add = Reduction(lambda: 0.0, tf.add)
      >>> both = zip_reductions(a=add, b=add)
      >>> float(both.merge(both.zero(), {"a": 1.0, "b": 2.0})["b"])
      2.0
    """
    if not reductions:
        raise ValueError("`zip_reductions` must have at least one reduction by name; found none.")
    for name, part in reductions.items():
        checks.instance(name, part, Reduction)

    def each(call: Callable[[str, Reduction], Structure]) -> OrderedDict[str, Structure]:
        return OrderedDict((name, call(name, part)) for name, part in reductions.items())

    return Reduction(
        zero=lambda: each(lambda name, part: part.zero()),
        merge=lambda a, b: each(lambda name, part: part.merge(a[name], b[name])),
        lift=lambda value: each(lambda name, part: part.lift(value[name])),
        report=lambda total: each(lambda name, part: part.report(total[name])),
    )


def federated_reduce(
    value: tff.Value,
    zero: Structure | tff.Computation | Reduction,
    op: Function | None = None,
    merge: Function | None = None,
) -> tff.Value:
    """Folds clients' values one by one: `<{T}@CLIENTS, U, (<U, T> -> U)> -> U@SERVER`.

    ```
    result = op(... op(op(zero, x_1), x_2) ..., x_n)
    ```

    For use inside a `tff.federated_computation`. A `Reduction` in place of `zero` replaces all further
    arguments; the result is then what it reports.

    Args:
      value: Value placed at `tff.CLIENTS`.
      zero: The start of the fold: a structure of constants, a computation of no arguments that returns
        one, or the result of calling it. Its type is `U`, except that dimensions of 0 that `op` makes
        grow have any length in `U`. Or a `Reduction`.
      op: Function of TensorFlow operations or `tff.Computation`, `(U, T) -> U`.
      merge: Function or computation `(U, U) -> U` that joins two folds, each started from `zero`.
        Without one, the reduction works on one worker only: a second worker or sub-round raises an
        error that says so.

    Returns:
      The fold, or the report of a `Reduction`, placed at `tff.SERVER`.

    Raises:
      TypeError: If `value` is not placed at clients, a type does not match, or `op` is missing or given
        together with a `Reduction`.

    Example:
      >>> import numpy as np
      >>> @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
      ... def largest(x):
      ...     return federated_reduce(x, np.float32(-np.inf), tf.maximum, merge=tf.maximum)
      >>> str(largest.type_signature)
      '({float32}@CLIENTS -> float32@SERVER)'
    """
    value, member = checks.placed("value", value, tff.CLIENTS)
    if isinstance(zero, Reduction):
        if op is not None or merge is not None:
            raise TypeError(
                "`op` and `merge` must be left out beside a `Reduction`, which brings its own; found "
                f"{op!r} and {merge!r}."
            )
        return _reduce(value, member, zero)
    first = _start(zero)
    accumulate = _computation("op", op, first.type_signature, member)
    start = _grown(first, accumulate.type_signature.result)
    total = start.type_signature
    if start is not first:
        accumulate = _computation("op", op, total, member)
    _check_result("op", accumulate, total)
    if merge is None:
        joined = tff.tensorflow.computation(_refuse, [total, total])
    elif merge is op and member.is_equivalent_to(total):
        joined = accumulate
    else:
        joined = _check_result("merge", _computation("merge", merge, total, total), total)
    report = tff.tensorflow.computation(_unchanged, total)
    return tff.federated_aggregate(value, start, accumulate, joined, report)


def _reduce(value: tff.Value, member: tff.Type, reduction: Reduction) -> tff.Value:
    if reduction.lift is not _unchanged:
        lift = tff.tensorflow.computation(lambda x: reduction.lift(x), member)
        value, member = tff.federated_map(lift, value), lift.type_signature.result
    start = _grown(tff.tensorflow.computation(lambda: reduction.zero())(), member)
    total = start.type_signature
    if not total.is_assignable_from(member):
        raise TypeError(
            f"`lift` must return the type of `zero`, {total}; found that it returns {member}. Cast or "
            "reshape one of them; without a `lift`, it is the client's own value."
        )
    joined = _check_result(
        "merge", _bare_computation("merge", reduction.merge, total, total), total
    )
    same = member.is_equivalent_to(total)
    accumulate = joined if same else _bare_computation("merge", reduction.merge, total, member)
    report = tff.tensorflow.computation(lambda total: reduction.report(total), total)
    return tff.federated_aggregate(value, start, accumulate, joined, report)


def _start(zero: Structure | tff.Computation) -> tff.Value:
    """The start as an unplaced `tff.Value`."""
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
            f"`zero` must be known everywhere, so not placed; found {placed[0]}. Give the "
            "constant itself, or a computation that returns it."
        )
    if made:
        return tff.to_value(zero, None)
    return tff.tensorflow.computation(lambda: tf.nest.map_structure(tf.convert_to_tensor, zero))()


def _grown(start: tff.Value, found: tff.Type) -> tff.Value:
    """The start, whose dimensions of 0 get any length where the type that was found has another."""
    empty = [spec for spec in _specs(start.type_signature) if 0 in (spec.shape.dims or ())]
    if not empty:
        return start
    shapes = [spec.shape for spec in _specs(start.type_signature)]
    others = [spec.shape for spec in _specs(found)]
    if [shape.rank for shape in shapes] != [shape.rank for shape in others]:
        return start
    wide = [
        tf.TensorShape([None if m == 0 and n != 0 else m for m, n in zip(shape, other)])
        for shape, other in zip(shapes, others, strict=True)
    ]

    def widen(zero: Accumulator) -> Accumulator:
        tensors = tf.nest.flatten(zero)
        same = map(tf.compat.v1.placeholder_with_default, tensors, wide)
        return tf.nest.pack_sequence_as(zero, list(same))

    return tff.tensorflow.computation(widen, start.type_signature)(start)


def _specs(kind: tff.Type) -> list[tf.TensorSpec]:
    return tf.nest.flatten(tff.types.type_to_tf_tensor_specs(kind))


def _bare_computation(
    argument: str, function: Function, a: tff.Type, b: tff.Type
) -> tff.Computation:
    """A computation of two arguments without a `tf.function`, which would double the graph."""
    must = f"`{argument}` must be a function of two arguments in TensorFlow operations"
    advice = f"It is called with {a} and {b}."
    # It takes one pair: for two named arguments TFF would wrap every call once more.
    return tff.tensorflow.computation(
        lambda pair: checks.called(must, function, pair[0], pair[1], advice=advice), (a, b)
    )


def _computation(argument: str, function: Function | None, *parameter: tff.Type) -> tff.Computation:
    """A computation of a user's function or computation, checked to take these types."""
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
        return function
    # `tf.function` converts control flow that users write in Python.
    return _bare_computation(argument, tf.function(function), *parameter)


def _check_result(argument: str, computation: tff.Computation, result: tff.Type) -> tff.Computation:
    """The computation, checked to return this type."""
    returns = computation.type_signature.result
    if not result.is_assignable_from(returns):
        raise TypeError(
            f"`{argument}` must return the type of `zero`, {result}; found that it returns "
            f"{returns}. Cast or reshape one of them."
        )
    return computation


def _refuse(a: Accumulator, b: Accumulator) -> Accumulator:
    del b  # both are of one type, and neither is right
    with tf.control_dependencies([tf.debugging.Assert(False, [_NO_MERGE])]):
        return tf.nest.map_structure(tf.identity, a)
