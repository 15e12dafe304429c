"""Any Keras optimizer as a pure TFF optimizer: the only file that knows Keras optimizers' insides.

Each `initialize` and each `next` works on a shallow copy of the Keras optimizer whose variables are
replaced by cells (`state_cells.py`). `build` fills the copy with slots, the cells are bound to the
tensors of the state, Keras' own `update_step` runs on them, and the new tensors are read out again.
"""

import collections
import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tree

from tff_optim.devices import DevicePolicy, device_scope, select_device
from tff_optim.state_cells import NumberCell, ReadOnlyCell, VariableCell

_Keras = tf.keras.optimizers.Optimizer
_LR = tff.learning.optimizers.LEARNING_RATE_KEY
_ITERATIONS = "iterations"
_SLOTS = "slots"

# What Keras calls in `apply_gradients` and a pure step does not: a subclass that overrides one of
# them would be silently ignored.
_NOT_CALLED = (
    "apply_gradients",
    "aggregate_gradients",
    "_apply_weight_decay",
    "_distributed_apply_gradients_fn",
    "_internal_apply_gradients",
    "_update_model_variables_moving_average",
    "_update_step",
)


# ---------------------------------------------------------------- a copy of the optimizer with cells


@attrs.define
class _Copy:
    """A shallow copy of a Keras optimizer, built for some weights, with cells for its variables."""

    optimizer: Any
    weights: list[VariableCell]
    slots: "collections.OrderedDict[str, VariableCell]"
    # The slots whose initial value is made from the weights, such as their moving average.
    from_weights: list[str]


def _copy_containers(optimizer: Any) -> Any:
    """Copies an optimizer and its lists and dictionaries; their elements stay the same."""
    clone = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if isinstance(value, list):
            clone.__dict__[name] = list(value)
        elif isinstance(value, dict):
            clone.__dict__[name] = dict(value)
    clone.__dict__["_self_setattr_tracking"] = False  # lists stay plain lists
    return clone


def _replace_variables(optimizer: Any, replace: Callable[[tf.Variable], Any]) -> None:
    """Replaces every `tf.Variable` in an attribute, or in a list or dictionary that is one."""

    def replaced(value: Any) -> Any:
        if isinstance(value, tf.Variable):
            return replace(value)
        if isinstance(value, list):
            return [replaced(element) for element in value]
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


def _read_variables(optimizer: Any) -> dict[int, np.ndarray]:
    """The values of the variables that the optimizer's constructor has made, by identity."""
    values: dict[int, np.ndarray] = {}

    def read(variable: tf.Variable) -> tf.Variable:
        with tf.init_scope():
            if not tf.executing_eagerly():
                raise ValueError(
                    "`optimizer` must be built outside of a `tf.Graph` and of a TFF computation; "
                    "found one whose variables have no values yet."
                )
            values[id(variable)] = variable.numpy()
        return variable

    _replace_variables(optimizer, read)
    return values


def _build(
    optimizer: Any,
    initial: Mapping[int, np.ndarray],
    values: Sequence[tf.Tensor],
    names: Sequence[str],
) -> _Copy:
    """Copies `optimizer` and builds the copy for weights of these values."""
    clone = _copy_containers(optimizer)
    created: list[VariableCell] = []
    cells: dict[int, VariableCell] = {}

    def cell_for(variable: tf.Variable) -> VariableCell:
        if id(variable) not in cells:
            name = variable.name.split(":")[0]
            cells[id(variable)] = VariableCell(initial[id(variable)], name)
        return cells[id(variable)]

    def create(next_creator: Any, **arguments: Any) -> VariableCell:
        del next_creator  # no variable is made
        value = arguments["initial_value"]
        value = value() if callable(value) else value
        created.append(VariableCell(value, arguments.get("name") or "", arguments.get("dtype")))
        return created[-1]

    _replace_variables(clone, cell_for)
    weights = [VariableCell(value, name) for value, name in zip(values, names)]
    if weights:
        with tf.variable_creator_scope(create):
            clone.build(weights)
        _replace_variables(clone, _refuse_lifted_variable)
    own = {id(clone._iterations), id(clone._learning_rate)}
    own.add(id(getattr(clone, "_current_learning_rate", None)))  # follows from the iterations
    slots: collections.OrderedDict[str, VariableCell] = collections.OrderedDict()
    for cell in [*(c for c in cells.values() if id(c) not in own), *created]:
        name = cell.name if cell.name not in ("", "Variable") else _attribute_of(clone, cell)
        while name in slots:  # Keras gives two placeholders of Adafactor one name
            name += "_"
        slots[name] = cell
    return _Copy(clone, weights, slots, [])


def _refuse_lifted_variable(variable: tf.Variable) -> None:
    raise ValueError(
        f"`build` makes the variable {variable.name!r} in a `tf.init_scope`, where a pure optimizer "
        "cannot replace it by state. Make it without that scope, with `add_variable`."
    )


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


@contextlib.contextmanager
def _scratch_graph() -> Iterator[None]:
    """A graph that is thrown away, as if under eager execution."""
    eager = tf.__internal__.eager_context.eager_mode()
    with eager, tf.__internal__.FuncGraph("scratch").as_default():
        yield


def _call_traced(function: Callable[..., Any], *arguments: Any, jit_compile: bool = False) -> Any:
    """Calls a function that runs Keras code, traced where that code means what its author meant.

    Under a plain `tf.Graph`, which every TFF computation has at its root, `tensor == tensor` is not
    an operation but compares identities. So there the function is traced outside of that graph.
    """
    if tf.compat.v1.executing_eagerly_outside_functions():
        if jit_compile:
            function = tf.function(function, jit_compile=True)
        return function(*arguments)
    specs = tf.nest.map_structure(tf.type_spec_from_value, arguments)
    with tf.__internal__.eager_context.eager_mode():
        traced = tf.function(function, autograph=False, jit_compile=jit_compile or None)
        traced = traced.get_concrete_function(*specs)
    return traced(*arguments)


def _build_template(
    optimizer: Any,
    initial: Mapping[int, np.ndarray],
    specs: Sequence[tf.TensorSpec],
    names: Sequence[str],
) -> _Copy:
    """Builds a copy in a graph that is thrown away: it costs no memory and its cells hold no data."""
    with _scratch_graph():
        values = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
        template = _build(optimizer, initial, values, names)
        template.from_weights = [
            name for name, cell in template.slots.items() if _depends_on([cell.value()], values)
        ]
    return template


# ---------------------------------------------------------------------------------------- one step


def _refuse_new_variable(next_creator: Any, **arguments: Any) -> None:
    del next_creator
    raise ValueError(
        f"`update_step` creates the variable {arguments.get('name')!r}. Create every variable in "
        "`build`: a step of a pure optimizer can only change state that `initialize` has made."
    )


def _attributes(optimizer: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(optimizer).items()
    }


def _check_unchanged(optimizer: Any, before: Mapping[str, Any]) -> None:
    """Raises if a step kept something in a Python attribute, where the next step cannot find it."""
    after = _attributes(optimizer)
    for name in after:
        old, new = before.get(name), after[name]
        same = (
            len(old) == len(new) and all(a is b for a, b in zip(old, new))
            if isinstance(old, list) and isinstance(new, list)
            else old is new
        )
        if name not in before or not same:
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


def _run_step(copied: _Copy, weights: Sequence[VariableCell], gradients: Sequence[Any]) -> None:
    """Runs one step of Keras on the cells, in the order of Keras' own `apply_gradients`."""
    optimizer = copied.optimizer
    base: Any = super(_Keras, optimizer)  # Keras' step without `tf.distribute`
    before = _attributes(optimizer)
    optimizer._compute_current_learning_rate()
    base._apply_weight_decay(weights)
    is_nadam = isinstance(optimizer, tf.keras.optimizers.Nadam)
    before_weight = _hold_nadam_product(optimizer) if is_nadam else None
    with tf.variable_creator_scope(_refuse_new_variable):
        for gradient, weight in zip(gradients, weights):
            if before_weight is not None:
                before_weight(weight)
            optimizer.update_step(gradient, weight)
    if before_weight is not None:
        optimizer._u_product = before["_u_product"]
        optimizer._u_product_counter = before["_u_product_counter"]
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


# ------------------------------------------------------- hyper-parameters that may change in a graph


def _find_numbers(
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
        is_candidate = is_number and name != _LR and vars(optimizer).get(name) == value
        if is_candidate and _reads_in_graph(optimizer, initial, name):
            numbers[name] = float(value)
    return numbers


def _reads_in_graph(optimizer: Any, initial: Mapping[int, np.ndarray], name: str) -> bool:
    specs = [tf.TensorSpec((2, 3), tf.float32), tf.TensorSpec((3,), tf.float32)]
    template = _build_template(optimizer, initial, specs, ["0", "1"])
    with _scratch_graph():
        for cell in _all_cells(template):
            cell.bind(tf.compat.v1.placeholder(cell.dtype, cell.shape))
        number = tf.compat.v1.placeholder(tf.float64, ())
        template.optimizer.__dict__[name] = NumberCell(number)
        gradients = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
        try:
            _run_step(template, template.weights, gradients)
        except (TypeError, ValueError, NotImplementedError):
            return False  # the step needs a Python number, to branch on for example
        return _depends_on([cell.value() for cell in _all_cells(template)], [number])


def _all_cells(copied: _Copy) -> Iterator[VariableCell]:
    for name in ("_iterations", "_learning_rate", "_current_learning_rate"):
        cell = getattr(copied.optimizer, name, None)
        if isinstance(cell, VariableCell):  # a rate may be a schedule
            yield cell
    yield from copied.weights
    yield from copied.slots.values()


# --------------------------------------------------------------------------------- the TFF optimizer


def _config_key(optimizer: Any) -> str:
    config = optimizer.get_config()
    excluded = getattr(optimizer, "_exclude_from_weight_decay_names", [])
    return json.dumps([type(optimizer).__qualname__, config, list(excluded)], default=str)


def _paths(structure: Any) -> list[str]:
    """The names of the leaves: keys and positions joined by a slash; a lone leaf is `weight`."""
    paths = [
        "/".join(str(key) for key in path) or "weight"
        for path, _ in tree.flatten_with_path(structure)
    ]
    return paths


@attrs.frozen(slots=False)
class KerasOptimizer(tff.learning.optimizers.Optimizer):
    """A Keras optimizer as a pure `tff.learning.optimizers.Optimizer`; see `build_keras_optimizer`.

    Attributes:
      keras_optimizer: The Keras optimizer whose `build` and `update_step` are run. It is not changed.
      device: The device of the state and the step, or None to leave it to TensorFlow.
      weight_names: The names of the weights, in the order of `tf.nest.flatten`, or None.
    """

    keras_optimizer: Any = attrs.field(eq=_config_key)
    device: str | None = None
    weight_names: tuple[str, ...] | None = None
    _initial: dict[int, np.ndarray] = attrs.field(factory=dict, eq=False, repr=False)
    _learning_rate: Any = attrs.field(default=None, eq=False, repr=False)
    _numbers: "collections.OrderedDict[str, float]" = attrs.field(
        factory=collections.OrderedDict, eq=False, repr=False
    )

    def initialize(self, specs: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the state before the first step.

        Args:
          specs: A structure of `tf.TensorSpec`s of the weights, with known shapes.

        Returns:
          An `OrderedDict`: `learning_rate` (unless it is a schedule), the hyper-parameters that may
          change between steps, `iterations`, and `slots`, named after the slot and its weight.

        Raises:
          ValueError: If a shape is not fully known.
        """
        flat, names = tf.nest.flatten(specs), _paths(specs)
        for name, spec in zip(names, flat):
            if not spec.shape.is_fully_defined():
                raise ValueError(
                    f"`specs` must have known shapes, since slots are made of them; found "
                    f"{spec.shape} for the weight {name!r}."
                )
        return _call_traced(lambda: self._initialize(flat, names))

    def _initialize(self, specs: Any, names: Any) -> "collections.OrderedDict[str, Any]":
        with device_scope(self.device):
            zeros = [tf.zeros(spec.shape, spec.dtype) for spec in specs]
            copied = _build(self.keras_optimizer, self._initial, zeros, names)
            state: collections.OrderedDict[str, Any] = collections.OrderedDict()
            if self._learning_rate is not None:
                state[_LR] = self._learning_rate
            for name, value in self._numbers.items():
                state[name] = np.float64(value)
            state[_ITERATIONS] = tf.constant(0, tf.int64)
            state[_SLOTS] = collections.OrderedDict(
                (name, cell.value()) for name, cell in copied.slots.items()
            )
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """Takes one step of the Keras optimizer.

        Args:
          state: What `initialize` or the previous `next` returned.
          weights: A structure of tensors or variables; variables are read, not assigned.
          gradients: The same structure with the same shapes and dtypes. A leaf may be None: that
            weight and its slots stay as they are. A leaf may be a `tf.IndexedSlices`.

        Returns:
          The new state and the new weights, as tensors.

        Raises:
          ValueError: If structures, shapes or dtypes do not fit each other, or no gradient is given.
        """
        leaves, names = tf.nest.flatten(weights), _paths(weights)
        values = [tf.convert_to_tensor(leaf) for leaf in leaves]
        flat_gradients = _check_gradients(weights, gradients, values, names)
        if not values:
            return state, weights
        template = _build_template(self.keras_optimizer, self._initial, values, names)
        _check_state(state, template, self._state_keys())
        self._name_weights(template, leaves, names)
        given = [i for i, gradient in enumerate(flat_gradients) if gradient is not None]
        with device_scope(self.device):
            clipped = self.keras_optimizer._deduplicate_sparse_grad(
                self.keras_optimizer._clip_gradients([flat_gradients[i] for i in given])
            )
        new_state, new_values = _call_traced(
            functools.partial(self._step, template, given),
            tf.nest.map_structure(tf.convert_to_tensor, collections.OrderedDict(state)),
            values,
            clipped,
            jit_compile=self.keras_optimizer.jit_compile,
        )
        return new_state, tf.nest.pack_sequence_as(weights, new_values)

    def _step(
        self, template: _Copy, given: list[int], state: Any, values: Any, gradients: Any
    ) -> tuple[Any, list[tf.Tensor]]:
        with device_scope(self.device):
            optimizer = template.optimizer
            optimizer._iterations.bind(state[_ITERATIONS])
            current_rate = getattr(optimizer, "_current_learning_rate", None)
            if current_rate is not None:
                current_rate.bind(tf.zeros(current_rate.shape, current_rate.dtype))
            if self._learning_rate is not None:
                optimizer._learning_rate.bind(tf.cast(state[_LR], self._learning_rate.dtype))
            for name in self._numbers:
                optimizer.__dict__[name] = NumberCell(state[name])
            for cell, value in zip(template.weights, values):
                cell.bind(value)
            slots = dict(state[_SLOTS])
            if template.from_weights:
                names = [cell.name for cell in template.weights]
                fresh = _build(self.keras_optimizer, self._initial, values, names)
                first = tf.equal(state[_ITERATIONS], 0)
                for name, key in zip(template.slots, slots):
                    if name in template.from_weights:
                        slots[key] = tf.where(first, fresh.slots[name].value(), slots[key])
            for cell, value in zip(template.slots.values(), slots.values()):
                cell.bind(value)

            _run_step(template, [template.weights[i] for i in given], gradients)

            new_state = collections.OrderedDict(state)
            new_state[_ITERATIONS] = optimizer._iterations.value()
            if self._learning_rate is not None:
                new_state[_LR] = optimizer._learning_rate.value()
            new_state[_SLOTS] = collections.OrderedDict(
                (key, cell.value()) for key, cell in zip(slots, template.slots.values())
            )
            return new_state, [cell.value() for cell in template.weights]

    def _state_keys(self) -> list[str]:
        rate = [] if self._learning_rate is None else [_LR]
        return [*rate, *self._numbers, _ITERATIONS, _SLOTS]

    def _name_weights(self, template: _Copy, leaves: Sequence[Any], names: Sequence[str]) -> None:
        """Gives the weights the names that `exclude_from_weight_decay` looks at."""
        if not getattr(self.keras_optimizer, "_exclude_from_weight_decay_names", None):
            return
        if self.weight_names is not None:
            if len(self.weight_names) != len(leaves):
                raise ValueError(
                    f"`weight_names` must name every weight; found {len(self.weight_names)} names "
                    f"for {len(leaves)} weights."
                )
            names = self.weight_names
        elif all(isinstance(leaf, tf.Variable) for leaf in leaves):
            names = [leaf.name for leaf in leaves]
        elif all(part.isdigit() for name in names for part in name.split("/")):
            raise ValueError(
                "`exclude_from_weight_decay` selects weights by name, but these weights have none. "
                "Pass `weight_names=[v.name for v in model.trainable_variables]` to "
                "`build_keras_optimizer`."
            )
        for cell, name in zip(template.weights, names):
            cell.name = name

    def get_hparams(self, state: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the learning rate, unless it is a schedule, and the other numbers in the state."""
        return collections.OrderedDict(
            (name, state[name]) for name in self._state_keys() if name not in (_ITERATIONS, _SLOTS)
        )

    def set_hparams(self, state: Any, hparams: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the state with these hyper-parameters, which the next step uses.

        Raises:
          ValueError: If a name is not one that `get_hparams` returns.
        """
        known = self.get_hparams(state)
        new_state = collections.OrderedDict(state)
        for name, value in dict(hparams).items():
            if name not in known:
                raise ValueError(
                    f"`hparams` may hold {', '.join(known) or 'nothing'}; found {name!r}. Other "
                    "arguments of the Keras optimizer are fixed when it is built."
                )
            dtype = tf.as_dtype(state[name].dtype) if hasattr(state[name], "dtype") else tf.float64
            new_state[name] = (
                tf.cast(value, dtype) if tf.is_tensor(value) else dtype.as_numpy_dtype(value)
            )
        return new_state


def _check_gradients(
    weights: Any, gradients: Any, values: Sequence[tf.Tensor], names: Sequence[str]
) -> list[Any]:
    try:
        tf.nest.assert_same_structure(weights, gradients, check_types=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`gradients` must have the structure of `weights`; found "
            f"{tree.map_structure(lambda _: '.', gradients)} for "
            f"{tree.map_structure(lambda _: '.', weights)}."
        ) from error
    flat = [
        g if g is None or isinstance(g, tf.IndexedSlices) else tf.convert_to_tensor(g)
        for g in tf.nest.flatten(gradients)
    ]
    for name, value, gradient in zip(names, values, flat):
        if gradient is not None and (
            gradient.dtype != value.dtype or not gradient.shape.is_compatible_with(value.shape)
        ):
            raise ValueError(
                f"`gradients` must have the shapes and dtypes of `weights`; found "
                f"{gradient.dtype.name}{gradient.shape} for the weight {name!r}, which is "
                f"{value.dtype.name}{value.shape}."
            )
    if flat and all(gradient is None for gradient in flat):
        raise ValueError(
            "`gradients` holds None for every weight, so there is nothing to step along. Is the "
            "loss computed from these weights?"
        )
    return flat


def _check_state(state: Any, template: _Copy, keys: list[str]) -> None:
    if not isinstance(state, Mapping) or list(state) != keys:
        what = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"`state` must hold {keys}, as `initialize` returns it; found {what}. Was it "
            "made by another optimizer?"
        )
    slots = state[_SLOTS]
    expected = {name: (cell.dtype.name, cell.shape) for name, cell in template.slots.items()}
    found = {
        name: (tf.as_dtype(value.dtype).name, tf.TensorShape(value.shape))
        for name, value in slots.items()
    }
    for (name, want), (other, have) in zip(expected.items(), found.items()):
        if want[0] != have[0] or not want[1].is_compatible_with(have[1]):
            raise ValueError(
                f"The slot {other!r} of `state` must be {want[0]}{want[1]} for these weights "
                f"({name!r}); found {have[0]}{have[1]}. Was it made for other weights?"
            )
    if len(expected) != len(found):
        raise ValueError(
            f"`state` must hold the slots {list(expected)} for these weights; found {list(found)}. "
            "Was it made for other weights or by another optimizer?"
        )


# ------------------------------------------------------------------------------------ building one


def _builtin_classes() -> dict[str, Any]:
    return {
        name.lower(): value
        for name, value in vars(tf.keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, _Keras) and value is not _Keras
    }


def _from_name(name: Any) -> Any:
    classes = _builtin_classes()
    if not isinstance(name, str) or name.lower() not in classes:
        known = ", ".join(sorted(cls.__name__ for cls in classes.values()))
        raise ValueError(f"`optimizer` must name one of {known}; found {name!r}.")
    return classes[name.lower()]


def _from_keras_config(config: Mapping[str, Any]) -> Any:
    """Builds a built-in optimizer from what `tf.keras.optimizers.serialize` returns."""
    if "class_name" not in config:
        raise ValueError(
            "`optimizer` as a dictionary must be one that `tf.keras.optimizers.serialize` returns, "
            f"with `class_name` and `config`; found the keys {sorted(config)}."
        )
    arguments = copy.deepcopy(dict(config.get("config") or {}))
    if arguments.get("is_legacy_optimizer") or "legacy" in str(config.get("module")):
        raise ValueError(_legacy_message(config["class_name"]))
    cls = _from_name(config["class_name"].rpartition(">")[2])
    try:
        return cls.from_config(arguments)
    except TypeError as error:
        raise ValueError(
            f"`optimizer` has an entry in its `config` that {cls.__name__} does not take: {error}"
        ) from error


def _legacy_message(name: str) -> str:
    return (
        f"`optimizer` is the legacy Keras optimizer {name}, whose step cannot be run as a pure "
        f"function; use `tf.keras.optimizers.{name}` instead."
    )


def _resolve(optimizer: Any) -> Any:
    if isinstance(optimizer, str):
        return _from_name(optimizer)()
    if isinstance(optimizer, Mapping):
        return _from_keras_config(optimizer)
    if isinstance(optimizer, _Keras):
        return optimizer
    if isinstance(optimizer, tf.keras.optimizers.legacy.Optimizer):
        raise ValueError(_legacy_message(type(optimizer).__name__))
    if isinstance(optimizer, tff.learning.optimizers.Optimizer):
        raise TypeError(
            f"`optimizer` is a TFF optimizer already ({type(optimizer).__name__}); use it as it is."
        )
    if callable(optimizer):
        made = optimizer()
        if callable(made) or isinstance(made, (str, Mapping)):
            raise TypeError(
                "`optimizer` as a callable must return a Keras optimizer; found "
                f"{type(made).__name__}."
            )
        return _resolve(made)
    raise TypeError(
        "`optimizer` must be a Keras optimizer, its name, its config, or a callable without "
        f"arguments that returns one; found {type(optimizer).__name__}."
    )


def _check_supported(optimizer: Any) -> None:
    name = type(optimizer).__name__
    overridden = [
        method
        for method in _NOT_CALLED
        if getattr(type(optimizer), method, None) is not getattr(_Keras, method, None)
    ]
    if overridden:
        raise ValueError(
            f"`optimizer` of class {name} overrides {', '.join(overridden)}, which a pure step does "
            "not call. Keras' extension points are `build`, `update_step` and `get_config`."
        )
    steps = int(_read_variables(optimizer)[id(optimizer.iterations)])
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


def build_keras_optimizer(
    optimizer: str | Mapping[str, Any] | Callable[[], Any] | tf.keras.optimizers.Optimizer,
    *,
    device: str | DevicePolicy | None = None,
    weight_names: Sequence[str] | None = None,
) -> KerasOptimizer:
    """Makes a pure TFF optimizer of any Keras optimizer.

    A step of the result computes what `optimizer.apply_gradients` computes, in the same order:
    clip, sum repeated rows of sparse gradients, decay the weights, Keras' own `update_step` for each
    weight, moving average, and one more iteration. The state goes in and out as tensors; no variable
    is created, so the result works on clients and on the server, in any `tff.tensorflow.computation`.

    Slots, learning rate and weights keep Keras' dtypes. A learning-rate schedule is followed one
    step per `next`. Sparse gradients follow Keras' rules: most optimizers decay every row and add to
    those that have a gradient; Adagrad and RMSprop without momentum change only rows that have one;
    clipping by norm sees rows before they are summed. `jit_compile` compiles the step where Keras
    would, which is where there is a GPU.

    `tff.learning` sets the hyper-parameters that may change between rounds (`get_hparams`): the
    learning rate, and every number that the step reads in its graph rather than branching on it.

    TFF's worker process has no GPU code: `device="/GPU:0"` places the state and the step on a GPU
    when the optimizer runs in the Python process, and on the worker's CPU inside a TFF computation.

    Args:
      optimizer: A Keras optimizer that has not been used; its name, as `tf.keras.optimizers.get`
        takes it; its config, as `tf.keras.optimizers.serialize` returns it; or a callable without
        arguments that returns a Keras optimizer, such as its class.
      device: A device such as `"/GPU:0"` or a `DevicePolicy` for the state and the step; None for
        the policy in force, which leaves it to TensorFlow unless set.
      weight_names: The names of the weights in the order of `tf.nest.flatten`, for
        `exclude_from_weight_decay(var_names=...)`. None takes the names of variables or the keys of
        a dictionary, where there are any.

    Returns:
      A `tff.learning.optimizers.Optimizer`.

    Raises:
      TypeError: If `optimizer` is of another type.
      ValueError: If `optimizer` is unknown, legacy, used, or cannot be run as a pure function.

    >>> import tensorflow as tf
    >>> import tff_optim
    >>> optimizer = tff_optim.build_keras_optimizer(tf.keras.optimizers.Adam(0.1))
    >>> weights = [tf.constant([1.0, 2.0])]
    >>> state = optimizer.initialize([tf.TensorSpec([2], tf.float32)])
    >>> state, weights = optimizer.next(state, weights, [tf.constant([0.5, -0.5])])
    >>> weights[0].numpy().round(4)
    array([0.9, 2.1], dtype=float32)
    """
    made = _resolve(optimizer)
    _check_supported(made)
    made = _copy_containers(made)
    initial = _read_variables(made)
    return KerasOptimizer(
        keras_optimizer=made,
        device=select_device(device),
        weight_names=None if weight_names is None else tuple(weight_names),
        initial=initial,
        learning_rate=initial.get(id(made._learning_rate)),
        numbers=_find_numbers(made, initial),
    )
