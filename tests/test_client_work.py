"""Client work that measures what rules need, against TFF's own."""

import collections

import federated_twin as twin
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from problems import INPUT_SPEC, model_fn

import aggregators
from aggregators import Needs, rules, scores

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
BY_EXAMPLES = tff.learning.ClientWeighting.NUM_EXAMPLES


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"needs": scores.l2_distance}, TypeError, "`needs` must be the `needs` of a `Rule`"),
        ({"needs": Needs(layers=[(0,), (1,), (2,)])}, ValueError, "`layers` must hold each"),
        ({"client_weighting": None}, TypeError, "`client_weighting`"),
        ({"loop_implementation": "reduce"}, TypeError, "`loop_implementation`"),
        (
            {"optimizer": tf.keras.optimizers.SGD()},
            TypeError,
            "`client_optimizer`.*build_keras_optimizer",
        ),
    ],
)
def test_bad_arguments_of_scored_work_raise_when_it_is_built(arguments, error, message):
    with pytest.raises(error, match=message):
        aggregators.build_client_work(
            **{"model_fn": model_fn, "optimizer": SGD, "needs": Needs(), **arguments}
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "end"}, ValueError, "`loss_at` must be"),
        ({"layers": [(0, 0)]}, ValueError, "`layers` must"),
        ({"layers": "kernel"}, ValueError, "`layers` must"),
        ({"score": "kl"}, TypeError, "`score` must be a function"),
    ],
)
def test_needs_that_nobody_can_meet_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Needs(**arguments)


def test_updates_without_what_a_rule_needs_are_refused():
    sgd_work = aggregators.build_client_work(model_fn, SGD, Needs(loss="training"))
    with pytest.raises(
        ValueError, match=r"`rule` needs initial_loss, but .* come with training_loss"
    ):
        aggregators.compose_fed_avg(
            model_fn, sgd_work, aggregators.RuleFactory(rules.q_fed_avg(1.0, twin.RATE))
        )
    per_model = Needs(score=scores.kl_divergence, layers="model")
    kl_work = aggregators.build_client_work(model_fn, SGD, per_model)
    rule = rules.adaptive_mean(scores.kl_divergence, aggregators.weighting.uniform())
    with pytest.raises(ValueError, match=r"2 layers, but the updates hold scores of shape \(1,\)"):
        aggregators.compose_fed_avg(model_fn, kl_work, aggregators.RuleFactory(rule))


def test_halves_put_together_by_hand_equal_the_whole():
    rule = rules.loss_gated(min_decrease=0.1)
    work = aggregators.build_client_work(model_fn, SGD, rule.needs)
    halves = aggregators.compose_fed_avg(model_fn, work, aggregators.RuleFactory(rule))
    whole = aggregators.build_fed_avg(model_fn, SGD, rule=rule)
    states = [halves.initialize(), whole.initialize()]
    for _ in range(3):
        outputs = [
            p.next(s, twin.datasets(DATA)) for p, s in zip((halves, whole), states, strict=True)
        ]
        states = [output.state for output in outputs]
    for a, b in zip(*(s.global_model_weights.trainable for s in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert (
        outputs[0].metrics["aggregator"]["adaptive"] == outputs[1].metrics["aggregator"]["adaptive"]
    )


def test_an_update_that_blew_up_is_sent_as_zeros_and_said_to_be():
    data = twin.datasets(DATA)
    for rate, blown_up in ((0.1, False), (1e30, True)):
        # The loss is that of the weights training starts from, and finite either way.
        work = aggregators.build_client_work(
            model_fn, tff.learning.optimizers.build_sgdm(rate), Needs(loss="initial")
        )
        weights = tff.learning.models.ModelWeights.from_model(model_fn())
        weights = tf.nest.map_structure(lambda variable: variable.numpy(), weights)
        output = work.next(work.initialize(), [weights] * len(data), data)
        for result in output.result:
            assert result.update.non_finite == blown_up
            assert (result.update_weight == 0.0) == blown_up
            assert all(np.all(tensor == 0.0) == blown_up for tensor in result.update.delta)


def test_a_model_function_that_makes_no_model_is_refused():
    with pytest.raises(TypeError, match="`model_fn` must make"):
        aggregators.build_client_work(lambda: 1, SGD, Needs())


class Branching(tff.learning.models.VariableModel):
    """A model written by hand, with Python's own `if` in its forward pass."""

    def __init__(self):
        self._w = tf.Variable(tf.ones([3, 2]))
        self._examples = tf.Variable(0.0, trainable=False)

    trainable_variables = property(lambda self: [self._w])
    non_trainable_variables = property(lambda self: [])
    local_variables = property(lambda self: [self._examples])
    input_spec = property(lambda self: INPUT_SPEC)

    def predict_on_batch(self, x, training=True):
        predictions = x @ self._w
        if training and tf.reduce_sum(predictions) > 0:
            predictions *= 0.5
        return predictions

    def forward_pass(self, batch_input, training=True):
        predictions = self.predict_on_batch(batch_input["x"], training)
        self._examples.assign_add(tf.cast(tf.shape(predictions)[0], tf.float32))
        return tff.learning.models.BatchOutput(
            loss=tf.reduce_mean((predictions - batch_input["y"]) ** 2),
            predictions=predictions,
            num_examples=tf.shape(predictions)[0],
        )

    def report_local_unfinalized_metrics(self):
        return collections.OrderedDict(examples=[self._examples])

    def metric_finalizers(self):
        return collections.OrderedDict(examples=lambda values: values[0])

    def reset_metrics(self):
        self._examples.assign(0.0)


@pytest.mark.parametrize("loop", tff.learning.LoopImplementation)
@pytest.mark.parametrize("loss_at", ["training", "initial"])
def test_models_with_pythons_control_flow_train_as_in_tffs_client_work(loop, loss_at):
    class Wrapped(Branching):
        """TFF's own client work does not understand it otherwise."""

        forward_pass = tf.function(Branching.forward_pass)

    theirs = tff.learning.templates.build_model_delta_client_work(Wrapped, SGD, BY_EXAMPLES)
    ours = aggregators.build_client_work(
        Branching, SGD, Needs(loss=loss_at), loop_implementation=loop
    )
    weights = [tff.learning.models.ModelWeights([np.ones([3, 2], np.float32)], [])] * len(DATA)
    expected = theirs.next(theirs.initialize(), weights, twin.datasets(DATA))
    found = ours.next(ours.initialize(), weights, twin.datasets(DATA))
    for a, b, (x, y) in zip(found.result, expected.result, DATA, strict=True):
        np.testing.assert_allclose(a.update.delta, b.update, rtol=1e-5)
        if loss_at == "initial":
            np.testing.assert_allclose(
                a.update.measured["initial_loss"],
                np.mean((x.sum(1, keepdims=True) - y) ** 2),
                rtol=1e-5,
            )
    assert found.measurements["train"] == expected.measurements["train"]
