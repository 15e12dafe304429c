"""`federated_adaptive_mean` as it is used inside a hand-written round."""

from collections import OrderedDict

import aggregation_twins as twins
import numpy as np
import pytest
import runtimes
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import federated_adaptive_mean, scores, weighting
from aggregators.adaptive_mean import finite_tensors, weigh

SHAPES = [(2, 3), (3,), (4,)]
MODEL = tff.to_type([(np.float32, shape) for shape in SHAPES])
CLIENTS, SERVER = tff.FederatedType(MODEL, tff.CLIENTS), tff.FederatedType(MODEL, tff.SERVER)
NUMBER = tff.FederatedType(np.float32, tff.CLIENTS)
GROUPS = ((1, 0), (2,))


def cohort(seed, size=5):
    rng = np.random.default_rng(seed)
    server = [np.float32(rng.normal(size=shape)) for shape in SHAPES]
    trained = [
        [np.float32(s + rng.normal(scale=0.1 * (k + 1), size=s.shape)) for s in server]
        for k in range(size)
    ]
    return server, trained, [float(n) for n in rng.integers(1, 30, size)]


def mean_of(server, trained, examples, typical, score, rule, groups, **options):
    found = np.array(
        [[score([server[t] for t in g], [c[t] for t in g]) for g in groups] for c in trained]
    )
    raw = twins.raw_weights(found, examples, rule=rule, scale=typical, typical=typical, **options)
    return twins.weighted_mean(trained, raw, groups), found


@pytest.fixture(scope="module")
def by_kl():
    @tff.federated_computation(
        CLIENTS, SERVER, NUMBER, tff.FederatedType((np.float32, [2]), tff.SERVER)
    )
    def run(trained, server, examples, typical):
        return federated_adaptive_mean(
            trained,
            server,
            score=scores.kl_divergence,
            weighting=weighting.softmax(0.8, bound=20.0),
            weight=examples,
            layers=GROUPS,
            typical_score=typical,
        )

    return run


@pytest.fixture(scope="module")
def of_deltas():
    @tff.federated_computation(CLIENTS, SERVER)
    def run(deltas, server):
        return federated_adaptive_mean(
            deltas,
            server,
            score=scores.kl_divergence,
            weighting=weighting.power(-0.5, scale=None, floor=1e-9),
            layers="model",
            value_is="delta",
        )

    return run


def test_types(by_kl, of_deltas):
    result = by_kl.type_signature.result
    assert result.mean.is_equivalent_to(SERVER)
    vector, count = tff.to_type((np.float32, [2])), tff.to_type(np.int32)
    assert result.measurements.member._asdict() == {
        "clients": count,
        "non_finite_clients": count,
        "zero_weight_clients": count,
        "unchanged": count,
        "score_mean": vector,
        "score_min": vector,
        "score_max": vector,
        "effective_clients": vector,
        "largest_weight": vector,
        "scale": vector,
    }
    assert of_deltas.type_signature.result.mean.is_equivalent_to(SERVER)
    assert str(result.typical_score) == "float32[2]@SERVER"


def test_equals_numpy_over_rounds_with_a_scale_fed_back(by_kl):
    typical = np.zeros(2, np.float32)
    for seed in range(3):
        server, trained, examples = cohort(seed)
        output = by_kl(trained, server, examples, typical)
        expected, found = mean_of(
            server,
            trained,
            examples,
            np.float64(typical),
            twins.kl,
            lambda r: np.exp(-r / 0.8),
            GROUPS,
            bound=20.0,
        )
        for a, b in zip(output.mean, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(output.measurements["score_mean"], found.mean(0), rtol=1e-4)
        # By the memory of a half, once there is something to remember; kept where nobody counts.
        expected = 0.5 * (typical + found.mean(0)) if seed else found.mean(0)
        np.testing.assert_allclose(output.typical_score, expected, rtol=1e-4)
        typical = output.typical_score
    skipped = by_kl(trained, server, [0.0] * len(trained), typical)
    np.testing.assert_array_equal(skipped.typical_score, typical)


def test_deltas_are_scored_as_the_models_they_lead_to(of_deltas):
    server, trained, _ = cohort(7)
    deltas = [[s - t for s, t in zip(server, client, strict=True)] for client in trained]
    output = of_deltas(deltas, server)
    expected, _ = mean_of(
        server, trained, np.ones(5), np.ones(1), twins.kl, lambda r: r**-0.5, ((0, 1, 2),)
    )
    for a, s, b in zip(output.mean, server, expected, strict=True):
        np.testing.assert_allclose(s - a, b, rtol=1e-4, atol=1e-5)


def test_without_a_usable_client_the_model_is_the_servers_and_the_delta_zero(by_kl, of_deltas):
    server, trained, _ = cohort(8, size=2)
    for client in trained:
        client[2][0] = np.inf
    models = by_kl(trained, server, [1.0, 2.0], np.ones(2, np.float32))
    deltas = of_deltas(trained, server)
    for model, delta, old in zip(models.mean, deltas.mean, server, strict=True):
        np.testing.assert_array_equal(model, old)
        np.testing.assert_array_equal(delta, np.zeros_like(old))
    for output in (models, deltas):
        assert output.measurements["unchanged"] == 1
        assert output.measurements["non_finite_clients"] == 2
        for name in ("score_mean", "score_min", "score_max"):
            assert np.all(np.isnan(output.measurements[name]))
        for name in ("effective_clients", "largest_weight"):
            np.testing.assert_array_equal(output.measurements[name], 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize(
    "score", scores.UPDATE_SCORES + scores.MODEL_SCORES, ids=lambda score: score.__name__
)
def test_no_score_hides_a_client_that_is_not_finite(score, bad):
    for position in range(len(SHAPES)):
        ((_, (client,), _), zeros) = cohort(3, size=1), [np.zeros(s, np.float32) for s in SHAPES]
        client[position].flat[-1] = bad
        # Against a model, the zeros included that a model may hold, and an update against zeros.
        pairs = [(cohort(3)[0], client), (zeros, client)]
        if score in scores.UPDATE_SCORES:
            pairs.append((client, zeros))
        for groups in (((0,), (1,), (2,)), ((0, 1, 2),)):
            for old, new in pairs:
                found = scores.score_layers(score, old, new, groups)
                none = tf.zeros([len(groups)])
                part = weigh(weighting.softmax(scale=1.0), client, found, 1.0, none, False)
                assert part["statistics"].non_finite
                assert np.all(np.isneginf(part["mean"].log_weights))


@pytest.mark.parametrize(
    ("dtype", "finite", "not_finite"),
    [
        (np.float16, [6e4, -6e4], [np.inf, np.nan]),
        (np.float32, [1e19, -1e19], [3e19, 1e38, -np.inf, np.nan]),
        (np.float64, [1e19, -1e19], [3e19, -1e300, np.inf, np.nan]),
    ],
)
def test_an_update_is_finite_up_to_a_norm_whose_square_float32_holds(dtype, finite, not_finite):
    for largest in (*finite, *not_finite):
        update = [np.zeros((4, 3), dtype), np.zeros(2, dtype)]
        update[0][3, 1] = largest
        found = finite_tensors([tf.constant(tensor) for tensor in update])
        assert bool(found) == (largest in finite)


@pytest.mark.parametrize(
    "score", scores.UPDATE_SCORES + scores.MODEL_SCORES, ids=lambda score: score.__name__
)
def test_that_limit_holds_for_double_precision_under_every_score(score):
    double = tff.to_type([(np.float64, [2])])

    @tff.federated_computation(
        tff.FederatedType(double, tff.CLIENTS), tff.FederatedType(double, tff.SERVER)
    )
    def run(trained, server):
        rule = weighting.softmax(scale=1.0)
        return federated_adaptive_mean(trained, server, score=score, weighting=rule).measurements

    clients = [[np.array([size, 1.0])] for size in (1e19, 1e30, 1.0)]
    measured = run(clients, [np.ones(2)])
    assert (measured["clients"], measured["non_finite_clients"]) == (2, 1)


def test_two_workers_give_the_same_mean(by_kl):
    # TFF splits a cohort rightly only if the last argument is at the clients.
    server_first = tff.federated_computation(
        lambda server, typical, trained, examples: by_kl(trained, server, examples, typical),
        [SERVER, tff.FederatedType((np.float32, [2]), tff.SERVER), CLIENTS, NUMBER],
    )
    server, trained, examples = cohort(9)
    typical = np.float32([1e-2, 1e-3])
    here = by_kl(trained, server, examples, typical)
    with runtimes.two_workers():
        there = server_first(server, typical, trained, examples)
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        tuple(here),
        tuple(there),
    )


def _mean(**changes):
    arguments = {"score": scores.l2_distance, "weighting": weighting.softmax(scale=None)}

    def run(trained, server):
        return federated_adaptive_mean(trained, server, **{**arguments, **changes})

    return run


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (_mean(weighting=weighting.softmax()), ValueError, "`typical_score` is needed"),
        (_mean(score=None), TypeError, "`score` must be a function"),
        (
            _mean(score=tff.tensorflow.computation(lambda a, b: a[0] - b[0], [[np.float32]] * 2)),
            TypeError,
            "`score` must be a function.*no tff.Computation",
        ),
        (_mean(weighting=None), TypeError, "`weighting` must be a `Weighting`"),
        (_mean(value_is="update"), ValueError, "`value_is` must be"),
        (_mean(layers=[(0,)]), ValueError, "`layers` must hold each of the 3"),
        (_mean(sample_size=2.0), ValueError, "`sample_size` must be"),
        (
            lambda trained, server: _mean()(trained, tff.federated_broadcast(server)),
            TypeError,
            "`server_model` must be placed at tff.SERVER",
        ),
        (
            lambda trained, server: _mean()(server, server),
            TypeError,
            "`value` must be placed at tff.CLIENTS",
        ),
        (
            lambda trained, server: _mean()(trained, tff.federated_value(1.0, tff.SERVER)),
            TypeError,
            "`value` and `server_model` must have one type",
        ),
    ],
)
def test_bad_arguments_are_explained(run, error, message):
    with pytest.raises(error, match=message):
        tff.federated_computation(run, [CLIENTS, SERVER])


@pytest.mark.parametrize("shape", [[], [1], [2], [4]])
def test_a_typical_score_of_another_shape_is_not_broadcast(shape):
    def run(trained, server, typical):
        return _mean(weighting=weighting.softmax(), typical_score=typical)(trained, server)

    typical = tff.FederatedType((np.float32, shape), tff.SERVER)
    with pytest.raises(TypeError, match=r"`typical_score` must hold .*float32\[3\]; found"):
        tff.federated_computation(run, [CLIENTS, SERVER, typical])


@pytest.mark.parametrize(
    ("create", "error", "message"),
    [
        (
            lambda: aggregators.AdaptiveMeanFactory(
                weighting.softmax(), score=scores.kl_divergence
            ),
            ValueError,
            "`score` must depend on the update only; found kl_divergence",
        ),
        (
            lambda: aggregators.AdaptiveMeanFactory(weighting.softmax()).create(
                MODEL, tff.to_type(np.float32)
            ),
            ValueError,
            "`score` is needed for plain updates",
        ),
        (
            lambda: aggregators.AdaptiveMeanFactory(
                weighting.softmax(), score=scores.l2_distance
            ).create(MODEL, tff.to_type([np.float32])),
            TypeError,
            "`weight_type` must be the type of one number",
        ),
        (
            lambda: aggregators.QFedAvgFactory(1.0, 1.0).create(MODEL, tff.to_type(np.float32)),
            TypeError,
            "`value_type` must be that of a `ScoredUpdate`",
        ),
    ],
)
def test_bad_factories_are_explained(create, error, message):
    with pytest.raises(error, match=message):
        create()


def test_the_factory_drops_into_tffs_own_process():
    from problems import make_clients, model_fn

    sgd = tff.learning.optimizers.build_sgdm(0.1)
    factory = aggregators.AdaptiveMeanFactory(
        weighting.softmax(prefer="far", scale=None, times_examples=False), score=scores.l2_distance
    )
    theirs = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, sgd, tff.learning.optimizers.build_sgdm(1.2), model_aggregator=factory
    )
    ours = aggregators.build_fed_att(model_fn, sgd)
    clients = make_clients()
    # TFF sends a non-finite update as zeros with weight 0: it is seen, if not by name.
    bad = clients[0].map(lambda b: OrderedDict(x=b["x"] * np.nan, y=b["y"]))
    measured = theirs.next(theirs.initialize(), [bad, *clients[1:]]).metrics["aggregator"]
    assert (measured["clients"], measured["zero_weight_clients"]) == (len(clients) - 1, 1)
    states = [process.initialize() for process in (theirs, ours)]
    for _ in range(2):
        states = [p.next(s, clients).state for p, s in zip((theirs, ours), states, strict=True)]
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        *(p.get_model_weights(s) for p, s in zip((theirs, ours), states, strict=True)),
    )
