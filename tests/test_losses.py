"""Every loss that plain TFF trains is trained here, with the same numbers, by every rule."""

import collections

import federated_twin as twin
import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from problems import INPUT_SPEC

import aggregators
from aggregators import rules, scores, weighting

SGD = tff.learning.optimizers.build_sgdm(0.05)
DATA = twin.make_data()

# From the squared errors of a batch, `[examples, 2]`, to what a model may call its loss.
LOSSES = {
    "mean": tf.reduce_mean,
    "per example": lambda e: tf.reduce_mean(e, 1),
    "shape [1]": lambda e: tf.reduce_mean(e)[tf.newaxis],
    "summed": tf.reduce_sum,
    "per element": tf.identity,
    "double": lambda e: tf.cast(tf.reduce_mean(e), tf.float64),
}
COUNTS = {
    "int32": tf.shape,
    "int64": lambda p: tf.cast(tf.shape(p), tf.int64),
    "none": None,
}


def hand_written(loss, count, outputs=1):
    """A variable model with this loss and number of examples."""

    class Linear(tff.learning.models.VariableModel):
        def __init__(self):
            self._w = tf.Variable(0.1 * tf.ones([3, 2]), name="w")
            self._seen = tf.Variable(0.0, trainable=False)

        trainable_variables = property(lambda self: [self._w])
        non_trainable_variables = property(lambda self: [])
        local_variables = property(lambda self: [self._seen])
        input_spec = property(lambda self: INPUT_SPEC)

        def predict_on_batch(self, x, training=True):
            return x @ self._w

        def forward_pass(self, batch_input, training=True):
            predictions = self.predict_on_batch(batch_input["x"], training)
            self._seen.assign_add(tf.cast(tf.shape(predictions)[0], tf.float32))
            errors = (predictions - batch_input["y"]) ** 2
            several = {"a": predictions, "b": [predictions, errors]}
            return tff.learning.models.BatchOutput(
                loss=loss(errors),
                predictions=predictions if outputs == 1 else several,
                num_examples=count(predictions)[0] if count else None,
            )

        def report_local_unfinalized_metrics(self):
            return collections.OrderedDict(seen=[self._seen])

        def metric_finalizers(self):
            return collections.OrderedDict(seen=lambda values: values[0])

        def reset_metrics(self):
            self._seen.assign(0.0)

    return Linear


def functional(loss):
    """The same as a functional model."""

    @tf.function
    def predict(weights, x, training):
        return x @ weights[0][0]

    @tf.function
    def loss_fn(output, label, sample_weight=None):
        return loss((output - label) ** 2)

    return tff.learning.models.FunctionalModel(
        initial_weights=([0.1 * np.ones([3, 2], np.float32)], []),
        predict_on_batch_fn=predict,
        loss_fn=loss_fn,
        metrics_fns=(
            lambda: collections.OrderedDict(seen=tf.constant(0.0)),
            lambda state, labels, batch_output, sample_weight=None: collections.OrderedDict(
                seen=state["seen"] + tf.cast(tf.shape(labels)[0], tf.float32)
            ),
            lambda state: collections.OrderedDict(seen=state["seen"]),
        ),
        input_spec=INPUT_SPEC,
    )


MODELS = {
    **{f"variable, {name}": hand_written(loss, tf.shape) for name, loss in LOSSES.items()},
    **{f"examples {name}": hand_written(tf.reduce_mean, count) for name, count in COUNTS.items()},
    "several outputs": hand_written(tf.reduce_mean, tf.shape, outputs=2),
    **{f"functional, {name}": functional(loss) for name, loss in LOSSES.items()},
}


def shuffled():
    """Each pass over a client's data comes in an order of its own, in batches of other rows."""
    return [
        tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y))
        .shuffle(len(x), seed=seed)
        .batch(twin.BATCH)
        for seed, (x, y) in enumerate(DATA)
    ]


def trained(process, rounds=2):
    state = process.initialize()
    for _ in range(rounds):
        output = process.next(state, shuffled())
        state = output.state
    return state.global_model_weights.trainable, output.metrics


LOOPS = {
    f"{name}-{loop.name}": (name, loop)
    for name in MODELS
    for loop in tff.learning.LoopImplementation
}
# The loop does not look at the loss, and every loss is measured below. Those whose weighing shows.
QUICK = [
    "variable, summed-DATASET_REDUCE",
    "several outputs-DATASET_ITERATOR",
    "functional, per example-DATASET_REDUCE",
]


@pytest.mark.parametrize(("name", "loop"), selection.params(LOOPS, QUICK, unpack=True))
def test_plain_averaging_equals_tffs(name, loop):
    """Also by a rule that has clients look at their data once more, for weights that are all alike."""
    rule = rules.adaptive_mean("loss", weighting.uniform(), loss_at="initial")
    ours = aggregators.build_fed_avg(MODELS[name], SGD, rule=rule, loop_implementation=loop)
    theirs = tff.learning.algorithms.build_weighted_fed_avg(
        MODELS[name], SGD, loop_implementation=loop
    )
    (found, measured), (expected, their_metrics) = trained(ours), trained(theirs)
    assert_near(found[0], expected[0])
    assert measured["client_work"] == their_metrics["client_work"]
    assert measured["aggregator"]["clients"] == len(DATA)


EVERY_NEED = {
    "training loss": rules.loss_gated(score=scores.l2_distance, gate="fallen"),
    "initial loss": rules.adaptive_mean("loss", weighting.softmax(), loss_at="initial"),
    "initial loss alone": rules.q_fed_avg(1.0, 0.05),
    "steps": rules.fed_nova(),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_rule_takes_the_loss_as_the_mean_over_examples(name):
    """The measured losses are those of NumPy, whatever shape the model gives them."""
    errors_of = LOSSES[name.split(", ")[1]] if ", " in name else tf.reduce_mean
    work = aggregators.build_client_work(
        MODELS[name],
        tff.learning.optimizers.build_sgdm(0.0),
        aggregators.Needs(loss="initial", steps=True),
    )
    weights = tff.learning.models.ModelWeights([0.1 * np.ones([3, 2], np.float32)], [])
    types = work.next.type_signature.parameter[1].member
    weights = [tff.types.type_to_py_container(weights, types)] * len(DATA)
    output = work.next(work.initialize(), weights, twin.datasets(DATA))
    for result, data in zip(output.result, twin.datasets(DATA), strict=True):
        total, examples, batches = 0.0, 0, 0
        for batch in data:
            errors = (np.float64(batch["x"]) @ (0.1 * np.ones([3, 2])) - batch["y"]) ** 2
            total += np.mean(errors_of(errors)) * len(errors)
            examples += len(errors)
            batches += 1
        np.testing.assert_allclose(
            result.update.measured["initial_loss"], total / examples, rtol=1e-5
        )
        assert result.update.measured["steps"] == batches
        assert result.update_weight == examples


TRAINED = {
    f"{need}-{name}": (rule, name)
    for need, rule in EVERY_NEED.items()
    for name in ("variable, per example", "functional, shape [1]", "examples none")
}


@pytest.mark.parametrize(
    ("rule", "name"),
    # Each need once, each kind of model once.
    selection.params(TRAINED, [[*TRAINED][i] for i in (0, 4, 8, 9)], unpack=True),
)
def test_every_rule_trains_with_it(rule, name):
    _, measured = trained(aggregators.build_fed_avg(MODELS[name], SGD, rule=rule))
    found = measured["aggregator"]
    assert (found["clients"], found["non_finite_clients"], found["bad_score_clients"]) == (4, 0, 0)


def predicting_a_part_without_rows(kind):
    """TFF counts the rows of one prediction only; here the first of two is no row of examples."""
    if kind == "variable":

        class Two(hand_written(tf.reduce_mean, None)):
            def forward_pass(self, batch_input, training=True):
                output = super().forward_pass(batch_input, training)
                two = collections.OrderedDict(bias=tf.zeros([2]), y=output.predictions)
                return output._replace(predictions=two)

        return Two

    @tf.function
    def predict(weights, x, training):
        return collections.OrderedDict(bias=tf.zeros([2]), y=x @ weights[0][0])

    return tff.learning.models.FunctionalModel(
        initial_weights=([0.1 * np.ones([3, 2], np.float32)], []),
        predict_on_batch_fn=predict,
        loss_fn=tf.function(lambda output, label, sample_weight=None: tf.reduce_sum(output["y"])),
        input_spec=INPUT_SPEC,
    )


@pytest.mark.parametrize("kind", ["variable", "functional"])
def test_predictions_with_a_part_without_rows_are_no_number_of_examples(kind):
    process = aggregators.build_fed_avg(predicting_a_part_without_rows(kind), SGD)
    state = process.initialize()
    with pytest.raises(Exception, match=r"`predictions` must have a row.*\[bias:\] \[2\]"):
        process.next(state, twin.datasets(DATA))


def test_an_epoch_ending_in_an_empty_batch_has_a_loss():
    x, y = DATA[0]
    work = aggregators.build_client_work(
        functional(tf.reduce_mean),
        tff.learning.optimizers.build_sgdm(0.0),
        aggregators.Needs(loss="initial"),
    )
    columns = collections.OrderedDict(x=x[:4], y=y[:4])
    empty = collections.OrderedDict(x=x[:0], y=y[:0])
    spec = tf.data.DatasetSpec(INPUT_SPEC).element_spec
    data = tf.data.Dataset.from_generator(lambda: iter([columns, empty]), output_signature=spec)
    # A generator cannot be sent to the worker; its elements can.
    batches = [tf.data.Dataset.from_tensors(element) for element in data]
    joined = batches[0].concatenate(batches[1])
    weights = tff.learning.models.ModelWeights((0.1 * np.ones([3, 2], np.float32),), ())
    (result,) = work.next(work.initialize(), [weights], [joined]).result
    expected = np.mean((x[:4] @ (0.1 * np.ones([3, 2])) - y[:4]) ** 2)
    np.testing.assert_allclose(result.update.measured["initial_loss"], expected, rtol=1e-5)
