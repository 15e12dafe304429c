"""Traces functions that run users' code, inside TFF's computations and eagerly."""

import contextlib
import functools
from collections.abc import Iterator

import tensorflow as tf

from tff_optim.core.types import Function, GraphFunction, Structure, Value

_PACKAGE = __name__.partition(".")[0]
_autograph = tf.__internal__.autograph
# The context at import allows conversion; the context in which users' code is called may forbid it.
_CONTEXT = _autograph.control_status_ctx()


def converted(function: Function) -> Function:
    """Converts a user's function by AutoGraph, so that `if tensor:` becomes an operation.

    All functions that it calls are converted too, except those of Keras and TensorFlow. The calling code
    of this package stays unconverted: converting it takes seconds when a process is first built.

    Args:
      function: A function or method of a user, or of this package.

    Returns: A function of the same arguments; the same function if it is of this package, or in eager
      execution.
    """
    module = str(getattr(function, "__module__", None))
    if tf.executing_eagerly() or module.partition(".")[0] == _PACKAGE:
        return function

    def call(*arguments: Value, **named: Value) -> Value:
        return function(*arguments, **named)

    return _autograph.tf_convert(call, _CONTEXT)


@contextlib.contextmanager
def eager_world() -> Iterator[None]:
    """Leaves the graph of a TFF computation or a `tf.function`, for eager execution."""
    if tf.executing_eagerly():
        yield
    else:
        # In a new graph, since TFF and functions track all variables that are made while theirs is
        # current.
        with tf.Graph().as_default(), tf.__internal__.eager_context.eager_mode():
            yield


@contextlib.contextmanager
def scratch_graph() -> Iterator[tf.Graph]:
    """A throw-away graph."""
    graph = tf.__internal__.FuncGraph("scratch")
    with eager_world(), graph.as_default():
        yield graph


def function(body: Function, **options: object) -> GraphFunction:
    """`tf.function(body, **options)`, for code of which many functions are made.

    TensorFlow counts tracings by line of source, and warns of retracing when there are many. A function
    for each process, each traced once, would set that off. A partial has no line of source, so its
    tracings are counted alone.
    """
    return tf.function(functools.partial(body), **options)


def call_traced(function: Function, *arguments: Structure) -> Structure:
    """Calls a function that runs users' code, traced if its operators need that.

    In a plain `tf.Graph`, which every TFF computation has at its root, `tensor == tensor` is no
    operation but compares identities. There the function is traced outside of that graph.
    """
    if tf.compat.v1.executing_eagerly_outside_functions():
        return function(*arguments)
    specs = tf.nest.map_structure(
        lambda value: None if value is None else tf.type_spec_from_value(value), arguments
    )
    with eager_world():
        traced = tf.function(function, autograph=False)
        traced = traced.get_concrete_function(*specs)
    return traced(*arguments)
