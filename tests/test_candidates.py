"""What clients score candidates by: every loss of Keras and a focal one, by default and told."""

import collections
import inspect
import pathlib
import re

import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import class_error, rules
from aggregators.core.candidates import Candidates, errors_of_batch, mean_errors, no_errors

ROOT = pathlib.Path(__file__).parent.parent
LABELS = np.int32([0, 2, 1, 2, 0])
LOGITS = np.float32(np.random.default_rng(3).normal(size=(5, 3)) * 2.0)
SHARES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
ERRORS = 1.0 - SHARES[np.arange(5), LABELS]
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
K = tf.keras.losses


def found_by(error, loss, predictions, labels, sizes=(2, 3)):
    """Mean error and whether it is the loss, of a client with batches of these sizes."""
    total, start = no_errors(), 0
    for size in sizes:
        z, y = (x[start : start + size] for x in (predictions, labels))
        batch = errors_of_batch(
            error, loss(y, z), tf.constant(z), tf.constant(y), tf.constant(size)
        )
        total = tf.nest.map_structure(tf.add, total, batch)
        start += size
    (mean,), is_loss = mean_errors([total])
    return float(mean), bool(is_loss)


def focal(from_logits, reduction):
    def loss(y, z):
        p = tf.nn.softmax(z) if from_logits else z
        p = tf.gather(p, y, axis=1, batch_dims=1)
        each = -((1.0 - p) ** 2.0) * tf.math.log(p)
        return {"none": tf.identity, "sum": tf.reduce_sum}.get(reduction, tf.reduce_mean)(each)

    return loss


# What a model of this loss predicts, and its labels: `{from_logits: predictions}, labels, error`.
BY_POSITION = ({True: LOGITS, False: SHARES}, LABELS, ERRORS)
BY_ROW = ({True: LOGITS, False: SHARES}, ONE_HOT, ERRORS)
Z, OF_TWO = LOGITS[:, :1], np.float32([[1], [0], [1], [1], [0]])
P = 1.0 / (1.0 + np.exp(-Z))
TWO = ({True: Z, False: P}, OF_TWO, np.where(OF_TWO > 0, 1.0 - P, P))
NUMBERS = ({None: LOGITS**2 + 0.1}, ONE_HOT + 0.5, None)
LOSSES = {
    "SparseCategoricalCrossentropy": BY_POSITION,
    "focal": BY_POSITION,
    "CategoricalCrossentropy": BY_ROW,
    "CategoricalFocalCrossentropy": BY_ROW,
    "KLDivergence": ({False: SHARES}, ONE_HOT, ERRORS),
    "BinaryCrossentropy": TWO,
    "BinaryFocalCrossentropy": TWO,
    **dict.fromkeys(
        [
            "CategoricalHinge",
            "Hinge",
            "SquaredHinge",
            "CosineSimilarity",
            "Huber",
            "LogCosh",
            "MeanAbsoluteError",
            "MeanAbsolutePercentageError",
            "MeanSquaredError",
            "MeanSquaredLogarithmicError",
            "Poisson",
        ],
        NUMBERS,
    ),
}
CASES = [(name, logits) for name, (found, *_) in LOSSES.items() for logits in found]


def loss_of(name, from_logits, reduction):
    if name == "focal":
        return focal(from_logits, reduction)
    kind = getattr(K, name)
    takes = "from_logits" in inspect.signature(kind).parameters
    return kind(reduction=reduction, **({"from_logits": from_logits} if takes else {}))


def table():
    """The guide's: by loss, what votes by default, and what if told."""
    text = (ROOT / "docs/pages/guides/rules.md").read_text()
    rows = re.search(r'\| loss \| `votes="model"` .*\n\|[-|]+\n((?:\|.*\n)+)', text)[1]
    found = {}
    for row in rows.splitlines():
        names, by_default, told = (cell.strip() for cell in row.strip("|").split("|"))
        found.update(dict.fromkeys(re.findall(r"`(\w+)`", names), (by_default, told)))
    return found


def test_the_table_has_every_loss_of_keras_and_is_that_of_the_guide():
    of_keras = {
        name
        for name, kind in vars(K).items()
        if inspect.isclass(kind) and issubclass(kind, K.Loss) and kind is not K.Loss
    }
    assert set(LOSSES) == {*of_keras, "focal"}
    told = table()
    assert set(told) == set(LOSSES)
    for name, (_, labels, errors) in LOSSES.items():
        assert told[name][0] == ("`1 - p`" if labels is LABELS else "the loss"), name
        assert told[name][1].startswith("no prob" if errors is None else "`1 - p`"), name


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "none"])
@pytest.mark.parametrize(("name", "from_logits"), CASES)
def test_every_loss_is_scored_as_the_table_says(name, from_logits, reduction):
    predictions, labels, errors = LOSSES[name]
    predictions = predictions[from_logits]
    raw = loss_of(name, from_logits, reduction)

    def loss(y, z):  # scaled, and with a penalty
        return 7.0 * raw(y, z) + 3.0

    found, is_loss = found_by(None, loss, predictions, labels)
    if labels is LABELS:
        np.testing.assert_allclose(found, errors.mean(), rtol=1e-5)
        column = found_by(None, nothing, predictions, labels[:, None])
        np.testing.assert_allclose(column[0], errors.mean(), rtol=1e-5)
    else:
        expected = sum(
            n * np.mean(loss(labels[at : at + n], predictions[at : at + n]))
            for at, n in ((0, 2), (2, 3))
        )
        np.testing.assert_allclose(found, expected / 5, rtol=1e-5)
    assert is_loss == (labels is not LABELS)
    if errors is not None:
        told = class_error(from_logits=from_logits)
        found, is_loss = found_by(told, loss, predictions, labels)
        np.testing.assert_allclose(found, errors.mean(), rtol=1e-5)
        assert not is_loss


def nothing(y, z):
    return tf.constant(1.25)


@pytest.mark.parametrize("outputs", [LOGITS, SHARES], ids=["logits", "shares"])
@pytest.mark.parametrize("left_out", [-1, 3, 255, -100, 2**31 - 1])
def test_labels_that_are_no_class_count_for_nothing(outputs, left_out):
    labels = LABELS.copy()
    labels[[1, 3]] = left_out
    assert found_by(None, nothing, outputs, labels)[0] == pytest.approx(ERRORS[[0, 2, 4]].mean())
    told = class_error(from_logits=outputs is LOGITS)
    assert found_by(told, nothing, outputs, labels)[0] == pytest.approx(ERRORS[[0, 2, 4]].mean())
    # Nor does a client of which no label counts.
    assert found_by(None, nothing, outputs, np.full(5, left_out, np.int32)) == (0.0, False)


def test_a_class_to_ignore_is_told():
    by_position, by_row = (
        found_by(class_error(from_logits=True, ignore_class=0), nothing, LOGITS, labels)[0]
        for labels in (LABELS, ONE_HOT)
    )
    assert by_position == pytest.approx(ERRORS[[1, 2, 3]].mean())
    assert by_row == pytest.approx(ERRORS[[1, 2, 3]].mean())
    padded = ONE_HOT * (LABELS > 0)[:, None]  # rows of zeros
    assert found_by(class_error(from_logits=True), nothing, LOGITS, padded)[0] == by_position


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_probabilities_are_known_in_every_precision(dtype):
    rng = np.random.default_rng(5)
    logits = tf.constant(rng.normal(size=(200, 60)) * 3.0, dtype)
    labels = tf.constant(rng.integers(0, 60, 200))
    try:
        shares = tf.nn.softmax(logits)
    except tf.errors.AbortedError:  # oneDNN has none in bfloat16 for processors without AVX-512
        shares = tf.cast(tf.nn.softmax(tf.cast(logits, tf.float32)), dtype)
    expected = 1.0 - tf.gather(tf.cast(shares, tf.float64), labels, axis=1, batch_dims=1)
    for outputs in (shares, logits):
        total = errors_of_batch(None, tf.constant(9.0), outputs, labels, tf.constant(200))
        (found,), is_loss = mean_errors([total])
        assert not is_loss
        assert float(found) == pytest.approx(float(tf.reduce_mean(expected)), rel=0.01)


def test_predictions_are_read_in_one_way_for_all_data_and_candidates():
    # One row of logits that adds up to 1 says nothing where others do not.
    chance = np.float32([[0.25, 0.75], [2.0, -1.0]])
    labels = np.int32([0, 0])
    p = np.exp(chance) / np.exp(chance).sum(1, keepdims=True)
    assert found_by(None, nothing, chance, labels, sizes=(1, 1))[0] == pytest.approx(
        1 - p[:, 0].mean()
    )
    one = [
        errors_of_batch(
            None, tf.constant(0.0), tf.constant(row[None]), tf.constant([0]), tf.constant(1)
        )
        for row in chance
    ]
    np.testing.assert_allclose(mean_errors(one)[0], 1 - p[:, 0], rtol=1e-5)
    # Alone they are what they look like.
    assert float(mean_errors(one[:1])[0][0]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("outputs", "expected", "is_loss"),
    [
        ([[0.0, 0.0]] * 2, 0.5, False),  # of a model of zeros, alike either way
        ([[0.9, 0.8], [0.3, 0.1]], 1.25, True),  # sigmoids, or small logits: nothing tells
        ([[0.9, 0.8], [0.3, 0.7]], 1.25, True),
        ([[0.45, 0.6], [0.3, 0.69]], 1.25, True),
        ([[0.5, 0.5], [0.0, 0.0]], 0.5, False),
    ],
)
def test_predictions_that_may_be_either_fall_back_to_the_loss_and_say_so(
    outputs, expected, is_loss
):
    found = found_by(None, nothing, np.float32(outputs), np.int32([1, 0]), sizes=(1, 1))
    assert found == (pytest.approx(expected), is_loss)


def test_words_of_a_sequence_are_classes_and_padding_is_none():
    outputs = np.stack([LOGITS, LOGITS[::-1]])
    labels = np.stack([LABELS, LABELS[::-1]])
    labels[1, 2:] = -1
    counted = [*ERRORS, *ERRORS[::-1][:2]]
    assert found_by(None, nothing, outputs, labels, sizes=(1, 1))[0] == pytest.approx(
        np.mean(counted)
    )


@pytest.mark.parametrize("labels", [np.float32(LOGITS), np.float32(LABELS), None])
def test_any_other_model_votes_by_its_loss(labels):
    given = None if labels is None else tf.constant(labels)
    total = errors_of_batch(None, tf.constant(1.25), tf.constant(LOGITS), given, tf.constant(5))
    (mean,), is_loss = mean_errors([total])
    assert (float(mean), bool(is_loss)) == (1.25, True)


def test_a_function_of_ones_own_leaves_out_by_a_weight_of_zero():
    def error(predictions, labels):
        weights = tf.cast(labels != 0, tf.float32) * 2.0
        return tf.where(labels == 0, np.nan, predictions[:, 0]), weights

    found, is_loss = found_by(error, nothing, LOGITS, LABELS)
    assert (found, is_loss) == (pytest.approx(LOGITS[[1, 2, 3], 0].mean()), False)


REFUSED = {
    "logits by word": (
        lambda: class_error(from_logits="yes"),
        "`from_logits` must be True or False",
    ),
    "a class by half": (
        lambda: class_error(from_logits=True, ignore_class=0.5),
        "`ignore_class` must be a whole number",
    ),
    "labels of another shape": (
        lambda: found_by(class_error(from_logits=True), nothing, LOGITS, ONE_HOT[:, :2]),
        "`labels` must be positions of classes, or rows",
    ),
    "several outputs": (
        lambda: class_error(from_logits=True)({"a": tf.zeros([2, 3])}, tf.zeros([2])),
        "`predictions` and `labels` must be one tensor each",
    ),
    "weights of another shape": (
        lambda: found_by(lambda z, y: (z[:, 0], y[:, None] > 0), nothing, LOGITS, LABELS),
        "`error` must return weights of the errors' shape",
    ),
    "whole numbers for errors": (
        lambda: found_by(lambda z, y: y, nothing, LOGITS, LABELS),
        "`error` must return floating numbers; found int32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_words(name):
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("error", "labels", "message"),
    [
        (None, LABELS, "`labels` must have one entry for each prediction"),
        (class_error(from_logits=True), LABELS, "`labels` must have one entry for each prediction"),
        (
            class_error(from_logits=True),
            ONE_HOT,
            "`labels` must have one entry for each prediction",
        ),
        (lambda z, y: (z[:, 0], y > 0), LABELS, "`error` must return weights of the errors"),
    ],
)
def test_labels_and_weights_of_another_number_are_not_broadcast(error, labels, message):
    """They have one row where there are five predictions, and nothing tells before they are there."""

    @tf.function(autograph=False)
    def errors(predictions, labels):
        size = tf.shape(predictions)[0]
        return mean_errors([errors_of_batch(error, 0.5, predictions, labels, size)])[0]

    kind = tf.TensorSpec([None, *labels.shape[1:]], labels.dtype)
    compute = errors.get_concrete_function(tf.TensorSpec([None, 3]), kind)
    compute(tf.constant(LOGITS), tf.constant(labels))
    for size in (1, 2):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            compute(tf.constant(LOGITS), tf.constant(labels[:size]))


class ScaledFocal(K.Loss):
    """Of probabilities, labels by position, scaled and shifted."""

    def call(self, y, p):
        return 5.0 * focal(False, "none")(tf.reshape(tf.cast(y, tf.int32), [-1]), p) + 2.0


HEADS = {
    "logits": (None, K.SparseCategoricalCrossentropy(from_logits=True)),
    "logits, -1 left out": (None, K.SparseCategoricalCrossentropy(True, ignore_class=-1)),
    "probabilities, penalty": ("softmax", K.SparseCategoricalCrossentropy()),
    "probabilities, focal": ("softmax", ScaledFocal()),
}


def classifier(variable, activation, loss, penalty):
    def keras_model():
        return tf.keras.Sequential(
            [
                tf.keras.layers.InputLayer((3,)),
                tf.keras.layers.Dropout(0.5, seed=1),
                tf.keras.layers.Dense(
                    3,
                    activation,
                    kernel_initializer=tf.keras.initializers.GlorotUniform(seed=1),
                    kernel_regularizer=tf.keras.regularizers.L2(10.0) if penalty else None,
                ),
            ]
        )

    spec = collections.OrderedDict(
        x=tf.TensorSpec((None, 3), tf.float32), y=tf.TensorSpec((None,), tf.int32)
    )
    if variable:
        return lambda: tff.learning.models.from_keras_model(
            keras_model(), loss=loss, input_spec=spec
        )
    return tff.learning.models.functional_model_from_keras(keras_model, loss, spec)


SCORED = {
    "functional-logits": (False, "logits"),
    "variable-logits, -1 left out": (True, "logits, -1 left out"),
    "variable-probabilities, penalty": (True, "probabilities, penalty"),
    "functional-probabilities, focal": (False, "probabilities, focal"),
}


@pytest.mark.parametrize(
    ("variable", "name"),
    selection.params(
        SCORED,
        ["variable-logits, -1 left out", "functional-probabilities, focal"],
        unpack=True,
    ),
)
def test_clients_score_candidates_by_probabilities_and_not_in_training_mode(variable, name):
    rng = np.random.default_rng(7)
    x, y = np.float32(rng.normal(size=(7, 3))), np.int32(rng.integers(0, 3, 7))
    if "left out" in name:
        y[[1, 5]] = -1
    data = tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y)).batch(4)

    def models(weights, state):
        del state  # candidates of this rule are the same in every round
        return [weights, [2.0 * w + 0.1 for w in weights]]

    seen = aggregators.Needs(candidates=Candidates(models, 2), layers="model")
    rule = rules.plain_mean()

    def server(state, reduced):
        result = rule.server(state, reduced["mean"])
        measured = collections.OrderedDict(result.measurements, errors=reduced["errors"])
        return result._replace(measurements=measured)

    def client(update, state):
        found = [update.candidate_errors, update.errors_are_losses[None]]
        errors = tf.concat([tf.cast(x, tf.float64) for x in found], 0)
        return collections.OrderedDict(mean=rule.client(update, state), errors=errors)

    def reduction(layers):
        total = aggregators.Reduction(lambda: tf.zeros([3], tf.float64), tf.add)
        return aggregators.zip_reductions(mean=rule.reduction(layers), errors=total)

    spy = aggregators.Rule(client, reduction, server, needs=seen)
    model = classifier(variable, *HEADS[name], penalty="penalty" in name)
    sgd = tff.learning.optimizers.build_sgdm(0.01)
    process = aggregators.build_fed_avg(model, sgd, rule=spy)
    state = process.initialize()
    weights = process.get_model_weights(state).trainable
    *found, is_loss = process.next(state, [data]).metrics["aggregator"]["errors"]
    assert is_loss == 0.0
    counts = y >= 0
    for number, (kernel, bias) in enumerate([weights, [2.0 * w + 0.1 for w in weights]]):
        z = x @ kernel + bias
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        errors = (1 - p[np.arange(7), y])[counts]
        np.testing.assert_allclose(found[number], errors.mean(), rtol=1e-5)
