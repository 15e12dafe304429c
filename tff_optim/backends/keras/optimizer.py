"""Any Keras optimizer as a pure `tff.learning.optimizers.Optimizer`."""

import collections
import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.backends import keras as keras_step
from tff_optim.core import comparison, leaves, tracing
from tff_optim.core.devices import DevicePolicy, device_scope, select_device
from tff_optim.core.messages import shorten
from tff_optim.core.tracing import call_traced, eager_world
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects

_LR = tff.learning.optimizers.LEARNING_RATE_KEY
_ITERATIONS = "iterations"
_SLOTS = "slots"


def _names(structure: Any) -> list[str]:
    """The names of the leaves: their paths; a lone leaf is `weight`."""
    return [path or "weight" for path, _ in leaves.named_leaves(structure)]


class KerasOptimizer(tff.learning.optimizers.Optimizer):
    """A Keras optimizer as a pure `tff.learning.optimizers.Optimizer`; see `build_keras_optimizer`.

    Not an attrs class: TFF hands optimizers to a `tf.function`, which would take such an argument
    apart into its fields. Optimizers of one class, configuration, device and names are equal.

    Attributes:
      keras_optimizer: The Keras optimizer whose `build` and `update_step` run; it is not changed.
      device: The device of the state and the step, or None to leave it to TensorFlow.
      learning_rate: The rate before the first step, or None if it is a schedule.
      weight_names: The names of the weights, in the order of `tf.nest.flatten`, or None.
    """

    def __init__(
        self,
        keras_optimizer: Any,
        device: str | None,
        weight_names: tuple[str, ...] | None,
        initial: Mapping[int, np.ndarray],
        learning_rate: Any,
        numbers: Mapping[str, float],
    ):
        self._keras_optimizer = keras_optimizer
        self._device = device
        self._weight_names = weight_names
        self._initial = initial
        self._learning_rate = learning_rate
        self._numbers = numbers
        # Taken now: within a trace a Keras optimizer cannot tell its configuration.
        excluded = keras_step.excluded_patterns(keras_optimizer)
        with eager_world():
            self._key = comparison.key(
                (keras_optimizer, tuple(excluded), device, weight_names, learning_rate)
            )
        # Made once: a function made in every call would be traced and compiled in every call.
        self._compiled = tracing.function(self._build_and_step, jit_compile=True, autograph=False)

    @property
    def keras_optimizer(self) -> Any:
        """The Keras optimizer."""
        return self._keras_optimizer

    @property
    def learning_rate(self) -> Any:
        """The rate before the first step: a number, a tensor it was built with, or None."""
        return self._learning_rate

    @property
    def device(self) -> str | None:
        """The device of the state and the step."""
        return self._device

    @property
    def weight_names(self) -> tuple[str, ...] | None:
        """The names of the weights."""
        return self._weight_names

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, KerasOptimizer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __copy__(self) -> "KerasOptimizer":
        return self  # nothing in it changes

    def __deepcopy__(self, memo: Any) -> "KerasOptimizer":
        return self

    def __reduce__(self) -> Any:
        keras = self.keras_optimizer
        try:
            if tf.is_symbolic_tensor(self._learning_rate):
                keras_objects.to_json(self._learning_rate, "learning_rate")
            config = keras_step.constructor_arguments(keras)
        except ValueError as error:
            raise pickle.PicklingError(f"`optimizer` cannot be pickled: {error}") from error
        excluded = keras_step.excluded_patterns(keras)
        return _rebuild, (type(keras), config, excluded, self.device, self.weight_names)

    def __repr__(self) -> str:
        name = type(self.keras_optimizer).__name__
        rate = self._learning_rate
        if isinstance(rate, np.ndarray):
            rate = float(rate)
        hparams = {} if rate is None else {_LR: rate}
        return f"KerasOptimizer({name}, {hparams | dict(self._numbers)}, device={self.device!r})"

    @tf.autograph.experimental.do_not_convert
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
        leaves.check_specs(specs)
        flat, names = tf.nest.flatten(specs), _names(specs)

        def make_slots() -> "collections.OrderedDict[str, tf.Tensor]":
            with device_scope(self.device):
                zeros = [tf.zeros(spec.shape, spec.dtype) for spec in flat]
                copied = keras_step.build(self.keras_optimizer, self._initial, zeros, names)
            return collections.OrderedDict((n, cell.value()) for n, cell in copied.slots.items())

        state: collections.OrderedDict[str, Any] = collections.OrderedDict()
        if self._learning_rate is not None:
            state[_LR] = self._learning_rate
        for name, value in self._numbers.items():
            state[name] = np.float64(value)
        with device_scope(self.device):
            state[_ITERATIONS] = tf.constant(0, tf.int64)
        state[_SLOTS] = call_traced(make_slots)
        return state

    @tf.autograph.experimental.do_not_convert
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
        given_weights, names = tf.nest.flatten(weights), _names(weights)
        values = [tf.convert_to_tensor(weight) for weight in given_weights]
        gradients = leaves.read_gradients(gradients, tf.nest.pack_sequence_as(weights, values))
        flat_gradients = tf.nest.flatten(gradients)
        if not values:
            return state, weights
        template = keras_step.build_template(self.keras_optimizer, self._initial, values, names)
        leaves.check_keys(state, self._state_keys(), "state")
        leaves.check_slots(
            state, {n: tf.TensorSpec(cell.shape, cell.dtype) for n, cell in template.slots.items()}
        )
        labels = self._labels(given_weights, names)
        keras_step.exclude(template, labels)
        given = [i for i, gradient in enumerate(flat_gradients) if gradient is not None]
        with device_scope(self.device):
            given_gradients = keras_step.prepare_gradients(
                self.keras_optimizer, [flat_gradients[i] for i in given]
            )
        state = tf.nest.map_structure(tf.convert_to_tensor, collections.OrderedDict(state))
        if self.keras_optimizer.jit_compile:
            step = functools.partial(self._compiled, tuple(names), labels, tuple(given))
        else:
            step = functools.partial(self._step, template, given)
        new_state, new_values = call_traced(step, state, values, given_gradients)
        return new_state, tf.nest.pack_sequence_as(weights, new_values)

    def _build_and_step(
        self,
        names: tuple[str, ...],
        labels: tuple[str, ...],
        given: tuple[int, ...],
        state: Any,
        values: Any,
        gradients: Any,
    ) -> tuple[Any, list[tf.Tensor]]:
        """`_step`, from arguments by which a traced one is found again."""
        template = keras_step.build_template(self.keras_optimizer, self._initial, values, names)
        keras_step.exclude(template, labels)
        return self._step(template, given, state, values, gradients)

    def _step(
        self,
        template: keras_step.Copy,
        given: Sequence[int],
        state: Any,
        values: Any,
        gradients: Any,
    ) -> tuple[Any, list[tf.Tensor]]:
        with device_scope(self.device):
            numbers = {name: state[name] for name in self._numbers}
            keras_step.bind(template, state[_ITERATIONS], state.get(_LR), numbers)
            for cell, value in zip(template.weights, values):
                cell.bind(value)
            slots = dict(state[_SLOTS])
            if template.from_weights:
                names = [cell.name for cell in template.weights]
                fresh = keras_step.build(self.keras_optimizer, self._initial, values, names)
                first = tf.equal(state[_ITERATIONS], 0)
                for name in template.from_weights:
                    slots[name] = tf.where(first, fresh.slots[name].value(), slots[name])
            for name, cell in template.slots.items():
                cell.bind(slots[name])

            keras_step.run_step(template, [template.weights[i] for i in given], gradients)

            new_state = collections.OrderedDict(state)
            new_state[_ITERATIONS], rate = keras_step.iterations_and_rate(template)
            if rate is not None:
                new_state[_LR] = rate
            new_state[_SLOTS] = collections.OrderedDict(
                (name, template.slots[name].value()) for name in slots
            )
            return new_state, [cell.value() for cell in template.weights]

    def _state_keys(self) -> list[str]:
        rate = [] if self._learning_rate is None else [_LR]
        return [*rate, *self._numbers, _ITERATIONS, _SLOTS]

    def _labels(self, weights: Sequence[Any], names: Sequence[str]) -> tuple[str, ...]:
        """The names of the weights that `exclude_from_weight_decay` looks at, if it is used."""
        if self.weight_names is not None and len(self.weight_names) != len(weights):
            raise ValueError(
                f"`weight_names` must name every weight; found {len(self.weight_names)} names "
                f"for {len(weights)} weights."
            )
        if not keras_step.excluded_patterns(self.keras_optimizer):
            return ()
        if self.weight_names is not None:
            return self.weight_names
        if all(isinstance(weight, tf.Variable) for weight in weights):
            return tuple(weight.name for weight in weights)
        if all(part.isdigit() for name in names for part in name.split("/")):
            raise ValueError(
                "`exclude_from_weight_decay` must have weights with names to select from; found "
                "weights without. Pass `weight_names=[v.name for v in model.trainable_variables]` to "
                "`build_keras_optimizer`."
            )
        return tuple(names)

    def get_hparams(self, state: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the learning rate, unless it is a schedule, and the other numbers in the state."""
        return collections.OrderedDict(
            (name, state[name]) for name in self._state_keys() if name not in (_ITERATIONS, _SLOTS)
        )

    def set_hparams(self, state: Any, hparams: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the state with these hyper-parameters, which the next step uses.

        Args:
          state: A state of this optimizer.
          hparams: Some of what `get_hparams` returns; what is left out stays as it is.

        Raises:
          TypeError: If a value is neither a number nor a tensor.
          ValueError: If a name is unknown, a number is out of range, or a tensor is not a scalar.
        """
        cls = type(self.keras_optimizer)
        intervals = {
            name: keras_arguments.interval_of(cls, name) for name in self.get_hparams(state)
        }
        return hyperparameters.update(state, hparams, intervals, cls.__name__)


def _rebuild(
    cls: Any,
    config: dict[str, Any],
    excluded: list[str],
    device: str | None,
    weight_names: Sequence[str] | None,
) -> KerasOptimizer:
    """The optimizer that was pickled."""
    keras = cls.from_config(config)
    if excluded:
        keras.exclude_from_weight_decay(var_names=excluded)
    return build_keras_optimizer(keras, device=device, weight_names=weight_names)


def build_keras_optimizer(
    optimizer: str | Mapping[str, Any] | Callable[[], Any] | tf.keras.optimizers.Optimizer,
    *,
    device: str | DevicePolicy | None = None,
    learning_rate: Any = None,
    weight_names: Sequence[str] | None = None,
) -> KerasOptimizer:
    r"""Makes a pure TFF optimizer of any Keras optimizer.

    A step of the result computes what `optimizer.apply_gradients` computes, in the same order:
    clip, sum repeated rows of sparse gradients, decay the weights, Keras' own `update_step` for each
    weight, moving average, and one more iteration. The state goes in and out as tensors; no variable
    is created, so the result works on clients and on the server, in any `tff.tensorflow.computation`.

    Slots, learning rate and weights keep Keras' dtypes. A learning-rate schedule is followed one
    step per `next`. Sparse gradients follow Keras' rules: most optimizers decay every row and add to
    those that have a gradient; Adagrad and RMSprop without momentum change only rows that have one;
    clipping by norm sees rows before they are summed. `jit_compile` compiles the step where Keras
    would, which is where there is a GPU. As in Keras, no graph takes `if tensor:` in an `update_step` or
    a schedule of your own: write `tf.where` or `tf.cond`.

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
      learning_rate: A rate that takes the place of the optimizer's own: a number, or a scalar tensor
        of the TFF computation in which the optimizer is built, as with
        `tff.learning.algorithms.build_weighted_fed_avg_with_optimizer_schedule`.
      weight_names: The names of the weights in the order of `tf.nest.flatten`, for
        `exclude_from_weight_decay(var_names=...)`. None takes the names of variables or the keys of
        a dictionary, where there are any. The regular expressions are read as RE2 does: without
        lookaround, and with `\w`, `\d` and `\b` for ASCII only.

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
    traced = tf.is_symbolic_tensor(learning_rate)
    if learning_rate is not None:
        learning_rate = hyperparameters.checked(
            "build_keras_optimizer", _LR, learning_rate, hyperparameters.NON_NEGATIVE
        )
    in_graph = not tf.executing_eagerly()
    with eager_world():
        try:
            resolved = keras_objects.resolve(optimizer)
        except (TypeError, ValueError) as error:
            if not (in_graph and callable(optimizer)):
                raise
            raise ValueError(
                "`optimizer` must be one that can be made inside a TFF computation or a `tf.function`; "
                f"found {shorten(str(error))}. If it uses a tensor of that graph as its learning rate, "
                "pass it as `learning_rate` instead."
            ) from error
        made = keras_step.copy_containers(keras_step.check_supported(resolved))
        if learning_rate is not None or keras_step.has_rate_variable(made):
            keras_step.own_learning_rate(made, None if traced else learning_rate)
        initial = keras_step.read_variables(made)
        keras_step.check_arguments(made)
        keras_step.check_closed(made, initial)
        numbers = keras_step.find_numbers(made, initial)
    rate: Any = keras_step.initial_rate(made, initial)
    if traced:
        rate = tf.cast(learning_rate, rate.dtype)
    return KerasOptimizer(
        keras_optimizer=made,
        device=select_device(device),
        weight_names=None if weight_names is None else tuple(weight_names),
        initial=initial,
        learning_rate=rate,
        numbers=numbers,
    )
