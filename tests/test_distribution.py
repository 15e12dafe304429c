"""One worker, sub-rounds and two workers over gRPC give one result, so that no merge can be wrong.

The default runtime never calls `merge`: only these tests see it run.
"""

import numpy as np
import pytest
import rule_contracts as contracts
import runtimes
import tensorflow as tf
import tensorflow_federated as tff

import aggregators


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module", params=runtimes.IN_PIECES)
def distributed(request):
    """Results of every rule, by name, under another runtime."""
    # 4 pieces for 3 clients: one has none.
    with runtimes.IN_PIECES[request.param](4):
        return {
            case.name: contracts.run(case, contracts.rounds(case, seed=11, sizes=(3, 5)))
            for case in contracts.CASES
        }


@pytest.mark.parametrize("case", contracts.CASES, ids=lambda case: case.name)
def test_every_rule_distributes(case, distributed):
    here = contracts.run(case, contracts.rounds(case, seed=11, sizes=(3, 5)))
    for there, output in zip(distributed[case.name], here, strict=True):
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
