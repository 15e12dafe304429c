"""Scores, weightings and layers, run eagerly against NumPy."""

import copy
import pickle

import aggregation_twins as twins
import attrs
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nearness import assert_near

from aggregators import scores, weighting
from aggregators.core.hyperparameters import values
from aggregators.core.layers import names_of_variables, resolve_layers
from aggregators.core.score import as_score, score_layers

TWINS = {
    scores.kl_divergence: twins.kl,
    scores.js_divergence: twins.js,
    scores.l2_distance: twins.l2,
    scores.spectral_distance: twins.spectral,
    scores.cosine_distance: twins.cosine,
}
every_score = pytest.mark.parametrize("score", TWINS, ids=lambda score: score.name)


def layer(rng, size=1.0):
    return [np.float32(size * rng.normal(size=shape)) for shape in ((3, 3, 2, 4), (5, 2), (4,))]


def number(score, server, client):
    return float(score([tf.constant(s) for s in server], [tf.constant(c) for c in client]))


def test_no_public_score_is_missing_from_the_table():
    assert set(scores.ALL) == set(TWINS)


@every_score
@pytest.mark.parametrize("apart", [1e-3, 0.1, 1.0, 30.0])
def test_scores_equal_numpy_near_and_far(score, apart):
    rng = np.random.default_rng(1)
    for _ in range(5):
        server = layer(rng)
        client = [s + apart * d for s, d in zip(server, layer(rng), strict=True)]
        client = [c.astype(np.float32) for c in client]
        np.testing.assert_allclose(
            number(score, server, client), TWINS[score](server, client), rtol=2e-4, atol=1e-13
        )
        # One order only, or sums of squares could not tell client from server.
        if score is scores.kl_divergence and apart >= 0.1:
            assert not np.isclose(
                number(score, server, client), TWINS[score](client, server), rtol=1e-3
            )


@every_score
def test_scores_of_large_layers_keep_their_digits_when_models_hardly_moved(score):
    rng = np.random.default_rng(2)
    server = [np.float32(0.05 * rng.normal(size=(200, 100)))]
    client = [np.float32(server[0] + 2e-3 * rng.normal(size=(200, 100)))]
    np.testing.assert_allclose(
        number(score, server, client), TWINS[score](server, client), rtol=1e-3
    )


# Of middle size; and large enough for blocks, the last of them a short one, and of unlike weight.
MIDDLE, LARGE = 100_001, 530_001
both_sizes = pytest.mark.parametrize("length", [MIDDLE, LARGE])
divergences = pytest.mark.parametrize(
    "score", [scores.kl_divergence, scores.js_divergence], ids=lambda score: score.name
)


def large_server(length, spread=3.0):
    rng = np.random.default_rng(6)
    drift = np.linspace(-spread, spread, length)
    return rng, np.float32(drift + 0.05 * rng.normal(size=length))


def check_large(score, server, change, rtol):
    client = np.float32(server + change)
    expected = TWINS[score]([server], [client])
    np.testing.assert_allclose(number(score, [server], [client]), expected, rtol=rtol)


@divergences
@both_sizes
@pytest.mark.parametrize("apart", [3e-5, 1e-3, 0.03, 0.3, 3.0, 30.0])
def test_divergences_of_large_layers_near_and_far(score, length, apart):
    rng, server = large_server(length)
    check_large(score, server, apart * rng.normal(size=length), rtol=1e-4)
    # Blocks that differ not only in weight but also in what happened to them.
    check_large(score, server, apart * np.cos(np.linspace(0.0, 7.0, length)), rtol=1e-4)


@divergences
@both_sizes
@pytest.mark.parametrize("size", [0.19, -0.19, 1.0, -1.0])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_divergences_of_lopsided_changes(score, length, share, size):
    # Of all changes within a range, those of two values have the heaviest higher moments.
    rng, server = large_server(length, spread=0.5)
    check_large(score, server, size * (rng.random(length) < share), rtol=3e-4)
    for place in (np.linspace(0.0, 1.0, length), np.linspace(1.0, 0.0, length)):
        check_large(score, server, size * (place < share), rtol=3e-4)


@divergences
@both_sizes
@pytest.mark.parametrize(("shift", "apart"), [(1e-3, 1e-3), (0.01, 2e-5), (4.0, 1e-3)])
def test_divergences_of_large_layers_do_not_see_a_shift(score, length, shift, apart):
    rng, server = large_server(length, spread=0.5)
    check_large(score, server, shift + apart * rng.normal(size=length), rtol=2e-3)
    assert abs(number(score, [server], [server])) < 1e-12


@divergences
@both_sizes
def test_divergences_of_large_layers_are_the_same_in_the_worker(score, length):
    @tff.tensorflow.computation(tff.TensorType(np.float32, [length]), np.float32)
    def found(server, apart):
        change = apart * tf.cos(tf.range(length, dtype=tf.float32))
        return score([server], [server + change])

    _, server = large_server(length)
    for apart in (0.1, 1.0):
        change = apart * np.cos(np.arange(length, dtype=np.float32))
        expected = number(score, [server], [server + np.float32(change)])
        np.testing.assert_allclose(found(server, apart), expected, rtol=1e-3)


@divergences
@both_sizes
def test_divergences_of_large_layers_with_a_peak_and_with_nothing(score, length):
    rng, server = large_server(length)
    server[length // 2] = 14.0  # three quarters of the softmax
    change = 0.01 * rng.normal(size=length)
    check_large(score, server, change, rtol=1e-4)
    server[length // 2] = 300.0  # beyond exp in float32
    assert abs(number(score, [server], [np.float32(server + change)])) < 1e-7
    check_large(score, np.zeros(length, np.float32), change, rtol=1e-4)
    half = np.float16(0.1 * rng.normal(size=length))
    check_large(score, half, np.float16(change), rtol=1e-3)
    for bad in (np.nan, np.inf, -np.inf):
        client = np.float32(server + change)
        client[7] = bad
        assert not np.isfinite(number(score, [server], [client]))


# TensorFlow takes subnormal numbers for 0.
WEIGHTS = hnp.arrays(
    np.float32, (2, 3), elements=st.floats(-90, 90, width=32, allow_subnormal=False)
)


@every_score
@settings(max_examples=25, deadline=None, derandomize=True)
@given(WEIGHTS, WEIGHTS)
def test_scores_are_finite_and_not_negative_for_any_finite_layers(score, server, client):
    found = number(score, [server], [client])
    assert 0.0 <= found < np.inf
    assert abs(number(score, [server], [server])) <= 1e-7
    with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
        expected = TWINS[score]([server], [client])
    if np.isfinite(expected):
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-6)


@every_score
def test_layers_that_are_not_finite_give_scores_that_are_not(score):
    rng = np.random.default_rng(3)
    for bad in (np.nan, np.inf):
        server, client = layer(rng), layer(rng)
        client[1][0, 0] = bad
        assert not np.isfinite(number(score, server, client))


@every_score
def test_half_precision_is_scored_in_single_and_double_in_double(score):
    rng = np.random.default_rng(4)
    server = [rng.normal(size=(40, 50))]
    client = [server[0] + 0.1 * rng.normal(size=(40, 50))]
    halves = [[a[0].astype(np.float16)] for a in (server, client)]
    np.testing.assert_allclose(number(score, *halves), TWINS[score](*halves), rtol=1e-3)
    assert score([tf.constant(halves[0][0])], [tf.constant(halves[1][0])]).dtype == tf.float32
    doubles = score([tf.constant(server[0])], [tf.constant(client[0])])
    assert doubles.dtype == tf.float64
    np.testing.assert_allclose(doubles, TWINS[score](server, client), rtol=1e-9)


def test_golden_values():
    one, two = [np.float32([0, 0])], [np.float32(np.log([0.25, 0.75]))]
    np.testing.assert_allclose(number(scores.kl_divergence, one, two), 0.1438410362, rtol=1e-6)
    np.testing.assert_allclose(number(scores.js_divergence, one, two), 0.0338220756, rtol=1e-5)
    assert number(scores.kl_divergence, [np.float32([5])], [np.float32([9])]) == 0.0
    shifted = [np.float32([7, 7])]
    assert abs(number(scores.kl_divergence, one, shifted)) < 1e-7
    zero = [np.zeros(2, np.float32)]
    assert number(scores.cosine_distance, zero, two) == 1.0
    assert number(scores.cosine_distance, zero, zero) == 0.0


@pytest.mark.parametrize("size", [3, 20000])
def test_the_cosine_of_huge_and_tiny_layers(size):
    ones = np.ones(size, np.float32)
    for length in (1e20, 1e-24):
        long = np.float32(length) * ones
        assert abs(number(scores.cosine_distance, [ones], [long])) < 1e-5
        np.testing.assert_allclose(number(scores.cosine_distance, [ones], [-long]), 2.0, rtol=1e-5)
        np.testing.assert_allclose(number(scores.cosine_distance, [long], [-long]), 2.0, rtol=1e-5)
    long = np.full(size, 1e20, np.float32)
    long[1] = np.nan
    assert not np.isfinite(number(scores.cosine_distance, [ones], [long]))


@every_score
def test_layers_of_all_sizes_are_scored_together_as_alone(score):
    if score is scores.spectral_distance:
        shapes = [(3,), (70, 20), (30,), (5, 2, 4)]
    else:
        shapes = [(3,), (MIDDLE,), (700, 20), (LARGE,), (30,)]
    rng = np.random.default_rng(9)
    server = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    server.append(rng.normal(size=20_000))  # double precision
    for bad in (None, 0, 1, 3):
        client = [tensor + 0.01 * rng.normal(size=tensor.shape) for tensor in server]
        client = [np.asarray(new, old.dtype) for new, old in zip(client, server, strict=True)]
        if bad is not None:
            client[bad].flat[2] = np.nan
        groups = [
            (0,),
            (2,),
            *((i,) for i in range(len(shapes)) if i not in (0, 2)),
            (len(shapes),),
        ]
        together = score_layers(score, server, client, groups).numpy()
        alone = [number(score, [server[i]], [client[i]]) for (i,) in groups]
        assert_near(together, alone)
        assert [not np.isfinite(x) for x in together] == [group == (bad,) for group in groups]


@divergences
def test_divergences_of_layers_without_elements_and_of_unknown_shape(score):
    server = [np.zeros(0, np.float32), np.float32([0, 0]), np.zeros((3, 0), np.float32)]
    client = [server[0], np.float32([0, 1]), server[2]]
    found = score_layers(score, server, client, ((0,), (1,), (2,)))
    np.testing.assert_allclose(found, [0.0, number(score, [server[1]], [client[1]]), 0.0])
    assert found[1] > 0.0
    traced = tf.function(lambda x: score([x], [x]), input_signature=[tf.TensorSpec([None])])
    with pytest.raises(ValueError, match="tensors of known shape"):
        traced(server[1])


def test_layers_are_scored_one_by_one():
    rng = np.random.default_rng(5)
    server, client = layer(rng), layer(rng)
    found = score_layers(scores.l2_distance, server, client, ((2, 0), (1,)))
    expected = [twins.l2([server[i] for i in g], [client[i] for i in g]) for g in ((2, 0), (1,))]
    assert_near(found, np.asarray(expected))
    assert found.dtype == tf.float32


NAMES = ["a/kernel", "b/kernel", "a/bias"]


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("tensor", {"a/kernel": (0,), "b/kernel": (1,), "a/bias": (2,)}),
        ("layer", {"a": (0, 2), "b": (1,)}),
        ("model", {"model": (0, 1, 2)}),
        ([[2, 0], [1]], {"a/bias+a/kernel": (2, 0), "b/kernel": (1,)}),
        ({"first": [0, 1], "rest": [2]}, {"first": (0, 1), "rest": (2,)}),
    ],
)
def test_layers_resolve_to_named_groups(layers, groups):
    found = resolve_layers(layers, NAMES)
    assert list(found.items()) == list(groups.items())


@pytest.mark.parametrize(
    "layers",
    [
        "tensors",
        [(0, 1)],
        [(0, 1), (1, 2)],
        [(0, 1, 2, 3)],
        [],
        5,
        {},
        {"a": (0, 1)},
        [(0, -1), (1, 2)],
    ],
)
def test_layers_that_do_not_fit_are_refused(layers):
    with pytest.raises(ValueError, match="`layers` must"):
        resolve_layers(layers, NAMES)
    with pytest.raises(ValueError, match="at least one tensor"):
        resolve_layers("model", [])


def test_every_layer_has_a_name_of_its_own():
    with pytest.raises(ValueError, match="`layers` must have a name of its own for each layer"):
        resolve_layers({1: [0], "1": [1, 2]}, NAMES)
    variables = [tf.Variable(0.0, name=name) for name in ("a", "a", "a_1")]
    assert names_of_variables(variables) == ["a_0", "a_1", "a_1_2"]


def state_of(chosen, typical, round_number=0):
    start = tf.constant(round_number)
    return {
        "typical_score": tf.constant(typical, tf.float32),
        "round": start,
        **values(chosen.all_hparams, start),
    }


def logs(chosen, found, weight=1.0, typical=(0.0, 0.0)):
    found, sound = weighting.log_weights(
        chosen, tf.constant(found, tf.float32), tf.constant(weight), state_of(chosen, typical)
    )
    assert sound or np.all(np.isneginf(found))
    return found.numpy()


def test_log_weights_of_each_rule():
    found, typical = [2.0, 8.0], (4.0, 4.0)
    near = weighting.softmax(0.5)
    np.testing.assert_allclose(
        # -1 and -4, less the -2 of the typical client.
        logs(near, found, 3.0, typical),
        np.log(3.0) + np.array([1, -2]),
        rtol=1e-12,
    )
    far = weighting.softmax(2.0, prefer="far", scale=1.0, times_examples=False)
    np.testing.assert_allclose(logs(far, found, 3.0), [1, 4])
    inverse = weighting.power(-2.0, scale=None)
    np.testing.assert_allclose(logs(inverse, found), -2 * np.log(found))
    np.testing.assert_allclose(
        logs(weighting.power(1.0, floor=3.0, scale=None), found), np.log([3, 8])
    )
    np.testing.assert_allclose(logs(weighting.uniform(), found, 7.0), np.log([7.0, 7.0]))
    own = weighting.Weighting(tf.square, scale=2.0)
    np.testing.assert_allclose(logs(own, found), [1, 16])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=2),
    st.floats(1.0, 1e6),
    st.floats(2.0**-66, 2.0**66, width=32),
)
def test_a_bound_limits_the_ratio_of_any_two_clients(found, bound, typical):
    for chosen in (
        weighting.softmax(0.1, bound=bound),
        weighting.softmax(prefer="far", scale=None, bound=bound),
        weighting.power(-3.0, bound=bound),
    ):
        pair = logs(chosen, found, 1.0, (typical, typical))
        assert abs(pair[0] - pair[1]) <= np.log(bound) + 1e-6 * (1 + abs(pair).max())


def test_log_weights_stay_where_equal_ones_still_add_up():
    extreme = weighting.softmax(1e-4, prefer="far", scale=None, times_examples=False)
    largest = logs(extreme, [3e38, 2e38])
    assert np.all(largest == largest[0])
    np.testing.assert_allclose(np.logaddexp(*largest) - largest[0], np.log(2), rtol=1e-8)


def test_until_scores_are_known_all_count_alike():
    for chosen in (weighting.softmax(), weighting.softmax(scale=1.0, bound=2.0)):
        assert chosen.needs_typical_score
        np.testing.assert_array_equal(logs(chosen, [1.0, 5.0]), [0.0, 0.0])
    assert not weighting.softmax(scale=3.0).needs_typical_score


def test_the_sharpest_rules_still_tell_clients_apart_around_the_typical_one():
    for chosen in (weighting.softmax(1e-4), weighting.softmax(1e-4, scale=1e-8)):
        found = logs(chosen, [1.0002e-4, 0.9998e-4], 1.0, (1e-4, 1e-4))
        assert found[1] - found[0] > 1.0
    np.testing.assert_allclose(
        logs(weighting.power(-1000.0, floor=1e-30, scale=None), [1e-30, 1e30]),
        [1000 * np.log(1e30), -1000 * np.log(1e30)],
        rtol=1e-6,
    )


def test_a_score_without_a_number_takes_its_client_out():
    nan_below_one = weighting.Weighting(lambda r: tf.sqrt(r - 1.0), scale=None)
    assert np.all(np.isneginf(logs(nan_below_one, [0.5, 2.0])))
    np.testing.assert_allclose(logs(nan_below_one, [1.0, 5.0]), [0.0, 2.0])
    # Nothing is wrong with a client without weight, whatever its score.
    for weight, right in ((1.0, False), (0.0, True)):
        _, sound = weighting.log_weights(
            nan_below_one, tf.constant([0.5]), weight, state_of(nan_below_one, [0.0])
        )
        assert sound == right
    # A typical score that has no number is not subtracted.
    np.testing.assert_allclose(logs(nan_below_one, [1.0, 5.0], 1.0, (0.5, 2.0)), [0.0, 1.0])


def test_scales_are_0_while_all_scores_count_alike():
    for chosen, expected in (
        (weighting.softmax(), [0, 4]),
        (weighting.softmax(scale=3.0, bound=2.0), [0, 3]),
        (weighting.softmax(scale=3.0), [3, 3]),
    ):
        state = state_of(chosen, [0.0, 4.0])
        np.testing.assert_array_equal(weighting.relative_scale(chosen, state), expected)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_clients_of_no_weight_do_not_count(weight):
    assert np.all(np.isneginf(logs(weighting.uniform(), [1.0, 2.0], weight)))
    alone = weighting.softmax(scale=None, times_examples=False)
    assert np.all(np.isneginf(logs(alone, [1.0, 2.0], weight)))


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf, -1.0, -1e-30])
def test_clients_of_no_score_do_not_count(score):
    assert np.all(np.isneginf(logs(weighting.softmax(scale=None), [1.0, score])))


def test_the_running_score_remembers_and_skips_rounds_without_clients():
    chosen = weighting.softmax(decay=0.75)
    moved = weighting.next_typical_score(
        chosen, state_of(chosen, [4.0, 0.0, 4.0]), tf.constant([8.0, 8.0, np.nan], tf.float64)
    )
    np.testing.assert_allclose(moved, [5.0, 8.0, 4.0])


def test_one_round_cannot_blow_the_running_score_up():
    chosen = weighting.softmax(decay=0.5)
    state = state_of(chosen, [2.0, 0.0])
    moved = weighting.next_typical_score(chosen, state, tf.constant([1e15, 1e15], tf.float64))
    # At most ten times what was known; what was not known has nothing to be held against.
    np.testing.assert_allclose(moved, [11.0, 1e15])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weighting.softmax(0.0), ValueError, "`temperature` .* at least 0.0001; found 0.0"),
        (lambda: weighting.softmax(1e-7), ValueError, "`temperature` .* at least 0.0001; found"),
        (
            lambda: weighting.softmax(scale=1e-13),
            ValueError,
            "`scale` must be .* 1e-12 and of at most 1e",
        ),
        (
            lambda: weighting.power(-1e4),
            ValueError,
            "`exponent` must be .* at least -1000 and of at most 1000",
        ),
        (lambda: weighting.softmax(np.nan), ValueError, "`temperature`"),
        (lambda: weighting.softmax("1"), ValueError, "`temperature`"),
        (lambda: weighting.softmax(prefer="close"), ValueError, "`prefer`.*'close'"),
        (lambda: weighting.softmax(scale=0), ValueError, "`scale` must be"),
        (lambda: weighting.softmax(scale="mean"), ValueError, "`scale` must be"),
        (lambda: weighting.softmax(bound=0.5), ValueError, "`bound` must be"),
        (lambda: weighting.softmax(decay=1.0), ValueError, "`decay` must be"),
        (lambda: weighting.uniform(times_examples=1), TypeError, "`times_examples` must be"),
        (lambda: weighting.power(np.inf), ValueError, "`exponent`"),
        (lambda: weighting.power(floor=0.0), ValueError, "`floor`"),
        (lambda: weighting.Weighting("softmax"), TypeError, "`rule` must be a function"),
        (
            lambda: score_layers(
                scores.Score(lambda s, c: s[0]), [tf.zeros(2)], [tf.zeros(2)], ((0,),)
            ),
            TypeError,
            r"`score` must return one floating number per layer; found float32 of shape \(2,\)",
        ),
    ],
)
def test_bad_arguments_raise_at_construction(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_score_of_ones_own_may_branch_in_python():
    @scores.Score
    def score(server, client):
        if tf.reduce_sum(client[0]) > tf.reduce_sum(server[0]):
            return tf.constant(2.0)
        return tf.constant(1.0)

    @tff.tensorflow.computation
    def found():
        zeros, ones = tf.zeros([2]), tf.ones([3])
        return score_layers(score, [zeros, ones], [ones[:2], ones], ((0,), (1,)))

    np.testing.assert_array_equal(found(), [2.0, 1.0])


def test_scores_are_values_that_keep_their_fast_form():
    kl = scores.kl_divergence
    assert copy.deepcopy(kl) is kl
    assert pickle.loads(pickle.dumps(kl)) is kl
    wrapped = attrs.evolve(kl, name="mine")
    assert wrapped.over_layers is kl.over_layers
    assert wrapped.needs == "model"
    assert as_score(lambda s, c: s[0]).needs == "model"
    assert [s.needs for s in scores.ALL] == ["model", "model", "update", "update", "update"]
