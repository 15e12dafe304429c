"""Traces functions that run other people's code, in TFF's computations as under eager execution."""

import contextlib
import functools
from collections.abc import Iterator

import tensorflow as tf

from tff_optim.core.types import Function, GraphFunction, Structure, Value

_PACKAGE = __name__.partition(".")[0]
_autograph = tf.__internal__.autograph
# Where this module is imported nothing forbids the conversion; around the code to convert it is off.
_CONTEXT = _autograph.control_status_ctx()


def converted(function: Function) -> Function:
    """A function of a user as AutoGraph converts it: `if tensor:` is an operation in it.

    All that the function calls is converted with it, but for Keras and TensorFlow. The code of this
    package around it need not be converted, which takes seconds when a process is built first.

    Args:
      function: What a user has written, a method of a subclass for example, or what this package has.

    Returns:
      A function of the same arguments: the same one where it is of this package, or where there is no
      graph.
    """
    module = str(getattr(function, "__module__", None))
    if tf.executing_eagerly() or module.partition(".")[0] == _PACKAGE:
        return function

    def call(*arguments: Value, **named: Value) -> Value:
        return function(*arguments, **named)

    return _autograph.tf_convert(call, _CONTEXT)


@contextlib.contextmanager
def eager_world() -> Iterator[None]:
    """Steps out of the graph that is built: that of a TFF computation or of a `tf.function`."""
    if tf.executing_eagerly():
        yield
    else:
        # A new graph, since TFF and functions look after every variable that is made while theirs is
        # current.
        with tf.Graph().as_default(), tf.__internal__.eager_context.eager_mode():
            yield


@contextlib.contextmanager
def scratch_graph() -> Iterator[tf.Graph]:
    """A graph that is thrown away."""
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
    """Calls a function that runs other people's code, traced where its operators need that.

    Under a plain `tf.Graph`, which every TFF computation has at its root, `tensor == tensor` is not
    an operation but compares identities. So there the function is traced outside of that graph.
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
