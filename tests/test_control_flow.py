"""Control flow of tensors that users write in Python, in every place that runs an optimizer."""

import attrs
import contracts
import numpy as np
import pytest
import tensorflow as tf

import tff_optim
from tff_optim import hyperparameters, projections, schedules, transforms
from tff_optim.backends.keras import steps as keras_steps
from tff_optim.core import leaves

K = tf.keras
WEIGHTS = [np.array([0.5, -2.0, 0.0], "float32"), np.array(1.5, "float32")]
GRADIENTS = [
    [np.array(row, "float32"), np.array(one, "float32")]
    for row, one in (([1.0, 0.0, 2.0], 0.5), ([-1.0, -2.0, 0.0], -0.5), ([0.0, 3.0, -1.0], 0.0))
]
PLACES = [
    contracts.in_eager_code,
    contracts.in_a_tf_function,
    contracts.in_xla,
    contracts.in_tff_computations,
]


class Whole(transforms.GradientTransform):
    """A branch, a loop, and `==` in the methods of a transform."""

    def initialize(self, specs):
        start = tf.constant(3.0)
        if tf.constant(len(specs)) > 1:
            start -= 1.0
        return {"factor": start}

    def next(self, state, weights, gradients):
        factor = state["factor"]
        if tf.reduce_sum(gradients[0]) > 0:
            factor = factor + 1.0
        total = tf.constant(0.0)
        for element in gradients[0]:
            total += tf.abs(element)
        changed = [tf.where(g == 0.0, total, factor * g) for g in gradients]
        return {"factor": factor}, changed


def whole(weights, gradients, t, memory):
    factor = memory.get("factor", 2.0) + (gradients[0].sum() > 0)
    memory["factor"] = factor
    return [np.where(g == 0, np.abs(gradients[0]).sum(), factor * g) for g in gradients]


@attrs.frozen
class Rule(transforms.ElementwiseTransform):
    """A branch in each method that a rule for elements may override."""

    scale: float = hyperparameters.positive(2.0)
    counts_steps = True

    def scalars(self, values, step, dtype):
        scalars = super().scalars(values, step, dtype)
        if step > 1.0:
            scalars = {"scale": scalars["scale"] * 3.0}
        return scalars

    def rule(self, scalars, gradient):
        if tf.reduce_sum(gradient) >= 0:
            gradient = scalars["scale"] * gradient
        else:
            gradient = gradient / scalars["scale"]
        return (gradient,)


def rule(weights, gradients, t, memory):
    scale = 2.0 * (3.0 if t else 1.0)
    return [g * scale if g.sum() >= 0 else g / scale for g in gradients]


class Regularizer(K.regularizers.Regularizer):
    def __call__(self, w):
        penalty = tf.constant(0.0)
        if tf.reduce_sum(w) < 0:
            penalty = 0.25 * tf.reduce_sum(w * w)
        return penalty


class Constraint(K.constraints.Constraint):
    def __call__(self, w):
        if tf.reduce_sum(w) < 0:
            w = w * 0.5
        return w


def looped(w):
    for _ in tf.range(2):
        w = w * 0.5
    return w


class Schedule(K.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        rate = tf.constant(0.25)
        if step == 1:
            rate *= 2.0
        return rate


def same(weights, gradients, t, memory):
    return gradients


def penalized(weights, gradients, t, memory):
    return [g + 0.5 * w * (w.sum() < 0) for g, w in zip(gradients, weights)]


# The arguments of a pipeline, and what NumPy makes of gradients, of the rate at a step, and of weights.
CASES = {
    "transform": ({"transforms": [Whole()]}, whole, None, None),
    "rule": ({"transforms": [Rule()]}, rule, None, None),
    "regularizer": ({"regularizers": [Regularizer()]}, penalized, None, None),
    "constraint": ({"projection": Constraint()}, same, None, lambda w: w / (1 + (w.sum() < 0))),
    "function": ({"projection": projections.Projection(looped)}, same, None, lambda w: w / 4),
    "schedule": ({"learning_rate": Schedule()}, same, lambda t: 0.5 if t == 1 else 0.25, None),
    "schedule in another": (
        {"learning_rate": schedules.Warmup(0.25, 1, then=Schedule())},
        same,
        lambda t: 0.5 if t == 2 else 0.25,
        None,
    ),
}


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_works_alike_in_every_place(name, jit_compile):
    arguments, change, rate, project = CASES[name]
    expected, memory = [w.astype("f8") for w in WEIGHTS], {}
    for t, gradients in enumerate(GRADIENTS):
        changed = change(expected, gradients, t, memory)
        size = rate(t) if rate else 0.125
        expected = [w - size * g for w, g in zip(expected, changed)]
        expected = [project(w) for w in expected] if project else expected
    optimizer = tff_optim.build_optimizer(
        **({"learning_rate": 0.125, "jit_compile": jit_compile} | arguments)
    )
    for place in PLACES:
        found = place(optimizer, WEIGHTS, GRADIENTS)
        contracts.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Branching(K.optimizers.SGD):
    def update_step(self, gradient, variable):
        if tf.reduce_sum(gradient) > 0:
            gradient = 2.0 * gradient
        super().update_step(gradient, variable)


class Equal(K.optimizers.SGD):
    """`==` of variables, which compares their values in Keras."""

    def update_step(self, gradient, variable):
        gradient = tf.where(variable == 1.5, 2.0 * gradient, gradient)
        gradient = tf.where(self.iterations == 1, 0.5 * gradient, gradient)
        gradient = tf.where(self.iterations != 2, gradient + 1.0, gradient)
        super().update_step(gradient, variable)


class Jump(K.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return tf.where(step == 1, 0.5, 0.25)


@pytest.mark.parametrize("rate", [0.5, Jump()], ids=["number", "schedule"])
def test_variables_of_keras_are_equal_by_value(rate):
    case = contracts.keras_case(lambda: Equal(rate))
    expected = case.reference(WEIGHTS, GRADIENTS)
    for place in PLACES:
        contracts.assert_close(place(case.make(), WEIGHTS, GRADIENTS), expected)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: Branching(0.5), lambda: K.optimizers.SGD(Schedule())], ids=["step", "rate"]
)
def test_optimizers_of_keras_are_converted_where_keras_converts_them(make, jit_compile):
    def make_keras():
        keras = make()
        keras.jit_compile = jit_compile  # the constructor turns it off where there is no GPU
        return keras

    keras, variables = make_keras(), [tf.Variable(w) for w in WEIGHTS]
    keras.build(variables)
    optimizer = tff_optim.build_keras_optimizer(make_keras)
    state = optimizer.initialize(contracts.specs_of(WEIGHTS))
    gradients = [tf.constant(g) for g in GRADIENTS[0]]

    def plain():
        keras.apply_gradients(zip(gradients, variables))
        return [v.value() for v in variables]

    def ours():
        return optimizer.next(state, WEIGHTS, gradients)[1]

    refused = tf.errors.OperatorNotAllowedInGraphError
    for function in (plain, ours):  # in no graph, XLA's included
        with pytest.raises(refused):
            tf.function(function)()
    with pytest.raises(refused):
        contracts.in_tff_computations(optimizer, WEIGHTS, GRADIENTS)
    if jit_compile:  # one step is one graph; Keras asks its schedule outside of its graph
        for function in (plain, ours) if isinstance(keras, Branching) else (ours,):
            with pytest.raises(refused):
                function()
    else:
        contracts.assert_close(ours(), plain())


def test_the_code_of_this_package_is_not_converted(monkeypatch):
    seen = []

    def watch(module, name):
        function = getattr(module, name)

        def watched(*arguments, **named):
            status = tf.__internal__.autograph.control_status_ctx().status.name
            seen.append((name, status))
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, watched)

    watch(leaves, "check_specs")
    watch(leaves, "read_gradients")
    watch(leaves, "widen")
    watch(keras_steps, "run_step")
    specs = contracts.specs_of(WEIGHTS)
    gradients = [tf.constant(g) for g in GRADIENTS[0]]
    compiled = K.optimizers.SGD(0.1)
    compiled.jit_compile = True
    for optimizer in (
        tff_optim.build_optimizer(0.1),
        tff_optim.build_optimizer(0.1, jit_compile=True),
        tff_optim.build_keras_optimizer(K.optimizers.SGD(0.1)),
        tff_optim.build_keras_optimizer(compiled),
    ):

        def take_a_step(optimizer=optimizer):
            return optimizer.next(optimizer.initialize(specs), WEIGHTS, gradients)

        seen.clear()
        tf.function(take_a_step)()
        assert {name for name, _ in seen} >= {"check_specs", "read_gradients"}
        assert len({name for name, _ in seen}) == 3
        assert {status for _, status in seen} <= {"DISABLED", "UNSPECIFIED"}

    torch = tff_optim.build_torch_optimizer("SGD", lr=0.1, python="python")
    seen.clear()
    for call in (
        lambda: torch.initialize([tf.TensorSpec([2], tf.int32)]),
        lambda: torch.next({}, WEIGHTS, gradients[:1]),
    ):
        with pytest.raises(ValueError, match="must"):
            tf.function(call)()
    assert seen == [("check_specs", "DISABLED"), ("read_gradients", "DISABLED")]
