"""What the tests of `tff_optim.resident` share: a tiny process, cohorts, and comparisons."""

import functools
import os
import time

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

_SPEC = (tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None, 1], tf.float32))


def model_fn():
    layers = [
        tf.keras.layers.Dense(n, kernel_initializer=tf.keras.initializers.GlorotUniform(seed=n))
        for n in (2, 1)
    ]
    model = tf.keras.Sequential([tf.keras.layers.InputLayer(input_shape=(3,)), *layers])
    return tff.learning.models.from_keras_model(
        model, loss=tf.keras.losses.MeanSquaredError(), input_spec=_SPEC
    )


@functools.cache
def functional_model():
    return tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(3,))]),
        tf.keras.losses.MeanSquaredError(),
        _SPEC,
    )


@functools.cache
def process():
    return tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.05),
        server_optimizer_fn=tff.learning.optimizers.build_adam(0.1, beta_1=0.8),
    )


def cohort(num_clients, seed, batches=2):
    rng = np.random.default_rng(seed)

    def draw(size):
        return rng.normal(size=(3 * batches, size)).astype(np.float32)

    return [
        tf.data.Dataset.from_tensor_slices((draw(3), draw(1))).batch(3) for _ in range(num_clients)
    ]


# A cohort that stays, shrinks, grows, and is met again.
SIZES = (3, 3, 2, 5, 3)


@functools.cache
def cohorts():
    return tuple(tuple(cohort(n, seed)) for seed, n in enumerate(SIZES))


@functools.cache
def plain_run():
    """States and metrics of the plain process, the truth of most tests."""
    state = process().initialize()
    outputs = [(state, None)]
    for clients in cohorts():
        state, metrics = process().next(state, list(clients))
        outputs.append((state, metrics))
    return outputs


def assert_equal(actual, expected):
    """Bit-identical values of the same Python types in the same containers."""
    tf.nest.assert_same_structure(actual, expected)
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        assert type(a) is type(e), (a, e)
        np.testing.assert_array_equal(a, e)
        assert np.asarray(a).dtype == np.asarray(e).dtype


def assert_close(actual, expected):
    tf.nest.assert_same_structure(actual, expected)
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-7)


def assert_near(actual, expected, rounding=2e-6):
    """Equal to rounding, in units of the largest number of each tensor."""
    tf.nest.assert_same_structure(actual, expected)
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if e.size and e.dtype.kind == "f":
            largest = np.nanmax(np.abs(e), initial=0.0)
            np.testing.assert_allclose(a, e, rtol=0, atol=rounding * largest + 1e-30)
        else:
            np.testing.assert_array_equal(a, e)


def connections_of(resident):
    """The connections to the workers of a `ResidentProcess`, started if need be."""
    workers = resident._clients._workers
    return [workers.connection(i) for i in range(len(workers))]


def is_running(pid):
    """Whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} seconds"
        time.sleep(0.02)


def children_of(pid):
    """Process ids whose parent or session is `pid`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as f:
                    fields = f.read().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if pid in (int(fields[1]), int(fields[3])) and fields[0] != "Z":
                found.append(int(entry))
    return found
