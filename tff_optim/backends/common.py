"""The common base of this package's optimizers, and of their configurations."""

import abc
import collections
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Self

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.core import comparison, entries, leaves
from tff_optim.core.devices import device_scope
from tff_optim.core.entries import Described, Entry
from tff_optim.core.messages import refusal
from tff_optim.core.numbers import FINITE, Interval
from tff_optim.core.tracing import eager_world
from tff_optim.core.types import (
    Gradients,
    Hparams,
    Json,
    Leaves,
    Named,
    Number,
    Specs,
    State,
    Stepped,
    Value,
    Weights,
)

LEARNING_RATE = tff.learning.optimizers.LEARNING_RATE_KEY
SLOTS = "slots"


def check_weight_names(names: Sequence[str] | None, count: int) -> None:
    """Raises `ValueError` unless `names` is None or has a name for each weight."""
    if names is not None and len(names) != count:
        raise refusal(
            "weight_names", "name every weight", f"{len(names)} names for {count} weights"
        )


def check_state(state: State, names: Iterable[str], slots: Mapping[str, tf.TensorSpec]) -> None:
    """Raises `ValueError` unless a state has the entries `names`, and slots with these specs."""
    leaves.check_keys(state, [*names, SLOTS], "state")
    leaves.check_slots(state, slots)


class PureOptimizer(tff.learning.optimizers.Optimizer):
    """An optimizer of pure functions: state is an argument and a result, and no variable is made.

    Two optimizers of one class are equal if their parts are. Attributes are set once, so a copy is the
    same object.

    Not an attrs class: TFF passes optimizers to a `tf.function`, which would split such an argument into
    its fields.

    A subclass implements `_initial_state` and `_step`, which get checked arguments.

    Attributes:
      device: The device of the state and the step, or None to leave it to TensorFlow.
      weight_names: The names of the weights, in the order of `tf.nest.flatten`, or None.
    """

    # Whether a step takes `tf.IndexedSlices` as they are; if not, they are made dense.
    takes_rows: ClassVar[bool] = False
    # Whether weights must be floating.
    floating: ClassVar[bool] = True
    # Entries of a state that are no hyper-parameters.
    not_hparams: ClassVar[tuple[str, ...]] = (SLOTS,)

    def __init__(
        self,
        parts: object,
        device: str | None = None,
        weight_names: tuple[str, ...] | None = None,
    ):
        """Sets the attributes that decide equality, and `parts`, the other ones that do."""
        self.device = device
        self.weight_names = weight_names
        # Both now: a `tf.function` hashes its arguments while it traces, when Keras objects cannot
        # return their configuration.
        with eager_world():
            self._key = comparison.key((parts, device, weight_names))
            self._hash = hash(self._key)

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise AttributeError(f"`{name}` of {type(self).__name__} is set when it is built.")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, type(self)) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    # AutoGraph must not convert the code of other libraries that runs here, which would take seconds.
    @tf.autograph.experimental.do_not_convert
    def initialize(self, specs: Specs) -> State:
        """Returns the state before the first step.

        Args:
          specs: A structure of `tf.TensorSpec`s of the weights, with known shapes.

        Returns:
          An `OrderedDict` as the optimizer's `build_` function describes it: numbers that may change
          between steps, `learning_rate` first, and then the slots.

        Raises:
          ValueError: If a shape is unknown, a dtype is not floating where it must be, or the optimizer
            cannot run on such weights.
        """
        leaves.check_specs(specs, floating=self.floating)
        return self._initial_state(specs)

    @tf.autograph.experimental.do_not_convert
    def next(self, state: State, weights: Weights, gradients: Gradients) -> Stepped:
        """Takes one step.

        Args:
          state: The result of `initialize` or the previous `next`; it is not changed.
          weights: A structure of tensors or variables; variables are read, not assigned.
          gradients: A structure like `weights` with the same shapes and dtypes. If a leaf is None, its
            weight and slots stay as they are. If a leaf is a `tf.IndexedSlices`, repeated rows are
            added up.

        Returns:
          The new state and the new weights, as tensors.

        Raises:
          ValueError: If structures, shapes or dtypes do not match each other or the state, or no
            gradient is given.
        """
        with device_scope(self.device):
            values = tf.nest.map_structure(tf.convert_to_tensor, weights)
            gradients = leaves.read_gradients(gradients, values)
            if not self.takes_rows:
                gradients = tf.nest.map_structure(leaves.dense, gradients, values)
        flat = tf.nest.flatten(values)
        if not flat:
            return state, weights
        state, flat = self._step(state, weights, flat, tf.nest.flatten(gradients))
        return state, tf.nest.pack_sequence_as(weights, flat)

    @abc.abstractmethod
    def _initial_state(self, specs: Specs) -> State:
        """The state before the first step; `initialize` has checked the specs."""

    @abc.abstractmethod
    def _step(
        self, state: State, given: Weights, weights: Leaves, gradients: Leaves
    ) -> tuple[State, Leaves]:
        """The state and the weights after a step.

        Args:
          state: The state, not checked.
          given: The weights in the caller's structure, which may contain variables.
          weights: The leaves of that structure as tensors; at least one.
          gradients: The checked leaves of the gradients.
        """

    def get_hparams(self, state: State) -> Hparams:
        """Returns the numbers that may change between steps.

        Args:
          state: A state of this optimizer.

        Returns:
          An `OrderedDict`: `learning_rate`, unless a schedule gives it, and other numbers by name.
        """
        return collections.OrderedDict(
            (name, value) for name, value in state.items() if name not in self.not_hparams
        )

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """Returns the state with these hyper-parameters, which the next step uses.

        Args:
          state: A state of this optimizer.
          hparams: Some of the numbers of `get_hparams`; the others stay as they are.

        Raises:
          TypeError: If a value is neither a number nor a tensor.
          ValueError: If a name is unknown, a number is out of range, or a tensor is not a scalar.
        """
        intervals = {name: self._interval_of(name) for name in self.get_hparams(state)}
        return hyperparameters.update(state, hparams, intervals, self._owner)

    @property
    def _owner(self) -> str:
        """The owner of the hyper-parameters, for messages."""
        return type(self).__name__

    def _interval_of(self, name: str) -> Interval:
        """The numbers that a hyper-parameter may be."""
        del name  # any finite number, unless overridden
        return FINITE


@attrs.frozen
class OptimizerKind:
    """A kind of optimizer, and its form in a configuration.

    Attributes:
      name: The value of `kind` in a configuration.
      cls: The class of such optimizers.
      to_json: Writes an optimizer as entries of plain Python types.
      from_json: Reads a configuration, given whole and by entry, into a description.
      names: The names of the entries.
      required: The names of entries that must not be missing.
    """

    name: str
    cls: type
    to_json: Callable[[Value], dict[str, Json]]
    from_json: Callable[[Entry, Mapping[str, Entry]], Described]
    names: tuple[str, ...]
    required: tuple[str, ...]


def names_and_device_to_json(optimizer: PureOptimizer) -> dict[str, Json]:
    """The entries `weight_names` and `device`."""
    names = optimizer.weight_names
    return {"weight_names": None if names is None else [*names], "device": optimizer.device}


def names_and_device(fields: Mapping[str, Entry]) -> Named:
    """The arguments `weight_names` and `device` of an optimizer."""
    names = fields.get("weight_names")
    given = None if names is None or names.value is None else names.strings()
    return {"weight_names": given, "device": entries.device(fields)}


def arguments_from_json(
    fields: Mapping[str, Entry], build: Callable[..., PureOptimizer]
) -> dict[str, Json]:
    """The arguments of a factory or class, which must not be those of `build` itself."""
    if "arguments" not in fields:
        return {}
    given = fields["arguments"]
    if not isinstance(given.value, dict):
        given.refuse("be a mapping", TypeError)
    own = {*inspect.signature(build).parameters} - {"learning_rate", "kwargs"}
    if taken := sorted(own & set(given.value)):
        given.at(taken[0]).refuse(f"be left out, since it is an argument of `{build.__name__}`")
    return given.value
