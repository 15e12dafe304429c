"""Clients train as plain TFF's do on data that shuffle, whatever a rule has them measure besides."""

import collections
import functools
import itertools
import math

import federated_twin as twin
import numpy as np
import pytest
import rule_contracts as contracts
import selection
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from problems import INPUT_SPEC, model_fn

import aggregators
from aggregators import ExampleClipping, Needs, rules

SGD = tff.learning.optimizers.build_sgdm(0.1, momentum=0.5)
DATA = twin.make_data()
NAMES = list("abcd")
MODELS = {"functional": twin.functional_model(), "variable": model_fn}


def shuffled():
    """Each pass over a client's data comes in an order of its own."""
    return [
        tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y))
        .shuffle(len(x), seed=seed)
        .repeat(2)
        .batch(twin.BATCH)
        for seed, (x, y) in enumerate(DATA)
    ]


def only_looks(rule):
    """A rule whose clients measure what another one needs, and whose update is the plain mean."""

    def client(update, state):
        del state
        weight = update.weight
        return weight, tuple(tf.cast(weight, x.dtype) * x for x in update.delta)

    def zero(layers):
        return tf.zeros([], tf.float64), tuple(tf.zeros(s.shape, s.dtype) for s in layers.specs)

    def server(state, reduced):
        own = collections.OrderedDict((name, x) for name, x in state.items() if name not in given)
        weight, sums = reduced
        update = [x / tf.cast(weight, x.dtype) for x in sums]
        return aggregators.RuleResult(own, update, {}, weight <= 0)

    given = {"round", *rule.hparams}
    return aggregators.Rule(
        client,
        lambda layers: aggregators.Reduction(
            lambda: zero(layers), lambda a, b: tf.nest.map_structure(tf.add, a, b)
        ),
        server,
        needs=rule.needs,
        initial_state=rule.initial_state,
        hparams=rule.hparams,
    )


def _measured(rule):
    """All that clients measure for a rule, as a name."""
    names, stateful = list(rule.needs.names), rule.needs.stateful_client
    if stateful:
        asked = ("initial_gradient", "mean_gradient")
        names += ["state", *(name for name in asked if getattr(stateful, name))]
    return "+".join(names) or "nothing"


# All that clients can be asked for after they have trained: by two rules in one, in every way to train.
ASKING = rules.scaffold(4, option="I", rule=rules.jury_mean())
# The package's rules, one for each set of things that clients measure for them.
RULES = [
    *(case.rule for case in contracts.CASES),
    rules.scaffold(4),
    rules.fed_dyn(4, 1e-9, rule=rules.loss_gated(loss_at="initial")),
    rules.kept_optimizer(),
]
RULES = {_measured(rule): rule for rule in RULES}
WAYS = list(itertools.product(MODELS, tff.learning.LoopImplementation))
CASES = {f"everything-{kind}-{loop.name}": (ASKING, kind, loop) for kind, loop in WAYS}
CASES |= {name: (rule, *way) for (name, rule), way in zip(RULES.items(), itertools.cycle(WAYS))}
QUICK = ["everything-functional-DATASET_ITERATOR", "everything-variable-DATASET_REDUCE"]
QUICK += ["initial_loss"]


def trained(process, rounds, states=None):
    state = process.initialize()
    for _ in range(rounds):
        if states is None:
            output = process.next(state, shuffled())
        else:
            with states.cohort(NAMES, shuffled()) as cohort:
                output = process.next(state, cohort)
        state = output.state
    return state.global_model_weights.trainable, output.metrics["client_work"]


@functools.cache
def tffs(kind, loop, rounds):
    process = tff.learning.algorithms.build_weighted_fed_avg(
        MODELS[kind], SGD, loop_implementation=loop
    )
    return trained(process, rounds)


@pytest.mark.parametrize(("rule", "kind", "loop"), selection.params(CASES, QUICK, unpack=True))
def test_weights_and_metrics_are_tffs_whatever_is_measured(rule, kind, loop):
    process = aggregators.build_fed_avg(
        MODELS[kind], SGD, rule=only_looks(rule), loop_implementation=loop
    )
    if rule.needs.stateful_client is None:
        rounds, (weights, metrics) = 2, trained(process, 2)
    else:
        # From the second round on what clients keep has its part in their training.
        with aggregators.ClientStates(NAMES) as states:
            rounds, (weights, metrics) = 1, trained(process, 1, states)
    expected, their_metrics = tffs(kind, loop, rounds)
    assert_near(list(weights), list(expected))
    assert_near(metrics, their_metrics)


@pytest.mark.parametrize(
    ("kind", "loop"), [WAYS[0], pytest.param(*WAYS[3], marks=pytest.mark.slow)]
)
def test_examples_that_nothing_clips_train_as_tffs(kind, loop):
    process = aggregators.build_fed_avg(
        MODELS[kind],
        SGD,
        rule=only_looks(rules.q_fed_avg(1.0, 0.1)),
        loop_implementation=loop,
        example_clipping=ExampleClipping(math.inf),
    )
    weights, _ = trained(process, 2)
    assert_near(list(weights), list(tffs(kind, loop, 2)[0]), 1e-5)


def test_the_initial_loss_is_that_of_all_initial_weights():
    """Training moves the averages of a batch normalisation, which the pass after it must not see."""

    def keras_model():
        return tf.keras.Sequential(
            [
                tf.keras.layers.InputLayer((3,)),
                tf.keras.layers.BatchNormalization(momentum=0.1),
                tf.keras.layers.Dense(2, kernel_initializer="ones"),
            ]
        )

    loss = tf.keras.losses.MeanSquaredError()
    work = aggregators.build_client_work(
        lambda: tff.learning.models.from_keras_model(keras_model(), loss, INPUT_SPEC),
        SGD,
        Needs(loss="initial"),
    )
    model = keras_model()
    weights = tff.learning.models.ModelWeights(
        *(
            [v.numpy() for v in group]
            for group in (model.trainable_variables, model.non_trainable_variables)
        )
    )
    output = work.next(work.initialize(), [weights] * len(DATA), shuffled())
    for result, (x, y) in zip(output.result, DATA, strict=True):
        expected = loss(y, model(x, training=False))
        np.testing.assert_allclose(result.update.measured["initial_loss"], expected, rtol=1e-5)
