"""Checks that a Keras optimizer can run as a pure function, and finds its hparams."""

import collections
import inspect
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tff_optim.backends.keras.cells import NumberCell
from tff_optim.backends.keras.copies import (
    Keras,
    all_cells,
    build_template,
    depends_on,
    excluded_patterns,
    read_variables,
)
from tff_optim.backends.keras.steps import run_step
from tff_optim.core import patterns
from tff_optim.core.messages import refusal
from tff_optim.core.tracing import scratch_graph
from tff_optim.keras_objects import arguments as keras_arguments

# The methods of Keras' base classes that a pure step calls as Keras does, or that have no part in a
# step. An override of any other method would be ignored, so it is refused: clipping in
# `compute_gradients` may serve privacy.
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


# Entries of a state that no hparam may replace.
_ENTRIES = ("learning_rate", "step", "slots")


def not_called() -> set[str]:
    """The methods of Keras' optimizers that a pure step does not call."""
    bases = [base for base in Keras.__mro__ if keras_arguments.of_keras(base)]
    defined = {name for base in bases for name, value in vars(base).items() if callable(value)}
    return {name for name in defined if not name.startswith("__")} - _HONOURED


def check_arguments(optimizer: Keras) -> None:
    """Raises if an argument of the optimizer or its schedule makes steps impossible."""
    keras_arguments.check_object(optimizer)
    for pattern in excluded_patterns(optimizer):
        patterns.check("exclude_from_weight_decay", pattern)
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


def find_hparams(
    optimizer: Keras, initial: Mapping[int, np.ndarray]
) -> "collections.OrderedDict[str, float]":
    """Finds the numbers that a step uses as tensors rather than branching on them.

    A step is traced with tensors for all numbers, or for one at a time if one must be a Python number.

    Raises:
      ValueError: If a step reads or assigns a variable that state cannot replace.
    """
    try:
        config = optimizer.get_config()
    except NotImplementedError:  # a subclass need not be serializable
        config = {}
    candidates: collections.OrderedDict[str, float] = collections.OrderedDict()
    for name, value in config.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name not in _ENTRIES and vars(optimizer).get(name) == value:
            candidates[name] = float(value)
    read = [_read_in_graph(optimizer, initial, [*candidates])]
    if read == [None]:
        read = [_read_in_graph(optimizer, initial, [name]) for name in candidates]
    if all(names is None for names in read):
        _read_in_graph(optimizer, initial, [])  # raises for a variable that is no state
    found = set().union(*(names or () for names in read))
    return collections.OrderedDict((n, value) for n, value in candidates.items() if n in found)


def _read_in_graph(
    optimizer: Keras, initial: Mapping[int, np.ndarray], names: Sequence[str]
) -> set[str] | None:
    """The numbers on which a step depends, or None if it cannot be traced with tensors for all.

    Raises:
      ValueError: If the step reads or assigns a variable that state cannot replace.
    """
    specs = [tf.TensorSpec((2, 3), tf.float32), tf.TensorSpec((3,), tf.float32)]
    try:
        template = build_template(optimizer, initial, specs, ["0", "1"])
        with scratch_graph() as graph:
            for cell in all_cells(template):
                cell.bind(tf.compat.v1.placeholder(cell.dtype, cell.shape))
            hparams = {name: tf.compat.v1.placeholder(tf.float64, ()) for name in names}
            for name, number in hparams.items():
                template.optimizer.__dict__[name] = NumberCell(number)
            gradients = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
            run_step(template, template.weights, gradients)
            outputs = [cell.value() for cell in all_cells(template)]
    except Exception as error:
        if names and not isinstance(error, TypeError | ValueError | NotImplementedError):
            raise
        return None  # it branches on a number; if not, the first step fails too and says why
    if any(tensor.dtype == tf.resource for tensor, _ in graph.captures):
        raise refusal(
            f"`optimizer` of class {type(optimizer).__name__}",
            "hold its variables in attributes, or in lists, tuples or dictionaries there",
            "that a step uses another `tf.Variable`, of a schedule for example",
            "A graph would keep the value that this variable has now.",
        )
    return {name for name, number in hparams.items() if depends_on(outputs, [number])}


def check_supported(optimizer: Keras) -> Keras:
    """Returns the optimizer, or raises if a pure step would differ from that of Keras."""
    cls = type(optimizer)
    name = cls.__name__
    overridden = [
        method
        for method in sorted(not_called())
        if inspect.getattr_static(cls, method, None) is not inspect.getattr_static(Keras, method)
    ]
    if overridden:
        raise ValueError(
            f"`optimizer` of class {name} must not override what a pure step does not call; found "
            f"that it overrides {', '.join(overridden)}. Keras' extension points are `build`, "
            "`update_step` and `get_config`."
        )
    replaced = [key for key in vars(optimizer) if callable(getattr(Keras, key, None))]
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
        raise refusal("optimizer", "not be laid out on a DTensor mesh", "one with `mesh`")
    if getattr(optimizer, "_exclude_from_weight_decay", None):
        raise ValueError(
            "`optimizer` must exclude weights from decay by `var_names`; found `var_list`. The weights "
            "of a TFF process are tensors, not those variables. Pass `weight_names` if they have no "
            "names."
        )
    return optimizer
