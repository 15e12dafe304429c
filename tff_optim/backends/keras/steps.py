"""One step of a Keras optimizer on tensors.

The cells of a copy are bound to the tensors of a state, Keras' own `update_step` runs on them, and the
new tensors are read from them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.backends.keras.cells import NumberCell, ReadOnlyCell, VariableCell
from tff_optim.backends.keras.copies import Keras, Template
from tff_optim.core.types import Number, Value

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


def bind(
    template: Template, step: Number, rate: Number | None, hparams: Mapping[str, Number]
) -> None:
    """Sets a copy's number of steps taken, its rate (None for a schedule), and its hparams."""
    optimizer = template.optimizer
    optimizer._iterations.bind(step)
    current_rate = getattr(optimizer, "_current_learning_rate", None)
    if current_rate is not None:  # that of a schedule, a function of the step
        current_rate.bind(tf.zeros(current_rate.shape, current_rate.dtype))
    if rate is not None:
        optimizer._learning_rate.bind(tf.cast(rate, optimizer._learning_rate.dtype))
    for name, value in hparams.items():
        optimizer.__dict__[name] = NumberCell(value)


def prepare_gradients(optimizer: Keras, gradients: Sequence[Gradient]) -> list[Gradient]:
    """Clips gradients and sums the repeated rows of sparse ones, as Keras does before a step."""
    return optimizer._deduplicate_sparse_grad(optimizer._clip_gradients(list(gradients)))


def _refuse_new_variable(next_creator: object, **arguments: object) -> None:
    del next_creator
    raise ValueError(
        "`update_step` must use the variables that `build` makes, and no others; found that "
        f"it creates {arguments.get('name')!r}. Create every variable in `build`: a step of a pure "
        "optimizer can only change state that `initialize` has made."
    )


@attrs.frozen(eq=False)
class _Identity:
    """Compares an object by identity, and keeps it so that no other can have its identity."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _frozen(value: object) -> object:
    """A copy of an attribute's value that later changes do not affect."""
    if isinstance(value, list | tuple):
        return [_frozen(element) for element in value]
    if isinstance(value, dict):
        return {key: _frozen(element) for key, element in value.items()}
    if isinstance(value, set):
        return set(value)
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype, value.tobytes())
    return value if isinstance(value, int | float | str) else _Identity(value)


def _attributes(optimizer: Keras) -> dict[str, object]:
    return {name: _frozen(value) for name, value in vars(optimizer).items()}


def _check_unchanged(optimizer: Keras, before: Mapping[str, object]) -> None:
    """Raises if a step kept a value in a Python attribute, where the next step cannot find it."""
    for name, now in _attributes(optimizer).items():
        if name not in before or before[name] != now:
            raise ValueError(
                f"`update_step` of {type(optimizer).__name__} must keep its state in variables; "
                f"found that it changes the Python attribute `{name}`, which is lost when the step "
                "runs in a graph. Make a variable by `add_variable` in `build`."
            )


def _hold_nadam_product(optimizer: Keras) -> Callable[[VariableCell], None]:
    """Advances Nadam's product of momenta once per step; returns a function to call before each weight.

    Keras' Nadam assigns `_u_product` in a branch of `tf.cond` that a Python counter selects, for the
    first weight of a step only. Here the product is advanced first, and each weight takes the other
    branch, which only reads the product.
    """
    product = optimizer._u_product
    dtype = product.dtype
    step = tf.cast(optimizer.iterations + 1, dtype)
    decay = tf.pow(tf.cast(0.96, dtype), step)
    product.assign(product * (tf.cast(optimizer.beta_1, dtype) * (1.0 - 0.5 * decay)))
    held = ReadOnlyCell(product.value(), product.name)
    counter = optimizer.iterations + 2

    def before_weight(weight: VariableCell) -> None:
        optimizer._u_product = (
            held
            if weight.dtype == dtype
            else ReadOnlyCell(tf.cast(held.value(), weight.dtype), product.name)
        )
        optimizer._u_product_counter = counter

    return before_weight


def run_step(
    template: Template, weights: Sequence[VariableCell], gradients: Sequence[Gradient]
) -> None:
    """Runs one step of Keras on the cells, in the order of Keras' own `apply_gradients`."""
    optimizer = template.optimizer
    base: Value = super(Keras, optimizer)  # Keras' step without `tf.distribute`
    before = _attributes(optimizer)
    optimizer._compute_current_learning_rate()
    base._apply_weight_decay(weights)
    is_nadam = isinstance(optimizer, tf.keras.optimizers.Nadam)
    product = (optimizer._u_product, optimizer._u_product_counter) if is_nadam else None
    before_weight = _hold_nadam_product(optimizer) if is_nadam else None
    with tf.variable_creator_scope(_refuse_new_variable):
        for gradient, weight in zip(gradients, weights):
            if before_weight is not None:
                before_weight(weight)
            optimizer.update_step(gradient, weight)
    if product is not None:
        optimizer._u_product, optimizer._u_product_counter = product
    _check_unchanged(optimizer, before)
    if optimizer.use_ema:
        base._update_model_variables_moving_average(weights)
        if optimizer.ema_overwrite_frequency:
            steps = optimizer.iterations + 1
            overwrite = tf.equal(steps % optimizer.ema_overwrite_frequency, 0)
            for weight in weights:
                index = optimizer._index_dict[optimizer._var_key(weight)]
                average = optimizer._model_variables_moving_average[index]
                weight.assign(tf.where(overwrite, average, weight))
    optimizer.iterations.assign_add(1)
