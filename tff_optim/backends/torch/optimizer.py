"""Any torch optimizer as a TFF optimizer for the server, run in a Python process of its own."""

import atexit
import collections
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tff_optim.backends.common import LEARNING_RATE, SLOTS, PureOptimizer, check_state
from tff_optim.backends.torch import arguments as torch_arguments
from tff_optim.backends.torch.process import TorchProcess
from tff_optim.core import entries, leaves
from tff_optim.core.messages import shown
from tff_optim.core.numbers import NON_NEGATIVE, Interval, checked_number
from tff_optim.core.types import Function, Json, Leaves, Specs, State, Weights

_STARTED = "started"
_GROUP_RATE = "group/lr"
# TensorFlow's error for an operation that it cannot run shows only its name.
NODE = "torch_runs_in_the_Python_process_only_use_a_Keras_or_optax_optimizer_in_the_TFF_worker"


class TorchOptimizer(PureOptimizer):
    """A torch optimizer as a TFF optimizer; see `build_torch_optimizer`.

    Attributes:
      recipe: How torch builds it: `optimizer`, `arguments` and `scheduler`.
    """

    not_hparams = (_STARTED, SLOTS)
    _owner = "build_torch_optimizer"

    def __init__(self, python: str, recipe: Mapping[str, Json]):
        self.recipe = recipe
        self._made_of = python, json.dumps(recipe, sort_keys=True)
        super().__init__(self._made_of)

    def __repr__(self) -> str:
        scheduler = self.recipe["scheduler"]
        then = f", lr_scheduler={scheduler!r}" if scheduler else ""
        return f"TorchOptimizer({self.recipe['optimizer']}, {self.recipe['arguments']}{then})"

    def __reduce__(self) -> tuple:
        return TorchOptimizer, (self._made_of[0], self.recipe)

    def _initial_state(self, specs: Specs) -> State:
        if isinstance(specs, tf.TensorSpec) and specs.shape.rank == 0:
            # TFF's client work asks for hparams by one scalar weight.
            raise ValueError(
                "`optimizer` must be of Keras or optax on clients, since torch runs only on the server, "
                "in the Python process; found one of torch. Use `build_keras_optimizer` or "
                "`build_optax_optimizer` there."
            )
        process = _process(self._layout(specs))
        state: State = collections.OrderedDict()
        if not self.recipe["scheduler"]:  # a scheduler would set the rate
            state[LEARNING_RATE] = np.float64(process.numbers[_GROUP_RATE])
        state[_STARTED] = tf.zeros(len(tf.nest.flatten(specs)), tf.bool)
        state[SLOTS] = collections.OrderedDict(
            (path, leaves.zeros(slot) if isinstance(slot, tf.TensorSpec) else tf.constant(slot))
            for path, slot in self._slots(process, specs).items()
        )
        return state

    def _layout(self, weights: Weights | Specs) -> "_Layout":
        specs = tuple(tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tf.nest.flatten(weights))
        return (*self._made_of, os.environ.get("PYTHONPATH"), specs)

    def _slots(
        self, process: TorchProcess, weights: Weights | Specs
    ) -> "collections.OrderedDict[str, tf.TensorSpec | np.number]":
        """Specs of tensors by path, followed by the first values of numbers."""
        paths = [path for path, _ in leaves.named_leaves(weights)]
        slots: collections.OrderedDict[str, tf.TensorSpec | np.number] = collections.OrderedDict(
            (f"{slot.key}/{paths[slot.weight]}".rstrip("/"), slot.spec) for slot in process.slots
        )
        for path, number in process.numbers.items():
            if path != _GROUP_RATE or self.recipe["scheduler"]:
                slots[path] = np.int64(number) if isinstance(number, int) else np.float64(number)
        return slots

    def _step(
        self, state: State, given: Weights, weights: Leaves, gradients: Leaves
    ) -> tuple[State, Leaves]:
        layout = self._layout(weights)
        process = _process(layout)
        slots = self._slots(process, given)
        rate = [] if self.recipe["scheduler"] else [LEARNING_RATE]
        check_state(state, [*rate, _STARTED], {n: leaves.spec_of(s) for n, s in slots.items()})
        positions = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        tensors = [*slots][: len(process.slots)]
        kept = [
            *(state[SLOTS][n] if n in slots else state[LEARNING_RATE] for n in process.numbers),
            state[_STARTED],
            *(state[SLOTS][path] for path in tensors),
            *weights,
        ]
        # Nothing reads the recipe. It identifies the callback, of which the graph holds only a number.
        inputs = [*kept, *(gradients[i] for i in positions), tf.constant(layout[1])]
        outputs = iter(_call(_callback(layout, bool(rate), positions), inputs, kept))
        numbers = {path: next(outputs) for path in process.numbers}
        new_state = collections.OrderedDict(state)
        if rate:
            new_state[LEARNING_RATE] = numbers[_GROUP_RATE]
        new_state[_STARTED] = next(outputs)
        values = {path: next(outputs) for path in tensors} | numbers
        new_state[SLOTS] = collections.OrderedDict((path, values[path]) for path in slots)
        return new_state, list(outputs)

    def _interval_of(self, name: str) -> Interval:
        return NON_NEGATIVE


# The Python of torch, the recipe as JSON, the search path of modules, and the specs of the weights.
_Layout = tuple[str, str, str | None, tuple[tf.TensorSpec, ...]]


# Few, since each holds memory for weights, gradients and slots. None holds a state, so one that is
# needed again can be made again.
@functools.lru_cache(maxsize=4)
def _process(layout: _Layout) -> TorchProcess:
    python, recipe, _, specs = layout
    return TorchProcess(python, json.loads(recipe), list(specs))


atexit.register(_process.cache_clear)


# Callbacks of graphs are kept for ever. TFF keeps only the definition of a graph, in which a callback is
# a number, and neither TFF nor TensorFlow keeps the callback itself.
@functools.cache
def _callback(
    layout: _Layout, has_rate: bool, given: tuple[int, ...]
) -> Callable[..., list[np.ndarray]]:
    return lambda *values: _run(_process(layout), has_rate, given, values[:-1])


def _call(callback: Function, inputs: list[tf.Tensor], like: list[tf.Tensor]) -> list[tf.Tensor]:
    """Calls a callback eagerly or in a graph; the results have the specs of `like`."""
    if tf.executing_eagerly():
        return [tf.convert_to_tensor(x) for x in callback(*(np.asarray(x) for x in inputs))]
    specs = [leaves.spec_of(value) for value in like]
    outputs = tf.numpy_function(callback, inputs, [spec.dtype for spec in specs], name=NODE)
    for output, spec in zip(outputs, specs):
        output.set_shape(spec.shape)
    return list(outputs)


def _run(
    process: TorchProcess, has_rate: bool, given: Sequence[int], values: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """A step on arrays in the order of `_step`; returns them without the gradients."""
    rest = iter(values)
    old = {path: next(rest) for path in process.numbers}
    started = next(rest)
    slots = [next(rest) for _ in process.slots]
    weights = [next(rest) for _ in range(process.num_weights)]
    numbers = {path: number.item() for path, number in old.items()}
    result = process.step(weights, dict(zip(given, rest)), slots, started, numbers)
    rate, new_rate = (of.get(_GROUP_RATE) for of in (numbers, result.numbers))
    if has_rate and rate != new_rate:
        raise ValueError(
            "`optimizer` must not change its learning rate; found that a step changes it from "
            f"{rate!r} to {new_rate!r}. Use an `lr_scheduler`."
        )
    new_numbers = [_number(path, result.numbers, number.dtype) for path, number in old.items()]
    now = np.array([bool(s) or i in given for i, s in enumerate(started)])
    return [*new_numbers, now, *result.slots, *result.weights]


def _number(name: str, numbers: Mapping[str, Json], dtype: np.dtype) -> np.ndarray:
    value = numbers.get(name)
    try:
        new = np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError):  # None, or no whole number
        new = None
    if new is None or (new != value and value == value):
        raise ValueError(
            "`optimizer` must keep the types of its numbers: a whole number stays whole; found "
            f"{shown(value)} for {name!r} of {dtype}. Give it as a float."
        )
    return new


def build_torch_optimizer(
    optimizer: str,
    *,
    python: str | os.PathLike | None = None,
    trusted_packages: Collection[str] = (),
    lr_scheduler: tuple[str, Mapping[str, Json]] | None = None,
    **kwargs: Json,
) -> TorchOptimizer:
    """Makes a TFF optimizer of a torch optimizer, for the server.

    torch needs newer packages than TensorFlow Federated allows, so it runs in a process and a Python
    environment of its own. Weights, gradients and the optimizer's state travel through shared memory,
    bit for bit, and torch does the arithmetic.

    The optimizer runs where TensorFlow runs in the Python process: called directly, in a
    `tf.function`, or on the server device of a resident process. TFF's worker cannot reach another
    process. There, and on clients, use `build_keras_optimizer` or `build_optax_optimizer`.

    The state is an `OrderedDict`. It has `learning_rate`, the only hparam, unless a scheduler sets the
    rate. `started` says for each weight whether it has had a gradient, since torch makes the state of a
    weight with its first gradient. `slots` holds the tensors of torch's state by path, and the numbers
    of its parameter group and its scheduler, which are fixed.

    A step is taken exactly once, or raises and leaves the state as it was, even if torch's process is
    killed or stopped, several threads take steps, or this process is forked. torch has 300 seconds to
    start and 300 for each step, or the seconds in the environment variable TFF_OPTIM_TORCH_TIMEOUT.
    `initialize` and `next` raise `RuntimeError` if that is too short or the process ends. In a graph,
    TensorFlow raises its own error with the same text.

    Args:
      optimizer: The name of a class of `torch.optim`, or the full name of a class of a trusted
        package: `"Adam"`, `"mypackage.optimizers.Fancy"`.
      python: The Python of an environment with torch 2. None takes the running Python, if torch is
        installed there without breaking TensorFlow.
      trusted_packages: Names of top-level packages that may be imported in that environment.
      lr_scheduler: The name of a class of `torch.optim.lr_scheduler` or of a trusted package, and its
        arguments: `("StepLR", {"step_size": 10})`. It takes one step with each step of the optimizer.
      **kwargs: The arguments of the class, such as `lr`: numbers, strings, lists, True, False, None.

    Returns:
      A `tff.learning.optimizers.Optimizer`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If an optimizer or scheduler cannot run from gradients alone or is not trusted, a
        rate is not allowed, or there is no torch.

    Source: https://docs.pytorch.org/docs/stable/optim.html.

    Example:
      >>> import sys
      >>> import tff_optim
      >>> tff_optim.build_torch_optimizer("Adam", lr=0.1, betas=(0.8, 0.99), python=sys.executable)
      TorchOptimizer(Adam, {'lr': 0.1, 'betas': [0.8, 0.99]})
    """
    trusted = entries.check_packages(trusted_packages)
    torch_arguments.check_name(
        "optimizer", optimizer, "torch.optim", trusted, torch_arguments.REFUSED
    )
    arguments = torch_arguments.check_arguments("kwargs", kwargs)
    if "lr" in arguments:
        arguments["lr"] = checked_number(
            "build_torch_optimizer", "lr", arguments["lr"], NON_NEGATIVE
        )
    scheduler = None
    if lr_scheduler is not None:
        if isinstance(lr_scheduler, str) or len(lr_scheduler) != 2:
            raise TypeError(
                "`lr_scheduler` must be a pair of a name and arguments, such as "
                f'("StepLR", {{"step_size": 10}}); found {shown(lr_scheduler)}.'
            )
        name, given = lr_scheduler
        where = "torch.optim.lr_scheduler"
        torch_arguments.check_name(
            "lr_scheduler", name, where, trusted, torch_arguments.REFUSED_SCHEDULERS
        )
        scheduler = [name, torch_arguments.check_arguments("lr_scheduler", given)]
    recipe = {"optimizer": optimizer, "arguments": arguments, "scheduler": scheduler}
    return TorchOptimizer(torch_arguments.find_python(python), recipe)
