"""A copy of a Keras optimizer, with stand-ins for its variables.

A step works on a shallow copy of the optimizer, in which cells (`cells.py`) replace the variables. Its
`build` adds slots to the copy and does not change the optimizer.
"""

import collections
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.backends.keras.cells import VariableCell, current_graph
from tff_optim.core import comparison, patterns
from tff_optim.core.tracing import scratch_graph
from tff_optim.core.types import Function, Named, Number, Operation, Value

Keras: TypeAlias = tf.keras.optimizers.Optimizer


@attrs.frozen(eq=False)
class Template:
    """A shallow copy of a Keras optimizer, built for some weights, with cells for its variables.

    Attributes:
      optimizer: The copy.
      weights: The cells of the weights.
      slots: The cells of the slots by name.
      from_weights: The slots whose initial value depends on the weights, such as their average.
    """

    optimizer: Keras
    weights: list[VariableCell]
    slots: "collections.OrderedDict[str, VariableCell]"
    from_weights: list[str] = attrs.field(factory=list)

    @property
    def can_be_copied(self) -> bool:
        """Whether `copy` finds everything that `build` made: nothing is inside a user's own object."""
        found: list[VariableCell] = []
        plain = all(
            name in _KEPT or _is_plain(value, found) for name, value in vars(self.optimizer).items()
        )
        return plain and {*map(id, self.slots.values())} <= {*map(id, found)}

    def copy(self) -> "Template":
        """The same with cells of its own, which one step can bind without affecting another."""
        clone = copy_containers(self.optimizer)
        copies: dict[int, VariableCell] = {}

        def copied(cell: VariableCell) -> VariableCell:
            if id(cell) not in copies:
                copies[id(cell)] = VariableCell(cell.value(), cell.name)
            return copies[id(cell)]

        _replace(clone, VariableCell, copied)
        slots = collections.OrderedDict((n, copied(cell)) for n, cell in self.slots.items())
        return Template(clone, [copied(c) for c in self.weights], slots, self.from_weights)


# Keras' own attributes that no step changes.
_KEPT = ("_distribution_strategy", "_learning_rate")


def _is_plain(value: Value, found: list[VariableCell]) -> bool:
    """Whether a value is a cell, a plain value, or a list, tuple or dictionary of these."""
    if isinstance(value, VariableCell):
        found.append(value)
        return True
    if isinstance(value, dict):
        return all(_is_plain(element, found) for element in value.values())
    if type(value) in (list, tuple):
        return all(_is_plain(element, found) for element in value)
    return value is None or isinstance(value, bool | int | float | str | tf.DType | np.generic)


def copy_containers(optimizer: Keras) -> Keras:
    """Copies an optimizer and its lists and dictionaries; their elements stay the same."""
    clone = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name.startswith("_self_"):  # Keras' tracking for checkpoints, with the same variables
            del clone.__dict__[name]
        elif isinstance(value, list):
            clone.__dict__[name] = list(value)
        elif isinstance(value, dict):
            clone.__dict__[name] = dict(value)
    clone.__dict__["_self_setattr_tracking"] = False  # lists stay plain lists
    return clone


def _replace(optimizer: Keras, kind: type, replace: Function) -> None:
    """Replaces every instance of `kind` in attributes, and in lists, tuples and dictionaries there."""

    def replaced(value: Value) -> Value:
        if isinstance(value, kind):
            return replace(value)
        if isinstance(value, list):
            return [replaced(element) for element in value]
        if type(value) is tuple:
            return tuple(replaced(element) for element in value)
        if isinstance(value, dict):
            return {key: replaced(element) for key, element in value.items()}
        return value

    for name, value in list(vars(optimizer).items()):
        optimizer.__dict__[name] = replaced(value)


def _attribute_of(optimizer: Keras, cell: VariableCell) -> str:
    for name, value in vars(optimizer).items():
        if value is cell:
            return name.lstrip("_")
    return "variable"


def has_rate_variable(optimizer: Keras) -> bool:
    """Whether the learning rate is a number, which Keras keeps in a variable, and not a schedule."""
    return isinstance(optimizer._learning_rate, tf.Variable)


def replace_learning_rate(optimizer: Keras, value: Number | None) -> None:
    """Gives a copied optimizer a variable of its own for its rate, with a new value unless None."""
    if not has_rate_variable(optimizer):
        raise ValueError(
            "`learning_rate` must be None for an `optimizer` with a schedule; found "
            f"{value}. Make the optimizer with a number as its rate."
        )
    shared = optimizer._learning_rate
    initial = value if value is not None else read_variables(optimizer)[id(shared)]
    optimizer.__dict__["_learning_rate"] = tf.Variable(
        initial, dtype=shared.dtype, name="learning_rate", trainable=False
    )


def read_variables(optimizer: Keras) -> dict[int, np.ndarray]:
    """The values of the variables that the optimizer's constructor made, by identity."""
    values: dict[int, np.ndarray] = {}

    def read(variable: tf.Variable) -> tf.Variable:
        with tf.init_scope():
            if tf.is_symbolic_tensor(variable.handle):
                raise ValueError(
                    "`optimizer` must have variables with values; found that it was made inside a "
                    "TFF computation or another graph. Pass a callable that makes it. If its rate is "
                    "a tensor of that graph, pass the rate by itself: `build_keras_optimizer("
                    "tf.keras.optimizers.SGD, learning_rate=r)`."
                )
            values[id(variable)] = variable.numpy()
        return variable

    _replace(optimizer, tf.Variable, read)
    return values


def build(
    optimizer: Keras,
    initial: Mapping[int, np.ndarray],
    values: Sequence[tf.Tensor],
    names: Sequence[str],
) -> Template:
    """Copies `optimizer` and builds the copy for weights with these values."""
    clone = copy_containers(optimizer)
    created: list[VariableCell] = []
    cells: dict[int, VariableCell] = {}

    def cell_for(variable: tf.Variable) -> VariableCell:
        if id(variable) not in cells:
            name = variable.name.split(":")[0]
            cells[id(variable)] = VariableCell(initial[id(variable)], name)
        return cells[id(variable)]

    graph = current_graph()

    def create(next_creator: object, **arguments: Value) -> VariableCell:
        del next_creator  # a cell replaces the variable
        if current_graph() is not graph:
            raise ValueError(
                "`build` must make its variables directly; found that it makes "
                f"{arguments.get('name')!r} in a `tf.init_scope` or a `tf.function` of its own, where "
                "a pure optimizer cannot replace it by state. Call `add_variable` outside of these."
            )
        value = arguments["initial_value"]
        value = value() if callable(value) else value
        created.append(VariableCell(value, arguments.get("name") or "", arguments.get("dtype")))
        return created[-1]

    _replace(clone, tf.Variable, cell_for)
    weights = [VariableCell(value, name) for value, name in zip(values, names)]
    if weights:
        with tf.variable_creator_scope(create):
            clone.build(weights)
    own = {id(clone._iterations), id(clone._learning_rate)}
    own.add(id(getattr(clone, "_current_learning_rate", None)))  # a function of the step
    slots: collections.OrderedDict[str, VariableCell] = collections.OrderedDict()
    for cell in [*(c for c in cells.values() if id(c) not in own), *created]:
        name = cell.name if cell.name not in ("", "Variable") else _attribute_of(clone, cell)
        while name in slots:  # Keras gives two placeholders of Adafactor the same name
            name += "_"
        slots[name] = cell
    return Template(clone, weights, slots)


def depends_on(outputs: Sequence[tf.Tensor], sources: Sequence[tf.Tensor]) -> bool:
    """Whether any output of a graph is computed from any of the sources."""
    targets = {source.op for source in sources}
    seen: set[Operation] = set()
    todo = [output.op for output in outputs]
    while todo:
        op = todo.pop()
        if op in targets:
            return True
        if op not in seen:
            seen.add(op)
            todo.extend(tensor.op for tensor in op.inputs)
    return False


def build_template(
    optimizer: Keras,
    initial: Mapping[int, np.ndarray],
    specs: Sequence[tf.TensorSpec],
    names: Sequence[str],
) -> Template:
    """Builds a copy in a throw-away graph, so that it takes no memory and its cells hold no data."""
    with scratch_graph():
        values = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
        template = build(optimizer, initial, values, names)
        from_weights = [
            name for name, cell in template.slots.items() if depends_on([cell.value()], values)
        ]
    return attrs.evolve(template, from_weights=from_weights)


def template_maker(build: Callable[[], Template]) -> Callable[[], Template]:
    """A function that returns a template for one step: if possible, a copy of one that is built now."""
    template = build()
    return template.copy if template.can_be_copied else build


def constructor_arguments(optimizer: Keras) -> Named:
    """The arguments of the constructor of `optimizer`, with a schedule as an object.

    Raises:
      ValueError: If its `get_config` leaves out any.
    """
    config = comparison.constructor_arguments(optimizer)
    if "learning_rate" in config and not has_rate_variable(optimizer):
        config["learning_rate"] = optimizer._learning_rate
    return config


def excluded_patterns(optimizer: Keras) -> list[str]:
    """The regular expressions for the names of weights that do not decay."""
    return list(getattr(optimizer, "_exclude_from_weight_decay_names", None) or [])


def exclude_from_decay(copied: Template, names: Sequence[str]) -> None:
    """Excludes from decay the weights whose names match."""
    optimizer = copied.optimizer
    found = excluded_patterns(optimizer)
    optimizer.__dict__["_exclude_from_weight_decay"] = [
        optimizer._var_key(cell)
        for cell, name in zip(copied.weights, names)
        if any(patterns.search(pattern, name) for pattern in found)
    ]
    optimizer.__dict__["_exclude_from_weight_decay_names"] = []


def with_unit_rate(optimizer: Keras) -> Keras:
    """A copy at learning rate 1, without decay and moving average of weights.

    A copy, not a new one from its configuration, since that of a subclass may be incomplete.
    """
    clone = copy_containers(optimizer)
    rate = tf.Variable(1.0, dtype=tf.keras.backend.floatx(), name="learning_rate", trainable=False)
    clone.__dict__.pop("_current_learning_rate", None)  # that of a schedule
    # AdamW must have a number, also when it is rebuilt from its configuration.
    decay = 0.0 if isinstance(clone, tf.keras.optimizers.AdamW) else None
    # Into `__dict__`, since Keras' setters would change the old variable.
    clone.__dict__.update(_learning_rate=rate, weight_decay=decay)
    clone.__dict__.update(use_ema=False, ema_momentum=0.99, ema_overwrite_frequency=None)
    return clone


def all_cells(copied: Template) -> Iterator[VariableCell]:
    """The cells that a step reads or assigns."""
    for name in ("_iterations", "_learning_rate", "_current_learning_rate"):
        cell = getattr(copied.optimizer, name, None)
        if isinstance(cell, VariableCell):  # a rate may be a schedule
            yield cell
    yield from copied.weights
    yield from copied.slots.values()
