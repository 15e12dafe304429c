"""Gradients clipped per example against a loop over examples, alone and in whole processes."""

import collections
import math

import federated_twin as twin
import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from problems import INPUT_SPEC, model_fn

import aggregators
from aggregators import ExampleClipping
from aggregators.client.example_clipping import check_examples_are_apart, clip_examples

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
SEQUENCE = collections.OrderedDict(
    x=tf.TensorSpec((None, 5), tf.int32), y=tf.TensorSpec((None, 1), tf.int32)
)
IMAGE = collections.OrderedDict(
    x=tf.TensorSpec((None, 6, 6, 1), tf.float32), y=tf.TensorSpec((None, 1), tf.int32)
)
layers = tf.keras.layers
MODELS = {
    "dense": (IMAGE, lambda: [layers.Flatten(input_shape=(6, 6, 1)), layers.Dense(3)]),
    "convolutional": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3, input_shape=(6, 6, 1)), layers.Flatten(), layers.Dense(3)],
    ),
    "embedding": (
        SEQUENCE,
        lambda: [layers.Embedding(7, 4, input_length=5), layers.Flatten(), layers.Dense(3)],
    ),
    "recurrent": (
        SEQUENCE,
        lambda: [layers.Embedding(7, 4, input_length=5), layers.LSTM(4), layers.Dense(3)],
    ),
    "normalised": (
        IMAGE,
        lambda: [
            layers.Flatten(input_shape=(6, 6, 1)),
            layers.Dense(4),
            layers.LayerNormalization(),
            layers.Dense(3),
        ],
    ),
    "dropout": (
        IMAGE,
        lambda: [layers.Flatten(input_shape=(6, 6, 1)), layers.Dropout(0.5), layers.Dense(3)],
    ),
}


def keras_model(name):
    tf.keras.utils.set_random_seed(1)
    return tf.keras.Sequential(MODELS[name][1]())


def loss_fn():
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batch_for(name, size, seed=0):
    rng = np.random.default_rng(seed)
    spec = MODELS[name][0]
    x = (
        rng.integers(0, 7, (size, 5)).astype(np.int32)
        if spec is SEQUENCE
        else 3 * rng.normal(size=(size, 6, 6, 1)).astype(np.float32)
    )
    return collections.OrderedDict(x=x, y=rng.integers(0, 3, (size, 1)).astype(np.int32))


def gradients_of(model, x, y, training=True):
    with tf.GradientTape() as tape:
        loss = loss_fn()(y, model(x, training=training))
    found = tape.gradient(loss, model.trainable_variables)
    return [tf.convert_to_tensor(g).numpy().astype(np.float64) for g in found]


def clip_by_hand(per_example, norm, per_tensor=False):
    """The truth: NumPy, example by example."""
    total = [np.zeros_like(g) for g in per_example[0]]
    for gradients in per_example:
        lengths = [np.linalg.norm(g) for g in gradients]
        whole = np.sqrt(sum(length**2 for length in lengths))
        for k, g in enumerate(gradients):
            length = lengths[k] if per_tensor else whole
            total[k] = total[k] + g * min(1.0, norm / max(length, 1e-30))
    return total


def variable_model(name):
    return lambda: tff.learning.models.from_keras_model(
        keras_model(name), loss=loss_fn(), input_spec=MODELS[name][0]
    )


def clipped(name, batch, clipping, variable):
    """One clipped batch, by a process of one client, one step and rate 1: its update."""
    make = variable_model(name)
    if not variable:
        make = tff.learning.models.functional_model_from_keras(
            lambda: keras_model(name), loss_fn(), MODELS[name][0]
        )
    process = aggregators.build_fed_avg(
        make, tff.learning.optimizers.build_sgdm(1.0), example_clipping=clipping
    )
    state = process.initialize()
    before = process.get_model_weights(state).trainable
    dataset = tf.data.Dataset.from_tensors(batch)
    output = process.next(state, [dataset])
    after = process.get_model_weights(output.state).trainable
    update = [a - b for a, b in zip(before, after, strict=True)]
    return update, output.metrics["client_work"], before


def assert_equal_to_rounding(found, expected):
    """To 1e-6 of the gradient, as a vector and in each element.

    Elements far smaller than the gradient are sums that cancel, which float32 knows no better; that
    the rest is such rounding, and nothing else, shows in float64.
    """
    flat = [np.concatenate([np.ravel(np.float64(x)) for x in each]) for each in (found, expected)]
    length = np.linalg.norm(flat[1])
    assert np.linalg.norm(flat[0] - flat[1]) <= 1e-6 * length
    assert np.abs(flat[0] - flat[1]).max() <= 1e-6 * min(length, 1.0)


WITHOUT_CHANCE = [name for name in MODELS if name != "dropout"]
KINDS = {
    f"{name}-{kind}": (name, kind == "variable")
    for name in WITHOUT_CHANCE
    for kind in ("functional", "variable")
}


@pytest.mark.parametrize(
    ("name", "variable"),
    selection.params(
        KINDS,
        ["embedding-variable", "recurrent-functional"],
        unpack=True,
    ),
)
def test_equals_a_loop_over_examples(name, variable):
    batch = batch_for(name, 5)
    model = keras_model(name)
    per_example = [
        gradients_of(model, batch["x"][i : i + 1], batch["y"][i : i + 1]) for i in range(5)
    ]
    norms = [np.sqrt(sum(np.sum(g**2) for g in gradients)) for gradients in per_example]
    limit = 1.001 * float(np.median(norms))  # not on an example's own norm
    found, metrics, weights = clipped(name, batch, ExampleClipping(limit), variable)
    for a, b in zip(weights, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    assert_equal_to_rounding(found, [g / 5 for g in clip_by_hand(per_example, limit)])
    assert metrics["clipping"]["clipped_examples"] == sum(norm > limit for norm in norms)
    assert metrics["clipping"]["non_finite_examples"] == 0
    np.testing.assert_allclose(metrics["clipping"]["mean_norm"], np.mean(norms), rtol=1e-5)


@pytest.mark.parametrize("name", selection.params(WITHOUT_CHANCE, ["normalised"]))
def test_an_infinite_norm_gives_the_plain_gradient(name):
    batch = batch_for(name, 4)
    found, metrics, _ = clipped(name, batch, ExampleClipping(math.inf), False)
    plain = gradients_of(keras_model(name), batch["x"], batch["y"])
    assert_equal_to_rounding(found, plain)
    assert metrics["clipping"]["clipped_examples"] == 0


@pytest.mark.parametrize(("limit", "per_tensor"), [(0.7, True), (0.7, False), (math.inf, False)])
def test_in_float64_it_is_the_loop_in_every_element(limit, per_tensor):
    rng = np.random.default_rng(3)
    x, y = 2 * rng.normal(size=(6, 4)), rng.normal(size=(6, 1))
    spec = collections.OrderedDict(
        x=tf.TensorSpec([None, 4], tf.float64), y=tf.TensorSpec([None, 1], tf.float64)
    )
    model = tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential(
            [
                layers.Dense(1, dtype="float64", input_shape=(4,), kernel_initializer="ones"),
            ]
        ),
        tf.keras.losses.MeanSquaredError(),
        spec,
    )
    clipping = ExampleClipping(limit, per_tensor=per_tensor)
    process = aggregators.build_fed_avg(
        model, tff.learning.optimizers.build_sgdm(1.0), example_clipping=clipping
    )
    state = process.initialize()
    before = process.get_model_weights(state).trainable
    data = tf.data.Dataset.from_tensors(collections.OrderedDict(x=x, y=y))
    after = process.get_model_weights(process.next(state, [data]).state).trainable
    off = 2 * (x @ before[0] + before[1] - y)
    expected = clip_by_hand([(np.outer(x[i], off[i]), off[i]) for i in range(6)], limit, per_tensor)
    for a, b, g in zip(before, after, expected, strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a - b, g / 6, rtol=1e-13, atol=1e-14)


def test_narrow_gradients_are_measured_and_summed_in_float32():
    """A bfloat16 has eight bits: 512 summands of 1 would end at 256; a half ends at 65504."""
    for dtype, size in ((tf.bfloat16, 1.0), (tf.float16, 300.0)):
        batch = {"x": size * tf.ones([512, 1])}

        def one(example, dtype=dtype):
            return [tf.cast(tf.reshape(example["x"], [-1]), dtype)], tf.constant(0.0)

        found = clip_examples(ExampleClipping(1.0), batch, [tf.zeros([1], dtype)], one)
        assert found.counts["non_finite"] == 0
        assert found.gradients[0].dtype == dtype
        assert float(found.gradients[0][0]) == pytest.approx(1.0)


def test_dropout_trains_and_stays_within_the_norm():
    batch = batch_for("dropout", 6)
    found, metrics, _ = clipped("dropout", batch, ExampleClipping(0.01), True)
    assert 0 < np.sqrt(sum(np.sum(g**2) for g in found)) <= 0.01 * (1 + 1e-5)
    assert metrics["clipping"]["clipped_examples"] == 6


@pytest.mark.parametrize("per_tensor", selection.params([False, True], [True]))
def test_each_tensor_by_itself_is_another_gradient(per_tensor):
    batch = batch_for("dense", 4)
    model = keras_model("dense")
    per_example = [
        gradients_of(model, batch["x"][i : i + 1], batch["y"][i : i + 1]) for i in range(4)
    ]
    clipping = ExampleClipping(0.5, per_tensor=per_tensor)
    found, _, _ = clipped("dense", batch, clipping, False)
    assert_equal_to_rounding(found, [g / 4 for g in clip_by_hand(per_example, 0.5, per_tensor)])


def simulate(clip_norm, expected, data, rounds):
    """Federated averaging of clipped steps, in NumPy."""
    weights = twin.initial_weights()
    for _ in range(rounds):
        deltas, sizes = [], []
        for x, y in data:
            kernel, bias = (np.array(w) for w in weights)
            x, y = np.float64(x), np.float64(y)
            counted = 0
            for start in range(0, len(x), twin.BATCH):
                per_example = []
                for i in range(start, min(start + twin.BATCH, len(x))):
                    off = x[i] @ kernel + bias - y[i]
                    gradients = 2 / 2 * np.outer(x[i], off), 2 / 2 * off
                    if np.all(np.isfinite(off)):
                        per_example.append(gradients)
                total = clip_by_hand(per_example or [(0 * kernel, 0 * bias)], clip_norm)
                divisor = expected or max(len(per_example), 1)
                kernel = kernel - twin.RATE * total[0] / divisor
                bias = bias - twin.RATE * total[1] / divisor
                counted += len(per_example)
            deltas.append([weights[0] - kernel, weights[1] - bias])
            sizes.append(counted)
        shares = np.float64(sizes) / sum(sizes)
        weights = [
            w - sum(s * d[k] for s, d in zip(shares, deltas, strict=True))
            for k, w in enumerate(weights)
        ]
    return weights


ROUNDS = {
    f"{kind}-{expected}-{loop.name}": (model, expected, loop)
    for kind, model in (("functional", twin.functional_model()), ("variable", model_fn))
    for expected in (None, 5.0)
    for loop in tff.learning.LoopImplementation
}


@pytest.mark.parametrize(
    ("model", "expected", "loop"),
    selection.params(
        ROUNDS, ["functional-None-DATASET_REDUCE", "variable-5.0-DATASET_ITERATOR"], unpack=True
    ),
)
def test_rounds_with_ragged_batches_empty_clients_and_bad_examples(model, expected, loop):
    """Sizes that no batch divides, a client of nothing, and an example that is no number."""
    data = [(x.copy(), y.copy()) for x, y in DATA]
    data[0][0][5, 1] = np.nan
    data[3][0][:] = np.nan  # a client of nothing that counts
    data.append((np.zeros((0, 3), np.float32), np.zeros((0, 2), np.float32)))
    process = aggregators.build_fed_avg(
        model,
        SGD,
        example_clipping=ExampleClipping(0.8, expected_batch_size=expected),
        loop_implementation=loop,
    )
    state = process.initialize()
    for _ in range(3):
        state, metrics = process.next(state, twin.datasets(data))
    weights = process.get_model_weights(state).trainable
    for a, b in zip(weights, simulate(0.8, expected, data, 3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert metrics["client_work"]["clipping"]["non_finite_examples"] == 4
    assert metrics["aggregator"]["non_finite_clients"] == 0
    assert metrics["aggregator"]["zero_weight_clients"] == 2


def linear(example):
    """Gradient of the loss `sum(w x)` of a batch of one: its x."""
    return [tf.reshape(example["x"], [-1])], tf.reduce_sum(example["x"])


def test_removing_one_example_moves_the_sum_by_at_most_the_norm():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(20, 8)) * 10 ** rng.uniform(-3, 3, size=(20, 1)))
    clipping = ExampleClipping(0.7, expected_batch_size=1)
    weights = [tf.zeros([8])]
    whole = clip_examples(clipping, {"x": tf.constant(x)}, weights, linear).gradients[0]
    for i in range(20):
        rest = {"x": tf.constant(np.delete(x, i, 0))}
        other = clip_examples(clipping, rest, weights, linear).gradients[0]
        assert np.linalg.norm(whole - other) <= 0.7 * (1 + 1e-5)


def test_noise_per_tensor_grows_with_their_number():
    assert ExampleClipping(2.0, 1.5, 10).noise_stddev(9) == 3.0
    assert ExampleClipping(2.0, 1.5, 10, per_tensor=True).noise_stddev(9) == 9.0


def test_a_weight_that_the_loss_does_not_see_has_no_gradient():
    def one(example):
        return [tf.reshape(example["x"], [-1]), None], tf.constant(0.0)

    batch = {"x": tf.ones([2, 3])}
    clipping = ExampleClipping(1.0, 1.0, 2)
    found = clip_examples(clipping, batch, [tf.zeros([3]), tf.zeros([2])], one)
    assert found.gradients[1] is None
    assert found.gradients[0] is not None


@pytest.mark.parametrize("axis_of", ["dense", "fused"])
def test_batch_normalisation_is_refused(axis_of):
    def make():
        first = [layers.Flatten(input_shape=(6, 6, 1))]
        if axis_of == "fused":
            first = [layers.Conv2D(2, 3, input_shape=(6, 6, 1))]
        model = tf.keras.Sequential(
            [*first, layers.BatchNormalization(), layers.Flatten(), layers.Dense(3)]
        )
        return tff.learning.models.from_keras_model(model, loss=loss_fn(), input_spec=IMAGE)

    with pytest.raises(ValueError, match=r"`example_clipping` must be .* batch normalisation"):
        aggregators.build_fed_avg(make, SGD, example_clipping=ExampleClipping(1.0))


def test_models_that_are_not_refused():
    for name in MODELS:
        check_examples_are_apart(variable_model(name), ExampleClipping(1.0))
    check_examples_are_apart(twin.functional_model(), ExampleClipping(1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "`clip_norm` must be a finite number above 0, or infinity; found 0.0"),
        ((math.nan,), "`clip_norm`"),
        ((True,), "`clip_norm`"),
        ((1.0, -1.0), "`noise_multiplier` must be a finite number of at least 0; found -1.0"),
        ((1.0, 0.0, 0), "`expected_batch_size` must be a finite number above 0"),
        ((1.0, 1.0), "`expected_batch_size` must be given with noise"),
        ((math.inf, 1.0, 8), "`clip_norm` must be finite with noise"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExampleClipping(*arguments)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "7"])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"`seed` must be (a whole number of at least 0|below)"):
        ExampleClipping(1.0, 1.0, 8, seed=seed)


def test_bad_kinds():
    with pytest.raises(TypeError, match="`per_tensor` must be True or False"):
        ExampleClipping(1.0, per_tensor="yes")
    with pytest.raises(TypeError, match="`example_clipping` must be an `ExampleClipping`"):
        aggregators.build_fed_avg(model_fn, SGD, example_clipping=1.0)
    assert INPUT_SPEC is not None


# ------------------------------------------------------------- batches with parts that examples share

PARTS = {
    "rows": lambda n: np.float32(np.random.default_rng(n).normal(size=(n, 3))),
    "adjacency": lambda n: np.float32(np.random.default_rng(5).uniform(size=(3, 3))),
    "class_weights": lambda n: np.float32([0.5, 2.0]),
    "positions": lambda n: np.float32([[0.1, 0.2, 0.3]]),
    "temperature": lambda n: np.float32(1.5),
}
SHARED = ["x/adjacency", "x/class_weights", "x/positions", "x/temperature"]


def weighted_loss(w, x, y):
    """Of each example: its rows through a graph, each class of a weight of its own."""
    found = (x["rows"] + x["positions"]) @ x["adjacency"] @ w / x["temperature"]
    return tf.reduce_mean(x["class_weights"] * (found - y) ** 2, 1)


def shared_spec(**other):
    shapes = {name: part(4).shape for name, part in PARTS.items()} | {"rows": (None, 3)} | other
    x = collections.OrderedDict((name, tf.TensorSpec(shape)) for name, shape in shapes.items())
    return collections.OrderedDict(x=x, y=tf.TensorSpec((None, 2)))


def shared_batch(n, **other):
    x = collections.OrderedDict((name, part(n)) for name, part in PARTS.items())
    x.update(other)
    return collections.OrderedDict(
        x=x, y=np.float32(np.random.default_rng(9 + n).normal(size=(n, 2)))
    )


def sharing_variable(spec):
    class Sharing(tff.learning.models.VariableModel):
        def __init__(self):
            self._w = tf.Variable(0.3 * tf.ones([3, 2]), name="w")
            self._seen = tf.Variable([0.0, 0.0, 0.0], trainable=False)

        trainable_variables = property(lambda self: [self._w])
        non_trainable_variables = property(lambda self: [])
        local_variables = property(lambda self: [self._seen])
        input_spec = property(lambda self: spec)

        def predict_on_batch(self, x, training=True):
            return x["rows"] @ self._w

        @tf.function
        def forward_pass(self, batch_input, training=True):
            loss = weighted_loss(self._w, batch_input["x"], batch_input["y"])
            size = tf.size(loss)
            self._seen.assign_add([tf.reduce_sum(loss), tf.cast(size, tf.float32), 1.0])
            return tff.learning.models.BatchOutput(tf.reduce_mean(loss), loss, size)

        def report_local_unfinalized_metrics(self):
            return collections.OrderedDict(seen=[self._seen])

        def metric_finalizers(self):
            return collections.OrderedDict(seen=lambda values: values[0])

        def reset_metrics(self):
            self._seen.assign(tf.zeros([3]))

    return Sharing


def sharing_functional(spec):
    @tf.function
    def predict(weights, x, training):
        # The labels are not there yet: what the loss needs goes through the predictions, as rows.
        found = (x["rows"] + x["positions"]) @ x["adjacency"] @ weights[0][0] / x["temperature"]
        return collections.OrderedDict(
            found=found, weights=tf.ones_like(found) * x["class_weights"]
        )

    @tf.function
    def loss(output, label, sample_weight=None):
        return tf.reduce_mean(output["weights"] * (output["found"] - label) ** 2)

    def add(state, labels, batch_output, sample_weight=None):
        size = tf.cast(tf.shape(labels)[0], tf.float32)
        new = state["seen"] + [batch_output.loss * size, size, 1.0]
        return collections.OrderedDict(seen=new)

    return tff.learning.models.FunctionalModel(
        initial_weights=((np.full([3, 2], 0.3, np.float32),), ()),
        predict_on_batch_fn=predict,
        loss_fn=loss,
        metrics_fns=(lambda: collections.OrderedDict(seen=tf.zeros([3])), add, lambda state: state),
        input_spec=spec,
    )


SHARING = {"variable": sharing_variable, "functional": sharing_functional}


def batches(*found):
    datasets = [tf.data.Dataset.from_tensors(batch) for batch in found]
    joined = datasets[0]
    for dataset in datasets[1:]:
        joined = joined.concatenate(dataset)
    return joined


SHARED_IN = {
    f"{kind}-{loop.name}": (kind, loop)
    for kind in SHARING
    for loop in tff.learning.LoopImplementation
}


@pytest.mark.parametrize(
    ("kind", "loop"),
    selection.params(
        SHARED_IN, ["variable-DATASET_ITERATOR", "functional-DATASET_REDUCE"], unpack=True
    ),
)
def test_each_example_is_given_the_shared_parts_whole(kind, loop):
    """Steps, metrics, weight and counts over three ragged batches, against a loop over examples."""
    rate, limit = 0.1, 1.0
    clipping = ExampleClipping(limit, shared_parts=SHARED)
    process = aggregators.build_fed_avg(
        SHARING[kind](shared_spec()),
        tff.learning.optimizers.build_sgdm(rate),
        example_clipping=clipping,
        loop_implementation=loop,
    )
    data = [[shared_batch(8), shared_batch(5), shared_batch(3)], [shared_batch(2)]]
    output = process.next(process.initialize(), [batches(*client) for client in data])

    weights, counted, total, clipped_examples = [], [], np.zeros(3), 0
    for client in data:
        w = tf.Variable(0.3 * tf.ones([3, 2]))
        for batch in client:
            with tf.GradientTape() as tape:
                losses = weighted_loss(w, batch["x"], batch["y"])
            per_example = np.float64(tape.jacobian(losses, w))
            norms = np.linalg.norm(per_example.reshape(len(losses), -1), axis=1)
            factors = np.minimum(1.0, limit / norms)
            clipped_examples += np.sum(factors < 1)
            total += [np.sum(losses), len(losses), 1]
            w.assign_sub(rate * np.tensordot(factors, per_example, 1) / len(losses))
        weights.append(w.numpy())
        counted.append(sum(len(batch["y"]) for batch in client))
    expected = np.average(weights, axis=0, weights=counted)
    np.testing.assert_allclose(
        process.get_model_weights(output.state).trainable[0], expected, rtol=1e-5
    )
    metrics = output.metrics["client_work"]
    np.testing.assert_allclose(metrics["train"]["seen"], total, rtol=1e-5)
    assert 0 < clipped_examples < sum(counted)
    assert metrics["clipping"]["clipped_examples"] == clipped_examples


def test_metrics_are_those_of_training_that_clips_nothing():
    """12 batches of five are 12 batches, and every metric sees them as without clipping."""
    rng = np.random.default_rng(0)
    x, y = np.float32(rng.normal(size=(60, 3))), np.float32(rng.normal(size=(60, 2)))
    x[7, 0] = np.nan  # counts for nothing
    good = np.delete(x, 7, 0), np.delete(y, 7, 0)

    def dataset(x, y, sizes):
        ends = np.cumsum(sizes)[:-1]
        pairs = zip(np.split(x, ends), np.split(y, ends), strict=True)
        return batches(*(collections.OrderedDict(x=a, y=b) for a, b in pairs))

    def metrics(data, process):
        return process.next(process.initialize(), [data]).metrics["client_work"]["train"]

    clipping = ExampleClipping(math.inf)
    found = metrics(
        dataset(x, y, [5] * 12),
        aggregators.build_fed_avg(model_fn, SGD, example_clipping=clipping),
    )
    plain = tff.learning.algorithms.build_weighted_fed_avg(model_fn, SGD)
    expected = metrics(dataset(*good, [5, 4, *[5] * 10]), plain)
    assert (found["num_batches"], found["num_examples"]) == (12, 59)
    assert found["num_batches"] == expected["num_batches"]
    assert found["num_examples"] == expected["num_examples"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize(
    ("other", "shared", "message"),
    [
        (
            {},
            [],
            r"any number of them; found x/adjacency of shape \(3, 3\).*x/temperature of shape \(\)",
        ),
        (
            {},
            SHARED[1:],
            r"found x/adjacency of shape \(3, 3\)\. .*shared_parts=\[\"x/adjacency\"\]",
        ),
        ({}, SHARED[:-1], r"found x/temperature of shape \(\)\. "),
        ({}, ["x", "y"], "`shared_parts` must leave a part that has a row"),
        ({}, ["x/adjacent"], "`shared_parts` must name parts of a batch.*found 'x/adjacent'"),
        ({"rows": (8, 3)}, SHARED, r"any number of them; found x/rows of shape \(8, 3\)"),
        ({"rows": (8, 3), "y": (8, 2)}, SHARED[1:], r"found x/"),
    ],
)
def test_parts_without_rows_are_refused_by_name_when_the_spec_shows_them(
    kind, other, shared, message
):
    spec = shared_spec(**{name: shape for name, shape in other.items() if name != "y"})
    if "y" in other:
        spec["y"] = tf.TensorSpec(other["y"])
    with pytest.raises(ValueError, match=message):
        aggregators.build_fed_avg(
            SHARING[kind](spec), SGD, example_clipping=ExampleClipping(1.0, shared_parts=shared)
        )


@pytest.mark.parametrize("kind", selection.params([*SHARING], ["functional"]))
def test_parts_without_rows_are_refused_by_name_where_the_client_runs(kind):
    spec = shared_spec(positions=(None, 3), temperature=None)
    process = aggregators.build_fed_avg(
        SHARING[kind](spec), SGD, example_clipping=ExampleClipping(1.0, shared_parts=SHARED[:2])
    )
    state = process.initialize()
    with pytest.raises(Exception, match=r"\[x/positions:\] \[1\].*\[x/temperature:\] \[-1\]"):
        process.next(state, [batches(shared_batch(8))])


def test_a_structure_of_parts_and_places_in_a_sequence_have_names_too():
    batch = (
        tf.ones([4, 2]),
        {"graph": {"a": tf.ones([2, 2]), "b": tf.constant(1.0)}, "z": tf.ones([4])},
    )

    def one(example):
        assert example[1]["graph"]["a"].shape == (2, 2)
        return [tf.reduce_sum(example[0]) * tf.ones([1])], tf.reduce_sum(example[1]["z"])

    clipping = ExampleClipping(math.inf, shared_parts=["1/graph"])
    found = clip_examples(clipping, batch, [tf.zeros([1])], one)
    np.testing.assert_allclose(found.gradients[0], [2.0])
    assert found.examples == 4


@pytest.mark.parametrize("names", ["x/positions", [1], [""], None])
def test_bad_names_of_shared_parts(names):
    with pytest.raises(TypeError, match="`shared_parts` must be a sequence of names such as"):
        ExampleClipping(1.0, shared_parts=names)
