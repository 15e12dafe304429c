"""`federated_rule` as it is used inside a hand-written round."""

from collections import OrderedDict

import aggregation_twins as twins
import numpy as np
import pytest
import runtimes
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near

import aggregators
from aggregators import federated_rule, rule_state, rules, scores, weighting
from aggregators.core.score import score_layers
from aggregators.core.update import client_update, finite_tensors

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


BY_KL = rules.adaptive_mean(scores.kl_divergence, weighting.softmax(0.8, bound=20.0), layers=GROUPS)
OF_DELTAS = rules.adaptive_mean(
    scores.kl_divergence, weighting.power(-0.5, scale=None, floor=1e-9), layers="model"
)


def state_type(rule, model=MODEL):
    return tff.FederatedType(rule_state(rule, model).type_signature.result, tff.SERVER)


@pytest.fixture(scope="module")
def by_kl():
    @tff.federated_computation(state_type(BY_KL), SERVER, CLIENTS, NUMBER)
    def run(state, server, trained, examples):
        return federated_rule(BY_KL, trained, state, server_model=server, weight=examples)

    return run


@pytest.fixture(scope="module")
def of_deltas():
    @tff.federated_computation(state_type(OF_DELTAS), SERVER, CLIENTS)
    def run(state, server, deltas):
        return federated_rule(OF_DELTAS, deltas, state, server_model=server, value_is="delta")

    return run


def test_types(by_kl, of_deltas):
    result = by_kl.type_signature.result
    assert result.result.is_equivalent_to(SERVER)
    number, count = tff.to_type(np.float32), tff.to_type(np.int32)
    layers = tff.to_type(OrderedDict([("1+0", np.float32), ("2", np.float32)]))
    found = result.measurements.member._asdict()
    counts = ("clients", "non_finite_clients", "bad_score_clients", "zero_weight_clients")
    by_layer = ("score_mean", "score_min", "score_max", "effective_clients", "largest_weight")
    assert list(found) == [*counts, *by_layer, "scale", "unchanged"]
    assert all(found[name] == count for name in (*counts, "unchanged"))
    assert all(found[name].is_equivalent_to(layers) for name in (*by_layer, "scale"))
    result = of_deltas.type_signature.result
    assert result.result.is_equivalent_to(SERVER)
    assert all(result.measurements.member._asdict()[name] == number for name in by_layer)
    assert result.state.is_equivalent_to(state_type(OF_DELTAS))


def test_equals_numpy_over_rounds(by_kl):
    state = rule_state(BY_KL, MODEL)()
    typical = np.zeros(2)
    for seed in range(3):
        server, trained, examples = cohort(seed)
        output = by_kl(state, server, trained, examples)
        expected, found = mean_of(
            server,
            trained,
            examples,
            typical,
            twins.kl,
            lambda r: np.exp(-r / 0.8),
            GROUPS,
            bound=20.0,
        )
        for a, b in zip(output.result, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        shown = list(output.measurements["score_mean"].values())
        np.testing.assert_allclose(shown, found.mean(0), rtol=1e-4)
        # By the memory of a half, once there is something to remember; kept where nobody counts.
        typical = 0.5 * (typical + found.mean(0)) if seed else found.mean(0)
        np.testing.assert_allclose(output.state["typical_score"], typical, rtol=1e-4)
        assert output.state["round"] == seed + 1
        state = output.state
    skipped = by_kl(state, server, trained, [0.0] * len(trained))
    np.testing.assert_array_equal(skipped.state["typical_score"], state["typical_score"])


def test_deltas_are_scored_as_the_models_they_lead_to(of_deltas):
    server, trained, _ = cohort(7)
    deltas = [[s - t for s, t in zip(server, client, strict=True)] for client in trained]
    output = of_deltas(rule_state(OF_DELTAS, MODEL)(), server, deltas)
    expected, _ = mean_of(
        server, trained, np.ones(5), np.ones(1), twins.kl, lambda r: r**-0.5, ((0, 1, 2),)
    )
    for a, s, b in zip(output.result, server, expected, strict=True):
        np.testing.assert_allclose(s - a, b, rtol=1e-4, atol=1e-5)


def test_without_a_usable_client_the_model_is_the_servers_and_the_delta_zero(by_kl, of_deltas):
    server, trained, _ = cohort(8, size=2)
    for client in trained:
        client[2][0] = np.inf
    models = by_kl(rule_state(BY_KL, MODEL)(), server, trained, [1.0, 2.0])
    deltas = of_deltas(rule_state(OF_DELTAS, MODEL)(), server, trained)
    for model, delta, old in zip(models.result, deltas.result, server, strict=True):
        np.testing.assert_array_equal(model, old)
        np.testing.assert_array_equal(delta, np.zeros_like(old))
    for output in (models, deltas):
        assert output.measurements["unchanged"] == 1
        assert output.measurements["non_finite_clients"] == 2
        for name in ("score_mean", "score_min", "score_max"):
            assert np.all(np.isnan(tf.nest.flatten(output.measurements[name])))
        for name in ("effective_clients", "largest_weight"):
            np.testing.assert_array_equal(tf.nest.flatten(output.measurements[name]), 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("score", scores.ALL, ids=lambda score: score.name)
def test_no_score_hides_a_client_that_is_not_finite(score, bad):
    for position in range(len(SHAPES)):
        ((_, (client,), _), zeros) = cohort(3, size=1), [np.zeros(s, np.float32) for s in SHAPES]
        client[position].flat[-1] = bad
        # Against a model, the zeros included that a model may hold.
        for old in (cohort(3)[0], zeros):
            for groups in (((0,), (1,), (2,)), ((0, 1, 2),)):
                found = score_layers(score, old, client, groups)
                delta = [a - b for a, b in zip(old, client, strict=True)]
                update = client_update(delta, tf.constant(3.0), scores=found)
                assert update.non_finite
                sent = [*update.delta, update.weight, update.scores]
                assert all(np.all(tensor == 0.0) for tensor in sent)


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


@pytest.mark.parametrize("score", scores.ALL, ids=lambda score: score.name)
def test_that_limit_holds_for_double_precision_under_every_score(score):
    double = tff.to_type([(np.float64, [2])])
    rule = rules.adaptive_mean(score, weighting.softmax(scale=1.0))

    @tff.federated_computation(
        state_type(rule, double),
        tff.FederatedType(double, tff.SERVER),
        tff.FederatedType(double, tff.CLIENTS),
    )
    def run(state, server, trained):
        return federated_rule(rule, trained, state, server_model=server).measurements

    clients = [[np.array([size, 1.0])] for size in (1e19, 1e30, 1.0)]
    measured = run(rule_state(rule, double)(), [np.ones(2)], clients)
    assert (measured["clients"], measured["non_finite_clients"]) == (2, 1)


def test_two_workers_give_the_same_mean(by_kl):
    server, trained, examples = cohort(9)
    state = rule_state(BY_KL, MODEL)()
    state["typical_score"] = np.float32([1e-2, 1e-3])
    here = by_kl(state, server, trained, examples)
    with runtimes.two_workers():
        there = by_kl(state, server, trained, examples)
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        tuple(here),
        tuple(there),
    )


@pytest.mark.parametrize("chosen", ["softmax", "power"])
@pytest.mark.parametrize("kind", ["distances", "accuracies"])
def test_scores_of_the_clients_own_take_the_scores_place(kind, chosen):
    """Whoever is best has the largest weight, whichever way the scores go."""
    chosen, raw_of = {
        "softmax": (weighting.softmax(0.5, scale=1.0), lambda d: np.exp(-d / 0.5)),
        "power": (weighting.power(-1.0, scale=1.0, floor=0.01), lambda d: 1 / np.maximum(d, 0.01)),
    }[chosen]
    rule = rules.adaptive_mean(scores.kl_divergence, chosen, layers="model")

    @tff.federated_computation(state_type(rule), SERVER, CLIENTS, NUMBER)
    def run(state, server, trained, own):
        return federated_rule(
            rule, trained, state, server_model=server, scores=own, scores_are=kind
        )

    server, trained, _ = cohort(11, size=6)
    # One a rounding above the largest, and two that are none: their clients do not count.
    own = [0.9, 0.2, 0.6, 1.0 + 1e-7, -0.5, np.nan if kind == "distances" else 85.0]
    output = run(rule_state(rule, MODEL)(), server, trained, own)
    distances = np.array(own[:4])
    if kind == "accuracies":
        distances = np.maximum(1.0 - distances, 0.0)
    raw = raw_of(distances)
    assert np.argmax(raw) == {"distances": 1, "accuracies": 3}[kind]
    expected = twins.weighted_mean(trained[:4], raw[:, None], ((0, 1, 2),))
    for a, b in zip(output.result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert (output.measurements["clients"], output.measurements["bad_score_clients"]) == (4, 2)
    np.testing.assert_allclose(output.measurements["score_mean"], distances.mean(), rtol=1e-6)


def test_a_gate_of_ones_own_works_inside_a_round():
    seen_rounds = rules.loss_gated(
        weighting.softmax(0.5, prefer="far", scale=1.0),
        score=scores.l2_distance,
        layers="model",
        gate=lambda seen: (
            tf.cast(seen.round, tf.float64) / 2.0 * tf.cast(seen.loss > 0.1, tf.float64)
        ),
    )

    @tff.federated_computation(state_type(seen_rounds), SERVER, CLIENTS, NUMBER, NUMBER)
    def run(state, server, trained, loss, examples):
        return federated_rule(
            seen_rounds, trained, state, server_model=server, weight=examples, loss=loss
        )

    state = rule_state(seen_rounds, MODEL)()
    for round_number, (loss, share) in enumerate([(1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.05, 0.0)]):
        server, trained, examples = cohort(20 + round_number)
        output = run(state, server, trained, [loss] * 5, examples)
        state = output.state
        found = np.array([[twins.l2(server, c)] for c in trained])
        n = np.array(examples)[:, None]
        adaptive = twins.weighted_mean(trained, n * np.exp(found / 0.5), ((0, 1, 2),))
        plain = twins.weighted_mean(trained, n, ((0, 1, 2),))
        for t, a, p in zip(output.result, adaptive, plain, strict=True):
            np.testing.assert_allclose(t, p + share * (a - p), rtol=1e-4, atol=1e-5)
        assert_near(output.measurements["share"], share)
        assert output.measurements["gate_out_of_range"] == 0


@pytest.mark.parametrize(("value", "share"), [(1.5, 1.0), (-0.1, 0.0), (np.nan, 0.0)])
def test_a_gate_out_of_range_is_said(value, share):
    rule = rules.loss_gated(score=scores.l2_distance, gate=lambda seen: seen.loss * 0.0 + value)

    @tff.federated_computation(state_type(rule), CLIENTS, NUMBER)
    def run(state, deltas, loss):
        return federated_rule(rule, deltas, state, loss=loss, value_is="delta").measurements

    measured = run(rule_state(rule, MODEL)(), cohort(30)[1], [1.0] * 5)
    assert (measured["share"], measured["gate_out_of_range"]) == (share, 1)


RULE = rules.adaptive_mean(scores.l2_distance, weighting.softmax())
GATED = rules.loss_gated(score=scores.l2_distance)


def _run(rule=RULE, **changes):
    def run(state, server, trained):
        return federated_rule(rule, trained, state, **{"server_model": server, **changes})

    return run


def _at_clients(number):
    return tff.federated_value(number, tff.CLIENTS)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (_run("rule"), TypeError, "`rule` must be a `Rule`; found 'rule'"),
        (_run(server_model=None), ValueError, "`server_model` must be given"),
        (_run(value_is="update"), ValueError, "`value_is` must be"),
        (_run(GATED), TypeError, "`state` must be that of the rule"),
        (
            lambda state, server, trained: _run(loss=_at_clients(1.0))(state, server, trained),
            ValueError,
            "`loss` must be None for a rule whose `needs` leave it out",
        ),
        (
            lambda state, server, trained: _run(
                scores=_at_clients([1.0, 2.0]), scores_are="distances"
            )(state, server, trained),
            TypeError,
            "`scores` must be one number per client, or one per layer; found <float32,float32>",
        ),
        (
            lambda state, server, trained: _run(
                scores=tff.federated_value(1.0, tff.SERVER), scores_are="accuracies"
            )(state, server, trained),
            TypeError,
            "`scores` must be placed at tff.CLIENTS",
        ),
        (
            lambda state, server, trained: _run(scores=_at_clients(1.0))(state, server, trained),
            ValueError,
            '`scores_are` must be "distances", of which 0 is best, or "accuracies".*; found None',
        ),
        (_run(scores_are="distances"), ValueError, "`scores_are` must be None without `scores`"),
        (
            lambda state, server, trained: _run()(state, trained, trained),
            TypeError,
            "`server_model` must be placed at tff.SERVER",
        ),
        (
            lambda state, server, trained: _run()(state, server, server),
            TypeError,
            "`value` must be placed at tff.CLIENTS",
        ),
        (
            lambda state, server, trained: _run()(
                state, tff.federated_value(1.0, tff.SERVER), trained
            ),
            TypeError,
            "`value` and `server_model` must have one type",
        ),
    ],
)
def test_bad_arguments_are_explained(run, error, message):
    with pytest.raises(error, match=message):
        tff.federated_computation(run, [state_type(RULE), SERVER, CLIENTS])


def test_a_loss_that_a_rule_needs_must_be_given():
    with pytest.raises(ValueError, match="`loss` must be given to this rule"):
        tff.federated_computation(_run(GATED), [state_type(GATED), SERVER, CLIENTS])


NUMBERS = tff.to_type(np.float32)


@pytest.mark.parametrize(
    ("rule", "weight_type", "error", "message"),
    [
        (
            rules.adaptive_mean(scores.kl_divergence, weighting.softmax()),
            NUMBERS,
            ValueError,
            r"found that it needs kl_divergence \(which needs the server's model\)",
        ),
        (GATED, NUMBERS, ValueError, "needs training_loss"),
        (rules.q_fed_avg(1.0, 1.0), NUMBERS, ValueError, "needs initial_loss"),
        (rules.fed_nova(), NUMBERS, ValueError, "needs steps"),
        (RULE, tff.to_type([np.float32]), TypeError, "`weight_type` must be the type of one"),
    ],
)
def test_a_rule_whose_needs_are_not_met_cannot_be_built(rule, weight_type, error, message):
    with pytest.raises(error, match=message):
        aggregators.RuleFactory(rule).create(MODEL, weight_type)


def test_the_factory_drops_into_tffs_own_process():
    from problems import make_clients, model_fn

    sgd = tff.learning.optimizers.build_sgdm(0.1)
    theirs = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, sgd, model_aggregator=aggregators.RuleFactory(rules.fed_att())
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
        lambda a, b: assert_near(a, b, rtol=1e-5),
        *(p.get_model_weights(s) for p, s in zip((theirs, ours), states, strict=True)),
    )


MODEL_RULES = [
    rules.plain_mean(),
    rules.adaptive_mean(scores.kl_divergence, weighting.softmax(scale=1e-3)),
    rules.fed_att(0.8),
    rules.loss_gated(gate=lambda seen: 0.3 + 0.0 * seen.loss),
    rules.q_fed_avg(1.0, 0.5),
    rules.fed_nova(0.5),
]


@pytest.mark.parametrize("rule", MODEL_RULES, ids=lambda rule: "+".join(rule.needs.names) or "mean")
def test_models_and_deltas_lead_to_the_same_model(rule):
    @tff.federated_computation(state_type(rule), SERVER, CLIENTS, CLIENTS, NUMBER, NUMBER)
    def run(state, server, trained, deltas, steps, examples):
        options = {"server_model": server, "weight": examples}
        options |= {"loss": examples} if rule.needs.loss else {}
        options |= {"steps": steps} if rule.needs.steps else {}
        by_model = federated_rule(rule, trained, state, **options)
        by_delta = federated_rule(rule, deltas, state, value_is="delta", **options)
        return by_model.result, by_delta.result

    server, trained, examples = cohort(40)
    deltas = [[s - t for s, t in zip(server, client, strict=True)] for client in trained]
    steps = [1.0, 2.0, 3.0, 4.0, 5.0]
    model, delta = run(rule_state(rule, MODEL)(), server, trained, deltas, steps, examples)
    for m, s, d in zip(model, server, delta, strict=True):
        np.testing.assert_allclose(m, s - d, rtol=1e-5, atol=1e-6)
        assert np.abs(d).max() > 1e-3
