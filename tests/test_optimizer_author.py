"""The transform and the backend that CONTRIBUTING.md writes keep every law of this package's own."""

import functools
import inspect
import pathlib
import re

import contracts
import numpy as np
import pytest
import selection
import tensorflow as tf

import tff_optim

TEXT = (pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
RATE, BETA = 0.05, 0.75


@functools.cache
def written(name):
    """The class of this name, as the page writes it."""
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if f"class {name}" in b
    )
    namespace: dict = {"__name__": "written"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    return namespace[name]


def twin(weights, steps, average):
    """Steps along the signs of an average, or of a sum."""
    weights, sums = [w.astype("f8") for w in weights], [np.zeros(w.shape) for w in weights]
    for gradients in steps:
        for i, g in enumerate(gradients):
            if g is not None:
                g = np.asarray(tf.convert_to_tensor(g), "f8")
                sums[i] = BETA * sums[i] + ((1 - BETA) * g if average else g)
                weights[i] -= RATE * np.sign(sums[i])
    return weights


def as_pipeline():
    return tff_optim.build_optimizer(RATE, transforms=[written("AverageSign")(BETA)])


CASES = {
    "transform": contracts.Case(as_pipeline, functools.partial(twin, average=True)),
    "backend": contracts.Case(
        lambda: written("SignOptimizer")(RATE, BETA), functools.partial(twin, average=False)
    ),
}
PAIRS = {
    f"{name}-{law.__name__}": (case, law) for name, case in CASES.items() for law in contracts.LAWS
}
QUICK = [name for name in PAIRS if name.startswith("backend") or name.endswith("agrees_in_python")]


@pytest.mark.parametrize(("case", "law"), selection.params(PAIRS, QUICK, unpack=True))
def test_law(case, law, tmp_path):
    law(case, *([str(tmp_path)] if "directory" in inspect.signature(law).parameters else []))


def test_a_schedule_is_followed():
    decay = tf.keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.0, 1.0 - 2**-20])
    part = written("AverageSign")(decay)
    state = part.initialize(tf.TensorSpec([]))
    found = []
    for gradient in (3.0, -1.0):
        state, changed = part.next(state, tf.zeros([]), tf.constant(gradient))
        found.append(float(changed))
    assert found == [1.0, 1.0]  # the second step keeps nearly all of the average


def test_equality_and_messages():
    make = written("SignOptimizer")
    optimizer = make(RATE, BETA)
    assert optimizer == make(RATE, BETA) != make(RATE, 0.5)
    state = optimizer.initialize([tf.TensorSpec([2])])
    with pytest.raises(
        ValueError, match=r"`momentum` of `SignOptimizer` must be a number in \[0, 1\)"
    ):
        optimizer.set_hparams(state, {"momentum": 1.5})
    with pytest.raises(AttributeError, match="`device` of SignOptimizer is set when it is built"):
        optimizer.device = "/CPU:0"
