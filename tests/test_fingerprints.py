"""Fingerprints of computations: equal for what is built again, other for whatever changes a number."""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import fingerprint_cases
import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from fingerprint_cases import ALGORITHMS, of_process
from problems import INPUT_SPEC
from test_optimizer_laws import CASES

import tff_optim
from tff_optim.resident.graphs import fingerprints

ROOT = pathlib.Path(__file__).parent.parent
VECTOR = tff.TensorType(np.float32, [2])


OPTIMIZERS = {name: case.make for name, case in CASES.items()}
ALL = [*OPTIMIZERS, *ALGORITHMS]
QUICK = ["build_scaffold"]

# Builds in another order, so that counters in names differ, and with another order of sets.
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorflow_federated as tff
tff.test.set_no_default_context()
from {module} import found_of
with open(sys.argv[2], "w") as file:
    json.dump({{name: found_of(name) for name in sys.argv[:2:-1]}}, file)
"""


def found_of(name):
    if name not in OPTIMIZERS:
        return fingerprint_cases.found_of(name)
    both = tff_optim.build_optimizer_computations(OPTIMIZERS[name](), [VECTOR, VECTOR])
    initialize, step = map(fingerprints.of_computation, both)
    return {"initialize": initialize, "next": step}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Fingerprints that another program has found, those of all quick names at once."""
    path = tmp_path_factory.mktemp("fingerprints") / "found.json"

    @functools.cache
    def run(quick):
        # The module with the cases of all optimizers takes long to import.
        code = CHILD.format(module="fingerprint_cases" if quick else "test_fingerprints")
        names = [name for name in ALL if (name in QUICK) is quick]
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "tests"), str(path), *names],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        )
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("name", selection.params(ALL, QUICK))
def test_what_is_built_in_two_programs_is_the_same(name, elsewhere):
    assert found_of(name) == elsewhere(name in QUICK)[name]


@pytest.mark.slow
def test_no_two_are_the_same(elsewhere):
    found = elsewhere(True) | elsewhere(False)
    assert len({one["next"] for one in found.values()}) == len(found)


def add_one(x):
    return x + 1.0


def with_a_variable(first=1.0):
    def compute(x):
        variable = tf.Variable(first)
        with tf.control_dependencies([variable.assign_add(x[0])]):
            return variable.read_value()

    return compute


def of_two_variables(swapped):
    def compute(x):
        first, second = tf.Variable(1.0), tf.Variable(1.0)
        one, other = (second, first) if swapped else (first, second)
        with tf.control_dependencies([one.assign(x[0]), other.assign(x[1])]):
            return first.read_value() - second.read_value()

    return compute


def called(step):
    return lambda x: tf.function(step)(x)


def looped(times, step=add_one):
    return lambda x: tf.while_loop(lambda i, y: i < times, lambda i, y: (i + 1, step(y)), (0, x))[1]


def reduced(step):
    return lambda x: tf.data.Dataset.from_tensors(x).repeat(3).reduce(x, lambda a, b: step(a) + b)


def drawn_once(x):
    noise = tf.random.uniform([2])
    return x + noise - noise


def drawn_twice(x):
    return x + tf.random.uniform([2]) - tf.random.uniform([2])


def checked(rule):
    def compute(x):
        with tf.control_dependencies([rule(x, tf.zeros_like(x))]):
            return x + 1.0

    return compute


DIFFERENT = {
    "the operation": (add_one, lambda x: x - 1.0),
    "a constant": (add_one, lambda x: x + 2.0),
    "a large constant": (
        lambda x: tf.reduce_sum(np.arange(1000.0, dtype=np.float32)) + x,
        lambda x: tf.reduce_sum(np.arange(1000.0, dtype=np.float32)[::-1].copy()) + x,
    ),
    "an attribute": (
        lambda x: tf.linalg.matmul(x[None], x[None], transpose_a=True),
        lambda x: tf.linalg.matmul(x[None], x[None], transpose_b=True),
    ),
    "the order of inputs": (lambda x: x[0] - x[1], lambda x: x[1] - x[0]),
    "which output": (lambda x: tf.unstack(x)[0], lambda x: tf.unstack(x)[1]),
    "the order of results": (lambda x: (x, x + 1.0), lambda x: (x + 1.0, x)),
    "a called function": (called(add_one), called(lambda x: x + 2.0)),
    "what a loop does": (looped(3), looped(3, lambda x: x + 2.0)),
    "how often a loop runs": (looped(3), looped(4)),
    "what is done to data": (reduced(add_one), reduced(lambda x: x + 2.0)),
    "the first value of a variable": (with_a_variable(), with_a_variable(2.0)),
    "which variable": (of_two_variables(False), of_two_variables(True)),
    "how often is drawn": (drawn_once, drawn_twice),
    "a seed": (
        lambda x: x + tf.random.stateless_uniform([2], seed=[1, 0]),
        lambda x: x + tf.random.stateless_uniform([2], seed=[2, 0]),
    ),
    "the seed of an operation": (
        lambda x: x + tf.random.uniform([2], seed=1),
        lambda x: x + tf.random.uniform([2], seed=2),
    ),
    "a check": (checked(tf.debugging.assert_greater), checked(tf.debugging.assert_less)),
    "a side effect": (checked(tf.debugging.assert_greater), add_one),
}


def fingerprint(function, argument=VECTOR):
    return fingerprints.of_computation(tff.tensorflow.computation(function, argument))


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_changes_a_number_changes_the_fingerprint(name):
    one, other = DIFFERENT[name]
    for function in (one, other):
        assert fingerprint(function) == fingerprint(renamed(function))
    assert fingerprint(one) != fingerprint(other)


def renamed(function):
    """The same with names that begin with others, and with other counters in them."""

    def compute(x):
        tf.constant(3.0, name="what_nothing_uses")
        tf.function(add_one)(x)
        with tf.name_scope("elsewhere"):
            return function(x)

    return compute


def test_constants_may_be_left_out():
    def of(function):
        return fingerprints.of_results(
            tff.tensorflow.computation(function, VECTOR), constants=False
        )

    assert of(add_one) == of(lambda x: x + 2.0)
    assert of(called(add_one)) == of(called(lambda x: x + 2.0))
    assert of(add_one) != of(lambda x: x * 2.0)


def test_results_are_told_apart():
    both = tff.tensorflow.computation(lambda x: (x + 1.0, x * 2.0), VECTOR)
    other = tff.tensorflow.computation(lambda x: (x + 1.0, x * 3.0), VECTOR)
    assert fingerprints.of_results(both, [0]) == fingerprints.of_results(other, [0])
    assert fingerprints.of_results(both, [1]) != fingerprints.of_results(other, [1])


def placed(mean=tff.federated_mean, function=add_one, name="x"):
    """A computation whose parts have other names each time."""
    step = tff.tensorflow.computation(function, VECTOR)

    @tff.federated_computation(tff.FederatedType(VECTOR, tff.CLIENTS))
    def compute(values):
        first = tff.federated_map(step, values)
        second = tff.federated_map(step, first)
        return collections.OrderedDict([(name, mean(second)), ("sum", tff.federated_sum(first))])

    return fingerprints.of_computation(compute)


def test_what_is_done_between_clients_and_server_counts():
    found = [
        placed(),
        placed(mean=tff.federated_sum),
        placed(function=lambda x: x + 2.0),
        placed(name="y"),
    ]
    assert len(set(found)) == len(found)
    assert placed() == found[0]


def test_which_argument_goes_where_counts():
    kinds = [tff.FederatedType(VECTOR, tff.CLIENTS)] * 2

    def of(choose):
        return fingerprints.of_computation(tff.federated_computation(choose, *kinds))

    choices = [
        lambda a, b: tff.federated_sum(a),
        lambda a, b: tff.federated_sum(b),
        lambda a, b: (tff.federated_sum(a), tff.federated_mean(b)),
        lambda a, b: (tff.federated_sum(b), tff.federated_mean(a)),
    ]
    assert len({of(choose) for choose in choices}) == len(choices)
    assert of(choices[0]) == of(lambda a, b: tff.federated_sum(a))


def build_initialize(functional, scale=1.0, initializer="glorot_uniform"):
    def keras_model():
        dense = tf.keras.layers.Dense(2, input_shape=(3,), kernel_initializer=initializer)
        return tf.keras.Sequential([dense, tf.keras.layers.Lambda(lambda x: scale * x)])

    loss = tf.keras.losses.MeanSquaredError()
    if functional:
        model = tff.learning.models.functional_model_from_keras(keras_model, loss, INPUT_SPEC)
    else:

        def model():
            return tff.learning.models.from_keras_model(keras_model(), loss, INPUT_SPEC)

    return tff.learning.algorithms.build_weighted_fed_avg(
        model, tff.learning.optimizers.build_sgdm(0.1)
    )


@pytest.mark.parametrize("functional", [False, True])
def test_initial_weights_that_keras_draws_anew_do_not_count(functional):
    one, same = (of_process(build_initialize(functional)) for _ in range(2))
    assert one == same
    other = of_process(build_initialize(functional, scale=2.0))
    assert one["initialize"] == other["initialize"]
    assert one["next"] != other["next"]
