"""Any optax transformation as a pure `tff.learning.optimizers.Optimizer`."""

import collections
import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tff_optim.backends.common import LEARNING_RATE, SLOTS, PureOptimizer, check_state
from tff_optim.backends.optax import arguments as optax_arguments
from tff_optim.backends.optax.arguments import Given
from tff_optim.core import comparison
from tff_optim.core.devices import DevicePolicy, device_scope, select_device
from tff_optim.core.messages import shown
from tff_optim.core.numbers import STEP, Interval
from tff_optim.core.tracing import call_traced
from tff_optim.core.types import Leaves, Named, Number, Rate, Specs, State, Value, Weights

if TYPE_CHECKING:
    from tff_optim.backends.optax.program import Program


class OptaxOptimizer(PureOptimizer):
    """An optax transformation as a pure TFF optimizer; see `build_optax_optimizer`.

    Attributes:
      transformation_or_factory: The argument that it was built with.
    """

    not_hparams = (STEP, SLOTS)
    _owner = "build_optax_optimizer"

    def __init__(
        self,
        transformation_or_factory: Given,
        arguments: Mapping[str, Value],
        hparams: Mapping[str, Number],
        weight_names: tuple[str, ...] | None,
        device: str | None,
    ):
        super().__init__((transformation_or_factory, arguments, hparams), device, weight_names)
        self.transformation_or_factory = transformation_or_factory
        self._arguments = arguments
        self._hparams = hparams
        self._programs: dict[Hashable, Program] = {}

    @property
    def arguments(self) -> Named:
        """The factory's arguments, without those at their defaults that are no hparams."""
        if not self._arguments:
            return dict(self._hparams)
        known = inspect.signature(self.transformation_or_factory).parameters
        fixed = {
            name: value
            for name, value in self._arguments.items()
            if name not in known or comparison.key(value) != comparison.key(known[name].default)
        }
        return {**fixed, **self._hparams}

    def __repr__(self) -> str:
        made = self.transformation_or_factory
        made = getattr(made, "func", made)  # `optax.nadam` is a partial
        name = getattr(made, "__name__", type(made).__name__)
        return f"OptaxOptimizer({name}, {dict(self._hparams)}, device={self.device!r})"

    def __reduce__(self) -> tuple:
        made = self.transformation_or_factory, self._arguments, self._hparams
        return OptaxOptimizer, (*made, self.weight_names, self.device)

    def _initial_state(self, specs: Specs) -> State:
        state: State = collections.OrderedDict()
        if isinstance(specs, tf.TensorSpec) and specs.shape.rank == 0:
            specs = self._stand_in(specs)
            if specs is None:
                return collections.OrderedDict({SLOTS: collections.OrderedDict()})
        program = self._program(specs)
        values = {name: self._hparams[name] for name in program.hparams}
        hparams = {
            name: tf.cast(value, tf.float64) if tf.is_tensor(value) else np.float64(value)
            for name, value in values.items()
        }
        hparams |= program.initial_injected()
        for name in sorted(hparams, key=lambda name: name != LEARNING_RATE):
            state[name] = hparams[name]
        if program.from_weights:
            state[STEP] = np.int64(0)
        with device_scope(self.device):
            state[SLOTS] = call_traced(program.initial_slots)
        return state

    def _stand_in(self, scalar: tf.TensorSpec) -> Specs | None:
        """Specs to find the hparams with, for TFF's client work, which asks with one scalar weight.

        None if the transformation takes no such weights and has no hparams.
        """
        for shape in ([], [1], [1, 1]):
            one = tf.TensorSpec(shape, scalar.dtype)
            specs = one if self.weight_names is None else [one] * len(self.weight_names)
            try:
                self._program(specs)
                return specs
            except ValueError as error:
                problem = error
        if self._hparams or _has_injected(self.transformation_or_factory):
            raise ValueError(
                "`transformation_or_factory` must also take one scalar weight, since TFF's client work "
                f"reads the hparams with one; found that it does not: {problem} Give masks and labels "
                "as functions of the weights, or pass `weight_names`."
            ) from problem
        return None  # a mask for another structure, and no hparams for any weights

    def _step(
        self, state: State, given: Weights, weights: Leaves, gradients: Leaves
    ) -> tuple[State, Leaves]:
        program = self._program(tf.nest.pack_sequence_as(given, weights))
        steps = [STEP] if program.from_weights else []
        check_state(state, [*program.hparams, *program.injected, *steps], program.slots)
        state = tf.nest.map_structure(tf.convert_to_tensor, collections.OrderedDict(state))
        run = program.eager_run if tf.executing_eagerly() else program.run
        with device_scope(self.device):
            return call_traced(run, state, weights, gradients)

    def _interval_of(self, name: str) -> Interval:
        return optax_arguments.interval_of(self.transformation_or_factory, name)

    def _program(self, weights: Weights | Specs) -> "Program":
        # Both import optax, which other users need not have.
        from tff_optim.backends.optax.program import build_program
        from tff_optim.backends.optax.tracing import arrange

        layout = arrange(weights, self.weight_names)
        if layout.key not in self._programs:
            # A tensor has no value yet, and any number will do for tracing.
            candidates = {n: 0.5 if tf.is_tensor(v) else v for n, v in self._hparams.items()}
            arguments = {**self._arguments, **candidates}
            program = build_program(
                lambda hparams: optax_arguments.make(
                    self.transformation_or_factory, {**arguments, **hparams}
                ),
                candidates,
                layout,
            )
            for name, value in self._hparams.items():
                if tf.is_tensor(value) and name not in program.hparams:
                    raise ValueError(
                        f"`{name}` must be a number here, since the initial state or the graph "
                        f"depends on its value; found {shown(value)}."
                    )
            self._programs[layout.key] = program
        return self._programs[layout.key]


def _has_injected(made: Given) -> bool:
    """Whether `optax.inject_hyperparams` made a transformation, which has its numbers in its state."""
    init = getattr(made, "init", None)
    return getattr(init, "__qualname__", "").startswith("inject_hyperparams.")


def build_optax_optimizer(
    transformation_or_factory: Given,
    *,
    learning_rate: Rate | None = None,
    weight_names: Sequence[str] | None = None,
    device: str | DevicePolicy | None = None,
    **kwargs: Value,
) -> OptaxOptimizer:
    """Makes a pure TFF optimizer of any optax transformation.

    A step computes the same as plain optax,

        updates, state = transformation.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)

    in plain TensorFlow operations without XLA, so it runs on clients and on the server, in TFF's worker
    and in the Python process. Weights of 64 bits are computed in 64 bits. If all weights have at most
    32 bits, jax' usual 32 bits are used.

    For a factory, such as `optax.adam` or a function of your own, the state holds each argument that is
    a float. These hyper-parameters can be set between rounds (`get_hparams`), as under
    `optax.inject_hyperparams`, so `tff.learning.optimizers.schedule_learning_rate` works. All other
    arguments are fixed: integers, functions and schedules, arguments that Python code branches on or
    that the initial state depends on, and a default of 0, which turns a term off at no cost. A finished
    transformation is fixed as a whole, except for the numbers that `optax.inject_hyperparams` keeps in
    its state.

    The state is an `OrderedDict` of those numbers and of `slots`, the tensors of optax' state by path,
    without Python classes of optax. Some slots start from the values of the weights, such as those of
    `optax.contrib.prodigy`. The first step sets them, and such a state also has `step`, the number of
    steps taken.

    Args:
      transformation_or_factory: An `optax.GradientTransformation`, or a callable that returns one.
      learning_rate: The factory's argument of this name: a number, an optax schedule, or a scalar
        tensor of the TFF computation in which the optimizer is built.
      weight_names: Names of the weights in the order of `tf.nest.flatten`, all different. With names,
        optax sees a dictionary of weights, for masks and labels. Without, it sees lists and
        dictionaries nested as the weights are.
      device: A device such as `"/GPU:0"` or a `DevicePolicy` for the state and the step; None for
        the policy in force, which leaves it to TensorFlow unless set.
      **kwargs: The other arguments of the factory.

    Returns:
      A `tff.learning.optimizers.Optimizer`. Its `initialize`, which TFF calls when a process is built,
      refuses transformations that only optax itself can run: with a state whose shapes change, an
      operation without a counterpart in TensorFlow, or an `update` with extra arguments.

    Raises:
      ImportError: If optax is not installed.
      TypeError: If an argument is of the wrong type, or not one of the factory's.
      ValueError: If a number is not allowed.

    Source: https://optax.readthedocs.io.

    Example:
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
            "set (README, section Install), whose packages fit TFF's jax 0.4.13."
        ) from error
    made = transformation_or_factory
    arguments = dict(kwargs)
    if learning_rate is not None:
        arguments[LEARNING_RATE] = learning_rate
    if isinstance(made, optax.GradientTransformation | optax.MultiSteps):
        if arguments:
            raise TypeError(
                "`transformation_or_factory` must be a factory if there are arguments; found a finished "
                f"transformation and {', '.join(sorted(arguments))}. Pass the factory itself: "
                "`build_optax_optimizer(optax.adam, learning_rate=0.1)`."
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
    hparams = {
        name: value
        for name, value in arguments.items()
        if name not in (STEP, SLOTS)
        and (
            tf.is_tensor(value)
            or (
                isinstance(value, float)
                and (value != 0.0 or name in kwargs or name == LEARNING_RATE)
            )
        )
    }
    # Made once now, so that the factory's own errors are raised here.
    optax_arguments.make(made, {n: 0.5 if tf.is_tensor(v) else v for n, v in arguments.items()})
    return OptaxOptimizer(
        made,
        {name: value for name, value in arguments.items() if name not in hparams},
        hparams,
        names,
        select_device(device),
    )
