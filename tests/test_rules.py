"""Laws that every aggregation rule keeps, in TFF's runtime."""

import contextlib
import inspect

import numpy as np
import pytest
import rule_contracts as contracts
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff
import test_stateful_clients
from nearness import assert_near

import aggregators
from aggregators import rules, scores, weighting

SAMPLES = ("sample_clients", "sample_counted", "sample_scores", "sample_weights")
BY_NAME = {case.name: case for case in contracts.CASES}
every_rule = pytest.mark.parametrize("case", selection.params(BY_NAME, contracts.QUICK))


def assert_same(found, expected, rtol=2e-5):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_no_public_rule_is_missing_from_the_table():
    weightings = {
        name
        for name, member in vars(weighting).items()
        if inspect.isfunction(member)
        and inspect.signature(member).return_annotation is weighting.Weighting
    }
    assert weightings == {"softmax", "power", "uniform"}
    covered = {name for case in contracts.CASES for name in case.covers}
    # Rules whose clients keep a state go through whole processes alone.
    covered |= {name for name in test_stateful_clients.COVERED if not name.startswith("build_")}
    assert set(rules.__all__) | weightings == covered


# `test_jury.py` has more rounds of the first four; the others differ from a quick one by a number.
ELSEWHERE = {"redescending", "jury", "jury-direction", "jury-stride"}
ELSEWHERE |= {"softmax-far-fixed", "update-l2", "fed-nova", "loss-gated-fallen"}


@pytest.mark.parametrize("case", selection.params(BY_NAME, [*BY_NAME.keys() - ELSEWHERE]))
def test_equals_its_numpy_twin_over_rounds(case):
    cohorts = contracts.rounds(case, seed=1)
    memory = {}
    for output, (clients, weights) in zip(contracts.run(case, cohorts), cohorts, strict=True):
        assert_same(output.result, case.twin(clients, weights, memory))
        assert output.measurements["clients"] == len(clients)
        assert output.measurements["non_finite_clients"] == 0
        assert output.measurements["unchanged"] == 0


@every_rule
def test_the_order_of_clients_does_not_matter(case):
    cohorts = contracts.rounds(case, seed=2)
    turned = [(clients[::-1], weights[::-1]) for clients, weights in cohorts]
    for a, b in zip(contracts.run(case, cohorts), contracts.run(case, turned), strict=True):
        assert_same(a.result, b.result, rtol=1e-5)


@every_rule
def test_bad_clients_leave_no_trace_but_in_the_measurements(case):
    cohorts = contracts.rounds(case, seed=3)
    dirty = []
    for clients, weights in cohorts:
        rng = np.random.default_rng(len(clients))
        bad = [contracts.client(rng, case.num_layers) for _ in range(4)]
        bad[0]["delta"][0][0, 0] = np.nan
        bad[1]["delta"][2][1] = np.inf
        # The third has a weight that is no number, the fourth has no examples.
        dirty.append(([bad[0], *clients, *bad[1:]], [1.0, *weights, 5.0, np.nan, 0.0]))
    for clean, found in zip(contracts.run(case, cohorts), contracts.run(case, dirty), strict=True):
        assert_same(found.result, clean.result, rtol=1e-6)
        assert found.measurements["non_finite_clients"] == 3
        assert found.measurements["zero_weight_clients"] == 1
        dirty_ones = contracts.flat(found.measurements)
        for name, number in contracts.flat(clean.measurements).items():
            if name not in ("non_finite_clients", "zero_weight_clients", *SAMPLES):
                assert_near(dirty_ones[name], number, rtol=1e-5, err_msg=name)


@every_rule
def test_without_a_usable_client_the_result_is_nan_and_it_is_said(case):
    (before, after) = contracts.rounds(case, seed=4, sizes=(3, 3))
    bad, _ = contracts.rounds(case, seed=5, sizes=(3, 3))
    for clients in bad[0]:
        clients["delta"][1][:] = np.nan
    through_bad = contracts.run(case, [before, (bad[0], [3.0, 2.0, 1.0]), after])
    through_none = contracts.run(case, [before, (before[0], [0.0] * 3), after])
    without = contracts.run(case, [before, after])
    for outputs, non_finite in ((through_bad, 3), (through_none, 0)):
        # TFF's finalizers leave model and optimizer alone for NaN; zeros they would take for a step.
        assert all(np.all(np.isnan(tensor)) for tensor in outputs[1].result)
        assert outputs[1].measurements["unchanged"] == 1
        assert outputs[1].measurements["clients"] == 0
        assert outputs[1].measurements["non_finite_clients"] == non_finite
        assert np.all(np.isnan(contracts.flat(outputs[1].measurements)["score_mean"]))
        # What is carried on is what was there before.
        assert_same(outputs[2].result, without[1].result, rtol=1e-6)


@every_rule
def test_one_client_is_its_own_mean(case):
    ((clients, weights),) = contracts.rounds(case, seed=6, sizes=(1,))
    if case.fewest > 1:
        with pytest.raises(Exception, match=rf"at least\D*{case.fewest}\D.*found\D*1\D"):
            contracts.run(case, [(clients, weights)])
        return
    (output,) = contracts.run(case, [(clients, weights)])
    expected = case.twin(clients, weights, {})
    assert_same(output.result, expected)
    stepping = {"q_fed_avg", "fed_att", "redescending_mean", "jury_mean", "centered_clipping"}
    if not stepping & set(case.covers):  # whose steps are no mean's
        assert_same(output.result, clients[0]["delta"])
    measured = contracts.flat(output.measurements)
    assert_near(measured["effective_clients"], 1.0)
    assert_near(measured["largest_weight"], 1.0)


@every_rule
def test_extreme_values_never_overflow(case):
    first, ((clients, weights)) = contracts.rounds(case, seed=7, sizes=(3, 4))
    clients[0]["scores"][:] = 3e38
    clients[1]["scores"][:] = 1e-45
    clients[2]["scores"][:] = 0.0
    clients[0]["loss"] = np.float32(1e30)
    clients[1]["loss"] = np.float32(1e-30)
    for tensor in clients[2]["delta"]:
        tensor[:] = 0.0
    clients[3]["delta"][0][:] = 1e38
    weights[1], weights[2] = 1e30, 1e-30
    output = contracts.run(case, [first, (clients, weights)])[1]
    assert all(np.all(np.isfinite(tensor)) for tensor in output.result)
    # Scores and shares of the 1e38 update may overflow; then the client is out, and counted.
    measured = contracts.flat(output.measurements)
    out = measured["non_finite_clients"] + measured["bad_score_clients"]
    assert measured["clients"] + out == 4
    assert np.all(measured["largest_weight"] <= 1.0 + 1e-6)


@pytest.mark.parametrize("name", ["uniform", "plain"])
def test_uniform_weights_equal_tffs_own_mean(name):
    (case,) = (case for case in contracts.CASES if case.name == name)
    tff_mean = tff.aggregators.MeanFactory().create(contracts.DELTA_TYPE, contracts.WEIGHT_TYPE)
    for clients, weights in contracts.rounds(case, seed=8):
        theirs = tff_mean.next(tff_mean.initialize(), [c["delta"] for c in clients], weights)
        (ours,) = contracts.run(case, [(clients, weights)])
        assert_same(ours.result, theirs.result, rtol=2e-6)


def test_measurements_equal_numpy():
    case = next(case for case in contracts.CASES if case.name == "softmax-near")
    cohorts = contracts.rounds(case, seed=9, sizes=(3, 4))
    cohorts[1][1][2] = 0.0
    second = contracts.flat(contracts.run(case, cohorts)[1].measurements)
    typical = np.mean([c["scores"] for c in cohorts[0][0]], 0, np.float64)
    kept = [(c["scores"], n) for c, n in zip(*cohorts[1], strict=True) if n > 0]
    found = np.array([s for s, _ in kept], np.float64)
    w = np.exp(-found / typical / 0.7) * np.array([[n] for _, n in kept])
    expected = {
        "clients": 3,
        "score_mean": found.mean(0),
        "score_min": found.min(0),
        "score_max": found.max(0),
        "effective_clients": w.sum(0) ** 2 / (w**2).sum(0),
        "largest_weight": (w / w.sum(0)).max(0),
        "scale": typical,
        "sample_clients": 2,
    }
    for name, number in expected.items():
        assert_near(second[name], number, rtol=1e-5, err_msg=name)
    # The first two clients of the cohort, in its order; the third, of weight 0, is beyond the sample.
    np.testing.assert_array_equal(second["sample_counted"], [True, True])
    assert_near(second["sample_scores"], found[:2].T)
    assert_near(second["sample_weights"], (w / w.sum(0))[:2].T, rtol=1e-5)


@pytest.mark.parametrize("runtime", ["here", *runtimes.IN_PIECES])
def test_a_sample_has_a_row_for_every_client_in_order_and_says_who_counted(runtime):
    rule = rules.adaptive_mean(
        scores.l2_distance, weighting.softmax(scale=5.0, times_examples=False)
    )
    process = aggregators.RuleFactory(rule, sample_size=6).create(
        tff.to_type((np.float32, [2])), contracts.WEIGHT_TYPE
    )
    updates = [np.float32(x) for x in ([3, 4], [np.nan, 1], [0, 1], [0, 2], [6, 8])]
    here = contextlib.nullcontext if runtime == "here" else lambda: runtimes.IN_PIECES[runtime](2)
    with here():
        measured = process.next(
            process.initialize(), updates, [1.0, 1.0, 3.0, 0.0, 1.0]
        ).measurements
    assert measured["sample_clients"] == 5
    order = [0, 1, 2, 3, 4]
    if runtime != "here" and measured["sample_scores"][0] != 5:
        order = [3, 4, 0, 1, 2]  # TFF merges the two pieces of a cohort as they are done
    raw = np.array([np.exp(-1), 0, np.exp(-0.2), 0, np.exp(-2)])
    for name, expected in (
        ("sample_counted", np.array([1, 0, 1, 0, 1])),
        ("sample_scores", np.array([5, 0, 1, 2, 10])),
        ("sample_weights", raw / raw.sum()),
    ):
        np.testing.assert_allclose(measured[name], [*expected[order], 0], rtol=1e-5)


def test_the_sample_of_a_gated_rule_lists_the_weights_that_were_used():
    case = next(case for case in contracts.CASES if case.name == "loss-gated")
    cohorts = contracts.rounds(case, seed=14, sizes=(2, 2, 2))
    for (clients, _), loss in zip(cohorts, (2.0, 1.0, 1.5), strict=True):
        for c in clients:
            c["loss"] = np.float32(loss)
    outputs = contracts.run(case, cohorts)
    assert [int(output.measurements["adaptive"]) for output in outputs] == [0, 0, 1]
    for output, (clients, _) in zip(outputs, cohorts, strict=True):
        used = contracts.flat(output.measurements)["sample_weights"]  # [layers, clients]
        for layer, tensor in enumerate(output.result):
            mean = sum(w * c["delta"][layer] for w, c in zip(used[layer], clients, strict=True))
            np.testing.assert_allclose(tensor, mean, rtol=1e-4, atol=1e-6)


def test_the_gate_is_reported():
    case = next(case for case in contracts.CASES if case.name == "loss-gated")
    cohorts = contracts.rounds(case, seed=10, sizes=(2, 2, 2, 2))
    # The loss falls by half, by 1% (less than asked for), and rises.
    for (clients, _), loss in zip(cohorts, (2.0, 1.0, 0.99, 1.5), strict=True):
        for c in clients:
            c["loss"] = np.float32(loss)
    outputs = contracts.run(case, cohorts)
    assert [int(output.measurements["adaptive"]) for output in outputs] == [0, 0, 1, 1]
    np.testing.assert_allclose(
        [float(output.measurements["loss"]) for output in outputs], [2.0, 1.0, 0.99, 1.5]
    )
    assert np.isnan(outputs[0].measurements["previous_loss"])


def test_the_gate_opens_for_a_rise_of_negative_losses():
    case = next(case for case in contracts.CASES if case.name == "loss-gated")  # needs a 5% fall
    cohorts = contracts.rounds(case, seed=12, sizes=(2, 2, 2))
    for (clients, _), loss in zip(cohorts, (-1.0, -0.97, -1.2), strict=True):
        for c in clients:
            c["loss"] = np.float32(loss)
    outputs = contracts.run(case, cohorts)
    assert [int(output.measurements["adaptive"]) for output in outputs] == [0, 1, 0]


def test_a_client_whose_score_has_no_number_is_counted_as_bad():
    nan_below_one = weighting.Weighting(lambda r: tf.sqrt(r - 1.0), scale=None)
    rule = rules.adaptive_mean(scores.l2_distance, nan_below_one)
    process = aggregators.RuleFactory(rule).create(
        tff.to_type((np.float32, [2])), contracts.WEIGHT_TYPE
    )
    updates = [np.float32([0.1, 0.1]), np.float32([3, 4]), np.float32([0, 1])]
    output = process.next(process.initialize(), updates, [1.0, 1.0, 1.0])
    near, far = np.exp(0), np.exp(2)
    np.testing.assert_allclose(
        output.result, np.array([3 * far, 4 * far + near]) / (far + near), rtol=1e-5
    )
    assert output.measurements["clients"] == 2
    assert output.measurements["bad_score_clients"] == 1
    assert output.measurements["non_finite_clients"] == 0
    assert output.measurements["zero_weight_clients"] == 0


@pytest.mark.parametrize("momentum", [0.99, 0.999])
def test_steps_of_high_momentum_do_not_cancel(momentum):
    (case,) = (case for case in contracts.CASES if case.name == "fed-nova")
    process = aggregators.RuleFactory(rules.fed_nova(momentum)).create(
        contracts.value_type(case), contracts.WEIGHT_TYPE
    )
    ((clients, weights),) = contracts.rounds(case, seed=13, sizes=(2,))
    clients[0]["steps"], clients[1]["steps"] = 1, 2
    measured = process.next(
        process.initialize(), *contracts.values(case, clients, weights)
    ).measurements
    np.testing.assert_allclose(measured["score_min"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(measured["score_max"], 2.0 + momentum, rtol=1e-6)


def test_a_mean_of_half_precision_is_taken_in_single():
    factory = aggregators.RuleFactory(rules.adaptive_mean(scores.l2_distance, weighting.uniform()))
    mixed = tff.to_type([(np.float16, [2]), (np.float64, [2])])
    process = factory.create(mixed, contracts.WEIGHT_TYPE)
    assert process.next.type_signature.result.result.member.is_equivalent_to(mixed)
    rng = np.random.default_rng(0)
    clients = [[rng.uniform(1, 2, 2).astype(np.float16), rng.uniform(1, 2, 2)] for _ in range(40)]
    result = process.next(process.initialize(), clients, [1.0] * 40).result
    half = np.mean([np.float64(c[0]) for c in clients], 0)
    np.testing.assert_array_equal(result[0], half.astype(np.float16))
    np.testing.assert_allclose(result[1], np.mean([c[1] for c in clients], 0), rtol=1e-14)


# Sums of such values leave float16, and so do their squares; in bfloat16 sums lose the small ones.
# Exactly float16 and bfloat16 both, so that the truth is that of what was sent.
HUGE = [np.float64(a) for a in ([61440, -57344, 64], [59392, -61440, 1], [65024, -49152, -2])]
HALVES = [np.float16, tf.bfloat16.as_numpy_dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_half_precision_updates_are_scored_and_averaged_in_single(dtype):
    chosen = weighting.softmax(1e4, prefer="far", scale=None)
    factory = aggregators.RuleFactory(rules.adaptive_mean(scores.l2_distance, chosen))
    updates = [[a.astype(dtype)] for a in HUGE]
    process = factory.create(tff.to_type([(dtype, [3])]), contracts.WEIGHT_TYPE)
    examples = [1.0, 2.0, 3.0]
    output = process.next(process.initialize(), updates, examples)
    norms = np.array([np.linalg.norm(np.float64(u[0])) for u in updates])
    assert norms.min() > 65504  # more than float16 holds
    assert output.measurements["clients"] == 3
    for name, expected in (("min", norms.min()), ("mean", norms.mean()), ("max", norms.max())):
        np.testing.assert_allclose(output.measurements[f"score_{name}"], expected, rtol=1e-5)
    shares = np.array(examples) * np.exp((norms - norms.max()) / 1e4)
    mean = sum(s * np.float64(u[0]) for s, u in zip(shares / shares.sum(), updates, strict=True))
    assert output.result[0].dtype == dtype
    # Rounded once, at the end, but for float32's own error.
    one_step = 2.0**-10 if dtype is np.float16 else 2.0**-7
    np.testing.assert_allclose(np.float64(output.result[0]), mean, rtol=0.51 * one_step)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_half_precision_models_are_weighed_by_their_divergence(dtype):
    server = np.float64([61440, 61440, 61440]).astype(dtype)
    models = [np.float64(a).astype(dtype) for a in ([61440, 61440, 61440], [65024, 61440, 57344])]
    kind = tff.to_type((dtype, [3]))
    rule = rules.adaptive_mean(scores.kl_divergence, weighting.softmax(scale=1e3))
    start = aggregators.rule_state(rule, kind)

    @tff.federated_computation(
        tff.FederatedType(start.type_signature.result, tff.SERVER),
        tff.FederatedType(kind, tff.SERVER),
        tff.FederatedType(kind, tff.CLIENTS),
    )
    def average(state, model, trained):
        return aggregators.federated_rule(rule, trained, state, server_model=model)

    output = average(start(), server, models)
    # softmax(server) is a third each, and log softmax(client) is the client less its largest.
    divergence = [0.0, float(np.max(np.float64(models[1])) - np.mean(np.float64(models[1])))]
    divergence[1] -= np.log(3)
    np.testing.assert_allclose(output.measurements["score_max"], divergence[1], rtol=1e-5)
    shares = np.exp(-np.array(divergence) / 1e3)
    mean = sum(s * np.float64(m) for s, m in zip(shares / shares.sum(), models, strict=True))
    assert output.result.dtype == dtype
    one_step = 2.0**-10 if dtype is np.float16 else 2.0**-7
    np.testing.assert_allclose(np.float64(output.result), mean, rtol=0.51 * one_step)
