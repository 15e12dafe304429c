"""Stand-ins for `tf.Variable` and for Python numbers that turn a Keras step into a pure function.

A Keras optimizer keeps its slots in `tf.Variable`s and its hyper-parameters in Python numbers. A TFF
computation can have neither, since its state is made of tensors. `VariableCell` looks like a variable
but holds a tensor. `NumberCell` looks like a Python `float` but holds a scalar tensor, which may change
between steps without retracing.
"""

import operator
from collections.abc import Callable
from typing import NoReturn, Self

import numpy as np
import tensorflow as tf

from tff_optim.core.types import Function, Number, Value


def current_graph() -> tf.Graph | None:
    """The graph to which operations are being added, or None in eager execution."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


class VariableCell:
    """Holds a tensor behind the part of the `tf.Variable` interface that optimizers use.

    A value that is assigned inside an inner graph (`tf.cond`, `tf.while_loop`, `tf.function`) could not
    leave it, so such an assignment raises.
    """

    trainable = True
    constraint = None
    # Makes `numpy_array * cell` call the cell's operator instead of NumPy's.
    __array_priority__ = 100

    def __init__(self, value: Number, name: str, dtype: tf.DType | None = None):
        self._value = tf.convert_to_tensor(value, dtype)
        self._graph = current_graph()
        self.name = name
        # Keras identifies a variable by `_unique_id` and names its slots after `_shared_name`.
        self._unique_id = self._shared_name = name

    def __repr__(self) -> str:
        return f"VariableCell({self.name!r}, shape={self.shape}, dtype={self.dtype.name})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"The optimizer reads `{name}` of the variable {self._shared_name!r}. In a pure step it "
            "is a tensor: it can be read and assigned (assign, assign_add, assign_sub, scatter_add, "
            "scatter_sub, scatter_update, scatter_max, scatter_min), but it has no handle and no "
            "other method of `tf.Variable`. Rewrite `update_step` with those."
        )

    dtype = property(operator.attrgetter("_value.dtype"))
    shape = property(operator.attrgetter("_value.shape"))
    # `tf.group`, `tf.control_dependencies` and others read these of an assigned variable.
    device = property(operator.attrgetter("_value.device"))
    op = property(operator.attrgetter("_value.op"))
    graph = property(operator.attrgetter("_value.graph"))

    def _as_graph_element(self) -> tf.Tensor:
        return self._value

    def get_shape(self) -> tf.TensorShape:
        return self.shape

    def value(self) -> tf.Tensor:
        """The tensor that the cell holds now."""
        return self._value

    read_value = value

    def numpy(self) -> np.ndarray:
        return self._value.numpy()

    def bind(self, value: Number) -> None:
        """Replaces the value from outside the step, in the graph in which the step will run."""
        self._value = tf.convert_to_tensor(value)
        self._graph = current_graph()

    def assign(self, value: Number, **unused: object) -> Self:
        """Replaces the value by one of the same shape and dtype."""
        del unused  # `use_locking`, `name` and `read_value` have no meaning for a tensor
        if current_graph() is not self._graph:
            raise ValueError(
                f"`update_step` must assign variables directly; found that it assigns "
                f"{self._shared_name!r} inside `tf.cond`, `tf.while_loop` or a `tf.function` of its "
                "own. In a pure step that value cannot leave the branch or loop: compute it there and "
                "assign it outside, or use `tf.where`."
            )
        value = tf.convert_to_tensor(value, self.dtype)
        if not value.shape.is_compatible_with(self.shape):
            raise ValueError(
                f"`update_step` must keep the shapes of variables; found that it assigns a value of "
                f"shape {value.shape} to {self._shared_name!r} of shape {self.shape}."
            )
        self._value = value
        return self

    def assign_add(self, delta: Number, **unused: object) -> Self:
        del unused
        return self.assign(self._value + tf.convert_to_tensor(delta, self.dtype))

    def assign_sub(self, delta: Number, **unused: object) -> Self:
        del unused
        return self.assign(self._value - tf.convert_to_tensor(delta, self.dtype))


def _scatter(operation: str) -> Callable[..., VariableCell]:
    def scatter(cell: VariableCell, slices: tf.IndexedSlices, **unused: object) -> VariableCell:
        del unused
        if not isinstance(slices, tf.IndexedSlices):
            raise TypeError(
                f"A scatter on the variable {cell.name!r} must be given `tf.IndexedSlices`; "
                f"found {type(slices).__name__}."
            )
        values = tf.convert_to_tensor(slices.values, cell.dtype)
        changed = getattr(tf, f"tensor_scatter_nd_{operation}")
        return cell.assign(changed(cell.value(), tf.expand_dims(slices.indices, -1), values))

    return scatter


for _operation in ("add", "sub", "update", "max", "min"):
    setattr(VariableCell, f"scatter_{_operation}", _scatter(_operation))


class ReadOnlyCell(VariableCell):
    """A cell whose assignments have no effect, since its new value is computed elsewhere."""

    def assign(self, value: Number, **unused: object) -> Self:
        del value, unused
        return self


class NumberCell:
    """Holds a float64 scalar tensor that behaves like a Python `float` in arithmetic.

    Like a Python number it takes the dtype of the other operand, and `1 - x` is computed in double
    precision, so a step gives the same numbers as with a Python `float`. Unlike a Python number it has
    no truth value, since code that branches on it could not follow a change without retracing.
    """

    __array_priority__ = 200

    def __init__(self, value: Number):
        self._value = tf.cast(value, tf.float64)

    def _cast(self, dtype: tf.DType | None) -> tf.Tensor:
        # TensorFlow reads a bare Python float as float32.
        return tf.cast(self._value, dtype or tf.float32)

    def _arithmetic(self, other: Number, operation: Function) -> Number:
        if isinstance(other, NumberCell):
            return NumberCell(operation(self._value, other._value))
        if isinstance(other, (int, float)):
            return NumberCell(operation(self._value, tf.constant(other, tf.float64)))
        other = tf.convert_to_tensor(other)
        return operation(self._cast(other.dtype), other)

    def __neg__(self) -> "NumberCell":
        return NumberCell(-self._value)

    def _no_branch(self, *unused: object) -> NoReturn:
        del unused
        raise TypeError("A hyper-parameter that may change between steps has no truth value.")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _no_branch
    __hash__ = object.__hash__


def _arithmetic(name: str) -> None:
    operation = getattr(operator, name)
    setattr(NumberCell, f"__{name}__", lambda a, b: a._arithmetic(b, operation))
    setattr(NumberCell, f"__r{name}__", lambda b, a: b._arithmetic(a, lambda x, y: operation(y, x)))


for _name in ("add", "sub", "mul", "truediv", "pow"):
    _arithmetic(_name)


def _convert_variable(
    cell: VariableCell, dtype: tf.DType | None = None, name: object = None, as_ref: bool = False
) -> tf.Tensor:
    del name, as_ref
    if dtype is not None and not dtype.is_compatible_with(cell.dtype):
        return NotImplemented
    return cell.value()


def _convert_number(
    cell: NumberCell, dtype: tf.DType | None = None, name: object = None, as_ref: bool = False
) -> tf.Tensor:
    del name, as_ref
    return cell._cast(dtype)


def _overload(name: str) -> None:
    def apply(cell: VariableCell, *operands: Value, **named: Value) -> tf.Tensor:
        return getattr(tf.Tensor, name)(cell.value(), *operands, **named)

    apply.__name__ = name
    setattr(VariableCell, name, apply)


for _name in tf.Tensor.OVERLOADABLE_OPERATORS:  # `==` too: it compares values, as a variable's
    _overload(_name)

tf.register_tensor_conversion_function(VariableCell, _convert_variable)
tf.register_tensor_conversion_function(NumberCell, _convert_number)
