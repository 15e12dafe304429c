"""Client work that measures what rules need, against TFF's own."""

import collections

import federated_twin as twin
import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from problems import INPUT_SPEC, model_fn

import aggregators
from aggregators import Needs, rules, scores

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
BY_EXAMPLES = tff.learning.ClientWeighting.NUM_EXAMPLES


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"needs": scores.l2_distance}, TypeError, "`needs` must be a `Needs`"),
        ({"needs": Needs(layers=[(0,), (1,), (2,)])}, ValueError, "`layers` must hold each"),
        ({"client_weighting": None}, TypeError, "`client_weighting`"),
        ({"loop_implementation": "reduce"}, TypeError, "`loop_implementation`"),
        (
            {"optimizer": tf.keras.optimizers.SGD()},
            TypeError,
            "`optimizer`.*build_keras_optimizer",
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
        ({"loss": "end"}, ValueError, "`loss` must be"),
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
        ValueError, match=r"must hold what the rule needs, initial_loss; found training_loss"
    ):
        aggregators.compose_fed_avg(
            model_fn, sgd_work, aggregators.RuleFactory(rules.q_fed_avg(1.0, twin.RATE))
        )
    per_model = Needs(score=scores.kl_divergence, layers="model")
    kl_work = aggregators.build_client_work(model_fn, SGD, per_model)
    rule = rules.adaptive_mean(scores.kl_divergence, aggregators.weighting.uniform())
    with pytest.raises(ValueError, match=r"2 numbers in `kl_divergence`.*; found shape \(1,\)"):
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
        assert_near(a, b)
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
        assert_near(a.update.delta, b.update, rtol=1e-5)
        if loss_at == "initial":
            np.testing.assert_allclose(
                a.update.measured["initial_loss"],
                np.mean((x.sum(1, keepdims=True) - y) ** 2),
                rtol=1e-5,
            )
    assert found.measurements["train"] == expected.measurements["train"]


class Halving(tff.learning.optimizers.Optimizer):
    """An optimizer of somebody's own, with Python's `if`: large gradients are halved.

    Args:
      branch: `(halve, gradient) -> gradient`.
    """

    def __init__(self, branch):
        self._branch = branch

    def initialize(self, specs):
        return collections.OrderedDict(learning_rate=0.1)

    def next(self, state, weights, gradients):
        moved = [self._branch(tf.norm(g) > 1.0, g) for g in gradients]
        rate = tf.cast(state["learning_rate"], tf.float32)
        updated = tuple(w - rate * g for w, g in zip(weights, moved, strict=True))
        return state, updated

    def get_hparams(self, state):
        return state

    def set_hparams(self, state, hparams):
        return hparams


def _halve_in_python(halve, x):
    if halve:
        x = 0.5 * x
    return x


def _halve_in_tensorflow(halve, x):
    return tf.where(halve, 0.5 * x, x)


def _functional_model(branch):
    """A linear model whose predictions, loss and metrics branch on tensors."""

    @tf.function
    def predict(weights, x, training):
        predictions = x @ weights[0][0]
        return branch(tf.reduce_sum(predictions) > 0.0, predictions)

    @tf.function
    def loss(output, label, sample_weight=None):
        found = tf.reduce_mean((output - label) ** 2)
        return branch(found > 0.5, found)

    def add_metrics(state, labels, batch_output, sample_weight=None):
        loss = branch(batch_output.loss > 0.1, batch_output.loss)
        return collections.OrderedDict(halved=state["halved"] + loss)

    return tff.learning.models.FunctionalModel(
        initial_weights=((np.ones([3, 2], np.float32),), ()),
        predict_on_batch_fn=predict,
        loss_fn=loss,
        metrics_fns=(
            lambda: collections.OrderedDict(halved=tf.constant(0.0)),
            add_metrics,
            lambda state: state,
        ),
        input_spec=INPUT_SPEC,
    )


@pytest.mark.parametrize("loop", tff.learning.LoopImplementation)
def test_functional_models_and_optimizers_may_be_written_with_pythons_control_flow(loop):
    found = []
    for branch in (_halve_in_python, _halve_in_tensorflow):
        work = aggregators.build_client_work(
            _functional_model(branch),
            Halving(branch),
            Needs(loss="initial"),
            loop_implementation=loop,
        )
        weights = [tff.learning.models.ModelWeights((np.ones([3, 2], np.float32),), ())] * len(DATA)
        found.append(work.next(work.initialize(), weights, twin.datasets(DATA)))
    metrics = [output.measurements["train"]["halved"] for output in found]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    for ours, same in zip(found[0].result, found[1].result, strict=True):
        assert_near(ours.update.delta, same.update.delta)
        assert np.abs(same.update.delta).max() > 0.0
        np.testing.assert_allclose(
            ours.update.measured["initial_loss"], same.update.measured["initial_loss"], rtol=1e-6
        )


def digest(process, state, clients):
    if isinstance(clients[0], tf.data.Dataset):
        output = process.next(state, clients)
    else:
        data, states = zip(*clients)
        with aggregators.ClientStates(list(states)) as store, store.cohort(states, data) as cohort:
            output = process.next(state, cohort)
    weights = process.get_model_weights(output.state)
    return b"".join(np.asarray(tensor).tobytes() for tensor in weights.trainable)


ITERATOR, REDUCE = (
    tff.learning.LoopImplementation.DATASET_ITERATOR,
    tff.learning.LoopImplementation.DATASET_REDUCE,
)
PASSES = {
    f"{'functional' if functional else 'variable'}-{kind}-{loop.name}": (functional, kind, loop)
    for functional in (False, True)
    for kind in ("jury", "initial loss", "memory")
    for loop in (ITERATOR, REDUCE)
}


@pytest.mark.parametrize(
    ("functional", "kind", "loop"),
    selection.params(
        PASSES,
        [
            "variable-jury-DATASET_ITERATOR",
            "functional-initial loss-DATASET_ITERATOR",
            "functional-memory-DATASET_REDUCE",
        ],
        unpack=True,
    ),
)
def test_all_passes_over_shuffled_data_come_in_one_order(functional, kind, loop):
    """A data set that shuffles hands each iterator another order, so iterators come in one, too."""

    def build_keras_model():
        dense = tf.keras.layers.Dense(3, input_shape=(4,), kernel_initializer="ones")
        return tf.keras.Sequential([dense])

    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    spec = (tf.TensorSpec([None, 4]), tf.TensorSpec([None], tf.int32))
    rng, clients = np.random.default_rng(0), []
    for seed in range(4):
        rows = np.float32(rng.normal(size=(200, 4))), np.int32(rng.integers(0, 3, 200))
        data = tf.data.Dataset.from_tensor_slices(rows).shuffle(200, seed=seed).batch(4)
        clients.append((data, str(seed)) if kind == "memory" else data)

    def variable_model():
        return tff.learning.models.from_keras_model(build_keras_model(), loss, spec)

    model = variable_model
    if functional:
        model = tff.learning.models.functional_model_from_keras(build_keras_model, loss, spec)
    sgd = tff.learning.optimizers.build_sgdm(0.5)
    if kind == "memory":
        process = aggregators.build_scaffold(
            model, sgd, num_clients=4, option="I", loop_implementation=loop
        )
    else:
        rule = rules.jury_mean() if kind == "jury" else rules.q_fed_avg(1.0, 0.5)
        process = aggregators.build_fed_avg(model, sgd, rule=rule, loop_implementation=loop)
    state = process.initialize()
    assert len({digest(process, state, clients) for _ in range(6)}) == 1
