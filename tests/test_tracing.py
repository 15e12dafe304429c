"""Functions that the package makes anew for each process or optimizer."""

import logging

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from tff_optim.core import tracing
from tff_optim.resident.graphs import imported


@pytest.fixture
def warnings():
    """What TensorFlow logs."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("tensorflow")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def made_here():
    return tracing.function(lambda x: 2 * x, autograph=False)


def test_many_functions_traced_once_are_not_called_retraced(warnings):
    for _ in range(7):
        made_here()(tf.ones(2))
    assert not warnings


def test_one_function_traced_often_is(warnings):
    function = made_here()
    for size in range(1, 8):
        function(tf.ones(size))
    assert any("triggered tf.function retracing" in warning for warning in warnings)


def test_many_computations_and_compiled_optimizers_warn_of_nothing(warnings):
    for number in range(7):
        add = tff.tensorflow.computation(lambda x: x + number, np.float32)  # noqa: B023
        function = imported.ImportedComputation(add, "/CPU:0")
        assert function([tf.constant(1.0)])[0] == 1 + number
        optimizer = tff_optim.build_optimizer(0.1 + number, jit_compile=True)
        state = optimizer.initialize([tf.TensorSpec([2])])
        optimizer.next(state, [tf.ones(2)], [tf.ones(2)])
    assert not warnings
