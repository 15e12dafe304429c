"""Weights on the clients: client work that weighs itself, under TFF's own aggregators."""

import federated_twin as twin
import numpy as np
import pytest
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff
from aggregation_twins import kl, l2
from nearness import assert_near
from problems import model_fn

import aggregators
from aggregators import rules, scores, weighting

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
BY_EXAMPLES = tff.learning.ClientWeighting.NUM_EXAMPLES


def plain_work(model):
    if callable(model):
        return tff.learning.templates.build_model_delta_client_work(model, SGD, BY_EXAMPLES)
    return tff.learning.templates.build_functional_model_delta_client_work(
        model=model, optimizer=SGD, client_weighting=BY_EXAMPLES
    )


def run(process, cohorts):
    state, outputs = process.initialize(), []
    for data in cohorts:
        outputs.append(process.next(state, twin.datasets(data)))
        state = outputs[-1].state
    return process.get_model_weights(state).trainable, outputs


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", selection.params(["variable", "functional"], ["functional"]))
def test_kl_weights_on_the_clients_equal_numpy(kind):
    model = model_fn if kind == "variable" else twin.functional_model()
    work = aggregators.build_self_weighting_client_work(
        plain_work(model), scores.kl_divergence, weighting.softmax(0.5, decay=0.0)
    )
    weights, outputs = run(aggregators.compose_fed_avg(model, work), [DATA] * 3)
    combine = twin.adaptive(kl, lambda r: np.exp(-r / 0.5), groups=twin.MODEL, keep=0.0)
    close(weights, twin.simulate(3, DATA, combine))
    measured = outputs[2].metrics["client_work"]
    assert set(measured) == {"train", "weighting"}
    assert measured["weighting"]["clients"] == len(DATA)
    assert measured["weighting"]["non_finite_clients"] == 0
    assert 1.0 < measured["weighting"]["effective_clients"] < len(DATA)


def test_the_clients_weight_does_without_examples_and_means_scores_over_layers():
    work = aggregators.build_self_weighting_client_work(
        plain_work(model_fn),
        scores.l2_distance,
        weighting.softmax(2.0, prefer="far", scale=0.1, times_examples=False),
        layers="tensor",
    )
    weights, _ = run(aggregators.compose_fed_avg(model_fn, work), [DATA] * 2)

    def combine(weights, clients, memory):
        distances = [
            np.mean([l2([w], [t]) for w, t in zip(weights, c["trained"], strict=True)])
            for c in clients
        ]
        raw = np.exp(np.array(distances)[:, None] / 0.1 / 2.0)
        return twin.twins.weighted_mean([c["delta"] for c in clients], raw, twin.MODEL)

    close(weights, twin.simulate(2, DATA, combine))


@pytest.fixture(scope="module")
def guarded():
    return aggregators.compose_fed_avg(
        model_fn,
        aggregators.build_self_weighting_client_work(
            plain_work(model_fn),
            scores.kl_divergence,
            weighting.softmax(bound=9.0),
            sample_size=2,
        ),
    )


def test_clients_that_are_not_finite_are_counted_and_empty_ones_are_not(guarded):
    bad = (np.full_like(DATA[0][0], np.nan), DATA[0][1])
    empty = tuple(array[:0] for array in DATA[0])
    clean, clean_outputs = run(guarded, [DATA, DATA])
    dirty, dirty_outputs = run(guarded, [[bad, *DATA, empty], [*DATA, bad, bad]])
    close(dirty, clean, 1e-6)
    found = [o.metrics["client_work"]["weighting"] for o in dirty_outputs]
    assert [int(m["non_finite_clients"]) for m in found] == [1, 2]
    assert [int(m["clients"]) for m in found] == [len(DATA)] * 2
    assert [int(m["zero_weight_clients"]) for m in found] == [1, 0]
    assert [int(m["sample_clients"]) for m in found] == [2, 2]
    assert [list(m["sample_counted"]) for m in found] == [[False, True], [True, True]]
    assert_near(
        found[1]["effective_clients"],
        clean_outputs[1].metrics["client_work"]["weighting"]["effective_clients"],
        rtol=1e-5,
    )


def test_a_client_that_would_overflow_when_weighted_is_left_out_and_counted(guarded):
    # Its update is of size 1e37: finite, until it is multiplied by its 40 examples and added up.
    huge = (np.full((40, 3), 1e19, np.float32), np.ones((40, 2), np.float32))
    state = guarded.initialize()
    whole = [*twin.datasets(DATA), *(d.unbatch().batch(40) for d in twin.datasets([huge]))]
    output = guarded.next(state, whole)
    clean = guarded.next(state, twin.datasets(DATA))
    assert output.metrics["finalizer"]["update_non_finite"] == 0
    measured = output.metrics["client_work"]["weighting"]
    assert measured["clients"] == len(DATA)
    assert measured["non_finite_clients"] == 1
    close(
        guarded.get_model_weights(output.state).trainable,
        guarded.get_model_weights(clean.state).trainable,
        1e-6,
    )
    assert_near(
        output.state.client_work["typical_score"],
        clean.state.client_work["typical_score"],
    )


def test_an_empty_client_is_not_the_nearest_of_all():
    model = twin.functional_model()
    uniform = tff.learning.templates.build_functional_model_delta_client_work(
        model=model, optimizer=SGD, client_weighting=tff.learning.ClientWeighting.UNIFORM
    )
    process = aggregators.compose_fed_avg(
        model,
        aggregators.build_self_weighting_client_work(
            uniform, scores.kl_divergence, weighting.softmax(0.2)
        ),
    )
    empty = tuple(array[:0] for array in DATA[0])
    clean, _ = run(process, [DATA, DATA])
    found, outputs = run(process, [[*DATA, empty]] * 2)
    close(found, clean, 1e-6)
    measured = outputs[1].metrics["client_work"]["weighting"]
    assert (measured["clients"], measured["zero_weight_clients"]) == (len(DATA), 1)
    assert measured["score_min"] > 0


def test_only_bad_clients_leave_the_model_unchanged(guarded):
    state = guarded.next(guarded.initialize(), twin.datasets(DATA)).state
    bad = [(np.full_like(x, np.nan), y) for x, y in DATA]
    output = guarded.next(state, twin.datasets(bad))
    tf.nest.map_structure(
        np.testing.assert_array_equal,
        guarded.get_model_weights(output.state),
        guarded.get_model_weights(state),
    )
    assert output.metrics["client_work"]["weighting"]["unchanged"] == 1
    assert output.metrics["finalizer"]["update_non_finite"] == 1
    np.testing.assert_array_equal(
        output.state.client_work["typical_score"], state.client_work["typical_score"]
    )


@pytest.mark.parametrize("prefer", selection.params(["near", "far"], ["far"]))
def test_weights_that_would_underflow_or_overflow_stay_in_range(prefer):
    work = aggregators.build_self_weighting_client_work(
        plain_work(twin.functional_model()),
        scores.l2_distance,
        weighting.softmax(1e-4, prefer=prefer, scale=None, times_examples=False),
    )
    process = aggregators.compose_fed_avg(twin.functional_model(), work)
    before = process.get_model_weights(process.initialize()).trainable
    weights, outputs = run(process, [DATA])
    assert outputs[0].metrics["client_work"]["weighting"]["clients"] == len(DATA)
    # In a first round there is no typical client to start from, and all are beyond the same end
    # of the clip, as documented: the unweighted mean, and never no update at all.
    clients = [twin.train([np.float64(w) for w in before], *d) for d in DATA]
    equal = twin.twins.weighted_mean(
        [c["delta"] for c in clients], np.ones((len(DATA), 1)), twin.MODEL
    )
    close(weights, [b - e for b, e in zip(before, equal, strict=True)])
    # From then on clients on either side of the typical one differ as far as float32 goes.
    second = process.next(outputs[0].state, twin.datasets(DATA))
    effective = second.metrics["client_work"]["weighting"]["effective_clients"]
    assert effective <= len(DATA) - 1 + 1e-4


def test_hyperparameters_are_those_of_the_inner_work(guarded):
    state = guarded.initialize()
    hparams = guarded.get_hparams(state)
    assert np.isclose(hparams["client_work"]["learning_rate"], twin.RATE)
    hparams["client_work"]["learning_rate"] = 0.0
    frozen = guarded.next(guarded.set_hparams(state, hparams), twin.datasets(DATA)).state
    tf.nest.map_structure(
        np.testing.assert_array_equal,
        guarded.get_model_weights(frozen),
        guarded.get_model_weights(state),
    )


def _clipped(clients, norm):
    """The clients, their updates scaled down to this global norm."""
    for c in clients:
        length = np.sqrt(sum(np.sum(d**2) for d in c["delta"]))
        c["delta"] = [d * min(1.0, norm / length) for d in c["delta"]]
    return clients


@pytest.mark.parametrize(
    ("aggregator", "clip", "tolerance"),
    selection.params(
        {
            "zeroing": (
                lambda: tff.learning.robust_aggregator(zeroing=True, clipping=False),
                np.inf,
                1e-5,
            ),
            "clipping": (
                lambda: tff.aggregators.clipping_factory(0.3, tff.aggregators.MeanFactory()),
                0.3,
                1e-5,
            ),
            "compression": (
                lambda: tff.learning.compression_aggregator(zeroing=False, clipping=False),
                np.inf,
                5e-2,
            ),
        },
        ["clipping"],
        unpack=True,
    ),
)
def test_tffs_weighted_aggregators_take_the_weights(aggregator, clip, tolerance):
    weights, _ = run(_kl_process(aggregator()), [DATA])
    close(weights, twin.simulate(1, DATA, _kl_clipped(clip)), tolerance)


@pytest.mark.slow  # as the test after it, with weights that are not sharp
def test_the_weights_go_through_a_secure_sum():
    process = _kl_process(tff.learning.secure_aggregator(zeroing=False, clipping=False))
    # TFF's local runtime has no secure sum; its test runtime stands in with a plain one on the
    # same whole numbers.
    secure = tff.backends.test.create_sync_test_cpp_execution_context()
    with tff.framework.get_context_stack().install(secure):
        weights, outputs = run(process, [DATA])
    close(weights, twin.simulate(1, DATA, _kl_clipped(np.inf)), 1e-3)
    assert "secure_upper_threshold" in str(outputs[0].metrics["aggregator"])


def test_sharp_weights_survive_a_secure_sum():
    # With raw weights, n exp(-r / 0.03), all would be rounded to 0.
    model = twin.functional_model()
    work = aggregators.build_self_weighting_client_work(
        plain_work(model), scores.kl_divergence, weighting.softmax(0.03, bound=100.0)
    )
    # A slow server, so that scores of the second round lie on both sides of the first's mean.
    slow = tff.learning.optimizers.build_sgdm(0.1)
    plain, outputs = run(aggregators.compose_fed_avg(model, work, None, slow), [DATA] * 2)
    secure = tff.learning.secure_aggregator(zeroing=False, clipping=False)
    process = aggregators.compose_fed_avg(model, work, secure, slow)
    with tff.framework.get_context_stack().install(
        tff.backends.test.create_sync_test_cpp_execution_context()
    ):
        found, _ = run(process, [DATA] * 2)
    measured = outputs[1].metrics["client_work"]["weighting"]
    assert measured["score_min"] < measured["scale"] < measured["score_max"]
    assert measured["effective_clients"] < 2.5  # plain averaging has 3.2
    close(found, plain, 1e-5)


def _kl_process(aggregator):
    model = twin.functional_model()
    work = aggregators.build_self_weighting_client_work(
        plain_work(model), scores.kl_divergence, weighting.softmax(scale=1e-2)
    )
    return aggregators.compose_fed_avg(model, work, aggregator)


def _kl_clipped(norm):
    combine = twin.adaptive(kl, lambda r: np.exp(-r / 1e-2), groups=twin.MODEL, running=False)
    return lambda weights, clients, memory: combine(weights, _clipped(clients, norm), memory)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: (w.next, scores.l2_distance, weighting.softmax()), TypeError, "`client_work`"),
        (lambda w: (w, "kl", weighting.softmax()), TypeError, "`score` must be a function"),
        (lambda w: (w, scores.l2_distance, "softmax"), TypeError, "`weighting` must be"),
        (
            lambda w: (w, lambda s, c: s[0] - c[0], weighting.softmax()),
            TypeError,
            "`score` must return one floating number per layer",
        ),
    ],
)
def test_bad_arguments_raise_when_the_client_work_is_built(call, error, message):
    with pytest.raises(error, match=message):
        aggregators.build_self_weighting_client_work(*call(plain_work(twin.functional_model())))


def test_a_client_work_whose_update_is_not_of_the_weights_is_refused():
    scored = aggregators.build_client_work(model_fn, SGD, rules.fed_nova().needs)
    with pytest.raises(TypeError, match="shapes and dtypes of the trainable weights"):
        aggregators.build_self_weighting_client_work(
            scored, scores.l2_distance, weighting.softmax()
        )


def test_weights_made_on_the_clients_spread_over_workers(guarded):
    here, _ = run(guarded, [DATA] * 2)
    with runtimes.two_workers():
        there, _ = run(guarded, [DATA] * 2)
    close(there, here)


def test_the_weightings_numbers_are_hyperparameters_too(guarded):
    state = guarded.initialize()
    hparams = guarded.get_hparams(state)["client_work"]
    assert list(hparams) == ["learning_rate", "weighting"]
    assert list(hparams["weighting"]) == ["temperature", "bound", "decay"]
    first = guarded.next(state, twin.datasets(DATA)).state
    new = guarded.get_hparams(first)
    new["client_work"]["weighting"]["temperature"] = 0.05
    sharp = guarded.next(guarded.set_hparams(first, new), twin.datasets(DATA))
    mild = guarded.next(first, twin.datasets(DATA))
    effective = [o.metrics["client_work"]["weighting"]["effective_clients"] for o in (sharp, mild)]
    assert effective[0] < effective[1]
    assert sharp.state.client_work["temperature"] == 0.05
