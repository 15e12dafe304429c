"""What would turn a rule into plain averaging, or another number, is an error or is counted."""

import copy
import functools
import pickle

import attrs
import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from problems import model_fn

import aggregators
from aggregators import Needs, Score, Weighting, hparam, rules, scores, weighting

SGD = tff.learning.optimizers.build_sgdm(0.1)
UPDATE = tff.to_type([(np.float32, [2]), (np.float32, [3])])
NUMBER = tff.to_type(np.float32)
SOFTMAX = weighting.softmax()


def factory(rule):
    return aggregators.RuleFactory(rule).create(UPDATE, NUMBER)


def by_update(function, chosen=SOFTMAX):
    return factory(rules.adaptive_mean(Score(function, needs="update"), chosen))


def by_rule(rule, **options):
    return factory(rules.adaptive_mean(scores.l2_distance, Weighting(rule, **options)))


def norm(server, client):
    return tf.norm(server[0] - client[0])


# What is written, the error, and what the message must say: the argument, what was found, the advice.
AT_CONSTRUCTION = {
    "a score of one argument": (
        lambda: Score(lambda server: server[0]),
        (
            TypeError,
            r"`score` must be a function of \(server, client\); found .* takes others .*`def score",
        ),
    ),
    "a score of three arguments": (
        lambda: rules.adaptive_mean(lambda a, b, c: a, SOFTMAX),
        (TypeError, r"`score` must be a function of \(server, client\); found .* takes others"),
    ),
    "a score of NumPy": (
        lambda: by_update(lambda s, c: np.linalg.norm(s[0] - c[0])),
        (
            TypeError,
            "`score` must be a function of TensorFlow operations; .* in TensorFlow operations",
        ),
    ),
    "a score of NumPy, on the model": (
        lambda: aggregators.build_fed_avg(
            model_fn, SGD, rule=rules.adaptive_mean(lambda s, c: np.max(np.exp(c[0])), SOFTMAX)
        ),
        (TypeError, "`score` must be a function of TensorFlow operations"),
    ),
    "a score that is a vector": (
        lambda: by_update(lambda s, c: s[0]),
        (TypeError, r"`score` must return one floating number per layer; found float32 of shape"),
    ),
    "a score that is a whole number": (
        lambda: by_update(lambda s, c: tf.constant(1)),
        (TypeError, "`score` must return one floating number per layer; found int32"),
    ),
    "a score of the model where only updates are": (
        lambda: factory(rules.adaptive_mean(norm, SOFTMAX)),
        (
            ValueError,
            r'needs norm \(which needs the server.s model\).*`Score\(f, needs="update"\)`',
        ),
    ),
    "a renamed KL where only updates are": (
        lambda: factory(
            rules.adaptive_mean(functools.partial(scores.kl_divergence), weighting.softmax())
        ),
        (ValueError, "which needs the server's model"),
    ),
    "a score's word that is none": (
        lambda: Score(norm, needs="delta"),
        (ValueError, '`needs` must be "model" or "update"; found'),
    ),
    "a rule of no argument": (
        lambda: Weighting(lambda: 1.0),
        (TypeError, r"`rule` must be a function of \(relative\); found .*`def rule\(relative\)`"),
    ),
    "a rule of NumPy": (
        lambda: by_rule(lambda r: np.exp(r)),
        (
            TypeError,
            "`rule` must map relative scores to log-weights; .* with TensorFlow operations",
        ),
    ),
    "a rule that gives one number for all layers": (
        lambda: by_rule(tf.reduce_sum),
        (TypeError, r"`rule` must return float64 of the shape it is given, \[2\]; found .*\(\)"),
    ),
    "a rule that gives another number of layers": (
        lambda: by_rule(lambda r: r[:1]),
        (TypeError, r"`rule` must return float64 of the shape it is given, \[2\]; found .*\(1,\)"),
    ),
    "a rule that gives single precision": (
        lambda: by_rule(lambda r: tf.cast(r, tf.float32)),
        (TypeError, "`rule` must return float64 of the shape it is given, .* found float32"),
    ),
    "a rule that multiplies with single precision": (
        lambda: by_rule(lambda r: r * tf.constant(2.0)),
        (TypeError, "`rule` must map relative scores .*float64"),
    ),
    "a rule that looks at a loss that nobody takes": (
        lambda: by_rule(lambda relative, seen: relative * seen.loss),
        (TypeError, "`rule` must map relative scores to log-weights"),
    ),
    "a function as the weighting": (
        lambda: rules.adaptive_mean(scores.l2_distance, tf.exp),
        (TypeError, r"`weighting` must be a `Weighting`; .*`Weighting\(rule=f\)`"),
    ),
    "a weighting that is not called": (
        lambda: rules.adaptive_mean(scores.l2_distance, weighting.softmax),
        (TypeError, "`weighting` must be a `Weighting`"),
    ),
    "no score": (
        lambda: rules.adaptive_mean(None, SOFTMAX),
        (TypeError, '`score` must be a score or "loss"'),
    ),
    "a place of the loss that nothing looks at": (
        lambda: rules.adaptive_mean(scores.l2_distance, SOFTMAX, loss_at="initial"),
        (ValueError, "`loss_at` must be None if neither score nor weighting uses the loss"),
    ),
    "q-FedAvg with the loss taken while training": (
        lambda: aggregators.compose_fed_avg(
            model_fn,
            aggregators.build_client_work(model_fn, SGD, Needs(loss="training")),
            aggregators.RuleFactory(rules.q_fed_avg(1.0, 0.1)),
        ),
        (ValueError, "`value_type` must hold what the rule needs, initial_loss"),
    ),
    "updates without the scores of the rule": (
        lambda: aggregators.compose_fed_avg(
            model_fn,
            aggregators.build_client_work(model_fn, SGD, Needs(steps=True)),
            aggregators.RuleFactory(rules.adaptive_mean(scores.kl_divergence, SOFTMAX)),
        ),
        (ValueError, "`value_type` must hold what the rule needs, kl_divergence; found steps"),
    ),
    "updates with the scores of another rule": (
        lambda: aggregators.compose_fed_avg(
            model_fn,
            aggregators.build_client_work(model_fn, SGD, Needs(score=scores.js_divergence)),
            aggregators.RuleFactory(rules.adaptive_mean(scores.kl_divergence, SOFTMAX)),
        ),
        (
            ValueError,
            "`value_type` must hold what the rule needs, kl_divergence; found js_divergence",
        ),
    ),
    "a gate of two numbers": (
        lambda: _gated(lambda seen: seen.scores),
        (TypeError, "`gate` must return one floating number or bool; found float64 of shape"),
    ),
    "a gate of NumPy": (
        lambda: _gated(lambda seen: np.float64(seen.loss)),
        (TypeError, "`gate` must be a function of a `Round`"),
    ),
    "a decrease for a gate that does not look at it": (
        lambda: rules.loss_gated(gate=lambda seen: seen.loss, min_decrease=0.1),
        (ValueError, "`min_decrease` must be 0 for your own gate"),
    ),
    "a number of a rule's own with a taken name": (
        lambda: Weighting(tf.negative, hparams={"decay": 1.0}),
        (ValueError, "`hparams` must map names, which must not be any of scale, bound, decay"),
    ),
    "a number of a rule that is text": (
        lambda: hparam("mine", "1", 0.0),
        (ValueError, "`mine` must be a finite number of at least 0; found '1'"),
    ),
    "a reduction of something else": (
        lambda: factory(
            attrs.evolve(
                rules.plain_mean(),
                reduction=lambda layers: aggregators.Reduction(lambda: 0.0, tf.add),
            )
        ),
        (TypeError, "`lift` must return the type of `zero`, float32; found that it returns <mean="),
    ),
    "a reduction that is none": (
        lambda: factory(attrs.evolve(rules.plain_mean(), reduction=lambda layers: tf.add)),
        (TypeError, "`reduction` must be a function that returns a `Reduction`; found"),
    ),
    "a state that is not the rule's": (
        lambda: factory(
            aggregators.Rule(
                rules.plain_mean().client,
                rules.plain_mean().reduction,
                lambda state, reduced: (
                    rules.plain_mean()
                    .server(state, reduced)
                    ._replace(state={"mine": tf.constant(0.0)})
                ),
                needs=Needs(layers="model"),
            )
        ),
        (ValueError, "`server` must return a state with the names of `initial_state`"),
    ),
}


def _gated(gate):
    rule = rules.loss_gated(score=scores.l2_distance, gate=gate)
    return aggregators.build_fed_avg(model_fn, SGD, rule=rule)


@pytest.mark.parametrize("name", AT_CONSTRUCTION)
def test_it_is_an_error_at_construction(name):
    write, (error, message) = AT_CONSTRUCTION[name]
    with pytest.raises(error, match=message):
        write()


CHOSEN = {
    "running": weighting.softmax(),
    "fixed": weighting.softmax(scale=1.0),
    "raw": weighting.softmax(scale=None),
    "bounded": weighting.softmax(scale=None, bound=4.0),
    "power": weighting.power(-1.0),
    "uniform": weighting.uniform(),
}


@pytest.mark.parametrize("name", selection.params([*CHOSEN], ["running", "raw", "power"]))
def test_a_negative_score_takes_its_client_out_and_is_counted(name):
    """A similarity with a minus, say, under any scale: no round in which it counts."""

    def minus(server, client):
        return tf.reduce_sum(server[0] - client[0])  # the sum of the update

    process = by_update(minus, CHOSEN[name])
    state = process.initialize()
    for _ in range(2):
        updates = [[np.float32([k, k]), np.ones(3, np.float32)] for k in (1.0, -1.0, 2.0)]
        output = process.next(state, updates, [1.0, 1.0, 1.0])
        state = output.state
        assert output.measurements["clients"] == 2
        assert output.measurements["bad_score_clients"] == 1
    everybody = process.next(state, [updates[1]] * 2, [1.0, 1.0])
    assert everybody.measurements["bad_score_clients"] == 2
    assert everybody.measurements["unchanged"] == 1
    assert np.all(np.isnan(everybody.result[0]))


def test_a_rule_that_gives_nobody_a_weight_leaves_the_round_unchanged_and_says_so():
    process = by_rule(lambda r: tf.fill(r.shape, tf.constant(-np.inf, tf.float64)), scale=None)
    updates = [[np.ones(2, np.float32), np.ones(3, np.float32)]] * 3
    output = process.next(process.initialize(), updates, [1.0, 2.0, 3.0])
    assert output.measurements["unchanged"] == 1
    assert output.measurements["clients"] == 0
    assert output.measurements["zero_weight_clients"] == 3
    assert np.all(np.isnan(output.result[0]))


def test_a_weighting_sees_layer_round_loss_and_its_own_numbers():
    def rule(relative, seen):
        layer = tf.cast(seen.layer, tf.float64)
        late = tf.cast(seen.round, tf.float64)
        return seen.hparams["slope"] * late * (1.0 + layer) * seen.loss - relative

    chosen = Weighting(rule, scale=None, times_examples=False, hparams={"slope": 0.5})
    made = rules.adaptive_mean(scores.l2_distance, chosen, loss_at="training")
    start = aggregators.rule_state(made, UPDATE)
    at_clients = tff.FederatedType(NUMBER, tff.CLIENTS)

    @tff.federated_computation(
        tff.FederatedType(start.type_signature.result, tff.SERVER),
        tff.FederatedType(UPDATE, tff.CLIENTS),
        at_clients,
    )
    def run(state, deltas, loss):
        return aggregators.federated_rule(made, deltas, state, loss=loss, value_is="delta")

    rng = np.random.default_rng(3)
    state = start()
    for late in range(3):
        deltas = [[np.float32(rng.normal(size=n)) for n in (2, 3)] for _ in range(3)]
        losses = [0.3, 0.9, 1.4]
        output = run(state, deltas, losses)
        state = output.state
        for layer in range(2):
            logs = [
                0.5 * late * (1 + layer) * loss - np.linalg.norm(d[layer])
                for d, loss in zip(deltas, losses, strict=True)
            ]
            shares = np.exp(logs) / np.sum(np.exp(logs))
            expected = sum(w * d[layer] for w, d in zip(shares, deltas, strict=True))
            np.testing.assert_allclose(output.result[layer], expected, rtol=1e-5, atol=1e-6)


def test_steps_that_no_client_can_have_done_take_it_out_and_are_counted():
    rule = rules.fed_nova(max_steps=10)
    start = aggregators.rule_state(rule, UPDATE)
    at_clients = tff.FederatedType(NUMBER, tff.CLIENTS)

    @tff.federated_computation(
        tff.FederatedType(start.type_signature.result, tff.SERVER),
        tff.FederatedType(UPDATE, tff.CLIENTS),
        at_clients,
    )
    def run(state, deltas, steps):
        return aggregators.federated_rule(rule, deltas, state, steps=steps, value_is="delta")

    deltas = [[np.full(n, k, np.float32) for n in (2, 3)] for k in (1.0, 2.0, 50.0, 70.0)]
    output = run(start(), deltas, [10.0, 5.0, 1e6, -3.0])
    expected = 0.5 * (10 + 5) * 0.5 * (1 / 10 + 2 / 5)
    assert_near(output.result[0], expected)
    assert output.measurements["bad_score_clients"] == 2


def test_a_client_that_shrinks_the_step_of_all_is_shown():
    rule = rules.q_fed_avg(1.0, 0.1)
    start = aggregators.rule_state(rule, UPDATE)

    @tff.federated_computation(
        tff.FederatedType(start.type_signature.result, tff.SERVER),
        tff.FederatedType(UPDATE, tff.CLIENTS),
        tff.FederatedType(NUMBER, tff.CLIENTS),
    )
    def run(state, deltas, loss):
        return aggregators.federated_rule(rule, deltas, state, loss=loss, value_is="delta")

    honest = [[np.full(n, 0.1, np.float32) for n in (2, 3)]] * 3
    huge = [[np.full(n, 1e6, np.float32) for n in (2, 3)]]
    for deltas, term in ((honest, 1 + 10 * 0.05), (honest + huge, 1 + 10 * 5e12)):
        measured = run(start(), deltas, [1.0] * len(deltas)).measurements
        np.testing.assert_allclose(measured["largest_term"], term, rtol=1e-5)
    assert measured["step"] < 1e-12


@pytest.mark.parametrize(
    "value",
    [
        weighting.softmax(0.3, bound=5.0),
        weighting.power(-0.5),
        scores.kl_divergence,
        Score(norm, needs="update"),
        rules.adaptive_mean(norm, SOFTMAX).needs,
        rules.loss_gated(min_decrease=0.1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_copy_equals_what_it_was_made_of(value):
    assert copy.deepcopy(value) == value
    if not isinstance(value, aggregators.Rule):  # whose functions have no names
        assert pickle.loads(pickle.dumps(value)) == value


def test_nothing_can_be_changed_in_a_value():
    for value, name in ((SOFTMAX, "bound"), (scores.l2_distance, "needs"), (Needs(), "steps")):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(value, name, None)
