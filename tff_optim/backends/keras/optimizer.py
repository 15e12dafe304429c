"""Any Keras optimizer as a pure `tff.learning.optimizers.Optimizer`."""

import collections
import functools
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.backends.common import (
    LEARNING_RATE,
    SLOTS,
    PureOptimizer,
    check_state,
    check_weight_names,
)
from tff_optim.backends.keras import checks, copies, steps
from tff_optim.backends.keras.copies import Keras, Template
from tff_optim.core import entries, leaves, tracing
from tff_optim.core.devices import DevicePolicy, device_scope, select_device
from tff_optim.core.entries import built
from tff_optim.core.messages import refusal, shorten
from tff_optim.core.numbers import NON_NEGATIVE, STEP, Interval, checked
from tff_optim.core.tracing import call_traced, eager_world
from tff_optim.core.types import (
    Function,
    Json,
    Leaves,
    Number,
    Specs,
    State,
    Value,
    Weights,
)
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.keras_objects.classes import instead_of


class KerasOptimizer(PureOptimizer):
    """A Keras optimizer as a pure `tff.learning.optimizers.Optimizer`; see `build_keras_optimizer`.

    Attributes:
      keras_optimizer: The Keras optimizer whose `build` and `update_step` run; it is not changed.
      learning_rate: The rate before the first step: a number, the tensor of a computation, or None for a
        schedule.
    """

    takes_rows = True
    floating = False
    not_hparams = (STEP, SLOTS)

    def __init__(
        self,
        keras_optimizer: Keras,
        device: str | None,
        weight_names: tuple[str, ...] | None = None,
        traced_rate: tf.Tensor | None = None,
    ):
        with eager_world():
            self._initial = copies.read_variables(keras_optimizer)
            self._hparams = checks.find_hparams(keras_optimizer, self._initial)
        rate: Value = self._initial.get(id(keras_optimizer._learning_rate))
        self.learning_rate = rate if traced_rate is None else tf.cast(traced_rate, rate.dtype)
        self.keras_optimizer = keras_optimizer
        excluded = tuple(copies.excluded_patterns(keras_optimizer))
        super().__init__((keras_optimizer, excluded, self.learning_rate), device, weight_names)
        self._templates: dict[Hashable, Callable[[], Template]] = {}
        # Made once: a new function would be traced and compiled in each call.
        self._compiled = tracing.function(self._run, jit_compile=True, autograph=False)

    @property
    def _owner(self) -> str:
        return type(self.keras_optimizer).__name__

    def __reduce__(self) -> tuple:
        keras = self.keras_optimizer
        try:
            if tf.is_symbolic_tensor(self.learning_rate):
                keras_objects.to_json(self.learning_rate, "learning_rate")
            config = copies.constructor_arguments(keras)
        except ValueError as error:
            raise pickle.PicklingError(f"`optimizer` cannot be pickled: {error}") from error
        excluded = copies.excluded_patterns(keras)
        return _rebuild, (type(keras), config, excluded, self.device, self.weight_names)

    def __repr__(self) -> str:
        rate = self.learning_rate
        if isinstance(rate, np.ndarray):
            rate = float(rate)
        hparams = {} if rate is None else {LEARNING_RATE: rate}
        hparams |= self._hparams
        return f"KerasOptimizer({self._owner}, {hparams}, device={self.device!r})"

    def _initial_state(self, specs: Specs) -> State:
        flat, names = tf.nest.flatten(specs), leaves.names_of(specs)

        def make_slots() -> "collections.OrderedDict[str, tf.Tensor]":
            with device_scope(self.device):
                zeros = [tf.zeros(spec.shape, spec.dtype) for spec in flat]
                built = copies.build(self.keras_optimizer, self._initial, zeros, names)
            return collections.OrderedDict((n, cell.value()) for n, cell in built.slots.items())

        state: State = collections.OrderedDict()
        if self.learning_rate is not None:
            state[LEARNING_RATE] = self.learning_rate
        for name, value in self._hparams.items():
            state[name] = np.float64(value)
        with device_scope(self.device):
            state[STEP] = tf.constant(0, tf.int64)
        state[SLOTS] = call_traced(make_slots)
        return state

    def _step(
        self, state: State, given: Weights, weights: Leaves, gradients: Leaves
    ) -> tuple[State, Leaves]:
        names = tuple(leaves.names_of(given))
        expected = {n: leaves.spec_of(c) for n, c in self._template(names, weights).slots.items()}
        rate = [] if self.learning_rate is None else [LEARNING_RATE]
        check_state(state, [*rate, *self._hparams, STEP], expected)
        positions = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        with device_scope(self.device):
            prepared = steps.prepare_gradients(
                self.keras_optimizer, [gradients[i] for i in positions]
            )
        state = tf.nest.map_structure(tf.convert_to_tensor, collections.OrderedDict(state))
        # The key of a compiled step.
        key = names, self._labels(tf.nest.flatten(given), names), positions
        run = self._compiled if self.keras_optimizer.jit_compile else self._run
        return call_traced(functools.partial(run, key), state, weights, prepared)

    def _template(self, names: tuple[str, ...], weights: Leaves) -> Template:
        """A template for such weights, for one step only, since threads may take steps at once."""
        specs = tuple(leaves.spec_of(weight) for weight in weights)
        if (names, specs) not in self._templates:
            build = functools.partial(
                copies.build_template, self.keras_optimizer, self._initial, specs, names
            )
            self._templates[names, specs] = copies.template_maker(build)
        return self._templates[names, specs]()

    def _run(
        self,
        key: tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]],
        state: State,
        weights: Leaves,
        gradients: Leaves,
    ) -> tuple[State, Leaves]:
        names, labels, positions = key
        template = self._template(names, weights)
        copies.exclude_from_decay(template, labels)
        with device_scope(self.device):
            hparams = {name: state[name] for name in self._hparams}
            steps.bind(template, state[STEP], state.get(LEARNING_RATE), hparams)
            for cell, value in zip(template.weights, weights):
                cell.bind(value)
            slots = dict(state[SLOTS])
            is_later = tf.executing_eagerly() and int(state[STEP]) > 0
            if template.from_weights and not is_later:
                fresh = copies.build(self.keras_optimizer, self._initial, weights, names)
                first = tf.equal(state[STEP], 0)
                for name in template.from_weights:
                    slots[name] = tf.where(first, fresh.slots[name].value(), slots[name])
            for name, cell in template.slots.items():
                cell.bind(slots[name])

            steps.run_step(template, [template.weights[i] for i in positions], gradients)

            new_state = collections.OrderedDict(state)
            new_state[STEP] = template.optimizer._iterations.value()
            if LEARNING_RATE in state:
                new_state[LEARNING_RATE] = template.optimizer._learning_rate.value()
            new_state[SLOTS] = collections.OrderedDict(
                (name, template.slots[name].value()) for name in slots
            )
            return new_state, [cell.value() for cell in template.weights]

    def _labels(
        self, weights: Sequence[tf.Tensor | tf.Variable], names: Sequence[str]
    ) -> tuple[str, ...]:
        """The names of the weights for `exclude_from_weight_decay`, if it is used."""
        check_weight_names(self.weight_names, len(weights))
        if not copies.excluded_patterns(self.keras_optimizer):
            return ()
        if self.weight_names is not None:
            return self.weight_names
        if all(isinstance(weight, tf.Variable) for weight in weights):
            return tuple(weight.name for weight in weights)
        if all(part.isdigit() for name in names for part in name.split("/")):
            raise ValueError(
                "`exclude_from_weight_decay` must select among weights with names; found weights "
                "without names. Pass `weight_names=[v.name for v in model.trainable_variables]` to "
                "`build_keras_optimizer`."
            )
        return tuple(names)

    def _interval_of(self, name: str) -> Interval:
        return keras_arguments.interval_of(type(self.keras_optimizer), name)


def _rebuild(
    cls: type[Keras],
    config: Mapping[str, Json],
    excluded: list[str],
    device: str | None,
    weight_names: Sequence[str] | None,
) -> KerasOptimizer:
    """Rebuilds a pickled optimizer."""
    keras = cls.from_config(config)
    if excluded:
        keras.exclude_from_weight_decay(var_names=excluded)
    return build_keras_optimizer(keras, device=device, weight_names=weight_names)


def resolve(optimizer: Value) -> Keras:
    """The Keras optimizer that an argument describes, checked to run as a pure function.

    Raises:
      TypeError: If it is of another type.
      ValueError: If it is unknown, legacy, used, or cannot run as a pure function.
    """
    written, in_graph = str | Mapping | list | tuple, not tf.executing_eagerly()
    with eager_world():
        if isinstance(optimizer, written):
            entry = entries.read(optimizer, name="optimizer")
            optimizer = built(keras_objects.optimizer_from_json(entry))
        elif callable(optimizer):
            optimizer = _called(optimizer, in_graph)
            if callable(optimizer) or isinstance(optimizer, written):
                found = type(optimizer).__name__
                raise TypeError(
                    f"`optimizer` as a callable must return a Keras optimizer; found {found}."
                )
        name = type(optimizer).__name__
        if isinstance(optimizer, tf.keras.optimizers.legacy.Optimizer):
            rule = "be a Keras optimizer that can be run as a pure function"
            raise refusal("optimizer", rule, f"the legacy {name}", instead_of(name))
        if isinstance(optimizer, tff.learning.optimizers.Optimizer):
            raise TypeError(
                f"`optimizer` must be a Keras optimizer; found {name}, a TFF optimizer already. "
                "Use it as it is."
            )
        if not isinstance(optimizer, tf.keras.optimizers.Optimizer):
            raise TypeError(
                "`optimizer` must be a Keras optimizer, its name, its config, or a callable without "
                f"arguments that returns one; found {name}."
            )
        return checks.check_supported(optimizer)


def _called(make: Function, in_graph: bool) -> Value:
    try:
        return make()
    except (TypeError, ValueError) as error:
        if not in_graph:
            raise
        raise ValueError(
            "`optimizer` must be one that can be made inside a TFF computation or a `tf.function`; "
            f"found {shorten(str(error))}. If it uses a tensor of that graph as its learning rate, "
            "pass it as `learning_rate` instead."
        ) from error


def build_keras_optimizer(
    optimizer: str | Mapping[str, Json] | Function | Keras,
    *,
    device: str | DevicePolicy | None = None,
    learning_rate: Number | None = None,
    weight_names: Sequence[str] | None = None,
) -> KerasOptimizer:
    r"""Makes a pure TFF optimizer of any Keras optimizer.

    A step computes the same as `optimizer.apply_gradients`, in the same order: clip, sum repeated rows
    of sparse gradients, decay the weights, Keras' own `update_step` for each weight, moving average,
    and count the step. State is passed and returned as tensors, and no variable is created, so the
    optimizer works on clients and on the server, in any `tff.tensorflow.computation`.

    Slots, learning rate and weights keep Keras' dtypes. A learning-rate schedule advances by one step
    per `next`. Sparse gradients follow Keras' rules: most optimizers decay every row, and update the
    rows that have a gradient; Adagrad, and RMSprop without momentum, change only those rows. Clipping
    by norm takes the norm before repeated rows are summed. `jit_compile` compiles the step where Keras
    would, on a GPU. As in Keras, a custom `update_step` or schedule cannot branch on a tensor by `if` in
    a graph: use `tf.where` or `tf.cond`.

    The state is an `OrderedDict` of the hyper-parameters that may change between rounds
    (`get_hparams`), `step`, the number of steps taken, and `slots`, named after the slot and its
    weight. Those hyper-parameters are the learning rate, unless it is a schedule, and every number that
    the step uses as a tensor rather than branching on it.

    TFF's worker process has no GPU code: `device="/GPU:0"` places the state and the step on a GPU
    if the optimizer runs in the Python process, and on the worker's CPU inside a TFF computation.

    Args:
      optimizer: A Keras optimizer that has not been used, its name as `tf.keras.optimizers.get`
        takes it, its config as `tf.keras.optimizers.serialize` returns it, or a callable without
        arguments that returns a Keras optimizer, such as its class.
      device: A device such as `"/GPU:0"` or a `DevicePolicy` for the state and the step; None for
        the policy in force, which leaves it to TensorFlow unless set.
      learning_rate: A rate that replaces the optimizer's own: a number, or a scalar tensor of the TFF
        computation in which the optimizer is built, as with
        `tff.learning.algorithms.build_weighted_fed_avg_with_optimizer_schedule`.
      weight_names: The names of the weights in the order of `tf.nest.flatten`, for
        `exclude_from_weight_decay(var_names=...)`. None takes the names of variables or the keys of
        a dictionary, if there are any. Regular expressions are those of RE2: without lookaround, and
        with `\w`, `\d` and `\b` for ASCII only.

    Returns:
      A `tff.learning.optimizers.Optimizer`.

    Raises:
      TypeError: If `optimizer` is of another type.
      ValueError: If `optimizer` is unknown, legacy, used, or cannot run as a pure function.

    Example:
      >>> import tensorflow as tf
      >>> import tff_optim
      >>> optimizer = tff_optim.build_keras_optimizer(tf.keras.optimizers.Adam(0.1))
      >>> weights = [tf.constant([1.0, 2.0])]
      >>> state = optimizer.initialize([tf.TensorSpec([2], tf.float32)])
      >>> state, weights = optimizer.next(state, weights, [tf.constant([0.5, -0.5])])
      >>> weights[0].numpy().round(4)
      array([0.9, 2.1], dtype=float32)
    """
    traced = tf.is_symbolic_tensor(learning_rate)
    if learning_rate is not None:
        learning_rate = checked("build_keras_optimizer", LEARNING_RATE, learning_rate, NON_NEGATIVE)
    resolved = resolve(optimizer)
    with eager_world():
        made = copies.copy_containers(resolved)
        if learning_rate is not None or copies.has_rate_variable(made):
            copies.replace_learning_rate(made, None if traced else learning_rate)
        checks.check_arguments(made)
    names = None if weight_names is None else tuple(weight_names)
    return KerasOptimizer(made, select_device(device), names, learning_rate if traced else None)
