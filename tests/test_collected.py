"""Rules over all updates: what they collect, where they run, bad clients and small cohorts."""

import aggregation_twins as twins
import federated_twin as twin
import numpy as np
import pytest
import rule_contracts as contracts
import selection
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import rules
from aggregators.core.layers import layers_of_type
from tff_optim import ResidentProcess

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
RULES = {
    "coordinate_median": (rules.coordinate_median(), twins.coordinate_median),
    "trimmed_mean": (
        rules.trimmed_mean(0.3),
        lambda deltas, weights, memory: twins.trimmed_mean(deltas, 0.3),
    ),
    "multi_krum": (
        rules.multi_krum(0, 2),
        lambda deltas, weights, memory: twins.multi_krum(deltas, 0, 2),
    ),
    "geometric_median": (
        rules.geometric_median(3),
        lambda deltas, weights, memory: twins.geometric_median(deltas, weights, 3),
    ),
    "centered_clipping": (
        rules.centered_clipping(0.2),
        lambda deltas, weights, memory: twins.centered_clipping(deltas, memory, 0.2),
    ),
}


def factory(rule, shape=(3,), sample_size=0):
    return aggregators.RuleFactory(rule, sample_size=sample_size).create(
        tff.to_type((np.float32, shape)), contracts.WEIGHT_TYPE
    )


@pytest.mark.parametrize(
    "name",
    # One that leaves clients out, and one with a state.
    selection.params([*RULES], ["multi_krum", "centered_clipping"]),
)
def test_a_process_equals_numpy_here_and_in_the_python_process(name):
    rule, in_numpy = RULES[name]

    def combine(weights, clients, memory):
        return in_numpy([c["delta"] for c in clients], [c["examples"] for c in clients], memory)

    process = aggregators.build_fed_avg(twin.functional_model(), SGD, rule=rule)
    resident = ResidentProcess(process, device="CPU:0", clients_at_once=3)
    expected = twin.simulate(3, DATA, combine)
    for each in (process, resident):
        state = each.initialize()
        for _ in range(3):
            state, metrics = each.next(state, twin.datasets(DATA))
        assert metrics["aggregator"]["clients"] == len(DATA)
        for a, b in zip(each.get_model_weights(state).trainable, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_round_of_ones_own_averages_models(name):
    rule, in_numpy = RULES[name]
    model = tff.to_type((np.float32, [3]))
    start = aggregators.rule_state(rule, model)

    @tff.federated_computation(
        tff.FederatedType(start.type_signature.result, tff.SERVER),
        tff.FederatedType(model, tff.SERVER),
        tff.FederatedType(np.float32, tff.CLIENTS),
        tff.FederatedType(model, tff.CLIENTS),
    )
    def average(state, server, weight, trained):
        return aggregators.federated_rule(rule, trained, state, server_model=server, weight=weight)

    rng, server = np.random.default_rng(3), np.float32([1.0, -2.0, 3.0])
    trained = [server + rng.normal(size=3).astype(np.float32) for _ in range(5)]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    output = average(start(), server, weights, trained)
    (update,) = in_numpy([[server - x] for x in trained], weights, {})
    np.testing.assert_allclose(output.result, server - update, rtol=1e-5)
    nobody = average(start(), server, [0.0] * 5, trained)
    np.testing.assert_array_equal(nobody.result, server)
    assert nobody.measurements["unchanged"] == 1


def test_it_keeps_a_row_for_each_client_that_counts():
    kind = tff.to_type([(np.float32, [2, 3]), (np.float64, []), (np.float16, [4])])
    fold = aggregators.collected(layers_of_type("model", kind))
    rng = np.random.default_rng(0)
    clients = [
        (
            [
                rng.normal(size=(2, 3)).astype(np.float32),
                np.float64(rng.normal()),
                np.float16(rng.normal(size=4)),
            ],
            n,
        )
        for n in (2.0, 0.0, 5.0, 1.0)
    ]
    parts = [fold.lift(([tf.constant(x) for x in delta], tf.constant(n))) for delta, n in clients]
    assert [int(part.weights.shape[0]) for part in parts] == [1, 0, 1, 1]
    whole = fold.zero()
    for part in parts:
        whole = fold.merge(whole, part)
    halves = [fold.merge(fold.merge(fold.zero(), a), b) for a, b in (parts[:2], parts[2:])]
    for total in (whole, fold.merge(*halves)):
        found = fold.report(total)
        np.testing.assert_array_equal(found.weights, [2.0, 5.0, 1.0])
        for position, rows in enumerate(found.tensors):
            kept = [delta[position] for delta, n in clients if n > 0]
            np.testing.assert_array_equal(rows, np.stack(kept))
            assert rows.dtype == np.asarray(clients[0][0][position]).dtype


# Honest updates, and some that are anything: more than a norm in float32 can tell among them.
HONEST = [np.float32([1.0, -1.0, 0.5]) + 0.1 * np.float32(x) for x in np.eye(3)]
ATTACKS = {
    "huge": np.float32([1e19, -1e19, 1e19]),
    "opposite": np.float32([-10.0, 10.0, -5.0]),
    "no number": np.float32([np.nan, 0.0, 0.0]),
    "zeros": np.float32([0.0, 0.0, 0.0]),
}
BOUNDED = {
    "coordinate_median": rules.coordinate_median(),
    "trimmed_mean": rules.trimmed_mean(0.3),
    "multi_krum": rules.multi_krum(1, 3),
    "geometric_median": rules.geometric_median(20),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_minority_of_any_kind_leaves_the_update_among_the_honest(name):
    process = factory(BOUNDED[name])
    honest = [*HONEST, *(x + 0.01 for x in HONEST)]
    low, high = np.min(honest, 0) - 1e-3, np.max(honest, 0) + 1e-3
    for attack in ATTACKS.values():
        for number in (1, 2) if name != "multi_krum" else (1,):
            updates = [*honest[:3], *[attack] * number, *honest[3:]]
            output = process.next(process.initialize(), updates, [1.0] * len(updates))
            assert np.all((output.result >= low) & (output.result <= high)), attack


def test_one_client_moves_centered_clipping_by_no_more_than_its_part():
    process = factory(rules.centered_clipping(0.5))
    updates = [*HONEST, *HONEST]
    state = process.next(process.initialize(), updates, [1.0] * 6).state
    without = process.next(state, [*updates, state["center"][0]], [1.0] * 7)
    assert without.measurements["clipped_clients"] == 6
    for attack in ("huge", "opposite"):
        output = process.next(state, [*updates, ATTACKS[attack]], [1.0] * 6 + [1e6])
        assert output.measurements["clipped_clients"] == 7
        moved = np.linalg.norm(output.result - without.result)
        np.testing.assert_allclose(moved, 0.5 / 7, rtol=1e-4)


def test_krum_refuses_a_cohort_that_is_too_small_and_bears_one_that_lost_clients():
    process = factory(rules.multi_krum(2, 3))
    state = process.initialize()
    with pytest.raises(Exception, match=r"at least\D*7\D.*num_bad=2, num_kept=3; found\D*6\D"):
        process.next(state, [*HONEST, *HONEST], [1.0] * 6)
    lost = process.next(state, [*HONEST, *HONEST, ATTACKS["no number"]], [1.0] * 7)
    assert np.all(np.isnan(lost.result))  # which TFF's finalizers take for no change
    measured = lost.measurements
    assert measured["unchanged"] == measured["too_few_clients"] == 1
    assert (measured["clients"], measured["non_finite_clients"]) == (6, 1)
    whole = process.next(state, [*HONEST, *HONEST, HONEST[0]], [1.0] * 7)
    assert whole.measurements["unchanged"] == whole.measurements["too_few_clients"] == 0
    assert whole.measurements["effective_clients"] == 3


def test_the_listing_shows_who_was_kept():
    process = factory(rules.multi_krum(1, 2), sample_size=6)
    updates = [ATTACKS["opposite"], *HONEST[:2], ATTACKS["no number"], HONEST[2] + 5.0, HONEST[0]]
    measured = process.next(process.initialize(), updates, [1.0] * 6).measurements
    np.testing.assert_array_equal(measured["sample_counted"], [1, 1, 1, 0, 1, 1])
    np.testing.assert_allclose(measured["sample_weights"], [0, 0.5, 0, 0, 0, 0.5])


def test_shares_are_cut_as_decimals_read():
    process = factory(rules.trimmed_mean(0.29), [1])
    values = np.arange(100.0)[:, None] ** 2
    found = process.next(process.initialize(), list(np.float32(values)), [1.0] * 100).result
    np.testing.assert_allclose(found, [np.mean(values[29:71])], rtol=1e-6)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: rules.trimmed_mean(0.5), "`share` must be"),
        (lambda: rules.multi_krum(-1), "`num_bad` must be"),
        (lambda: rules.multi_krum(1, 0), "`num_kept` must be"),
        (lambda: rules.geometric_median(0), "`iterations` must be"),
        (lambda: rules.geometric_median(smoothing=0.0), "`smoothing` must be"),
        (lambda: rules.centered_clipping(0.0), "`radius` must be"),
    ],
)
def test_numbers_out_of_range_are_refused(write, message):
    with pytest.raises(ValueError, match=message):
        write()
