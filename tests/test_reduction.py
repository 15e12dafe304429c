"""Reductions: a merge in any order and in any pieces, and the ways into TFF."""

import collections
import contextlib
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import runtimes
import tensorflow as tf
import tensorflow_federated as tff
from hypothesis import given, settings
from hypothesis import strategies as st

import aggregators
from aggregators import federated_reduce
from aggregators.weighted_mean.statistics import ClientStatistics, statistics_reduction
from aggregators.weighted_mean.streaming import LogWeighted, mean_reduction

AT_CLIENTS = tff.FederatedType(np.float32, tff.CLIENTS)
SPEC = tf.TensorSpec([2], tf.float64)

# No weight, weights over 250 orders of magnitude, all that a `Weighting` lets through; values up to
# the edge of their type.
log_weight = st.one_of(st.just(-math.inf), st.floats(-300, 300), st.floats(-1e6, 1e6))
clients = st.lists(
    st.tuples(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=2), log_weight),
    min_size=1,
    max_size=6,
)


def lifted(value, log):
    return LogWeighted((tf.constant(value, tf.float64),), tf.constant([log], tf.float64))


def fold(reduction, values):
    total = reduction.zero()
    for value in values:
        total = reduction.merge(total, reduction.lift(value))
    return total


def naive_mean(cohort):
    """The formula, with the largest weight taken out first."""
    logs = np.array([log for _, log in cohort])
    if np.all(np.isneginf(logs)):
        return np.zeros(2), -np.inf
    weights = np.exp(logs - logs.max())
    shares = weights / weights.sum()
    values = np.array([value for value, _ in cohort])
    return (shares[:, None] * values).sum(0), logs.max() + np.log(weights.sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(clients, st.randoms(use_true_random=False))
def test_the_streaming_mean_equals_its_formula_however_clients_are_split(cohort, random):
    reduction = mean_reduction([SPEC], ((0,),))
    values = [lifted(value, log) for value, log in cohort]
    expected, log_total = naive_mean(cohort)
    largest = max(abs(x) for value, _ in cohort for x in value)
    off = 1e-9 * largest + 1e-300  # TensorFlow's kernels take subnormal numbers for zero
    cut = random.randint(0, len(values))
    first, second = fold(reduction, values[:cut]), fold(reduction, values[cut:])
    shuffled = random.sample(values, len(values))
    for total in (
        fold(reduction, values),
        reduction.merge(first, second),
        reduction.merge(second, first),
        fold(reduction, shuffled),
    ):
        found = reduction.report(total)
        np.testing.assert_allclose(found.tensors[0], expected, atol=off)
        np.testing.assert_allclose(found.log_weights[0], log_total, rtol=1e-13, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e6, width=32), log_weight, st.sampled_from(["", "bad", "score"])),
        max_size=6,
    ),
    st.integers(0, 6),
)
def test_statistics_merge_into_what_one_fold_gives(cohort, cut):
    reduction = statistics_reduction(1, sample_size=3, others=1)
    cohort = [(score, -math.inf if bad else log, bad) for score, log, bad in cohort]
    values = [
        ClientStatistics(
            tf.constant([score]),
            tf.constant([log], tf.float64),
            tf.constant(bad == "bad"),
            tf.constant(bad == "score"),
            (tf.constant([log / 2], tf.float64),),
        )
        for score, log, bad in cohort
    ]
    whole = fold(reduction, values)
    merged = reduction.merge(fold(reduction, values[:cut]), fold(reduction, values[cut:]))
    for a, b in zip(tf.nest.flatten(whole), tf.nest.flatten(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    counted = [(score, log) for score, log, _ in cohort if log > -math.inf]
    assert whole.sums[0] == len(counted)
    assert whole.sums[1] == sum(bad == "bad" for *_, bad in cohort)
    assert whole.sums[2] == sum(bad == "score" for *_, bad in cohort)
    assert whole.sums[3] == sum(log == -math.inf and not bad for _, log, bad in cohort)
    filled, rows = whole.sample
    assert filled == min(len(cohort), 3)
    expected = [(score, log, log / 2) for score, log, _ in cohort[:3]]
    np.testing.assert_array_equal(rows[:filled, :, 0], np.reshape(expected, [-1, 3]))
    if counted:
        tiny = 1e-30  # TensorFlow's kernels take subnormal numbers for zero
        score_max, minus_min, log_max = whole.largest[:, 0]
        np.testing.assert_allclose(score_max, max(s for s, _ in counted), atol=tiny)
        np.testing.assert_allclose(-minus_min, min(s for s, _ in counted), atol=tiny)
        np.testing.assert_allclose(log_max, max(log for _, log in counted), atol=tiny)
        np.testing.assert_allclose(whole.sums[4], sum(s for s, _ in counted), 1e-12, tiny)


def test_a_client_without_weight_may_hold_anything():
    reduction = mean_reduction([SPEC], ((0,),))
    values = [lifted([np.nan, np.inf], -math.inf), lifted([1.0, 2.0], 0.0)]
    for order in (values, values[::-1]):
        np.testing.assert_array_equal(fold(reduction, order).tensors[0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (tf.TensorSpec([None], tf.float32), r"float32 of shape \(None,\)"),
        (tf.TensorSpec([2], tf.int32), r"int32 of shape \(2,\)"),
    ],
)
def test_a_mean_needs_floats_of_known_shape(spec, found):
    with pytest.raises(TypeError, match=f"floating tensors of known shape; found {found}"):
        mean_reduction([spec], ((0,),))


def test_federated_reduce_takes_functions_and_computations():
    pair = collections.OrderedDict(largest=np.float32, count=np.int32)

    @tff.tensorflow.computation(pair, np.float32)
    def op(total, x):
        total["largest"] = tf.maximum(total["largest"], x)
        total["count"] += 1
        return total

    @tff.federated_computation(AT_CLIENTS)
    def largest(x):
        zero = collections.OrderedDict(largest=np.float32(-np.inf), count=np.int32(0))
        return federated_reduce(x, zero, op)

    @tff.federated_computation(AT_CLIENTS)
    def product_of_positives(x):
        def multiply(total, y):
            if y > 0:
                total *= y
            return total

        one = tff.tensorflow.computation(lambda: tf.constant(1.0))
        return federated_reduce(x, one, multiply, merge=tf.multiply)

    assert str(largest.type_signature.result) == "<largest=float32,count=int32>@SERVER"
    assert largest([3.0, 7.0, 5.0]) == collections.OrderedDict(largest=7.0, count=3)
    assert product_of_positives([3.0, -1.0, 5.0]) == 15.0


def test_the_form_that_tff_had_works_as_it_was_written():
    @tff.tensorflow.computation
    def zero():
        return collections.OrderedDict(sum=0.0, largest=-1.0)

    @tff.tensorflow.computation(zero.type_signature.result, np.float32)
    def op(total, x):
        return collections.OrderedDict(
            sum=total["sum"] + x, largest=tf.maximum(total["largest"], x)
        )

    @tff.federated_computation(AT_CLIENTS)
    def run(x):
        one = tff.tensorflow.computation(lambda: 1.0)
        product = tff.tensorflow.computation(lambda a, b: a * b, [np.float32, np.float32])
        pair = (one(), one())  # of values that are not placed
        both = federated_reduce(x, pair, lambda total, y: (total[0] * y, total[1] + y))
        return federated_reduce(x, zero(), op), federated_reduce(x, one(), product), both

    found, product, both = run([3.0, 0.5, 7.0])
    assert found == collections.OrderedDict(sum=10.5, largest=7.0)
    assert product == 10.5
    assert tuple(both) == (10.5, 11.5)


def test_reductions_run_in_one_pass_together():
    add = aggregators.Reduction(lambda: 0.0, tf.add)
    count = aggregators.Reduction(lambda: 0, tf.add, lambda x: 1, lambda n: 10 * n)
    both = aggregators.zip_reductions(total=add, tens=count)

    @tff.federated_computation(AT_CLIENTS)
    def run(x):
        twice = tff.federated_zip(collections.OrderedDict(total=x, tens=x))
        return federated_reduce(twice, both)

    assert run([1.0, 2.5]) == collections.OrderedDict(total=3.5, tens=20)
    with pytest.raises(ValueError, match="must have at least one reduction"):
        aggregators.zip_reductions()


ROWS = (lambda a, b: tf.concat([a, b], 0), lambda x: tf.fill([1, 3], x))


@pytest.mark.parametrize("place", ["here", *runtimes.IN_PIECES])
def test_a_zero_of_no_rows_takes_any_number_of_them(place):
    rows = aggregators.Reduction(lambda: tf.zeros([0, 3]), *ROWS)

    @tff.federated_computation(AT_CLIENTS)
    def run(x):
        appended = federated_reduce(
            x,
            collections.OrderedDict(all=np.zeros([0], np.float32), last=np.float32(0.0)),
            lambda found, y: collections.OrderedDict(all=tf.concat([found["all"], [y]], 0), last=y),
            merge=lambda a, b: collections.OrderedDict(
                all=tf.concat([a["all"], b["all"]], 0), last=b["last"]
            ),
        )
        return federated_reduce(x, rows), appended

    kinds = [str(kind.member) for kind in run.type_signature.result]
    assert kinds == ["float32[?,3]", "<all=float32[?],last=float32>"]
    here = contextlib.nullcontext if place == "here" else lambda: runtimes.IN_PIECES[place](2)
    with here():
        found, appended = run([1.0, 2.0, 5.0])
    assert sorted(appended["all"]) == [1.0, 2.0, 5.0]
    np.testing.assert_array_equal(found[np.argsort(found[:, 0])], [[1] * 3, [2] * 3, [5] * 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: federated_reduce(tff.federated_sum(x), 0.0, tf.add),
            "`value` must be placed at",
        ),
        (lambda x: federated_reduce(x, 0.0, 5), "`op` must be a function"),
        (
            lambda x: federated_reduce(x, 0.0, lambda a, b: tf.cast(a + b, tf.int32)),
            "`op` must return the type of `zero`, float32; found that it returns int32",
        ),
        (
            lambda x: federated_reduce(x, 0.0, lambda a, b: tf.stack([a, b])),
            r"float32; found that it returns float32\[2\]",
        ),
        (
            lambda x: federated_reduce(
                x, 0, tff.tensorflow.computation(lambda a, b: a, [np.float32, np.float32])
            ),
            r"`op` must take <int32,float32>; found that it takes <a=float32,b=float32>",
        ),
        (
            lambda x: federated_reduce(x, 0.0, tf.add, merge=lambda a, b: [a, b]),
            "`merge` must return the type of `zero`, float32",
        ),
        (
            lambda x: federated_reduce(
                x, tff.tensorflow.computation(lambda a: a, np.float32), tf.add
            ),
            "`zero` must be a computation of no arguments",
        ),
        (
            lambda x: federated_reduce(x, tff.federated_value(0.0, tff.SERVER), tf.add),
            "`zero` must be known everywhere, so not placed; found float32@SERVER",
        ),
        (
            lambda x: federated_reduce(
                x,
                aggregators.Reduction(lambda: 0.0, lambda a, b: tf.cast(a + b, tf.float64)),
            ),
            "`merge` must return the type of `zero`, float32; found that it returns float64",
        ),
        (
            lambda x: federated_reduce(x, aggregators.Reduction(lambda: 0.0, tf.add, tf.is_tensor)),
            "`lift` must return the type of `zero`, float32; found that it returns bool",
        ),
        (
            lambda x: federated_reduce(x, aggregators.Reduction(lambda: 0, tf.add)),
            r"`lift` must return the type of `zero`, int32; found .* float32\..*client's own value",
        ),
        (  # a zero of no rows may grow, and only there
            lambda x: federated_reduce(x, aggregators.Reduction(lambda: tf.zeros([0, 2]), *ROWS)),
            r"`lift` must return the type of `zero`, float32\[\?,2\]; found .* float32\[1,3\]",
        ),
        (
            lambda x: federated_reduce(x, aggregators.Reduction(lambda: tf.zeros([1, 3]), *ROWS)),
            r"`merge` must return the type of `zero`, float32\[1,3\]; found .* float32\[2,3\]",
        ),
        (
            lambda x: federated_reduce(x, np.zeros([0]), lambda a, b: tf.fill([1, 1], b)),
            r"`op` must return the type of `zero`, float64\[0\]; found",
        ),
    ],
)
def test_types_that_do_not_fit_are_explained(call, message):
    with pytest.raises(TypeError, match=message):
        tff.federated_computation(call, AT_CLIENTS)


@pytest.mark.slow  # a program of its own, whose worker prints
def test_printing_shows_values_where_a_person_sees_them():
    script = """
import numpy as np, tensorflow_federated as tff
from aggregators import federated_print
@tff.tensorflow.computation(np.float32)
def pair(x):
    return {"half": x / 2.0, "list": [x]}
@tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
def mean(x):
    total = tff.federated_map(pair, tff.federated_mean(federated_print(x, "at a client")))
    return federated_print(total, "at the server")
assert mean([1.5, 2.5])["half"] == 1.0
tff.test.set_no_default_context()
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    shown = sorted(re.findall(r"at (?:a client|the server): .+", run.stderr + run.stdout))
    assert shown == ["at a client: 1.5", "at a client: 2.5", "at the server: half=1 list/0=2"]


def test_only_placed_values_are_printed():
    with pytest.raises(TypeError, match=r"`value` must be placed at tff\.CLIENTS or tff\.SERVER"):
        tff.federated_computation(lambda x: aggregators.federated_print(x, "x"), np.float32)


def test_a_reduction_takes_nothing_beside_it():
    add = aggregators.Reduction(lambda: 0.0, tf.add)
    with pytest.raises(TypeError, match="`op` and `merge` must be left out beside a `Reduction`"):
        tff.federated_computation(lambda x: federated_reduce(x, add, tf.add), AT_CLIENTS)
