"""Pipelines for the table of laws, each with its NumPy twin."""

from collections.abc import Callable

import contracts
import numpy as np
import optax
import tensorflow as tf
import twins

import tff_optim
from tff_optim import projections, regularizers, transforms

DECAYING = tf.keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.2, 0.1, 0.05])


def decaying(t: int) -> float:
    return np.float32([0.2, 0.2, 0.1, 0.1, 0.05][min(t, 4)])


class Noise:
    """What the transform adds to zeros; it has tests of its own."""

    def __init__(self, **arguments):
        self.transform = transforms.GaussianNoise(**arguments)
        self.state = self.transform.initialize(())

    def __call__(self, weights, gradients):
        zeros = [None if g is None else tf.zeros(g.shape) for g in gradients]
        self.state, noise = self.transform.next(self.state, None, zeros)
        return twins.present(lambda n, g: g + np.asarray(n, "f8"), noise, gradients)


def twin_reference(make_twin: Callable[[], Callable]) -> contracts.Reference:
    """Steps in float64; sparse gradients are summed, weights rounded to their dtype each step."""

    def exact(gradient, weight):
        if gradient is None:
            return None
        if isinstance(gradient, tf.IndexedSlices):
            dense = np.zeros(weight.shape)
            np.add.at(dense, gradient.indices.numpy(), gradient.values.numpy())
            return dense
        return np.asarray(gradient, "f8")

    def reference(weights, steps):
        twin = make_twin()
        for gradients in steps:
            wide = [np.asarray(w, "f8") for w in weights]
            new = twin(wide, [exact(g, w) for g, w in zip(gradients, weights, strict=True)])
            weights = [n.astype(w.dtype) for n, w in zip(new, weights, strict=True)]
        return weights

    return reference


def pipeline_case(make, make_twin, **options) -> contracts.Case:
    return contracts.Case(make, twin_reference(make_twin), **options)


def _build(*arguments, **options):
    return lambda: tff_optim.build_optimizer(*arguments, **options)


def _twin(rate, *make_parts, **options):
    of_step = rate if callable(rate) else lambda t: np.float32(rate)
    return lambda: twins.Pipeline(of_step, [make() for make in make_parts], **options)


def _adam():
    return tf.keras.optimizers.Adam(0.05, beta_1=0.75, beta_2=0.875, epsilon=1e-3)


CASES = {
    "pipeline: optax": pipeline_case(
        _build(
            0.05,
            transforms=[
                transforms.OptaxTransform(
                    tff_optim.build_optax_optimizer(optax.trace, decay=0.5, nesterov=True)
                )
            ],
        ),
        # `trace` does not scale what it adds by 1 - decay, nor does Momentum.
        _twin(0.05, lambda: twins.Momentum(0.5, True)),
    ),
    "pipeline: rate and decay": pipeline_case(
        _build(0.05, weight_decay=0.02),
        _twin(0.05, decay=lambda t: np.float32(0.02)),
    ),
    "pipeline: momenta in a row": pipeline_case(
        _build(
            0.05,
            transforms=[
                transforms.Momentum(0.5, nesterov=True),
                transforms.EWMA(0.6),
                transforms.Momentum(0.25),
                transforms.YogiMomentum(0.75),
            ],
        ),
        _twin(
            0.05,
            lambda: twins.Momentum(0.5, True),
            lambda: twins.EWMA(np.float32(0.6)),
            lambda: twins.Momentum(0.25),
            lambda: twins.YogiMomentum(0.75),
        ),
    ),
    "pipeline: in a pipeline": pipeline_case(
        _build(
            0.25,
            transforms=[
                transforms.Momentum(0.5),
                tff_optim.build_optimizer(
                    DECAYING,
                    transforms=[transforms.EWMA(0.6), tff_optim.build_optimizer(0.5)],
                    weight_decay=0.5,
                ),
            ],
            weight_decay=0.02,
        ),
        _twin(
            0.25,
            lambda: twins.Momentum(0.5),
            lambda: twins.EWMA(np.float32(0.6)),
            lambda: twins.Inner(decaying, 0.5, 0.5),
            decay=lambda t: np.float32(0.02),
        ),
    ),
    "pipeline: scaled by squares": pipeline_case(
        _build(DECAYING, transforms=[transforms.RMSProp(0.5, 0.25), transforms.Adagrad(0.5)]),
        _twin(decaying, lambda: twins.RMSProp(0.5, 0.25), lambda: twins.Adagrad(0.5)),
    ),
    "pipeline: everything, compiled": pipeline_case(
        _build(
            0.05,
            regularizers=[regularizers.FedProx(0.25), tf.keras.regularizers.L1L2(0.125, 0.25)],
            transforms=[
                transforms.ClipByNorm(2.0),
                transforms.Adam(0.75, 0.875, 0.0625, amsgrad=True),
                transforms.Momentum(0.5),
            ],
            weight_decay=DECAYING,
            projection=projections.Box(-0.75, 1.0),
            jit_compile=True,
        ),
        _twin(
            0.05,
            lambda: twins.FedProx(0.25),
            lambda: twins.L1L2(0.125, 0.25),
            lambda: twins.ClipByNorm(2.0),
            lambda: twins.Adam(0.75, 0.875, 0.0625, True),
            lambda: twins.Momentum(0.5),
            decay=decaying,
            projection=lambda w: np.clip(w, -0.75, 1.0),
        ),
    ),
    "pipeline: clipped together, with noise": pipeline_case(
        _build(
            0.05,
            transforms=[
                transforms.ClipByGlobalNorm(1.5),
                transforms.GaussianNoise(0.5, seed=4),
                transforms.Yogi(0.75, 0.875, 0.125),
            ],
        ),
        _twin(
            0.05,
            lambda: twins.ClipByGlobalNorm(1.5),
            lambda: Noise(stddev=0.5, seed=4),
            lambda: twins.Yogi(0.75, 0.875, 0.125),
        ),
        couples_weights=True,
    ),
    # The truth is eager Keras itself, at the pipeline's rate.
    "pipeline: around Keras": contracts.Case(
        _build(0.05, transforms=[transforms.KerasTransform(_adam)]),
        contracts.keras_case(_adam).reference,
    ),
}
