"""One step of a Keras optimizer on tensors: the only file that knows Keras optimizers' insides.

A step works on a shallow copy of the Keras optimizer whose variables are replaced by cells
(`state_cells.py`). `build` fills the copy with slots, the cells are bound to the tensors of the
state, Keras' own `update_step` runs on them, and the new tensors are read out of them.
"""

import collections
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim import comparison, keras_arguments, patterns
from tff_optim.state_cells import NumberCell, ReadOnlyCell, VariableCell, current_graph
from tff_optim.tracing import scratch_graph

_Keras = tf.keras.optimizers.Optimizer

# The methods of Keras' base classes that a pure step calls as Keras does, or that have no part in a
# step. A subclass that overrides any other one would be silently ignored, so it is refused: clipping
# in `compute_gradients` may be there for privacy.
_HONOURED = {
    "__init__",
    "_build_index_dict",
    "_build_learning_rate",
    "_clip_gradients",
    "_compute_current_learning_rate",
    "_create_iteration_variable",
    "_create_or_restore_slot_variable",
    "_deduplicate_sparse_grad",
    "_process_kwargs",
    "_serialize_hyperparameter",
    "_var_key",
    "add_variable",
    "add_variable_from_reference",
    "build",
    "exclude_from_weight_decay",
    "from_config",
    "get_config",
    "iterations",
    "learning_rate",
    "load_own_variables",
    "lr",
    "save_own_variables",
    "set_weights",
    "update_step",
    "variables",
}


def not_called() -> set[str]:
    """The methods that Keras defines for an optimizer and a pure step does not call."""
    bases = [base for base in _Keras.__mro__ if keras_arguments.of_keras(base)]
    defined = {name for base in bases for name, value in vars(base).items() if callable(value)}
    return {name for name in defined if not name.startswith("__")} - _HONOURED


# --------------------------------------------------------------- a copy of the optimizer with cells


@attrs.define
class Copy:
    """A shallow copy of a Keras optimizer, built for some weights, with cells for its variables."""

    optimizer: Any
    weights: list[VariableCell]
    slots: "collections.OrderedDict[str, VariableCell]"
    # The slots whose initial value is made from the weights, such as their moving average.
    from_weights: list[str]


def copy_containers(optimizer: Any) -> Any:
    """Copies an optimizer and its lists and dictionaries; their elements stay the same."""
    clone = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name.startswith("_self_"):  # what Keras tracks for checkpoints, with the same variables
            del clone.__dict__[name]
        elif isinstance(value, list):
            clone.__dict__[name] = list(value)
        elif isinstance(value, dict):
            clone.__dict__[name] = dict(value)
    clone.__dict__["_self_setattr_tracking"] = False  # lists stay plain lists
    return clone


def _replace_variables(optimizer: Any, replace: Callable[[tf.Variable], Any]) -> None:
    """Replaces every `tf.Variable` in attributes, and in lists, tuples and dictionaries in them."""

    def replaced(value: Any) -> Any:
        if isinstance(value, tf.Variable):
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


def _attribute_of(optimizer: Any, cell: VariableCell) -> str:
    for name, value in vars(optimizer).items():
        if value is cell:
            return name.lstrip("_")
    return "variable"


def has_rate_variable(optimizer: Any) -> bool:
    """Whether the learning rate is a number, which Keras keeps in a variable, not a schedule."""
    return isinstance(optimizer._learning_rate, tf.Variable)


def own_learning_rate(optimizer: Any, value: Any) -> None:
    """Gives a copied optimizer a rate of its own: this value, or the one that it has if None."""
    if not has_rate_variable(optimizer):
        raise ValueError(
            "`learning_rate` cannot replace the schedule of `optimizer`; found "
            f"{value}. Make the optimizer with a number as its rate."
        )
    shared = optimizer._learning_rate
    initial = value if value is not None else read_variables(optimizer)[id(shared)]
    optimizer.__dict__["_learning_rate"] = tf.Variable(
        initial, dtype=shared.dtype, name="learning_rate", trainable=False
    )


def read_variables(optimizer: Any) -> dict[int, np.ndarray]:
    """The values of the variables that the optimizer's constructor has made, by identity."""
    values: dict[int, np.ndarray] = {}

    def read(variable: tf.Variable) -> tf.Variable:
        with tf.init_scope():
            if tf.is_symbolic_tensor(variable.handle):
                raise ValueError(
                    "`optimizer` was made inside a `tf.Graph` or a TFF computation, where its "
                    "variables have no values. Pass a callable that makes it, such as its class."
                )
            values[id(variable)] = variable.numpy()
        return variable

    _replace_variables(optimizer, read)
    return values


def build(
    optimizer: Any,
    initial: Mapping[int, np.ndarray],
    values: Sequence[tf.Tensor],
    names: Sequence[str],
) -> Copy:
    """Copies `optimizer` and builds the copy for weights of these values."""
    clone = copy_containers(optimizer)
    created: list[VariableCell] = []
    cells: dict[int, VariableCell] = {}

    def cell_for(variable: tf.Variable) -> VariableCell:
        if id(variable) not in cells:
            name = variable.name.split(":")[0]
            cells[id(variable)] = VariableCell(initial[id(variable)], name)
        return cells[id(variable)]

    graph = current_graph()

    def create(next_creator: Any, **arguments: Any) -> VariableCell:
        del next_creator  # no variable is made
        if current_graph() is not graph:
            raise ValueError(
                f"`build` makes the variable {arguments.get('name')!r} in a `tf.init_scope` or a "
                "`tf.function` of its own, where a pure optimizer cannot replace it by state. Make "
                "it without, with `add_variable`."
            )
        value = arguments["initial_value"]
        value = value() if callable(value) else value
        created.append(VariableCell(value, arguments.get("name") or "", arguments.get("dtype")))
        return created[-1]

    _replace_variables(clone, cell_for)
    weights = [VariableCell(value, name) for value, name in zip(values, names)]
    if weights:
        with tf.variable_creator_scope(create):
            clone.build(weights)
    own = {id(clone._iterations), id(clone._learning_rate)}
    own.add(id(getattr(clone, "_current_learning_rate", None)))  # follows from the iterations
    slots: collections.OrderedDict[str, VariableCell] = collections.OrderedDict()
    for cell in [*(c for c in cells.values() if id(c) not in own), *created]:
        name = cell.name if cell.name not in ("", "Variable") else _attribute_of(clone, cell)
        while name in slots:  # Keras gives two placeholders of Adafactor one name
            name += "_"
        slots[name] = cell
    return Copy(clone, weights, slots, [])


def _depends_on(outputs: Sequence[tf.Tensor], sources: Sequence[tf.Tensor]) -> bool:
    """Whether any output of a graph is computed from any of the sources."""
    targets = {source.op for source in sources}
    seen: set[Any] = set()
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
    optimizer: Any,
    initial: Mapping[int, np.ndarray],
    specs: Sequence[tf.TensorSpec],
    names: Sequence[str],
) -> Copy:
    """Builds a copy in a graph that is thrown away: it costs no memory and its cells hold no data."""
    with scratch_graph():
        values = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
        template = build(optimizer, initial, values, names)
        template.from_weights = [
            name for name, cell in template.slots.items() if _depends_on([cell.value()], values)
        ]
    return template


# ---------------------------------------------------------------------------------------- one step


def prepare_gradients(optimizer: Any, gradients: Sequence[Any]) -> list[Any]:
    """Clips gradients and sums the repeated rows of sparse ones, as Keras does before a step."""
    return optimizer._deduplicate_sparse_grad(optimizer._clip_gradients(list(gradients)))


def _refuse_new_variable(next_creator: Any, **arguments: Any) -> None:
    del next_creator
    raise ValueError(
        f"`update_step` creates the variable {arguments.get('name')!r}. Create every variable in "
        "`build`: a step of a pure optimizer can only change state that `initialize` has made."
    )


@attrs.frozen(eq=False)
class _Identity:
    """An object that is compared by identity, and kept so that no other can take its identity."""

    value: Any

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _frozen(value: Any) -> Any:
    """What an attribute holds now, in a form that later changes do not reach."""
    if isinstance(value, list | tuple):
        return [_frozen(element) for element in value]
    if isinstance(value, dict):
        return {key: _frozen(element) for key, element in value.items()}
    if isinstance(value, set):
        return set(value)
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype, value.tobytes())
    return value if isinstance(value, int | float | str) else _Identity(value)


def _attributes(optimizer: Any) -> dict[str, Any]:
    return {name: _frozen(value) for name, value in vars(optimizer).items()}


def _check_unchanged(optimizer: Any, before: Mapping[str, Any]) -> None:
    """Raises if a step kept something in a Python attribute, where the next step cannot find it."""
    for name, now in _attributes(optimizer).items():
        if name not in before or before[name] != now:
            raise ValueError(
                f"`update_step` of {type(optimizer).__name__} changes the Python attribute "
                f"`{name}`. That state is lost when the step runs in a graph: keep it in a variable "
                "made by `add_variable` in `build`."
            )


def _hold_nadam_product(optimizer: Any) -> Callable[[VariableCell], None]:
    """Advances Nadam's product of momenta once per step, and returns what to do before each weight.

    Keras' Nadam assigns `_u_product` in a branch of `tf.cond` that a Python counter selects, for the
    first weight of a step only. Here the product is advanced up front and each weight is made to
    take the other branch, in which the product is only read.
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


def run_step(copied: Copy, weights: Sequence[VariableCell], gradients: Sequence[Any]) -> None:
    """Runs one step of Keras on the cells, in the order of Keras' own `apply_gradients`."""
    optimizer = copied.optimizer
    base: Any = super(_Keras, optimizer)  # Keras' step without `tf.distribute`
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


# ------------------------------------------------------ hyper-parameters that may change in a graph


def check_arguments(optimizer: Any) -> None:
    """Raises if a number of the optimizer or of its schedule is not one to step with."""
    keras_arguments.check_object(optimizer)
    rate = optimizer._learning_rate
    if isinstance(rate, tf.Variable):
        if rate.shape.rank != 0:
            raise ValueError(
                f"`learning_rate` of `{type(optimizer).__name__}` must be one number; found a tensor "
                f"of shape {rate.shape}."
            )
        keras_arguments.check_argument(type(optimizer), "learning_rate", rate)
    elif isinstance(rate, tf.keras.optimizers.schedules.LearningRateSchedule):
        keras_arguments.check_object(rate)


def constructor_arguments(optimizer: Any) -> dict[str, Any]:
    """The arguments that the class of `optimizer` makes it of, a schedule as it is.

    Raises:
      ValueError: If its `get_config` does not tell all of them.
    """
    config = comparison.full_config(optimizer)
    if config is None:
        raise ValueError(
            f"`get_config` of `{type(optimizer).__qualname__}` must return every argument of its "
            "constructor; found it missing or incomplete. Override it."
        )
    if "learning_rate" in config and not has_rate_variable(optimizer):
        config["learning_rate"] = optimizer._learning_rate
    return config


def excluded_patterns(optimizer: Any) -> list[str]:
    """The regular expressions of weights' names whose weights do not decay."""
    return list(getattr(optimizer, "_exclude_from_weight_decay_names", None) or [])


def exclude(copied: Copy, names: Sequence[str]) -> None:
    """Excludes from decay the weights whose names match, in bounded time where that is possible."""
    optimizer = copied.optimizer
    found = excluded_patterns(optimizer)
    optimizer.__dict__["_exclude_from_weight_decay"] = [
        optimizer._var_key(cell)
        for cell, name in zip(copied.weights, names)
        if any(patterns.search(pattern, name) for pattern in found)
    ]
    optimizer.__dict__["_exclude_from_weight_decay_names"] = []


def find_numbers(
    optimizer: Any, initial: Mapping[int, np.ndarray]
) -> "collections.OrderedDict[str, float]":
    """Finds the numbers that a step reads in its graph, by tracing a step for each candidate."""
    try:
        config = optimizer.get_config()
    except NotImplementedError:  # a subclass need not be serializable
        config = {}
    numbers: collections.OrderedDict[str, float] = collections.OrderedDict()
    for name, value in config.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_candidate = is_number and name != "learning_rate" and vars(optimizer).get(name) == value
        if is_candidate and _reads_in_graph(optimizer, initial, name):
            numbers[name] = float(value)
    return numbers


def _probe(
    optimizer: Any, initial: Mapping[int, np.ndarray], name: str | None = None
) -> tuple[Any, bool]:
    """Traces a step on two small weights, with one number replaced by a tensor.

    Returns the graph, and whether what the step computes depends on the number.
    """
    specs = [tf.TensorSpec((2, 3), tf.float32), tf.TensorSpec((3,), tf.float32)]
    template = build_template(optimizer, initial, specs, ["0", "1"])
    with scratch_graph() as graph:
        for cell in _all_cells(template):
            cell.bind(tf.compat.v1.placeholder(cell.dtype, cell.shape))
        number = tf.compat.v1.placeholder(tf.float64, ())
        if name is not None:
            template.optimizer.__dict__[name] = NumberCell(number)
        gradients = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
        run_step(template, template.weights, gradients)
        return graph, _depends_on([cell.value() for cell in _all_cells(template)], [number])


def _reads_in_graph(optimizer: Any, initial: Mapping[int, np.ndarray], name: str) -> bool:
    try:
        return _probe(optimizer, initial, name)[1]
    except (TypeError, ValueError, NotImplementedError):
        return False  # the step needs a Python number, to branch on for example


def check_closed(optimizer: Any, initial: Mapping[int, np.ndarray]) -> None:
    """Raises if a step reads or assigns a variable that could not be replaced by state."""
    try:
        graph, _ = _probe(optimizer, initial)
    except Exception:
        return  # what is wrong is told by the first step, with the weights that it happens to
    if any(tensor.dtype == tf.resource for tensor, _ in graph.captures):
        raise ValueError(
            f"A step of {type(optimizer).__name__} uses a `tf.Variable` that is not an attribute of "
            "the optimizer, nor in a list, tuple or dictionary that is one: a schedule's, for "
            "example. It would be read as it is at the moment, not as state."
        )


def _all_cells(copied: Copy) -> Iterator[VariableCell]:
    for name in ("_iterations", "_learning_rate", "_current_learning_rate"):
        cell = getattr(copied.optimizer, name, None)
        if isinstance(cell, VariableCell):  # a rate may be a schedule
            yield cell
    yield from copied.weights
    yield from copied.slots.values()


# -------------------------------------------------------------------------- what cannot be supported


def check_supported(optimizer: Any) -> Any:
    """Returns the optimizer, or raises if a pure step would not do what Keras does with it."""
    cls = type(optimizer)
    name = cls.__name__
    overridden = [
        method
        for method in sorted(not_called())
        if inspect.getattr_static(cls, method, None) is not inspect.getattr_static(_Keras, method)
    ]
    if overridden:
        raise ValueError(
            f"`optimizer` of class {name} overrides {', '.join(overridden)}, which a pure step does "
            "not call. Keras' extension points are `build`, `update_step` and `get_config`."
        )
    replaced = [key for key in vars(optimizer) if callable(getattr(_Keras, key, None))]
    if replaced:
        raise ValueError(
            f"`optimizer` must have the methods of its class {name}; found one with {replaced[0]} "
            "replaced on the instance. Override it in a subclass."
        )
    steps = int(read_variables(optimizer)[id(optimizer.iterations)])
    if getattr(optimizer, "_built", False) or steps:
        raise ValueError(
            f"`optimizer` must be fresh; found one of class {name} that was built or has taken "
            f"{steps} steps. Its slots would be lost: pass a callable that makes a new one."
        )
    if getattr(optimizer, "_mesh", None) is not None:
        raise ValueError(
            "`optimizer` must not be laid out on a DTensor mesh; found one with `mesh`."
        )
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise ValueError(
            "`optimizer` excludes weights from decay by `var_list`. The weights of a TFF process are "
            "tensors, not those variables: exclude by `var_names`, and pass `weight_names` if they "
            "have no names."
        )
    return optimizer
