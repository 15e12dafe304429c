"""Data that a process does not take: the message names the client, what was found, what to do."""

import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import ResidentProcess, simulation
from tff_optim.client_data import check_client_data

X, Y = np.ones([4, 2], np.float32), np.ones([4, 1], np.float32)


def named(x=X, y=Y):
    return tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y))


BAD = {
    "not batched": (named(), r"'x' has 1 dimension and not 2: batch it, `dataset.batch\(32\)`"),
    "batched twice": (named().batch(2).batch(2), "'x' has 3 dimensions and not 2: is it batched t"),
    "flat": (named(X[:, :1, None]).batch(2).batch(2), "4 dimensions and not 2: reshape it"),
    "float64": (
        named(X.astype(np.float64)).batch(2),
        r"'x' is float64 and not float32: cast it, .* `tf.cast\(..., tf.float32\)`",
    ),
    "int labels": (named(y=Y.astype(np.int64)).batch(2), "'y' is int64 and not float32"),
    "wide": (named(np.ones([4, 3], np.float32)).batch(2), r"shape \(None, 3\) and not \(None, 2\)"),
    "other names": (
        tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=X, z=Y)).batch(2),
        r"lacks \['y'\] and has \['z'\] besides",
    ),
    "list of examples": ([collections.OrderedDict(x=X[0], y=Y[0])], "1 dimension and not 2"),
    "a pair of arrays": ((X, Y), r"'x', 'y'\] together; the first is one array of shape \(4, 2\)"),
    "no data set": (7, "found int, 7. Give a `tf.data.Dataset`"),
}
ELEMENT = tff.to_type(
    collections.OrderedDict(
        x=tff.TensorType(np.float32, [None, 2]), y=tff.TensorType(np.float32, [None, 1])
    )
)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name):
    data, message = BAD[name]
    with pytest.raises(TypeError, match=message) as error:
        check_client_data(data, tff.SequenceType(ELEMENT), "ann")
    assert str(error.value).startswith("The data of client 'ann' must be")


@pytest.mark.parametrize(
    "data",
    [
        named().batch(2),
        named().batch(2, drop_remainder=True),
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(2),
        [],
        [collections.OrderedDict(x=X, y=Y)],
        [(X.tolist(), Y.tolist())],
    ],
    ids=["named", "fixed size", "tuple", "none", "list", "python numbers"],
)
def test_what_tff_takes_is_taken(data):
    check_client_data(data, tff.SequenceType(ELEMENT), "ann")

    @tff.tensorflow.computation(tff.SequenceType(ELEMENT))
    def count(dataset):
        return dataset.reduce(0, lambda total, batch: total + tf.shape(batch["x"])[0])

    assert count(data) in (0, 4)


def test_a_size_that_the_model_fixes():
    fixed = tff.TensorType(np.float32, [2, 2])
    data = tf.data.Dataset.from_tensor_slices(X)
    check_client_data(data.batch(2, drop_remainder=True), tff.SequenceType(fixed), 1)
    with pytest.raises(TypeError, match=r"client 1 .*drop_remainder=True"):
        check_client_data(data.batch(2), tff.SequenceType(fixed), 1)


def test_what_is_no_sequence_is_left_to_tff():
    check_client_data("anything", tff.TensorType(np.float32), 0)


@pytest.fixture(scope="module")
def process():
    model = tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
        tf.keras.losses.MeanSquaredError(),
        collections.OrderedDict(x=tf.TensorSpec([None, 2]), y=tf.TensorSpec([None, 1])),
    )
    return tff.learning.algorithms.build_weighted_fed_avg(
        model, tff.learning.optimizers.build_sgdm(0.1)
    )


def test_the_loop_names_the_client_by_id(process):
    clients = {"ann": named().batch(2), "bob": named()}
    with pytest.raises(TypeError, match=r"The data of client 'bob' must be .*batch it"):
        simulation.run(process, clients, rounds=1, clients_per_round=2)


@pytest.mark.parametrize("device", [None, "CPU:0"])
def test_a_resident_process_names_the_client_by_position_and_goes_on(process, device):
    good, bad = named().batch(2), named(X.astype(np.float64)).batch(2)
    with ResidentProcess(process, device=device) as resident:
        state = resident.initialize()
        with pytest.raises(TypeError, match=r"The data of client 1 must be .*float64"):
            resident.next(state, [good, bad])
        resident.next(state, [good, good])
