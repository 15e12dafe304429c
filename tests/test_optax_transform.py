"""optax' transformations in pipelines, against optax' own chain, beside parts of Keras."""

import copy
import json

import jax
import numpy as np
import optax
import pytest
import tensorflow as tf

import tff_optim
from tff_optim import transforms

SHAPES = [(3, 2), (4,)]
RNG = np.random.default_rng(3)
WEIGHTS = [RNG.normal(size=s) for s in SHAPES]
GRADIENTS = [[(1 + t) * RNG.normal(size=s) for s in SHAPES] for t in range(5)]


def stepped(optimizer, hparams=None):
    """Weights after all steps, in a graph and float64."""
    step = tf.function(optimizer.next)
    state = optimizer.initialize([tf.TensorSpec(s, tf.float64) for s in SHAPES])
    if hparams:
        state = optimizer.set_hparams(state, hparams)
    state = tf.nest.map_structure(tf.convert_to_tensor, state)
    weights = [tf.constant(w) for w in WEIGHTS]
    for gradients in GRADIENTS:
        state, weights = step(state, weights, [tf.constant(g) for g in gradients])
    return [np.asarray(w) for w in weights]


def chained(*parts):
    """The same by `optax.chain`."""
    chain = optax.chain(*parts)
    with jax.experimental.enable_x64():
        weights = [jax.numpy.asarray(w) for w in WEIGHTS]
        state = chain.init(weights)
        for gradients in GRADIENTS:
            updates, state = chain.update([jax.numpy.asarray(g) for g in gradients], state, weights)
            weights = optax.apply_updates(weights, updates)
        return [np.asarray(w) for w in weights]


def test_a_pipeline_of_optax_is_its_chain():
    belief = tff_optim.build_optax_optimizer(optax.scale_by_belief, b1=0.5)
    parts = [transforms.OptaxTransform(made) for made in (optax.clip(1.5), belief)]
    optimizer = tff_optim.build_optimizer(0.25, transforms=parts)
    expected = chained(optax.clip(1.5), optax.scale_by_belief(b1=0.5), optax.scale(-0.25))
    for mine, theirs in zip(stepped(optimizer), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    expected = chained(optax.clip(1.5), optax.scale_by_belief(b1=0.75), optax.scale(-0.25))
    changed = stepped(optimizer, {"OptaxTransform_2.b1": 0.75})
    for mine, theirs in zip(changed, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    assert copy.deepcopy(optimizer) == optimizer
    assert optimizer != tff_optim.build_optimizer(0.25, transforms=parts[1:])


def test_two_frameworks_and_this_package_in_one_pipeline():
    """Clipping of optax, a momentum of this package, and Keras' Adam, which optax has too."""
    keras = tf.keras.optimizers.Adam(beta_1=0.5, beta_2=0.75, epsilon=1e-8)
    parts = [
        transforms.OptaxTransform(optax.clip(1.5)),
        transforms.Momentum(0.5),
        transforms.KerasTransform(keras),
    ]
    mine = stepped(tff_optim.build_optimizer(0.1, transforms=parts))
    adam = optax.scale_by_adam(b1=0.5, b2=0.75, eps=1e-8)
    expected = chained(optax.clip(1.5), optax.trace(0.5), adam, optax.scale(-0.1))
    for one, other in zip(mine, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_weight_without_a_gradient_stays():
    part = transforms.OptaxTransform(optax.scale_by_adam)
    specs = [tf.TensorSpec(s, tf.float32) for s in SHAPES]
    weights = [tf.zeros(s) for s in SHAPES]
    before = part.initialize(specs)
    after, gradients = part.next(before, weights, [tf.ones(SHAPES[0]), None])
    assert gradients[1] is None
    np.testing.assert_array_equal(after["slots"]["mu/1"], before["slots"]["mu/1"])


def test_it_is_written_to_a_configuration_and_read():
    belief = tff_optim.build_optax_optimizer(optax.scale_by_belief, b1=0.5)
    optimizer = tff_optim.build_optimizer(0.1, transforms=[transforms.OptaxTransform(belief)])
    text = json.dumps(tff_optim.get_config(optimizer))
    assert tff_optim.from_config(text) == optimizer


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: optax.adam(0.1), ValueError, "must keep the sign of gradients, .*reverses it"),
        (lambda: optax.sgd(0.1), ValueError, "must keep the sign of gradients, .*reverses it"),
        (
            lambda: optax.add_decayed_weights(0.1),
            ValueError,
            "must depend on gradients alone; found a tr",
        ),
        (lambda: "adam", TypeError, "`transformation_or_factory` must be"),
    ],
)
def test_what_does_not_fit_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        transforms.OptaxTransform(given())
