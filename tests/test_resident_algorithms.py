"""Every algorithm of TFF and of this package, against plain TFF: bits and numbers."""

import collections
import functools

import numpy as np
import problems
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_close, assert_equal, assert_near

import aggregators
from aggregators import rules
from tff_optim import ResidentProcess, build_keras_optimizer, simulation
from tff_optim.resident.clients.in_process import data as data_lib
from tff_optim.resident.clients.in_process import slices

LIBRARY = tff.learning.algorithms
SGD = tff.learning.optimizers.build_sgdm(0.05, momentum=0.5)
ADAM = tff.learning.optimizers.build_adam(0.1)


def rate_of_round(number):
    return tf.gather([0.1, 0.02, 0.05, 0.05], number)  # a round ahead, too


RECONSTRUCTION = {
    "loss_fn": tf.keras.losses.MeanSquaredError,
    "metrics_fn": lambda: [tf.keras.metrics.MeanAbsoluteError()],
    "reconstruction_optimizer_fn": SGD,
    "dataset_split_fn": tff.learning.models.ReconstructionModel.build_dataset_split_fn(),
}
OF_TFF = {
    "build_fed_eval": lambda f: f(problems.model_fn),
    "build_fed_kmeans": lambda f: f(2, (3,), (1, 2)),
    "build_fed_recon": lambda f: f(
        problems.reconstruction_model_fn,
        server_optimizer_fn=ADAM,
        client_optimizer_fn=SGD,
        **RECONSTRUCTION,
    ),
    "build_fed_recon_eval": lambda f: f(problems.reconstruction_model_fn, **RECONSTRUCTION),
    "build_fed_sgd": lambda f: f(problems.model_fn, ADAM),
    "build_mime_lite_with_optimizer_schedule": lambda f: f(
        problems.model_fn, rate_of_round, SGD, ADAM
    ),
    "build_unweighted_fed_avg": lambda f: f(problems.model_fn, SGD, ADAM),
    "build_unweighted_fed_prox": lambda f: f(problems.model_fn, 0.1, SGD, ADAM),
    "build_unweighted_mime_lite": lambda f: f(problems.model_fn, SGD, ADAM),
    "build_weighted_fed_avg": lambda f: f(problems.model_fn, SGD, ADAM),
    "build_weighted_fed_avg_with_optimizer_schedule": lambda f: f(
        problems.model_fn, rate_of_round, tff.learning.optimizers.build_sgdm, ADAM
    ),
    "build_weighted_fed_prox": lambda f: f(problems.model_fn, 0.1, SGD, ADAM),
    "build_weighted_mime_lite": lambda f: f(problems.model_fn, SGD, ADAM),
}
OURS = {
    "build_fed_att": lambda f: f(problems.model_fn, SGD),
    "build_fed_avg": lambda f: f(problems.model_fn, SGD, ADAM, rule=rules.jury_mean()),
    "build_fed_kl": lambda f: f(problems.model_fn, SGD, ADAM),
    "build_fed_med": lambda f: f(problems.model_fn, SGD),
    "build_fed_nova": lambda f: f(problems.model_fn, SGD, momentum=0.5),
    "build_q_fed_avg": lambda f: f(problems.model_fn, SGD, q=1.0, learning_rate=0.05),
}


class Rewritten(tff.learning.optimizers.Optimizer):
    """Steps that TFF's compiler writes in another way, which rounds to other bits."""

    def initialize(self, specs):
        del specs
        return ()

    def next(self, state, weights, gradients):
        return state, tf.nest.map_structure(
            lambda w, g: w - (g * 0.1 - g * g * 0.3) / 3.0 * 7.0, weights, gradients
        )


OTHERS = {
    # Zeroing and clipping at norms that move with the rounds.
    "robust aggregation": lambda: LIBRARY.build_weighted_fed_avg(
        problems.model_fn, SGD, ADAM, model_aggregator=tff.learning.robust_aggregator()
    ),
    "Keras optimizers, KL weights": lambda: aggregators.build_fed_kl(
        problems.model_fn,
        build_keras_optimizer(tf.keras.optimizers.SGD(0.1)),
        build_keras_optimizer(tf.keras.optimizers.Nadam(0.01)),
    ),
    "a server's step that the compiler rewrites": lambda: LIBRARY.build_weighted_fed_avg(
        problems.model_fn, SGD, Rewritten()
    ),
}
# What is no whole process, or is held against plain TFF elsewhere.
NOT_HERE = {
    "build_personalization_eval_computation",  # one computation without a state
    "build_client_work",
    "build_self_weighting_client_work",
    "build_scaffold",  # tests/test_client_places.py
}


def clients_of(name):
    clients = problems.make_clients()
    if name == "build_fed_kmeans":
        return [data.map(lambda batch: batch["x"]).unbatch() for data in clients]
    return clients


def run(process, name, rounds=3):
    """The outputs of some rounds, states as plain values."""
    materialize = getattr(process, "materialize", lambda state: state)
    state, outputs = process.initialize(), []
    for number in range(rounds):
        state, metrics = process.next(state, clients_of(name)[: 2 + number % 2])
        outputs.append((materialize(state), metrics))
    return outputs


def check_readings(resident, name, monkeypatch):
    """Batches read one by one or in one go, and batches of rows and of arrays, give the same bits."""
    rng = np.random.default_rng(1)
    sizes = {"ann": 11, "bob": 3, "eve": 0, "joe": 8}
    if name == "build_fed_kmeans":  # takes examples, which no batches are
        data = tf.data.Dataset.from_tensor_slices(rng.normal(size=(11, 3)).astype(np.float32))
        cohorts = {"one by one": [data], "in one go": [data]}
    else:
        arrays = {
            client: collections.OrderedDict(
                x=rng.normal(size=(n, 3)).astype(np.float32),
                y=rng.normal(size=(n, 2)).astype(np.float32),
            )
            for client, n in sizes.items()
        }
        clients = simulation.ClientArrays(arrays, batch_size=4, epochs=2, shuffle=True)
        cohort = clients.cohort(sizes, 1)
        cohorts = {how: list(cohort) for how in ("one by one", "in one go", "rows")}
        cohorts["arrays"] = cohort
    state = resident.initialize()
    outputs = []
    for how, given in cohorts.items():
        with monkeypatch.context() as patch:
            if how in ("one by one", "in one go"):
                patch.setattr(slices, "rows_of", lambda cohort: None)
            if how == "one by one":
                patch.setattr(data_lib, "MOST_BYTES", -1)
            after, metrics = resident.next(state, given)
        outputs.append((resident.materialize(after), metrics))
    for output in outputs[1:]:
        assert_equal(output, outputs[0])


def test_no_algorithm_is_left_out():
    public = {name for module in (LIBRARY, aggregators) for name in dir(module)}
    assert {*OF_TFF, *OURS, *NOT_HERE} == {name for name in public if name.startswith("build_")}


@functools.cache
def build(name):
    if name in OTHERS:
        return OTHERS[name]()
    module, make = (LIBRARY, OF_TFF[name]) if name in OF_TFF else (aggregators, OURS[name])
    return make(getattr(module, name))


@functools.cache
def plain(name):
    return run(build(name), name)


# What takes examples, what has candidates scored, and what the compiler rewrites.
QUICK = [
    "build_fed_kmeans",
    "build_fed_avg",
    "a server's step that the compiler rewrites",
]


@pytest.mark.parametrize("name", selection.params([*OF_TFF, *OURS, *OTHERS], QUICK))
def test_a_worker_gives_plain_tffs_bits_and_the_python_process_its_numbers(name):
    for check, place in ((assert_equal, {"workers": 1}), (assert_close, {"device": "CPU:1"})):
        with ResidentProcess(build(name), **place) as resident:
            for ours, theirs in zip(run(resident, name), plain(name), strict=True):
                check(ours, theirs)


@pytest.mark.parametrize(
    "name",
    selection.params([*OF_TFF, *OURS, *OTHERS], ["build_fed_kmeans", "build_fed_avg"]),
)
def test_batches_give_the_same_bits_however_they_are_read(name, monkeypatch):
    with ResidentProcess(build(name), device="CPU:1", clients_at_once=1) as resident:
        check_readings(resident, name, monkeypatch)


@pytest.mark.parametrize(
    "name", selection.params([*OF_TFF, *OURS, *OTHERS], ["build_fed_kmeans", "build_fed_eval"])
)
def test_clients_side_by_side_give_plain_tffs_numbers(name, monkeypatch):
    # Adam squares what is left of gradients that all but cancel out.
    rounding = 5e-6 if name == "build_fed_recon" else 2e-6
    with ResidentProcess(build(name), device="CPU:1", vectorize=True) as resident:
        for ours, theirs in zip(run(resident, name), plain(name), strict=True):
            assert_near(ours, theirs, rounding)
        check_readings(resident, name, monkeypatch)
