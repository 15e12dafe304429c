"""Any optax transformation as a pure `tff.learning.optimizers.Optimizer`."""

import collections
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.backends.optax import arguments as optax_arguments
from tff_optim.core import comparison, leaves
from tff_optim.core.devices import DevicePolicy, device_scope, select_device
from tff_optim.core.messages import shown
from tff_optim.core.tracing import call_traced
from tff_optim.hyperparameters import STEP

_LR = tff.learning.optimizers.LEARNING_RATE_KEY
_SLOTS = "slots"
_OWNER = "build_optax_optimizer"


class OptaxOptimizer(tff.learning.optimizers.Optimizer):
    """An optax transformation as a pure TFF optimizer; see `build_optax_optimizer`.

    Optimizers of one transformation or factory with equal arguments, device and names are equal.
    """

    def __init__(
        self,
        transformation_or_factory: Any,
        arguments: Mapping[str, Any],
        numbers: Mapping[str, Any],
        weight_names: tuple[str, ...] | None,
        device: str | None,
    ):
        self._transformation_or_factory = transformation_or_factory
        self._arguments = arguments
        self._numbers = numbers
        self._weight_names = weight_names
        self._device = device
        self._key = comparison.key(
            (transformation_or_factory, arguments, numbers, weight_names, device)
        )
        self._programs: dict[Any, Any] = {}

    @property
    def device(self) -> str | None:
        """The device of the state and the step."""
        return self._device

    @property
    def weight_names(self) -> tuple[str, ...] | None:
        """The names of the weights."""
        return self._weight_names

    @property
    def transformation_or_factory(self) -> Any:
        """What it was built of."""
        return self._transformation_or_factory

    @property
    def arguments(self) -> dict[str, Any]:
        """The factory's arguments; those at their defaults that are no hparams are left out."""
        if not self._arguments:
            return dict(self._numbers)
        known = inspect.signature(self._transformation_or_factory).parameters
        fixed = {
            name: value
            for name, value in self._arguments.items()
            if name not in known or comparison.key(value) != comparison.key(known[name].default)
        }
        return {**fixed, **self._numbers}

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, OptaxOptimizer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        made = self._transformation_or_factory
        made = getattr(made, "func", made)  # `optax.nadam` is a partial
        name = getattr(made, "__name__", type(made).__name__)
        return f"OptaxOptimizer({name}, {dict(self._numbers)}, device={self.device!r})"

    def __copy__(self) -> "OptaxOptimizer":
        return self  # nothing in it changes but what it has traced

    def __deepcopy__(self, memo: Any) -> "OptaxOptimizer":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}  # traced anew in a copy

    # jax is Python code that must not be turned into graphs: looking it through takes seconds.
    @tf.autograph.experimental.do_not_convert
    def initialize(self, specs: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the state before the first step.

        Args:
          specs: A structure of `tf.TensorSpec`s of the weights, with known shapes.

        Returns:
          An `OrderedDict`: the numbers that may change between steps, `learning_rate` first; `step`,
          the number of steps taken, if the state of optax starts from the values of the weights;
          and `slots`, the tensors of that state by path.

        Raises:
          ValueError: If a weight has no floating dtype or known shape, or the transformation cannot
            be run on such weights as plain TensorFlow operations.
        """
        leaves.check_specs(specs, floating=True)
        if isinstance(specs, tf.TensorSpec) and specs.shape.rank == 0:
            specs = self._stand_in(specs)
            if specs is None:
                return collections.OrderedDict({_SLOTS: collections.OrderedDict()})
        program = self._program(specs)
        state: collections.OrderedDict[str, Any] = collections.OrderedDict()
        numbers = {name: self._initial_number(name) for name in program.numbers}
        numbers |= program.initial_injected()
        for name in sorted(numbers, key=lambda name: name != _LR):
            state[name] = numbers[name]
        if program.from_weights:
            state[STEP] = np.int64(0)
        with device_scope(self.device):
            state[_SLOTS] = call_traced(program.initial_slots)
        return state

    def _stand_in(self, scalar: tf.TensorSpec) -> Any:
        """Weights to tell the hparams by: TFF's client work asks for them by one scalar weight.

        None where the transformation takes no such weights and has no hparams.
        """
        for shape in ([], [1], [1, 1]):
            one = tf.TensorSpec(shape, scalar.dtype)
            specs = one if self.weight_names is None else [one] * len(self.weight_names)
            try:
                self._program(specs)
                return specs
            except ValueError as error:
                problem = error
        if self._numbers or _has_injected(self._transformation_or_factory):
            raise ValueError(
                "`transformation_or_factory` must take one weight alone too, for TFF's client work "
                f"asks for its hparams by one; found that it does not: {problem} Give masks and "
                "labels as functions of the weights, or pass `weight_names`."
            ) from problem
        return None  # a mask for weights of another structure, and no numbers whatever they are

    def _initial_number(self, name: str) -> Any:
        value = self._numbers[name]
        return tf.cast(value, tf.float64) if tf.is_tensor(value) else np.float64(value)

    @tf.autograph.experimental.do_not_convert
    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """Takes one step: the transformation's `update`, then `optax.apply_updates`.

        Args:
          state: What `initialize` or the previous `next` returned.
          weights: A structure of tensors or variables; variables are read, not assigned.
          gradients: The same structure with the same shapes and dtypes. A leaf may be None: that
            weight and its slots stay as they are. Rows of a `tf.IndexedSlices` are added up.

        Returns:
          The new state and the new weights, as tensors.

        Raises:
          ValueError: If structures, shapes or dtypes do not fit each other, or no gradient is given.
        """
        weights = tf.nest.map_structure(tf.convert_to_tensor, weights)
        with device_scope(self.device):
            gradients = leaves.read_gradients(gradients, weights)
            gradients = tf.nest.map_structure(leaves.dense, gradients, weights)
        if not tf.nest.flatten(weights):
            return state, weights
        program = self._program(weights)
        _check_state(state, program)
        state = tf.nest.map_structure(tf.convert_to_tensor, collections.OrderedDict(state))
        given = [i for i, g in enumerate(tf.nest.flatten(gradients)) if g is not None]
        with device_scope(self.device):
            new_state, values = call_traced(
                functools.partial(_step, program, given),
                state,
                tf.nest.flatten(weights),
                [g for g in tf.nest.flatten(gradients) if g is not None],
            )
        return new_state, tf.nest.pack_sequence_as(weights, values)

    def get_hparams(self, state: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the numbers in the state that may change between steps."""
        return collections.OrderedDict(
            (name, value) for name, value in state.items() if name not in (STEP, _SLOTS)
        )

    def set_hparams(self, state: Any, hparams: Any) -> "collections.OrderedDict[str, Any]":
        """Returns the state with some of these numbers set; see `hyperparameters.update`."""
        intervals = {
            name: optax_arguments.interval_of(self._transformation_or_factory, name)
            for name in self.get_hparams(state)
        }
        return hyperparameters.update(state, hparams, intervals, _OWNER)

    def _program(self, weights: Any) -> Any:
        # Both import optax, which only those need who come here.
        from tff_optim.backends.optax import program as optax_step
        from tff_optim.backends.optax import tracing as optax_tracing

        layout = optax_tracing.arrange(weights, self.weight_names)
        if layout.key not in self._programs:
            # A tensor has no value yet: any number does for tracing.
            candidates = {n: 0.5 if tf.is_tensor(v) else v for n, v in self._numbers.items()}
            arguments = {**self._arguments, **candidates}
            program = optax_step.build_program(
                lambda numbers: optax_arguments.make(
                    self._transformation_or_factory, {**arguments, **numbers}
                ),
                candidates,
                layout,
            )
            for name, value in self._numbers.items():
                if tf.is_tensor(value) and name not in program.numbers:
                    raise ValueError(
                        f"`{name}` must be a number here, since the initial state or the graph is "
                        f"made from its value; found {shown(value)}."
                    )
            self._programs[layout.key] = program
        return self._programs[layout.key]


def _step(program: Any, given: Sequence[int], state: Any, weights: Any, gradients: Any) -> Any:
    slots = state[_SLOTS]
    new_state = collections.OrderedDict(state)
    if STEP in state:
        slots = program.start(slots, weights, tf.equal(state[STEP], 0))
        new_state[STEP] = state[STEP] + 1
    of_all: list[Any] = [None] * len(weights)
    for position, gradient in zip(given, gradients):
        of_all[position] = gradient
    new_state[_SLOTS], values = program.step(state, slots, weights, of_all)
    return new_state, values


def _has_injected(made: Any) -> bool:
    """Whether `optax.inject_hyperparams` made a transformation, whose numbers are in its state."""
    init = getattr(made, "init", None)
    return getattr(init, "__qualname__", "").startswith("inject_hyperparams.")


def _check_state(state: Any, program: Any) -> None:
    steps = [STEP] if program.from_weights else []
    leaves.check_keys(state, [*program.numbers, *program.injected, *steps, _SLOTS], "state")
    leaves.check_slots(state, program.slots)


def build_optax_optimizer(
    transformation_or_factory: Any,
    *,
    learning_rate: Any = None,
    weight_names: Sequence[str] | None = None,
    device: str | DevicePolicy | None = None,
    **kwargs: Any,
) -> OptaxOptimizer:
    """Makes a pure TFF optimizer of any optax transformation.

    A step computes what plain optax computes,

        updates, state = transformation.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)

    as plain TensorFlow operations without XLA, so that it runs on clients and on the server, in
    TFF's worker and in the Python process. Weights of 64 bits are computed in 64 bits; where all
    have at most 32, jax' usual 32 bits are used.

    Given a factory, such as `optax.adam` or a function of your own, each of its arguments that is a
    float is kept in the state and can be set between rounds (`get_hparams`), as under
    `optax.inject_hyperparams`; so `tff.learning.optimizers.schedule_learning_rate` works.
    What stays as it is built: an argument that Python code branches on or that the initial state is
    made from, a default of 0 (it turns a term off, which then costs nothing), integers, functions
    and schedules. Given a transformation, all is as it was made,
    unless `optax.inject_hyperparams` made it: its numbers are then found in the state.

    A state that starts from the values of the weights (`optax.contrib.prodigy`, for example) is made
    in the first step. The tensors of the state are named by their paths in optax's state; no Python
    class of optax is in it.

    Args:
      transformation_or_factory: An `optax.GradientTransformation`, or a callable that returns one.
      learning_rate: The argument of this name of the factory: a number, an optax schedule, or a
        scalar tensor of the TFF computation in which the optimizer is built.
      weight_names: Names of the weights in the order of `tf.nest.flatten`, all different. With them,
        optax sees a dictionary of weights by name, for masks and labels; without, lists and
        dictionaries nested as the weights are.
      device: A device such as `"/GPU:0"` or a `DevicePolicy` for the state and the step; None for
        the policy in force, which leaves it to TensorFlow unless set.
      **kwargs: The other arguments of the factory.

    Returns:
      A `tff.learning.optimizers.Optimizer`. What optax can run and this cannot is told by its
      `initialize`, when TFF builds a process of it: a state that changes its shapes, an operation
      without a counterpart in TensorFlow, an `update` with extra arguments.

    Raises:
      ImportError: If optax is not installed.
      TypeError: If an argument is of the wrong type, or the factory does not take it.
      ValueError: If a number is not allowed.

    Source: https://optax.readthedocs.io.

    >>> import optax
    >>> import tensorflow as tf
    >>> import tff_optim
    >>> optimizer = tff_optim.build_optax_optimizer(optax.adam, learning_rate=0.1, b1=0.8)
    >>> state = optimizer.initialize([tf.TensorSpec([2], tf.float32)])
    >>> list(optimizer.get_hparams(state)), list(state["slots"])
    (['learning_rate', 'b1', 'b2', 'eps'], ['0/count', '0/mu/0', '0/nu/0'])
    >>> weights, gradients = [tf.constant([1.0, 2.0])], [tf.constant([0.5, -0.5])]
    >>> state, weights = optimizer.next(state, weights, gradients)
    >>> weights[0].numpy().round(4)
    array([0.9, 2.1], dtype=float32)
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            "`build_optax_optimizer` needs optax 0.2.1; it cannot be imported. Install the locked "
            "set (README, section Install), which holds what goes with TFF's jax 0.4.13."
        ) from error
    made = transformation_or_factory
    arguments = dict(kwargs)
    if learning_rate is not None:
        arguments[_LR] = learning_rate
    if isinstance(made, optax.GradientTransformation | optax.MultiSteps):
        if arguments:
            raise TypeError(
                "`transformation_or_factory` must be a factory if it is given arguments; found a "
                f"transformation that is made already, and {', '.join(sorted(arguments))}. Pass the "
                "factory itself: `build_optax_optimizer(optax.adam, learning_rate=0.1)`."
            )
    elif callable(made):
        arguments = {
            name: optax_arguments.check_argument(made, name, value)
            for name, value in optax_arguments.bind(made, arguments).items()
        }
    else:
        raise TypeError(
            "`transformation_or_factory` must be an optax.GradientTransformation or a callable that "
            f"returns one; found {shown(made)}."
        )
    names = None if weight_names is None else tuple(weight_names)
    if names is not None and len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            "`weight_names` must name every weight differently, for optax sees the weights by name; "
            f"found {shown(repeated)} more than once."
        )
    numbers = {
        name: value
        for name, value in arguments.items()
        if name not in (STEP, _SLOTS)
        and (
            tf.is_tensor(value)
            or (isinstance(value, float) and (value != 0.0 or name in kwargs or name == _LR))
        )
    }
    # Made once now, so that what the factory itself refuses is told here.
    optax_arguments.make(made, {n: 0.5 if tf.is_tensor(v) else v for n, v in arguments.items()})
    return OptaxOptimizer(
        made,
        {name: value for name, value in arguments.items() if name not in numbers},
        numbers,
        names,
        select_device(device),
    )
