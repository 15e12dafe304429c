"""What an author of a rule meets first: one function, values that print and compare, and mistakes."""

import copy
import pickle
from collections import OrderedDict

import attrs
import numpy as np
import pytest
import rule_contracts as contracts
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import Needs, Rule, RuleResult, hparam, rules, scores, weighted_mean, weighting

UPDATE = tff.to_type([(np.float32, [2]), (np.float32, [3])])
DELTAS = [[np.float32([k, -k]), np.full(3, k * k, np.float32)] for k in (1.0, 2.0, 4.0)]
EXAMPLES = [1.0, 3.0, 2.0]
FALLING = tf.keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.9)


def factory(rule, **options):
    return aggregators.RuleFactory(rule, **options).create(UPDATE, contracts.WEIGHT_TYPE)


def once(rule, deltas=DELTAS, weights=EXAMPLES):
    process = factory(rule)
    return process.next(process.initialize(), deltas, weights)


def mean(log_weight=lambda update, state: tf.math.log(update.weight), **options):
    return weighted_mean.rule(log_weight, name="mine", **options)


def by_norm(dtype, shape):
    """Clients by one over the norm of their updates, and `n`."""

    def log_weight(update, state):
        norm = tf.cast(tf.linalg.global_norm(update.delta), dtype)
        log = tf.math.log(tf.cast(update.weight, dtype)) - tf.math.log(norm)
        return tf.fill(shape, log)

    return log_weight


@pytest.mark.parametrize("dtype", [tf.float16, tf.float32, tf.float64])
@pytest.mark.parametrize(
    ("layers", "shape"), [("model", []), ("model", [1]), ("tensor", []), ("tensor", [2])]
)
def test_a_log_weight_is_one_number_or_one_per_layer_of_any_floating_type(dtype, layers, shape):
    found = once(mean(by_norm(dtype, shape), needs=Needs(layers=layers))).result
    norms = [np.sqrt(sum(np.sum(np.square(x)) for x in delta)) for delta in DELTAS]
    shares = np.array(EXAMPLES) / norms
    for position, tensor in enumerate(found):
        expected = sum(w * d[position] for w, d in zip(shares / shares.sum(), DELTAS, strict=True))
        np.testing.assert_allclose(tensor, expected, rtol=2e-3 if dtype == tf.float16 else 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_client_whose_log_weight_is_no_number_does_not_count_and_is_counted(bad):
    def log_weight(update, state):
        return tf.where(update.weight > 2.5, tf.cast(bad, tf.float64), tf.math.log(update.weight))

    output = once(mean(log_weight))
    np.testing.assert_allclose(
        output.result[0], (1 * DELTAS[0][0] + 2 * DELTAS[2][0]) / 3, rtol=1e-6
    )
    assert output.measurements["clients"] == 2
    assert output.measurements["bad_score_clients"] == 1


def test_a_rule_sees_what_it_asks_for_and_nothing_else():
    seen = []

    def log_weight(update, state):
        seen.append(update)
        return tf.math.log(update.weight)

    factory(mean(log_weight, needs=Needs(score=scores.l2_distance)))
    (update,) = seen
    assert update.scores.shape == [2]
    assert update.weight.dtype == tf.float64
    named = ("loss", "steps", "candidate_errors", "errors_are_losses", "sent")
    assert [getattr(update, name) for name in named] == [None] * 5


def test_a_rule_of_its_own_says_that_a_round_is_unchanged():
    def server(state, total):
        weight, deltas = total
        update = [x / tf.cast(weight, x.dtype) for x in deltas]
        return RuleResult({}, update, {"weight": weight}, unchanged=weight < 5.0)

    def zero(layers):
        return tf.zeros([], tf.float64), tuple(tf.zeros(s.shape, s.dtype) for s in layers.specs)

    total = Rule(
        lambda update, state: (
            update.weight,
            tuple(tf.cast(update.weight, x.dtype) * x for x in update.delta),
        ),
        lambda layers: aggregators.Reduction(
            lambda: zero(layers), lambda a, b: tf.nest.map_structure(tf.add, a, b)
        ),
        server,
    )
    process = factory(total)
    for weights, unchanged in ((EXAMPLES, 0), ([1.0, 1.0, 1.0], 1)):
        output = process.next(process.initialize(), DELTAS, weights)
        assert output.measurements == OrderedDict(weight=sum(weights), unchanged=unchanged)
        assert np.all(np.isnan(output.result[0])) == bool(unchanged)
    with pytest.raises(ValueError, match=r"`sample_size` must be 0 for rule\(\), which lists no"):
        factory(total, sample_size=3)


def test_what_finish_keeps_stays_where_no_client_counts():
    def finish(state, result):
        velocity = [tf.cast(state["momentum"], v.dtype) * v + x for v, x in _pairs(state, result)]
        kept = {"velocity": velocity, "done": state["done"] + 1}
        return result._replace(state=kept, update=velocity)

    def _pairs(state, result):
        return zip(state["velocity"], result.update, strict=True)

    process = factory(
        mean(
            hparams={"momentum": hparam("momentum", 0.5)},
            initial_state=lambda layers: {
                "velocity": [tf.zeros(spec.shape, spec.dtype) for spec in layers.specs],
                "done": tf.constant(0),
            },
            finish=finish,
        )
    )
    state, velocity, done = process.initialize(), 0.0, 0
    for number, weights in enumerate(([1.0, 3.0, 2.0], [0.0] * 3, [4.0, 0.0, 1.0])):
        output = process.next(state, DELTAS, weights)
        state = output.state
        if sum(weights):
            first = sum(w * d[0] for w, d in zip(weights, DELTAS, strict=True)) / sum(weights)
            velocity, done = 0.5 * velocity + first, done + 1
            np.testing.assert_allclose(output.result[0], velocity, rtol=1e-6)
        np.testing.assert_allclose(state["velocity"][0], velocity, rtol=1e-6)
        assert (state["done"], state["round"]) == (done, number + 1)


def _server(change):
    return mean(finish=lambda state, result: change(result))


MISTAKES = {
    "float32 times float64": (
        lambda: mean(
            lambda update, state: tf.linalg.global_norm(update.delta) * state["limit"],
            hparams={"limit": hparam("limit", 1.0)},
        ),
        TypeError,
        r"`log_weight` must be a function .* are float64: `tf.cast` .* float32",
    ),
    "a loss that was not asked for": (
        lambda: mean(lambda update, state: -update.loss),
        TypeError,
        r"`log_weight` must be .* `needs` does not ask for are None",
    ),
    "a log-weight for each tensor of one layer": (
        lambda: mean(lambda update, state: tf.zeros([2])),
        ValueError,
        r"`log_weight` must be one number, or one for each of the model's layers, 1; found .*\(2,\)",
    ),
    "a log-weight for one of two layers": (
        lambda: mean(lambda update, state: tf.zeros([1]), needs=Needs()),
        ValueError,
        r"`log_weight` must be one number, or one for each of the model's layers, 2; found .*\(1,\)",
    ),
    "a whole log-weight": (
        lambda: mean(lambda update, state: 1),
        TypeError,
        "`log_weight` must return a floating number, or one for each layer; found int32",
    ),
    "an update of a tensor less": (
        lambda: _server(lambda result: result._replace(update=result.update[:1])),
        ValueError,
        r"`server` must return its update as float32\[2\], float32\[3\]; found float32\[2\].$",
    ),
    "an update of another type": (
        lambda: _server(
            lambda result: result._replace(update=[tf.cast(x, tf.float64) for x in result.update])
        ),
        ValueError,
        r"`server` must return its update as float32\[2\], float32\[3\]; found float64\[2\]",
    ),
    "a result of two": (
        lambda: _server(lambda result: (result.state, result.update)),
        TypeError,
        "`finish` must be a function that returns a `RuleResult`; found",
    ),
    "a measured name that is not there": (
        lambda: _server(lambda result: result._replace(state=result.measurements["longest"])),
        TypeError,
        r"`finish` must be a function .* The error was KeyError: 'longest'",
    ),
    "a state that is forgotten": (
        lambda: mean(initial_state=lambda layers: {"longest": tf.constant(0.0)}),
        ValueError,
        r"`server` must return a state with the names of `initial_state`, \['longest'\]; found \[\]",
    ),
    "a state of another type": (
        lambda: mean(
            initial_state=lambda layers: {"longest": tf.constant(0.0)},
            finish=lambda state, result: result._replace(state={"longest": tf.constant(0)}),
        ),
        ValueError,
        r"`server` must return its state longest as float32\[\]; found int32\[\]",
    ),
    "a measurement of a taken name": (
        lambda: _server(lambda result: result._replace(measurements={"unchanged": tf.constant(0)})),
        ValueError,
        r"`server` must not use a name that .* measurements already have; found \['unchanged'\]",
    ),
    "a merge of one half": (
        lambda: attrs.evolve(
            mean(),
            reduction=lambda layers: attrs.evolve(
                mean().reduction(layers), merge=lambda a, b: a["mean"]
            ),
        ),
        TypeError,
        "`merge` must return the type of `zero`, <mean=.*; found that it returns <tensors=",
    ),
    "a merge that fails": (
        lambda: attrs.evolve(
            mean(), reduction=lambda layers: attrs.evolve(mean().reduction(layers), merge=tf.add)
        ),
        TypeError,
        "`merge` must be a function of two arguments in TensorFlow operations; found",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_first_mistake_is_told_in_words(name):
    make, error, words = MISTAKES[name]
    with pytest.raises(error, match=words):
        factory(make())


def everyone():
    near = weighting.softmax(0.5, bound=9.0)
    return [
        lambda: rules.plain_mean(),
        lambda: rules.adaptive_mean(scores.kl_divergence, near, layers={"all": [0, 1]}),
        lambda: rules.adaptive_mean(scores.js_divergence, near),
        lambda: rules.adaptive_mean("loss", weighting.power(FALLING)),
        lambda: rules.fed_att(norm="spectral"),
        lambda: rules.q_fed_avg(0.5, FALLING),
        lambda: rules.fed_nova(0.9),
        lambda: rules.fed_nova(0.9, max_steps=5),
        lambda: rules.loss_gated(near),
        lambda: rules.redescending_mean(cutoff=2.0),
        lambda: rules.jury_mean([("loss", near)], votes="direction"),
        lambda: rules.scaffold(4, option="I", rule=rules.jury_mean()),
        lambda: rules.fed_dyn(4, 0.1),
        lambda: rules.kept_optimizer(rules.fed_nova()),
        lambda: rules.coordinate_median(),
        lambda: rules.trimmed_mean(0.2),
        lambda: rules.multi_krum(1, num_kept=3),
        lambda: rules.geometric_median(5),
        lambda: rules.centered_clipping(2.0),
    ]


def test_rules_are_equal_by_their_calls_and_copies_and_pickles_are_equal():
    made = [make() for make in everyone()]
    assert {rule.name for rule in made} == set(rules.__all__)
    assert len(set(made)) == len(made)
    for make, rule in zip(everyone(), made, strict=True):
        for other in (make(), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
            assert other == rule
            assert hash(other) == hash(rule)
    assert [rule == other for rule in made for other in made].count(True) == len(made)
    same = tf.keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.9)
    assert rules.q_fed_avg(0.5, same) == rules.q_fed_avg(q=0.5, learning_rate=FALLING)
    assert rules.fed_nova(np.float64(0.9)) == rules.fed_nova(momentum=0.9)


def test_a_changed_rule_is_another_one():
    rule = rules.fed_nova(0.9)
    changed = attrs.evolve(rule, needs=attrs.evolve(rule.needs, loss="initial"))
    assert changed != rule
    assert copy.deepcopy(changed) == changed
    assert attrs.evolve(rule) == rule
    assert repr(changed) == "fed_nova(momentum=0.9)"  # its hyperparameters
    assert rule != "fed_nova(momentum=0.9, max_steps=None)"
    assert mean() != mean()  # two functions


def test_a_rule_prints_as_its_call():
    assert repr(rules.fed_nova(0.9)) == "fed_nova(momentum=0.9, max_steps=None)"
    shown = repr(rules.adaptive_mean(scores.kl_divergence, weighting.softmax(0.5), layers="model"))
    assert shown.startswith(
        "adaptive_mean(score=kl_divergence, weighting=Weighting(rule=_softmax_near, "
    )
    assert shown.endswith("layers='model', loss_at=None)")
    assert " at 0x" not in shown
