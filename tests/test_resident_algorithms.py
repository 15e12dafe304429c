"""Every algorithm of TFF in the Python process against plain TFF."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_equal, cohorts, model_fn

import aggregators
from tff_optim import ResidentProcess, build_keras_optimizer

SGD = tff.learning.optimizers.build_sgdm(0.05, momentum=0.5)
ADAM = tff.learning.optimizers.build_adam(0.05)
algorithms = tff.learning.algorithms


def functional_model():
    layers = [
        tf.keras.layers.Dense(n, kernel_initializer=tf.keras.initializers.GlorotUniform(seed=n))
        for n in (2, 1)
    ]
    return tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([tf.keras.layers.InputLayer(input_shape=(3,)), *layers]),
        tf.keras.losses.MeanSquaredError(),
        model_fn().input_spec,
    )


def reconstruction_model_fn():
    inputs = tf.keras.Input([3])
    first = tf.keras.layers.Dense(2, kernel_initializer="ones", name="everybody")
    last = tf.keras.layers.Dense(1, kernel_initializer="ones", name="own")
    keras_model = tf.keras.Model(inputs, last(first(inputs)))
    return tff.learning.models.ReconstructionModel.from_keras_model_and_layers(
        keras_model=keras_model,
        global_layers=[first],
        local_layers=[last],
        input_spec=model_fn().input_spec,
    )


ALGORITHMS = {
    "build_fed_eval": lambda: algorithms.build_fed_eval(model_fn),
    "build_fed_kmeans": lambda: algorithms.build_fed_kmeans(2, (3,), random_seed=(1, 2)),
    "build_fed_recon": lambda: algorithms.build_fed_recon(
        reconstruction_model_fn,
        loss_fn=tf.keras.losses.MeanSquaredError,
        client_optimizer_fn=SGD,
        server_optimizer_fn=ADAM,
        reconstruction_optimizer_fn=SGD,
    ),
    "build_fed_recon_eval": lambda: algorithms.build_fed_recon_eval(
        reconstruction_model_fn,
        loss_fn=tf.keras.losses.MeanSquaredError,
        reconstruction_optimizer_fn=SGD,
    ),
    "build_fed_sgd": lambda: algorithms.build_fed_sgd(functional_model(), ADAM),
    "build_mime_lite_with_optimizer_schedule": lambda: (
        algorithms.build_mime_lite_with_optimizer_schedule(
            model_fn, lambda r: 0.1 / (tf.cast(r, tf.float32) + 1.0), SGD, ADAM
        )
    ),
    "build_unweighted_fed_avg": lambda: algorithms.build_unweighted_fed_avg(
        functional_model(), SGD, ADAM, metrics_aggregator=tff.learning.metrics.finalize_then_sample
    ),
    "build_unweighted_fed_prox": lambda: algorithms.build_unweighted_fed_prox(
        model_fn, 0.1, SGD, ADAM
    ),
    "build_unweighted_mime_lite": lambda: algorithms.build_unweighted_mime_lite(
        functional_model(), SGD, ADAM
    ),
    "build_weighted_fed_avg": lambda: algorithms.build_weighted_fed_avg(
        model_fn,
        SGD,
        ADAM,
        model_aggregator=tff.learning.robust_aggregator(),
        loop_implementation=tff.learning.LoopImplementation.DATASET_ITERATOR,
    ),
    "build_weighted_fed_avg_with_optimizer_schedule": lambda: (
        algorithms.build_weighted_fed_avg_with_optimizer_schedule(
            model_fn, lambda r: 0.1 / (tf.cast(r, tf.float32) + 1.0), SGD, ADAM
        )
    ),
    "build_weighted_fed_prox": lambda: algorithms.build_weighted_fed_prox(
        functional_model(), 0.1, SGD, ADAM
    ),
    "build_weighted_mime_lite": lambda: algorithms.build_weighted_mime_lite(model_fn, SGD, ADAM),
    "build_fed_kl, Keras optimizers": lambda: aggregators.build_fed_kl(
        model_fn,
        build_keras_optimizer(tf.keras.optimizers.SGD(0.1)),
        build_keras_optimizer(tf.keras.optimizers.Nadam(0.01)),
    ),
    "build_fed_med": lambda: aggregators.build_fed_med(model_fn, SGD, ADAM),
}


def test_every_algorithm_is_here():
    named = {
        name
        for name in dir(algorithms)
        if name.startswith("build_") and name != "build_personalization_eval_computation"
    }  # which is no process
    assert named == {name for name in ALGORITHMS if name in dir(algorithms)}


def data_of(name, clients):
    if name == "build_fed_kmeans":
        return [client.map(lambda x, y: x).unbatch() for client in clients]
    return list(clients)


def assert_near(actual, expected, rtol=2e-5, atol=2e-6):
    tf.nest.assert_same_structure(actual, expected)
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        assert type(a) is type(e), (a, e)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_gives_plain_tffs_numbers(name):
    plain_process = ALGORITHMS[name]()
    with ResidentProcess(plain_process, device="CPU:1", clients_per_step=2) as resident:
        plain = plain_process.initialize()
        state = resident.restore(plain)
        for clients in cohorts()[1:4]:
            data = data_of(name, clients)
            state, metrics = resident.next(state, data)
            plain, plain_metrics = plain_process.next(plain, data)
            assert_near(metrics, plain_metrics)
            assert_near(resident.materialize(state), plain)
        assert_equal(
            resident.get_hparams(state), plain_process.get_hparams(resident.materialize(state))
        )
