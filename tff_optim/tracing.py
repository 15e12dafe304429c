"""Traces functions that run Keras code, in TFF's computations as under eager execution."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


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


def function(body: Callable[..., Any], **options: Any) -> Any:
    """`tf.function(body, **options)`, for code of which many functions are made.

    TensorFlow counts tracings by the place in the source and warns of retracing where it has seen
    many. A function for each process, each traced once, would be such a place. A partial has no place:
    it is counted for itself, and warned of if it is traced again and again.
    """
    return tf.function(functools.partial(body), **options)


def call_traced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that runs Keras code, traced where that code means what its author meant.

    Under a plain `tf.Graph`, which every TFF computation has at its root, `tensor == tensor` is not
    an operation but compares identities. So there the function is traced outside of that graph.
    """
    if tf.compat.v1.executing_eagerly_outside_functions():
        return function(*arguments)
    specs = tf.nest.map_structure(tf.type_spec_from_value, arguments)
    with eager_world():
        traced = tf.function(function, autograph=False)
        traced = traced.get_concrete_function(*specs)
    return traced(*arguments)
