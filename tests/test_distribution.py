"""One worker, sub-rounds and two workers over gRPC give one result, so that no merge can be wrong.

The default runtime never calls `merge`: only these tests see it run.
"""

import contextlib
import functools

import numpy as np
import pytest
import rule_contracts as contracts
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff

import aggregators


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def contexts():
    """The other runtimes, each made for the first test that runs in it."""
    with contextlib.ExitStack() as stack:
        # 4 pieces for 3 clients: one has none.
        yield functools.cache(
            lambda name: stack.enter_context(runtimes.CONTEXTS[name](4)),
        )


RUNS = {
    f"{runtime}-{case.name}": (case, runtime)
    for runtime in runtimes.CONTEXTS
    for case in contracts.CASES
}
# The merge of a rule is the same in both; what differs is how its parts travel. One rule of each
# kind of reduction: the mean by log-weights, one that adds a largest value, and those in two passes.
QUICK = ["subrounds-softmax-near", "subrounds-q-fed-avg", "subrounds-redescending-otherwise"]
QUICK += ["two-workers-jury-two-candidates"]


@pytest.mark.parametrize(("case", "runtime"), selection.params(RUNS, QUICK, unpack=True))
def test_every_rule_distributes(case, runtime, contexts):
    cohorts = contracts.rounds(case, seed=11, sizes=(3, 5))
    here = contracts.run(case, cohorts)
    with tff.framework.get_context_stack().install(contexts(runtime)):
        distributed = contracts.run(case, cohorts)
    for there, output in zip(distributed, here, strict=True):
        tf.nest.map_structure(assert_same, there.result, output.result)
        tf.nest.map_structure(assert_same, there.state, output.state)
        elsewhere = contracts.flat(there.measurements)
        for name, number in contracts.flat(output.measurements).items():
            # Which piece of a cohort comes first is for the runtime to choose.
            if name not in ("sample_counted", "sample_scores", "sample_weights"):
                assert_same(elsewhere[name], number)


@tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
def _without_merge(x):
    return aggregators.federated_reduce(x, 0, tf.add)


@tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
def _with_merge(x):
    return aggregators.federated_reduce(x, 0, tf.add, merge=tf.add)


def test_a_reduction_without_merge_works_on_one_worker_and_says_so_elsewhere():
    assert _without_merge([1, 2, 3]) == 6
    with runtimes.subrounds(2):
        assert _with_merge([1, 2, 3]) == 6
        with pytest.raises(Exception, match="was given no `merge`"):
            _without_merge([1, 2, 3])
