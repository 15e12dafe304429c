"""Pipelines of pipelines, weight decay of some weights, and frameworks in one pipeline, through TFF."""

import asyncio
import collections
import json

import contracts
import numpy as np
import optax
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near

import tff_optim
from tff_optim import transforms
from tff_optim.projections import Box, Projection

K = tf.keras
NAMES = ["dense/kernel:0", "dense/bias:0", "norm/gamma:0"]
RNG = np.random.default_rng(5)
WEIGHTS = [np.float32(RNG.normal(size=s)) for s in ((3, 2), (2,), (4,))]
GRADIENTS = [[np.float32(RNG.normal(size=w.shape)) for w in WEIGHTS] for _ in range(5)]


def adam_w(**options):
    """Adam with a decay that the learning rate multiplies, as AdamW: a pipeline in a pipeline."""
    inner = tff_optim.build_optimizer(
        1.0, transforms=[transforms.Adam(0.5, 0.75, 1e-6)], weight_decay=0.25, **options
    )
    return inner


def trained(optimizer, weights=WEIGHTS):
    """The weights after all steps; they may be nested in any way."""
    state = optimizer.initialize(tf.nest.map_structure(tf.type_spec_from_value, weights))
    for row in GRADIENTS:
        state, weights = optimizer.next(state, weights, tf.nest.pack_sequence_as(weights, row))
    return [np.asarray(w) for w in tf.nest.flatten(weights)]


def adam_w_of_optax(mask):
    made = optax.adamw(0.125, 0.5, 0.75, eps=1e-6, weight_decay=0.25, mask=mask)
    state, weights = made.init(WEIGHTS), WEIGHTS
    for row in GRADIENTS:
        updates, state = made.update(row, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def adam_w_of_keras(excluded):
    """Keras' own; its epsilon stands elsewhere, so that it is near and not equal."""
    made = K.optimizers.AdamW(0.125, weight_decay=0.25, beta_1=0.5, beta_2=0.75, epsilon=1e-6)
    variables = [tf.Variable(w, name=n.removesuffix(":0")) for w, n in zip(WEIGHTS, NAMES)]
    made.exclude_from_weight_decay(var_names=excluded)
    made.build(variables)
    for row in GRADIENTS:
        made.apply_gradients(zip(map(tf.constant, row), variables))
    return [v.numpy() for v in variables]


def test_adam_w_is_a_pipeline_in_a_pipeline_and_its_decay_has_the_mask_of_optax_and_keras():
    def outer(inner, **options):
        return tff_optim.build_optimizer(0.125, transforms=[inner], **options)

    for found, mask in (
        (trained(outer(adam_w())), [True, True, True]),
        (trained(outer(adam_w(exclude_from_weight_decay=1))), [True, False, False]),
        (trained(outer(adam_w(exclude_from_weight_decay="[12]"))), [True, False, False]),
        (
            trained(outer(adam_w(exclude_from_weight_decay=lambda path, spec: spec.shape == [4]))),
            [True, True, False],
        ),
        (
            trained(outer(adam_w(exclude_from_weight_decay="bias|norm"), weight_names=NAMES)),
            [True, False, False],
        ),
        (
            trained(outer(adam_w(exclude_from_weight_decay="kernel"), weight_names=NAMES)),
            [False, True, True],
        ),
    ):
        for mine, theirs in zip(found, adam_w_of_optax(mask), strict=True):
            assert_near(mine, theirs, 1e-5)
    excluded = trained(outer(adam_w(exclude_from_weight_decay="bias"), weight_names=NAMES))
    for mine, theirs in zip(excluded, adam_w_of_keras(["bias"]), strict=True):
        assert_near(mine, theirs, 1e-5)


def test_decay_of_the_outermost_pipeline_is_excluded_by_the_keys_of_nested_weights():
    nested = {"dense": {"bias": WEIGHTS[1], "kernel": WEIGHTS[2]}, "out": WEIGHTS[0]}
    expected = [np.float64(w) for w in tf.nest.flatten(nested)]
    optimizer = tff_optim.build_optimizer(0.0, weight_decay=0.5, exclude_from_weight_decay="bias$")
    state = optimizer.initialize(tf.nest.map_structure(tf.type_spec_from_value, nested))
    _, found = optimizer.next(state, nested, tf.nest.map_structure(np.ones_like, nested))
    for mine, before, share in zip(tf.nest.flatten(found), expected, (1.0, 0.5, 0.5), strict=True):
        assert_near(mine, share * before)


def test_names_select_what_is_projected_and_call_the_slots():
    optimizer = tff_optim.build_optimizer(
        1.0,
        transforms=[transforms.Momentum()],
        projection=Projection(Box(-0.125, 0.125), where="bias"),
        weight_names=NAMES,
    )
    state = optimizer.initialize([tf.type_spec_from_value(w) for w in WEIGHTS])
    assert sorted(state["parts"]["Momentum"]["velocity"]) == sorted(NAMES)
    found = trained(optimizer)
    assert [np.abs(w).max() <= 0.125 for w in found] == [False, True, False]
    plain = trained(tff_optim.build_optimizer(1.0, transforms=[transforms.Momentum()]))
    assert_near(found[0], plain[0])
    assert_near(found[2], plain[2])
    with pytest.raises(ValueError, match="`weight_names` must name every weight; found 3 names"):
        optimizer.initialize([tf.TensorSpec([2]), tf.TensorSpec([2])])


@pytest.mark.parametrize("excluded", ["biass", "dense|norm|[0-2]", 3, lambda path, spec: False])
def test_a_selection_of_nothing_or_of_all_is_refused(excluded):
    inner = adam_w(exclude_from_weight_decay=excluded)
    for optimizer in (inner, tff_optim.build_optimizer(0.1, transforms=[inner])):
        rule = "`exclude_from_weight_decay` must select at least one tensor of weights, and not all"
        with pytest.raises(ValueError, match=rule + ".*`weight_names="):
            optimizer.initialize([tf.type_spec_from_value(w) for w in WEIGHTS])
        optimizer.initialize(tf.TensorSpec([]))  # TFF's client work asks for hparams so


def test_an_inner_pipeline_is_the_flat_one_with_its_numbers_by_path(tmp_path):
    parts = [transforms.ClipByNorm(0.5), transforms.Momentum(0.5), transforms.RMSProp(0.75)]
    flat = tff_optim.build_optimizer(0.25, transforms=parts)
    inner = tff_optim.build_optimizer(0.5, transforms=parts[1:])
    nested = tff_optim.build_optimizer(0.5, transforms=[parts[0], inner], jit_compile=True)
    for one, other in zip(trained(flat), trained(nested), strict=True):
        assert_near(one, other)
    state = nested.initialize([tf.type_spec_from_value(w) for w in WEIGHTS])
    assert list(nested.get_hparams(state)) == [
        "learning_rate",
        "ClipByNorm.max_norm",
        "Pipeline.learning_rate",
        "Pipeline.Momentum.beta",
        "Pipeline.RMSProp.beta",
        "Pipeline.RMSProp.epsilon",
    ]
    changes = {"Pipeline.learning_rate": 0.25, "Pipeline.RMSProp.beta": 0.5}
    state = nested.set_hparams(state, changes)
    other = flat.initialize([tf.type_spec_from_value(w) for w in WEIGHTS])
    other = flat.set_hparams(other, {"learning_rate": 0.125, "RMSProp.beta": 0.5})
    weights = others = WEIGHTS
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    for t, row in enumerate(GRADIENTS):
        if t == 2:  # saved and loaded, the changed numbers too
            asyncio.run(manager.save((state, weights), t))
            structure = nested.initialize([tf.type_spec_from_value(w) for w in WEIGHTS]), weights
            state, weights = contracts.tensors(asyncio.run(manager.load(t, structure)))
        state, weights = nested.next(state, weights, row)
        other, others = flat.next(other, others, row)
    for one, two in zip(weights, others, strict=True):
        assert_near(one, two)
    for hparams, message in (
        ({"Pipeline.Momentum.beta": 1.5}, r"`beta` of `Momentum` must be a number in \[0, 1\)"),
        ({"Pipeline.learning_rate": -1}, "`learning_rate` of `Pipeline` must be a number of at le"),
        ({"Pipeline.Adam.beta_1": 0.5}, "`hparams` of `Pipeline` must hold some of"),
    ):
        with pytest.raises(ValueError, match=message):
            nested.set_hparams(state, hparams)
    with pytest.raises(ValueError, match=r"`parts` of `state` .*unknown \['ClipByNorm'\]"):
        nested.next(
            collections.OrderedDict(state, parts=dict(state["parts"], Pipeline=other)), weights, row
        )


def test_a_configuration_holds_inner_pipelines_masks_and_names():
    inner = adam_w(exclude_from_weight_decay="bias|norm")
    optimizer = tff_optim.build_optimizer(
        0.125, regularizers=[inner], transforms=[inner, transforms.Momentum()], weight_names=NAMES
    )
    text = json.dumps(tff_optim.get_config(optimizer))
    again = tff_optim.from_config(text)
    assert again == optimizer
    assert again.weight_names == tuple(NAMES)
    assert hash(again) == hash(optimizer)
    for one, other in zip(trained(optimizer), trained(again), strict=True):
        np.testing.assert_array_equal(one, other)
    by_rank = adam_w(exclude_from_weight_decay=1)
    assert tff_optim.from_config(tff_optim.get_config(by_rank)) == by_rank != adam_w()
    short = {"kind": "pipeline", "learning_rate": 0.5, "transforms": [{"kind": "pipeline"}]}
    with pytest.raises(
        ValueError, match=r"at 'transforms/0' must have .* missing \['learning_rate"
    ):
        tff_optim.from_config(short)
    short["transforms"] = [{"kind": "pipeline", "learning_rate": 1.0, "device": "/CPU:0"}]
    with pytest.raises(ValueError, match="must leave `device` to the outermost pipeline"):
        tff_optim.from_config(short)
    by_function = adam_w(exclude_from_weight_decay=lambda path, spec: path == "0")
    with pytest.raises(ValueError, match="`exclude_from_weight_decay` must be something that JSON"):
        tff_optim.get_config(by_function)


def test_three_frameworks_train_in_one_pipeline_through_tff():
    """On clients and on the server, over rounds, from a configuration, against a loop in NumPy."""
    inner = tff_optim.build_optimizer(
        0.5,
        transforms=[transforms.KerasTransform(K.optimizers.RMSprop(rho=0.5, epsilon=1e-3))],
        weight_decay=0.25,
        exclude_from_weight_decay=1,
    )
    made = tff_optim.build_optax_optimizer(optax.trace, decay=0.5, nesterov=True)
    client = tff_optim.build_optimizer(
        0.25, transforms=[transforms.OptaxTransform(made), inner, transforms.Momentum(0.25)]
    )
    client = tff_optim.from_config(json.dumps(tff_optim.get_config(client)))

    def model_fn():
        return tff.learning.models.from_keras_model(
            K.Sequential([K.layers.Dense(1, input_shape=(3,), kernel_initializer="ones")]),
            loss=K.losses.MeanSquaredError(),
            input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
        )

    x = np.float32(RNG.normal(size=(2, 8, 3)))
    y = np.float32(RNG.normal(size=(2, 8, 1)))
    data = [tf.data.Dataset.from_tensor_slices(pair).batch(2) for pair in zip(x, y)]
    process = tff.learning.algorithms.build_unweighted_fed_avg(model_fn, client)
    state = process.initialize()
    assert "Pipeline.KerasTransform.rho" in process.get_hparams(state)["client_work"]
    for _ in range(2):
        state = process.next(state, data).state
    found = process.get_model_weights(state).trainable

    kernel, bias = np.ones([3, 1]), np.zeros([1])
    for _ in range(2):
        ends = []
        for its_x, its_y in zip(x, y):
            weights, trace, square, velocity = [kernel, bias], [0, 0], [0, 0], [0, 0]
            for batch in range(4):
                a, b = (v[2 * batch : 2 * batch + 2].astype("f8") for v in (its_x, its_y))
                error = a @ weights[0] + weights[1] - b
                gradients = [a.T @ error, error.sum(0)]  # of the mean of two squares
                new = []
                for i, (w, g) in enumerate(zip(weights, gradients)):
                    trace[i] = 0.5 * trace[i] + g
                    g = 0.5 * trace[i] + g
                    square[i] = 0.5 * square[i] + 0.5 * g**2
                    g = 0.5 * g / np.sqrt(square[i] + 1e-3) + (0.25 * w if w.ndim == 2 else 0)
                    velocity[i] = 0.25 * velocity[i] + g
                    new.append(w - 0.25 * velocity[i])
                weights = new
            ends.append(weights)
        kernel, bias = (np.mean(leaf, axis=0) for leaf in zip(*ends))
    assert_near(found[0], kernel, 1e-5)
    assert_near(found[1], bias, 1e-5)
