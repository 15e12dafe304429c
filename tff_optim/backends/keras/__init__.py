"""Keras optimizers from inside: the only part of the package that reads their private names."""

from tff_optim.backends.keras.checks import (
    check_arguments,
    check_closed,
    check_supported,
    find_numbers,
    not_called,
)
from tff_optim.backends.keras.copies import (
    Copy,
    at_unit_rate,
    build,
    build_template,
    constructor_arguments,
    copy_containers,
    exclude,
    excluded_patterns,
    has_rate_variable,
    initial_rate,
    own_learning_rate,
    read_variables,
)
from tff_optim.backends.keras.steps import bind, iterations_and_rate, prepare_gradients, run_step

__all__ = [
    "Copy",
    "at_unit_rate",
    "bind",
    "build",
    "build_template",
    "check_arguments",
    "check_closed",
    "check_supported",
    "constructor_arguments",
    "copy_containers",
    "exclude",
    "excluded_patterns",
    "find_numbers",
    "has_rate_variable",
    "initial_rate",
    "iterations_and_rate",
    "not_called",
    "own_learning_rate",
    "prepare_gradients",
    "read_variables",
    "run_step",
]
