"""Keras optimizers in TFF's processes, and what cannot be one is refused."""

import asyncio
import collections
import concurrent.futures
import copy
import dataclasses
import inspect
import itertools
import pathlib
import pickle
import re
import sys
import types

import attrs
import contracts
import federated_twin as twin
import numpy as np
import problems
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near

import tff_optim
from tff_optim import build_keras_optimizer
from tff_optim.backends.keras import checks

K = tf.keras.optimizers
SPECS = [tf.TensorSpec((2, 2), tf.float32), tf.TensorSpec((2,), tf.float32)]
WEIGHTS = [np.float32([[1.0, -2.0], [0.5, 3.0]]), np.float32([0.1, -0.4])]


def one_step(optimizer, gradients=None, weights=WEIGHTS):
    gradients = [np.ones_like(w) for w in weights] if gradients is None else gradients
    return optimizer.next(optimizer.initialize(contracts.specs_of(weights)), weights, gradients)


# ------------------------------------------------------------------------------- whole TFF processes


def test_federated_averaging_equals_the_same_loop_in_eager_keras():
    client_fn = lambda: K.SGD(0.05, momentum=0.5, nesterov=True)  # noqa: E731
    server_fn = lambda: K.Adam(0.1, beta_2=0.95, epsilon=1e-3)  # noqa: E731
    process = tff.learning.algorithms.build_weighted_fed_avg(
        problems.model_fn,
        client_optimizer_fn=build_keras_optimizer(client_fn),
        server_optimizer_fn=build_keras_optimizer(server_fn),
    )
    clients = problems.make_clients()
    state = process.initialize()
    for _ in range(3):
        state = process.next(state, clients).state
    expected = problems.train_in_keras(client_fn, server_fn, 3, clients)
    contracts.assert_close(process.get_model_weights(state).trainable, expected, 1e-5, 1e-5)

    # Halving the rate of the server through the process counts from the next round on.
    hparams = process.get_hparams(state)
    assert set(hparams["client_work"]) == {"learning_rate", "momentum"}
    assert set(hparams["finalizer"]) == {"learning_rate", "beta_1", "beta_2", "epsilon"}
    hparams["finalizer"]["learning_rate"] = np.float32(0.0)
    frozen = process.next(process.set_hparams(state, hparams), clients).state
    contracts.assert_equal(
        process.get_model_weights(frozen).trainable, process.get_model_weights(state).trainable
    )
    hparams = process.get_hparams(state)
    hparams["client_work"]["learning_rate"] = np.float32(0.0)
    still = process.next(process.set_hparams(state, hparams), clients)
    moved = process.next(state, clients)
    first = moved.metrics["client_work"]["train"]["loss"]
    assert still.metrics["client_work"]["train"]["loss"] != first


def _build_fed_recon(optimizer):
    return tff.learning.algorithms.build_fed_recon(
        problems.reconstruction_model_fn,
        loss_fn=tf.keras.losses.MeanSquaredError,
        client_optimizer_fn=optimizer,
        reconstruction_optimizer_fn=optimizer,
        dataset_split_fn=tff.learning.models.ReconstructionModel.build_dataset_split_fn(),
    )


OTHERS = {
    "fed_recon": _build_fed_recon,
    "fed_prox": lambda optimizer: tff.learning.algorithms.build_weighted_fed_prox(
        problems.model_fn, 0.1, optimizer, optimizer
    ),
    "mime_lite": lambda optimizer: tff.learning.algorithms.build_weighted_mime_lite(
        problems.model_fn, optimizer, server_optimizer=optimizer
    ),
    "fed_sgd": lambda optimizer: tff.learning.algorithms.build_fed_sgd(
        problems.model_fn, optimizer
    ),
}


@pytest.mark.parametrize("name", selection.params([*OTHERS], ["mime_lite"]))
def test_other_algorithms_equal_themselves_with_the_optimizer_of_tff(name):
    ours, theirs = (
        OTHERS[name](optimizer)
        for optimizer in (
            build_keras_optimizer(lambda: K.SGD(0.05, momentum=0.9)),
            tff.learning.optimizers.build_sgdm(0.05, momentum=0.9),
        )
    )
    clients = problems.make_clients()
    results, states = [], []
    for process in (ours, theirs):
        state = process.initialize()
        for _ in range(2):
            state = process.next(state, clients).state
        states.append(state)
        results.append(process.get_model_weights(state).trainable)
    contracts.assert_close(*results, 1e-5, 1e-5)
    if name == "mime_lite":  # whose momentum stays at the server
        optimizer_state = states[0].client_work[0]
        assert optimizer_state["step"] == 2
        assert all(np.any(slot) for slot in optimizer_state["slots"].values())


def test_the_rate_of_the_clients_is_scheduled_over_rounds_from_the_state_of_the_server():
    process = tff.learning.algorithms.build_weighted_fed_avg_with_optimizer_schedule(
        twin.functional_model(),
        client_learning_rate_fn=lambda i: tf.gather([0.1, 0.0, 0.1], i),
        client_optimizer_fn=lambda rate: build_keras_optimizer(K.SGD, learning_rate=rate),
        server_optimizer_fn=build_keras_optimizer(lambda: K.SGD(1.0)),
    )
    state, clients = process.initialize(), problems.make_clients()
    weights = [process.get_model_weights(state).trainable]
    for _ in range(3):
        state = process.next(state, clients).state
        weights.append(process.get_model_weights(state).trainable)
    pairs = itertools.pairwise(weights)
    moved = [any(np.any(a != b) for a, b in zip(*pair)) for pair in pairs]
    assert moved == [True, False, True]


def test_a_learning_rate_takes_the_place_of_the_optimizers_own():
    _, weights = one_step(build_keras_optimizer(K.SGD, learning_rate=0.5))
    assert_near(weights[1], WEIGHTS[1] - 0.5)
    given = K.SGD(0.1)
    optimizer = build_keras_optimizer(given, learning_rate=0.5)
    assert optimizer == build_keras_optimizer(lambda: K.SGD(0.5))
    assert float(given.learning_rate) == np.float32(0.1)
    assert tff_optim.from_config(tff_optim.get_config(optimizer)) == optimizer
    schedule = K.schedules.ExponentialDecay(0.1, 2, 0.5)
    with pytest.raises(ValueError, match="schedule"):
        build_keras_optimizer(lambda: K.SGD(schedule), learning_rate=0.5)

    with tf.Graph().as_default():
        rate = tf.constant(0.1) * 2
        with pytest.raises(ValueError, match="pass it as `learning_rate`"):
            build_keras_optimizer(lambda: K.SGD(rate))
        for given in (rate, 0.1):
            with pytest.raises(
                ValueError, match=r"Pass a callable that makes it.*learning_rate=r\)"
            ):
                build_keras_optimizer(K.SGD(given))
        with pytest.raises(ValueError, match="must be something that JSON can hold"):
            tff_optim.get_config(build_keras_optimizer(K.SGD, learning_rate=rate))


@pytest.mark.parametrize("scope", [tf.function, tff.tensorflow.computation])
def test_an_optimizer_is_built_where_its_rate_is_a_tensor(scope):
    def step(rate):
        with pytest.raises(ValueError, match="pass it as `learning_rate`"):
            build_keras_optimizer(lambda: K.SGD(rate))
        optimizer = build_keras_optimizer(K.SGD, learning_rate=rate)
        return one_step(optimizer)[1]

    if scope is tf.function:
        found = tf.function(step, autograph=False)(tf.constant(0.25))
    else:
        found = tff.tensorflow.computation(step, np.float32)(0.25)
    for weight, start in zip(found, WEIGHTS):
        np.testing.assert_allclose(weight, start - np.float32(0.25), rtol=1e-6)


# -------------------------------------------------------------------------- ways to name an optimizer


@pytest.mark.parametrize(
    "optimizer",
    [
        K.AdamW(0.1, weight_decay=0.05, beta_1=0.8),
        K.serialize(K.AdamW(0.1, weight_decay=0.05, beta_1=0.8)),
        lambda: K.AdamW(0.1, weight_decay=0.05, beta_1=0.8),
    ],
    ids=["instance", "config", "callable"],
)
def test_an_instance_its_config_and_a_callable_give_the_same_optimizer(optimizer):
    expected = build_keras_optimizer(lambda: K.AdamW(0.1, weight_decay=0.05, beta_1=0.8))
    found = build_keras_optimizer(optimizer)
    assert found == expected
    assert found != build_keras_optimizer(lambda: K.AdamW(0.1, weight_decay=0.05, beta_1=0.7))
    contracts.assert_equal(one_step(found), one_step(expected))


@pytest.mark.parametrize("name", ["adamw", "Lion", "ADAFACTOR", "sgd", "ftrl"])
def test_a_name_gives_the_optimizer_with_its_defaults(name):
    cls = {n.lower(): c for n, c in vars(K).items()}[name.lower()]
    assert build_keras_optimizer(name) == build_keras_optimizer(cls)


def test_a_config_is_left_unchanged_and_keeps_a_schedule():
    schedule = K.schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
    config = K.serialize(K.SGD(schedule))
    before = repr(config)
    optimizer = build_keras_optimizer(config)
    assert repr(config) == before
    state, weights = optimizer.initialize(SPECS), WEIGHTS
    for _ in range(3):
        state, weights = optimizer.next(state, weights, [np.ones_like(w) for w in WEIGHTS])
    assert_near(weights[1], WEIGHTS[1] - (0.5 + 0.5 + 0.25))


def test_the_given_instance_is_neither_changed_nor_followed():
    keras = K.SGD(0.5)
    optimizer = build_keras_optimizer(keras)
    keras.learning_rate = 100.0
    keras.momentum = 0.9
    assert optimizer == build_keras_optimizer(lambda: K.SGD(0.5))
    _, weights = one_step(optimizer)
    assert_near(weights[1], WEIGHTS[1] - 0.5)
    assert len(keras.variables) == 1  # the iterations
    assert not hasattr(keras, "momentums")
    with pytest.raises(AttributeError):
        optimizer.device = "/CPU:0"


# ------------------------------------------------------------------------------- Keras' own arguments


def test_weights_are_excluded_from_decay_by_name():
    def make_with_rate():
        keras = K.SGD(1.0, weight_decay=0.5)
        keras.exclude_from_weight_decay(var_names=["bias"])
        return keras

    zeros = [np.zeros_like(w) for w in WEIGHTS]
    named = build_keras_optimizer(make_with_rate, weight_names=["dense/kernel:0", "dense/bias:0"])
    _, (kernel, bias) = one_step(named, zeros)
    assert_near(kernel, 0.5 * WEIGHTS[0])
    assert_near(bias, WEIGHTS[1])

    optimizer = build_keras_optimizer(make_with_rate)
    as_dict = {"kernel": WEIGHTS[0], "bias": WEIGHTS[1]}
    _, found = one_step(optimizer, tf.nest.map_structure(np.zeros_like, as_dict), as_dict)
    assert_near(found["bias"], WEIGHTS[1])
    assert_near(found["kernel"], 0.5 * WEIGHTS[0])

    variables = [tf.Variable(w, name=n) for w, n in zip(WEIGHTS, ["kernel", "bias"])]
    _, (kernel, bias) = one_step(optimizer, zeros, variables)
    assert_near(kernel, 0.5 * WEIGHTS[0])
    assert_near(bias, WEIGHTS[1])

    with pytest.raises(ValueError, match="weight_names"):
        one_step(optimizer, zeros)
    with pytest.raises(ValueError, match="found 1 names for 2 weights"):
        one_step(build_keras_optimizer(make_with_rate, weight_names=["bias"]), zeros)


def test_the_moving_average_starts_at_the_weights_of_the_first_step():
    optimizer = build_keras_optimizer(lambda: K.SGD(0.1, use_ema=True, ema_momentum=0.9))
    state, weights = optimizer.initialize(SPECS), WEIGHTS
    average = [w.astype("f8") for w in WEIGHTS]
    for _ in range(3):
        state, weights = optimizer.next(state, weights, [np.ones_like(w) for w in WEIGHTS])
        average = [0.9 * a + 0.1 * np.asarray(w, "f8") for a, w in zip(average, weights)]
    found = [state["slots"]["average/0"], state["slots"]["average/1"]]
    contracts.assert_close(found, average)


def test_nadam_equals_one_eager_process_across_a_resume_over_several_weights(tmp_path):
    weights, gradients = contracts.make_problem(steps=9)
    case = contracts.keras_case(lambda: K.Nadam(0.1, beta_1=0.7))
    optimizer = case.make()
    step = tf.function(optimizer.next)
    state = contracts.tensors(optimizer.initialize(contracts.specs_of(weights)))
    state, middle = contracts.run(
        step, state, contracts.tensors(weights), contracts.tensors(gradients[:5])
    )
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    asyncio.run(manager.save((state, middle), 5))
    fresh = case.make()
    structure = (fresh.initialize(contracts.specs_of(weights)), weights)
    state, middle = asyncio.run(manager.load(5, structure))
    _, found = contracts.run(fresh.next, state, middle, gradients[5:])
    contracts.assert_close(found, case.reference(weights, gradients))


def test_jit_compile_compiles_the_step_and_changes_no_number():
    def make():
        keras = K.Adam(0.1, amsgrad=True)
        keras.jit_compile = True  # the constructor turns it off where there is no GPU
        return keras

    optimizer = build_keras_optimizer(make)
    plain = build_keras_optimizer(lambda: K.Adam(0.1, amsgrad=True))
    contracts.assert_close(one_step(optimizer)[1], one_step(plain)[1])
    step = tf.function(optimizer.next).get_concrete_function(
        contracts.tensors(optimizer.initialize(SPECS)),
        contracts.tensors(WEIGHTS),
        contracts.tensors(WEIGHTS),
    )
    functions = step.graph.as_graph_def().library.function
    assert any(f.attr["_XlaMustCompile"].b for f in functions)
    weights_type = tff.types.tensorflow_to_type(SPECS)
    initialize, step = tff_optim.build_optimizer_computations(optimizer, weights_type)
    _, found = step(initialize(), WEIGHTS, [np.ones_like(w) for w in WEIGHTS])
    contracts.assert_close(found, one_step(plain)[1])


def test_compiled_steps_are_traced_once_for_the_same_gradients():
    steps = []  # of single weights, whenever Python runs them

    class Counted(K.Adam):
        def update_step(self, gradient, variable):
            steps.append(variable)
            super().update_step(gradient, variable)

    def make():
        keras = Counted(0.1, weight_decay=0.01)
        keras.exclude_from_weight_decay(var_names=["bias"])
        keras.jit_compile = True
        return keras

    optimizer, plain = build_keras_optimizer(make), build_keras_optimizer(make)
    plain.keras_optimizer.jit_compile = False
    weights = {"bias": tf.constant([1.0, 2.0]), "kernel": tf.constant([[3.0]])}
    specs = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), weights)
    ends, counts = [], []
    for each in (plain, optimizer):
        state, current = each.initialize(specs), weights
        steps.clear()
        for gradients in [weights] * 3 + [weights | {"bias": None}] * 2:
            state, current = each.next(state, current, gradients)
            counts.append(len(steps))
        ends.append(current)
    contracts.assert_close(*ends)
    assert counts[:5] == [2, 4, 6, 7, 8]
    assert counts[5:] == [2, 2, 2, 3, 3]


# ------------------------------------------------------------------------------- steps in eager code


BUILDS = []


class Counting(K.SGD):
    """Counts how often it is built."""

    def build(self, var_list):
        BUILDS.append(self)
        super().build(var_list)


class InABox(Counting):
    """Keeps a variable where no copy of the optimizer finds it."""

    def build(self, var_list):
        super().build(var_list)
        self.box = types.SimpleNamespace(last=self.add_variable([], name="last"))

    def update_step(self, gradient, variable):
        super().update_step(gradient + self.box.last, variable)
        self.box.last.assign(tf.reduce_sum(gradient))


@pytest.mark.parametrize(("cls", "builds_a_step"), [(Counting, 0), (InABox, 2)])
def test_an_eager_optimizer_is_built_once_where_it_can_be_copied(cls, builds_a_step):
    optimizer = build_keras_optimizer(cls(0.1, momentum=0.5))
    state, weights = one_step(optimizer)
    before, state_in_graph, in_graph = len(BUILDS), state, weights
    for step in range(1, 4):
        gradients = [np.full_like(w, step) for w in WEIGHTS]
        state, weights = optimizer.next(state, weights, gradients)
    assert len(BUILDS) - before == 3 * builds_a_step
    for step in range(1, 4):
        gradients = [tf.fill(w.shape, float(step)) for w in WEIGHTS]
        state_in_graph, in_graph = tf.function(optimizer.next)(state_in_graph, in_graph, gradients)
    contracts.assert_equal((state, weights), (state_in_graph, in_graph))


def test_threads_take_steps_of_one_optimizer_at_the_same_time():
    optimizer = build_keras_optimizer(K.Adam(0.1))

    def steps(sign):
        state, weights = optimizer.initialize(SPECS), WEIGHTS
        for _ in range(10):
            state, weights = optimizer.next(
                state, weights, [sign * np.ones_like(w) for w in WEIGHTS]
            )
        return state, weights

    alone = [steps(sign) for sign in (1.0, -1.0)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        contracts.assert_equal(list(pool.map(steps, (1.0, -1.0))), alone)


# ------------------------------------------------------------------------------------ user subclasses


class SignDescent(K.Optimizer):
    """A subclass that follows Keras' extension points and counts in a variable of its own."""

    def __init__(self, learning_rate=0.1, power=1.0, period=3, name="SignDescent", **kwargs):
        super().__init__(name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.power = power
        self.period = period
        self._flips = tf.Variable(0, dtype=tf.int64, name="flips")

    def build(self, var_list):
        super().build(var_list)
        if getattr(self, "_built", False):
            return
        self._built = True
        self.last = {i: self.add_variable_from_reference(v, "last") for i, v in enumerate(var_list)}

    def update_step(self, gradient, variable):
        gradient = tf.convert_to_tensor(gradient)
        rate = tf.cast(self.learning_rate, variable.dtype)
        last = self.last[self._index_dict[self._var_key(variable)]]
        flips = tf.reduce_sum(tf.cast(last * gradient < 0, tf.int64))
        self._flips.assign_add(flips)
        # A comparison of tensors with `==` must stay an operation in TFF's graphs.
        damp = tf.where((self.iterations + 1) % self.period == 0, 0.5, 1.0)
        size = tf.pow(tf.abs(gradient), self.power) * tf.cast(damp, variable.dtype)
        variable.assign_sub(rate * tf.sign(gradient) * size)
        last.assign(gradient)

    def get_config(self):
        rate = self._serialize_hyperparameter(self._learning_rate)
        config = {"learning_rate": rate, "power": self.power, "period": self.period}
        return {**super().get_config(), **config}


def test_a_subclass_that_follows_the_extension_points_works_everywhere():
    case = contracts.keras_case(lambda: SignDescent(0.1, power=0.5, weight_decay=0.01))
    contracts.agrees_in_python(case)
    contracts.agrees_in_tff(case)
    contracts.carries_hparams(case)
    optimizer = case.make()
    assert set(optimizer.get_hparams(optimizer.initialize(SPECS))) == {
        "learning_rate",
        "period",
        "power",
        "weight_decay",
    }
    assert "flips" in optimizer.initialize(SPECS)["slots"]


def _subclass(update_step=None, **methods):
    methods["update_step"] = update_step or SignDescent.update_step
    return type("Custom", (SignDescent,), methods)


def _assign_in_cond(self, gradient, variable):
    tf.cond(
        self.iterations > 0,
        lambda: variable.assign_sub(gradient).value(),
        lambda: tf.convert_to_tensor(variable),
    )


def _assign_in_while(self, gradient, variable):
    def body(i):
        variable.assign_sub(gradient)
        return i + 1

    tf.while_loop(lambda i: i < 2, body, [tf.constant(0)])


def _touch_handle(self, gradient, variable):
    tf.raw_ops.AssignSubVariableOp(resource=variable.handle, value=gradient)


def _keep_in_python(self, gradient, variable):
    self.count = getattr(self, "count", 0) + 1
    variable.assign_sub(gradient / self.count)


class Counting(SignDescent):
    """Keeps an array and a dictionary in Python."""

    def __init__(self, key="array", **kwargs):
        super().__init__(**kwargs)
        self.key = key
        self.array, self.dictionary = np.zeros(()), {"n": 0}

    def update_step(self, gradient, variable):
        if self.key == "array":
            self.array += 1
        else:
            self.dictionary["n"] += 1
        variable.assign_sub(gradient)


def _create_late(self, gradient, variable):
    late = tf.Variable(tf.zeros_like(gradient), name="late")
    variable.assign_sub(gradient + late)


class Holding(SignDescent):
    """Holds a variable in an object of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.held = types.SimpleNamespace(factor=tf.Variable(0.5))

    def update_step(self, gradient, variable):
        variable.assign_sub(self.held.factor * gradient)


class FromVariable(K.schedules.LearningRateSchedule):
    """A schedule that reads its rate from a variable."""

    def __init__(self):
        self.rate = tf.Variable(0.1)

    def __call__(self, step):
        return self.rate / (1.0 + tf.cast(step, tf.float32))


def _build_lifted(self, var_list):
    with tf.init_scope():
        self.lifted = tf.Variable(0.0, name="lifted")
    SignDescent.build(self, var_list)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (_subclass(_assign_in_cond), r"'0'.*inside `tf\.cond`"),
        (_subclass(_assign_in_while), r"'0'.*inside `tf\.cond`, `tf\.while_loop`"),
        (_subclass(_touch_handle), "reads `handle` of the variable '0'"),
        (_subclass(_keep_in_python), "changes the Python attribute `count`"),
        (lambda: Counting("array"), "changes the Python attribute `array`"),
        (lambda: Counting("dictionary"), "changes the Python attribute `dictionary`"),
        (_subclass(_create_late), "creates 'late'"),
        (_subclass(build=_build_lifted), "lifted.*init_scope"),
        (Holding, r"variables in attributes, .*found that a step uses another `tf\.Variable`"),
        (lambda: K.SGD(FromVariable()), r"uses another `tf\.Variable`, of a schedule"),
    ],
    ids=[
        "cond",
        "while",
        "handle",
        "python state",
        "array",
        "dictionary",
        "late variable",
        "lifted variable",
        "held variable",
        "variable of a schedule",
    ],
)
def test_a_subclass_that_cannot_be_pure_is_refused_and_told_why(cls, message):
    def step():
        optimizer = build_keras_optimizer(cls)
        weights_type = tff.types.tensorflow_to_type(SPECS)
        tff_optim.build_optimizer_computations(optimizer, weights_type)

    with pytest.raises((ValueError, AttributeError), match=message):
        step()


@pytest.mark.parametrize("method", sorted(checks.not_called()))
def test_a_subclass_that_overrides_what_is_not_called_is_refused(method):
    cls = _subclass(**{method: lambda self, *unused: None})
    with pytest.raises(
        ValueError, match=f"what a pure step does not call; found that it overrides {method}"
    ):
        build_keras_optimizer(cls)


def test_a_method_that_is_replaced_on_the_instance_is_refused():
    for method in ("update_step", "compute_gradients"):
        keras = K.SGD(0.1)
        keras.__dict__[method] = lambda *unused: None
        with pytest.raises(ValueError, match=f"found one with {method} replaced on the instance"):
            build_keras_optimizer(keras)


def _methods_called(function):
    """The names of the methods of Keras' base classes that a function calls."""
    code = {
        inspect.unwrap(value).__code__: name
        for base in K.Optimizer.__mro__
        if base.__module__.startswith("keras")
        for name, value in vars(base).items()
        if hasattr(inspect.unwrap(value), "__code__")
    }
    called = set()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code in code:
            called.add(code[frame.f_code])

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return called


def test_what_keras_calls_in_a_step_is_called_here_too_or_refused_when_overridden():
    options = {"clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 1}

    def in_keras():
        for keras in (K.SGD(0.1, **options), K.SGD(K.schedules.ExponentialDecay(0.1, 1, 0.5))):
            variables = [tf.Variable(w) for w in WEIGHTS]
            keras.minimize(lambda: sum(tf.reduce_sum(v**2) for v in variables), variables)  # noqa: B023
            keras.finalize_variable_values(variables) if keras.use_ema else None

    def here():
        for make in (
            lambda: K.SGD(0.1, **options),
            lambda: K.SGD(K.schedules.ExponentialDecay(0.1, 1, 0.5)),
        ):
            one_step(build_keras_optimizer(make))

    with_keras, with_us = _methods_called(in_keras), _methods_called(here)
    assert {"minimize", "compute_gradients", "apply_gradients", "_clip_gradients"} <= with_keras
    assert {"_clip_gradients", "_deduplicate_sparse_grad", "build"} <= with_us
    assert with_keras - with_us <= checks.not_called()


def test_only_one_folder_reads_private_names_of_keras_optimizers():
    private = {name for name in (*vars(K.Adam(0.1)), *dir(K.Optimizer)) if re.match("_[a-z]", name)}
    assert {"_iterations", "_learning_rate", "_clip_gradients"} <= private
    package = pathlib.Path(tff_optim.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.parent.name != "keras"]
    assert len(sources) > 30
    for path in sources:
        for name in re.findall(
            r"(?<!self)(?<!cls)\._(?!_)(\w+)|[\"\']_(\w+)[\"\']", path.read_text()
        ):
            assert f"_{''.join(name)}" not in private, (path.name, name)


def _use(result, how):
    if how == "grouped":
        tf.group(result, tf.no_op())
    elif how == "sliced":
        return result[:1] * 0.0 + 0.0
    elif how == "depended on":
        with tf.control_dependencies([result]):
            return tf.zeros([1])
    elif how == "read":
        return 0.0 * tf.reshape(result.read_value(), [-1])[:1]
    elif how == "assigned again":
        result.assign_add(tf.zeros(result.get_shape()))
    return tf.zeros([1])


@pytest.mark.parametrize("how", ["grouped", "sliced", "depended on", "read", "assigned again"])
def test_what_an_assignment_returns_is_used_as_in_keras(how):
    def update_step(self, gradient, variable):
        flat = variable.assign_sub(0.5 * gradient)
        nothing = tf.reshape(_use(flat, how), [-1])[0]
        variable.assign_add(tf.zeros_like(gradient) + nothing)

    case = contracts.keras_case(_subclass(update_step))
    weights, gradients = contracts.make_problem(steps=2)
    expected = case.reference(weights, gradients)
    for place in (
        contracts.in_eager_code,
        contracts.in_a_tf_function,
        contracts.in_tff_computations,
    ):
        contracts.assert_close(place(case.make(), weights, gradients), expected)


# ------------------------------------------------------------------------------------ copies and files


def test_optimizers_are_copied_and_pickled():
    schedule = K.schedules.ExponentialDecay(0.1, 2, 0.5)

    def excluding():
        keras = K.AdamW(0.1, weight_decay=0.5)
        keras.exclude_from_weight_decay(var_names=["bias"])
        return keras

    for optimizer in (
        build_keras_optimizer(lambda: K.Nadam(schedule, clipnorm=0.5)),
        build_keras_optimizer(excluding, weight_names=["kernel", "bias"], device="/CPU:0"),
        build_keras_optimizer(lambda: SignDescent(0.1, power=0.5)),
        tff_optim.build_optimizer(
            schedule,
            regularizers=[tf.keras.regularizers.L2(0.1)],
            transforms=[tff_optim.transforms.KerasTransform(K.Adam(beta_1=0.5))],
            projection=tff_optim.projections.Projection(tf.keras.constraints.NonNeg(), where="0"),
        ),
    ):
        holder = dataclasses.make_dataclass("Settings", ["optimizer"])(optimizer)
        for made in (
            copy.deepcopy(optimizer),
            copy.copy(optimizer),
            pickle.loads(pickle.dumps(optimizer)),
            dataclasses.asdict(holder)["optimizer"],
        ):
            assert made == optimizer
            assert hash(made) == hash(optimizer)
            contracts.assert_equal(one_step(made), one_step(optimizer))
    pipeline = tff_optim.build_optimizer(0.1, transforms=[tff_optim.transforms.Adam()]).pipeline
    assert copy.deepcopy(pipeline) == pipeline
    assert attrs.asdict(pipeline)["transforms"][0]["beta_1"] == 0.9


class Untold(SignDescent):
    """Does not tell its argument."""

    def __init__(self, secret, **kwargs):
        super().__init__(**kwargs)
        self.secret = secret


def test_what_cannot_be_pickled_says_why():
    untold = build_keras_optimizer(lambda: Untold(0.5))
    assert copy.deepcopy(untold) == untold
    with pytest.raises(
        pickle.PicklingError, match="`get_config` of `Untold` must return every arg"
    ):
        pickle.dumps(untold)
    with tf.Graph().as_default():
        traced = build_keras_optimizer(K.SGD, learning_rate=tf.constant(0.1) * 2)
        assert copy.deepcopy(traced) == traced
        with pytest.raises(pickle.PicklingError, match="a tensor of the computation in which"):
            pickle.dumps(traced)


# -------------------------------------------------------------------------------------------- refusals


def test_what_is_no_optimizer_is_refused():
    used = K.SGD()
    used.apply_gradients([(tf.ones(()), tf.Variable(1.0))])
    excluded = K.AdamW()
    excluded.exclude_from_weight_decay(var_list=[tf.Variable(1.0)])
    for wrong, error, message in [
        ("adamm", ValueError, "did you mean 'Adam'.*found 'adamm'"),
        (3, TypeError, "found int"),
        (lambda: None, TypeError, "found NoneType"),
        (lambda: "sgd", TypeError, "found str"),
        (K.legacy.Adam(), ValueError, r"Use `tf\.keras\.optimizers\.Adam`"),
        (K.serialize(K.legacy.SGD()), ValueError, r"Use `tf\.keras\.optimizers\.SGD`"),
        (tff.learning.optimizers.build_sgdm(0.1), TypeError, "already"),
        ({"config": {}}, ValueError, "class_name"),
        ({"class_name": "SGD", "config": {"speed": 1}}, ValueError, "speed"),
        (used, ValueError, "must be fresh.*taken 1 steps"),
        (excluded, ValueError, "var_list"),
        (tf.keras.mixed_precision.LossScaleOptimizer(K.SGD()), ValueError, "overrides"),
    ]:
        with pytest.raises(error, match=message):
            build_keras_optimizer(wrong)


def test_unknown_shapes_and_missing_gradients_are_refused():
    optimizer = build_keras_optimizer("adam")
    with pytest.raises(
        ValueError, match=r"`specs` at 'a' must have a known shape.*found float32\(None, 2\)"
    ):
        optimizer.initialize({"a": tf.TensorSpec((None, 2), tf.float32)})
    with pytest.raises(ValueError, match="must not be None for every weight"):
        one_step(optimizer, [None, None])


def test_the_state_of_another_optimizer_or_of_other_weights_is_refused(tmp_path):
    adam, sgd = build_keras_optimizer("adam"), build_keras_optimizer("sgd")
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    asyncio.run(manager.save(adam.initialize(SPECS), 1))
    with pytest.raises(ValueError, match="structure"):
        asyncio.run(manager.load(1, sgd.initialize(SPECS)))
    with pytest.raises(ValueError, match=r"`state` must have the entries .*unknown \['beta_1'"):
        sgd.next(adam.initialize(SPECS), WEIGHTS, WEIGHTS)
    other = [tf.TensorSpec((3,), tf.float32), tf.TensorSpec((2,), tf.float32)]
    loaded = asyncio.run(manager.load(1, adam.initialize(other)))
    weights = [np.zeros((3,), "float32"), np.zeros((2,), "float32")]
    with pytest.raises(
        ValueError,
        match=r"`slots` of `state` at 'm/0' must be float32\(3,\).*; found float32\(2, 2\)",
    ):
        adam.next(loaded, weights, weights)


@pytest.mark.parametrize(("made", "used"), [("adam", "adamax"), ("adamax", "adam")])
def test_the_state_of_an_optimizer_with_the_same_layout_is_refused(made, used):
    state = build_keras_optimizer(made).initialize(SPECS)
    with pytest.raises(ValueError, match=r"`slots` of `state` must have .*another optimizer"):
        build_keras_optimizer(used).next(state, WEIGHTS, WEIGHTS)


def test_the_state_of_weights_with_other_names_is_refused():
    optimizer = build_keras_optimizer("adam")
    a, b = WEIGHTS[0], WEIGHTS[0]
    state = optimizer.initialize(contracts.specs_of({"a": a, "b": b}))
    with pytest.raises(ValueError, match=r"missing \['m/c', 'v/c'\], unknown \['m/a', 'v/a'\]"):
        optimizer.next(state, {"b": a, "c": b}, {"b": a, "c": b})


def test_the_state_holds_each_slot_once_and_nothing_else():
    def slots(optimizer):
        return list(optimizer.initialize(SPECS[:1])["slots"])

    assert slots(build_keras_optimizer("adam")) == ["m/0", "v/0"]
    assert slots(build_keras_optimizer("nadam")) == ["u_product", "m/0", "v/0"]
    assert slots(build_keras_optimizer(K.SGD, learning_rate=0.5)) == ["m/0"]


@pytest.mark.parametrize(
    "value", [np.array([0.1, 0.2]), [0.5], np.nan, -0.1, 1.0, True, "fast", None, 10**400]
)
def test_a_number_is_checked_when_an_optimizer_is_built_and_when_it_is_set(value):
    message = r"`beta_1` of `Adam` must be a number in \[0, 1\)"
    optimizer = build_keras_optimizer("adam")
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.set_hparams(optimizer.initialize(SPECS), {"beta_1": value})
    with pytest.raises((TypeError, ValueError), match=message):
        build_keras_optimizer(lambda: K.Adam(beta_1=value))


@pytest.mark.parametrize("value", [[0.1, 0.2], np.nan, np.inf, -0.1, 1e39])
def test_a_learning_rate_is_checked_when_an_optimizer_is_built_and_when_it_is_set(value):
    message = "`learning_rate` of `.*` must be"
    optimizer = build_keras_optimizer("adam")
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.set_hparams(optimizer.initialize(SPECS), {"learning_rate": value})
    with pytest.raises((TypeError, ValueError), match=message):
        build_keras_optimizer(lambda: K.SGD(value))
    with pytest.raises((TypeError, ValueError), match=message):
        build_keras_optimizer(K.SGD, learning_rate=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0, 0.5), "`ExponentialDecay` must be a number greater than 0; found 0"),
        ((np.nan, 10, 0.5), "`initial_learning_rate` of `ExponentialDecay`"),
        (
            (1.0, 1, 1e30),
            "must give a finite rate of at least 0 at every step; found inf at step 10",
        ),
        ((1.0, 1, 1.05), "found inf at step 1000000. A schedule that grows needs an end"),
    ],
)
def test_a_schedule_is_checked_when_an_optimizer_is_built(arguments, message):
    schedule = K.schedules.ExponentialDecay(*arguments)
    with pytest.raises(ValueError, match=message):
        build_keras_optimizer(lambda: K.SGD(schedule))
    with pytest.raises(ValueError, match=message):
        tff_optim.build_optimizer(schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        tff_optim.schedules.Triangular(0.0, 1.0, 2, step_factor=1.05),
        tff_optim.schedules.CosineRestarts(0.0, 1.0, 2, factor=2.0),
        tff_optim.schedules.Warmup(1.0, 2, K.schedules.ExponentialDecay(1.0, 1, 1.05)),
        K.schedules.CosineDecayRestarts(1.0, 2, t_mul=1.0, m_mul=2.0),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_schedule_that_is_not_finite_later_on_is_refused(schedule):
    rates = [float(schedule(tf.constant(t, tf.int64))) for t in (0, 1, 2, 10)]
    assert np.isfinite(rates).all()
    with pytest.raises(
        ValueError, match=r"must give a finite rate .* found (inf|nan) at step 1000"
    ):
        tff_optim.build_optimizer(schedule)


def test_a_schedule_that_grows_to_an_end_is_taken():
    grows = K.schedules.PolynomialDecay(1e-7, 1000, 1.0)
    optimizer = build_keras_optimizer(lambda: K.SGD(grows))
    _, weights = one_step(optimizer)
    np.testing.assert_allclose(weights[1], WEIGHTS[1] - np.float32(1e-7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(1)])
def test_a_part_of_the_hyper_parameters_is_set_from_any_number(number):
    optimizer = build_keras_optimizer("adam")
    state = optimizer.initialize(SPECS)
    changed = optimizer.set_hparams(state, {"learning_rate": number})
    assert changed["learning_rate"] == number
    for name in ("learning_rate", "beta_1"):
        assert changed[name].dtype == state[name].dtype
    assert changed["beta_1"] == state["beta_1"]
    assert "'learning_rate': 0.5" in repr(build_keras_optimizer(K.SGD(0.5)))


def test_a_number_that_is_set_in_a_process_is_checked_where_the_process_runs():
    process = tff.learning.algorithms.build_weighted_fed_avg(
        problems.model_fn,
        client_optimizer_fn=build_keras_optimizer(lambda: K.SGD(0.1)),
        server_optimizer_fn=build_keras_optimizer(lambda: K.SGD(1.0)),
    )
    state = process.initialize()
    hparams = process.get_hparams(state)
    hparams["finalizer"]["learning_rate"] = -1.0
    with pytest.raises(Exception, match="`learning_rate` of `SGD` must be a number of at least 0"):
        process.set_hparams(state, hparams)
    # TFF's client work keeps the number as it is; the clients look at it.
    hparams = process.get_hparams(state)
    hparams["client_work"]["learning_rate"] = float("nan")
    poisoned = process.set_hparams(state, hparams)
    with pytest.raises(Exception, match="`learning_rate` of `SGD` must be a number of at least 0"):
        process.next(poisoned, problems.make_clients())


def test_computations_check_their_arguments():
    with pytest.raises(TypeError, match="build_keras_optimizer"):
        tff_optim.build_optimizer_computations(K.SGD(), tff.TensorType(np.float32))
    at_server = tff.FederatedType(np.float32, tff.SERVER)
    with pytest.raises(TypeError, match="without placement"):
        tff_optim.build_optimizer_computations(build_keras_optimizer("sgd"), at_server)


def test_the_computations_run_in_a_round_written_by_hand():
    optimizer = build_keras_optimizer(lambda: K.Adam(0.1))
    weights_type = tff.to_type(
        collections.OrderedDict(a=tff.TensorType(np.float32, [2]), b=tff.TensorType(np.float32))
    )
    initialize, step = tff_optim.build_optimizer_computations(optimizer, weights_type)

    @tff.federated_computation(
        tff.FederatedType(initialize.type_signature.result, tff.SERVER),
        tff.FederatedType(weights_type, tff.SERVER),
        tff.FederatedType(weights_type, tff.CLIENTS),
    )
    def one_round(state, weights, updates):
        return tff.federated_map(step, (state, weights, tff.federated_mean(updates)))

    weights = collections.OrderedDict(a=np.float32([1, 2]), b=np.float32(3))
    ones = collections.OrderedDict(a=np.float32([1, 1]), b=np.float32(1))
    updates = [tf.nest.map_structure(lambda x, s=s: np.float32(x * s), ones) for s in (1, 3)]
    state, found = one_round(initialize(), weights, updates)
    expected = optimizer.next(
        optimizer.initialize(contracts.specs_of(weights)),
        weights,
        tf.nest.map_structure(lambda x: np.float32(x * 2), ones),
    )[1]
    contracts.assert_close([found["a"], found["b"]], [expected["a"], expected["b"]])
    assert state["step"] == 1
