"""The noise of clipped examples: its size, and what it differs by, with a seed and without."""

import asyncio
import collections
import functools
import math

import numpy as np
import pytest
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
import tff_optim
from aggregators import ClientStates, ExampleClipping
from aggregators.client.example_clipping import clip_examples

SIZE = 5000
STDDEV = 1.5 * 2.0 / 10  # noise multiplier times norm over expected size
UNIFORM = tff.learning.ClientWeighting.UNIFORM
SGD = tff.learning.optimizers.build_sgdm(1.0)


@functools.cache
def model():
    spec = {"x": tf.TensorSpec([None, 1]), "y": tf.TensorSpec([None, 1])}
    return tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential(
            [
                tf.keras.layers.Dense(
                    SIZE, input_shape=(1,), use_bias=False, kernel_initializer="zeros"
                )
            ]
        ),
        tf.keras.losses.MeanSquaredError(),
        collections.OrderedDict(spec),
    )


def build(seed):
    return aggregators.build_fed_avg(
        model(),
        SGD,
        client_weighting=UNIFORM,
        example_clipping=ExampleClipping(2.0, 1.5, 10, seed=seed),
    )


with_seed = functools.cache(build)


def client(label, batches=1):
    """Data without a gradient, so that the update is noise; `label` tells clients apart."""
    x = np.zeros((3, 1), np.float32)
    batch = collections.OrderedDict(x=x, y=np.full((3, 1), label, np.float32))
    return tf.data.Dataset.from_tensors(batch).repeat(batches)


def weights(process, state):
    return process.get_model_weights(state).trainable[0].ravel()


def play(process, state, data):
    """The state after a round, and what the round has added."""
    after = process.next(state, data).state
    return after, weights(process, after) - weights(process, state)


def assert_normal(noise, stddev):
    """Mean and variance within five standard deviations of those of normal numbers."""
    size = np.size(noise)
    assert abs(np.mean(noise)) <= 5 * stddev / math.sqrt(size)
    assert abs(np.var(noise) / stddev**2 - 1) <= 5 * math.sqrt(2 / size)  # chi-square's
    # The fourth moment, by which numbers of the same variance that are not normal would be known.
    assert abs(np.mean((noise / stddev) ** 4) - 3) <= 5 * math.sqrt(96 / size)


def assert_unrelated(*noises):
    assert np.abs(np.corrcoef(noises) - np.eye(len(noises))).max() <= 5 / math.sqrt(SIZE)


@pytest.mark.parametrize("clients", [1, 4])
def test_without_a_seed_it_is_new_for_each_client_and_round(clients):
    """The mean over clients has `z C / B / sqrt(clients)`, also where clients are alike."""
    process, data = with_seed(None), [client(0)] * clients
    state, noises = process.initialize(), []
    tf.random.set_seed(1)  # must not tie clients together
    for _ in range(3):
        state, noise = play(process, state, data)
        noises.append(noise)
    # A restored state never brings back the noise of a round before, nor twice the same.
    noises += [play(process, state, data)[1] for _ in range(2)]
    for noise in noises:
        assert_normal(noise, STDDEV / math.sqrt(clients))
    assert_unrelated(*noises)


@pytest.mark.slow
def test_without_a_seed_it_is_new_for_each_client_side_by_side():
    with tff_optim.ResidentProcess(with_seed(None), device="CPU:0", vectorize=True) as process:
        state, one = play(process, process.initialize(), [client(0)] * 4)
        _, other = play(process, state, [client(0)] * 4)
    for noise in (one, other):
        assert_normal(noise, STDDEV / math.sqrt(4))
    assert_unrelated(one, other)


def test_with_a_seed_it_differs_by_client_round_and_step():
    process = with_seed(7)
    start = process.initialize()
    noises = [play(process, start, [client(label)])[1] for label in range(3)]
    second, first = play(process, start, [client(0)])
    noises.append(play(process, second, [client(0)])[1])
    noises.append(play(with_seed(8), start, [client(0)])[1])
    for noise in noises:
        assert_normal(noise, STDDEV)
    assert_unrelated(*noises)
    np.testing.assert_array_equal(first, noises[0])  # the same once more
    # Two steps on one batch: noise of its own for each.
    assert_normal(play(process, start, [client(0, batches=2)])[1], STDDEV * math.sqrt(2))
    # The mean of two clients, each with its own.
    both = play(process, start, [client(0), client(1)])[1]
    np.testing.assert_allclose(both, (noises[0] + noises[1]) / 2, atol=1e-6)


def test_with_a_seed_it_differs_by_the_bits_of_the_batch_in_every_part():
    def one(example):
        del example
        return [tf.zeros([SIZE]), tf.zeros([SIZE])], tf.constant(0.0)

    @tf.function
    def draw(batch, *position):
        scheme = ExampleClipping(2.0, 1.5, 10, seed=3)
        parts = [tf.zeros([SIZE])] * 2
        return clip_examples(scheme, batch, parts, one, noise_position=position).gradients

    batch = {"text": tf.constant(["a", "b"]), "z": tf.constant([[True], [False]])}
    noises = [*draw(batch), *draw(batch, 1), *draw(batch, 1, 0), *draw(batch, 0, 1)]
    for other in (
        {**batch, "text": tf.constant(["a", "c"])},
        {**batch, "z": tf.constant([[True], [True]])},
        {name: part[:1] for name, part in batch.items()},
        {name: part[:0] for name, part in batch.items()},
    ):
        noises += draw(other)
    assert_unrelated(*noises)


def test_clients_that_are_alike_are_told_apart_by_the_store_of_their_states():
    """Without one, their noise is the same, and does not shrink in the mean: as documented."""
    process = with_seed(7)
    assert_normal(play(process, process.initialize(), [client(0)] * 4)[1], STDDEV)
    process = aggregators.build_scaffold(
        model(), SGD, num_clients=4, example_clipping=ExampleClipping(2.0, 1.5, 10, seed=7)
    )
    start = process.initialize()
    with ClientStates(list("abcd")) as states:
        with states.cohort(list("abcd"), [client(0)] * 4) as cohort:
            state = process.next(start, cohort).state
        assert_normal(weights(process, state), STDDEV / 2)
        own = [states.get(one)["control/0"].ravel() for one in "abcd"]
    assert_unrelated(*own)


def test_with_a_seed_a_restored_run_goes_on_as_the_undisturbed_one(tmp_path):
    data = [client(label, batches=2) for label in range(3)]
    process = with_seed(7)
    state, undisturbed = process.initialize(), []
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    for number in range(4):
        if number == 2:
            asyncio.run(manager.save(state, 2))
        state, noise = play(process, state, data)
        undisturbed.append(noise)
    assert_unrelated(*undisturbed)
    process = build(7)
    for _ in range(2):  # two restores, in a process built anew
        state = asyncio.run(manager.load(2, process.initialize()))
        for expected in undisturbed[2:]:
            state, noise = play(process, state, data)
            np.testing.assert_array_equal(noise, expected)


@pytest.mark.parametrize("runtime", selection.params([*runtimes.IN_PIECES], ["two-workers"]))
def test_with_a_seed_pieces_of_a_cohort_draw_the_same(runtime):
    data = [client(label) for label in range(4)]
    process = with_seed(7)
    state, noises = process.initialize(), []
    for _ in range(2):
        state, noise = play(process, state, data)
        noises.append(noise)
    with runtimes.IN_PIECES[runtime](2):
        state = process.initialize()
        for expected in noises:
            state, noise = play(process, state, data)
            np.testing.assert_allclose(noise, expected, atol=1e-6)


PLACES = {
    "two": [{"clients_at_once": 1}, {"workers": 2}],
    "four": [{}, {"clients_at_once": 1}, {"workers": 1}, {"workers": 2}],
}


@pytest.mark.parametrize("places", selection.params(PLACES, ["two"]))
def test_with_a_seed_every_place_draws_the_same_and_goes_on_in_another(places):
    data = [client(label) for label in range(3)]
    process = with_seed(7)
    state, expected = process.initialize(), []
    for _ in range(3):
        state, noise = play(process, state, data)
        expected.append(noise)
    moved = process.initialize()
    for number, place in enumerate(places):
        with tff_optim.ResidentProcess(process, **place) as resident:
            state = resident.initialize()
            for noise in expected[:2]:
                state, found = play(resident, state, data)
                np.testing.assert_allclose(found, noise, atol=2e-6)
            if number < 3:  # one round in each place, of one run
                state, found = play(resident, resident.restore(moved), data)
                np.testing.assert_allclose(found, expected[number], atol=2e-6)
                moved = resident.materialize(state)


@pytest.mark.parametrize(
    "place", selection.params({"here": {}, "a worker": {"workers": 1}}, ["a worker"])
)
def test_without_a_seed_every_place_draws_anew(place):
    process, data = with_seed(None), [client(0)] * 4
    with tff_optim.ResidentProcess(process, **place) as resident:
        start, noises = resident.initialize(), []
        for _ in range(3):
            _, noise = play(resident, start, data)
            assert_normal(noise, STDDEV / 2)
            noises.append(noise)
        assert_unrelated(*noises)
