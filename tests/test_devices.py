"""Where state and step are placed: on two logical CPUs here, and on a GPU where there is one."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near

import tff_optim

K = tf.keras.optimizers
SPECS = [tf.TensorSpec((3,), tf.float32)]
WEIGHTS = [np.float32([1.0, 2.0, 3.0])]


@pytest.fixture(autouse=True)
def _restored_policy():
    yield
    tff_optim.set_device_policy(gpu=None)


def adam(**options):
    return tff_optim.build_keras_optimizer(lambda: K.Adam(0.1), **options)


def devices_of(optimizer):
    state = optimizer.initialize(SPECS)
    new_state, weights = optimizer.next(state, WEIGHTS, WEIGHTS)
    leaves = tf.nest.flatten([state["slots"], new_state["slots"], weights])
    return {tf.DeviceSpec.from_string(leaf.device).to_string()[-5:] for leaf in leaves}


def test_state_and_step_are_on_the_device_asked_for():
    assert devices_of(adam(device="/CPU:1")) == {"CPU:1"}
    assert devices_of(adam(device="cpu:1")) == {"CPU:1"}
    assert devices_of(adam(device=tff_optim.DevicePolicy(gpu=False, index=1))) == {"CPU:1"}
    assert devices_of(adam()) == {"CPU:0"}


def test_the_policy_in_force_when_an_optimizer_is_built_is_followed():
    tff_optim.set_device_policy(gpu=False, index=1)
    assert tff_optim.get_device_policy() == tff_optim.DevicePolicy(gpu=False, index=1)
    assert tff_optim.select_device() == "/CPU:1"
    optimizer = adam()
    tff_optim.set_device_policy(gpu=None)
    assert tff_optim.select_device() is None
    assert devices_of(optimizer) == {"CPU:1"}
    assert devices_of(adam()) == {"CPU:0"}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_device_is_written_into_the_graph_of_a_computation(jit_compile):
    def make():
        keras = K.Adam(0.1)
        keras.jit_compile = jit_compile
        return keras

    optimizer = tff_optim.build_keras_optimizer(make, device="/CPU:1")
    for function, arguments in [
        (lambda: optimizer.initialize(SPECS), ()),
        (optimizer.next, (optimizer.initialize(SPECS), WEIGHTS, WEIGHTS)),
    ]:
        with tf.Graph().as_default() as graph:  # as TFF serializes it
            function(*tf.nest.map_structure(tf.constant, arguments))
        definition = graph.as_graph_def()
        nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
        heavy = [n for n in nodes if n.op in ("Fill", "Zeros", "Mul", "Sub", "Square", "Sqrt")]
        assert heavy or function is not optimizer.next
        assert all(n.device.endswith("CPU:1") for n in heavy), [n.name for n in heavy]


def test_a_device_scope_in_a_computation_runs_in_the_worker():
    weights_type = tff.types.tensorflow_to_type(SPECS)
    optimizer = adam(device="/CPU:0")
    initialize, step = tff_optim.build_optimizer_computations(optimizer, weights_type)
    _, weights = step(initialize(), WEIGHTS, WEIGHTS)
    assert_near(weights[0], WEIGHTS[0] - 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("/CPU:7", ValueError, r"one that TensorFlow sees .*CPU:0.* found /CPU:7"),
        ("nonsense", ValueError, "found 'nonsense'"),
        ("/job:worker/task:7/device:CPU:0", ValueError, "found '/job:worker/task:7/device:CPU:0'"),
        ("/job:worker", ValueError, "found '/job:worker'"),
        (1, TypeError, "found int"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_when_the_optimizer_is_built(device, error, message):
    with pytest.raises(error, match=message):
        adam(device=device)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="found /GPU:0"):
        tff_optim.set_device_policy(gpu=True)
    assert tff_optim.get_device_policy() == tff_optim.DevicePolicy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "`gpu`"),
        ((False, -1), "`index`"),
        ((False, True), "`index`"),
        ((None, 0), "must be None where `gpu` is; found 0"),
    ],
)
def test_a_malformed_policy_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        tff_optim.DevicePolicy(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
def test_state_and_step_are_on_the_gpu():
    assert devices_of(adam(device="/GPU:0")) == {"GPU:0"}
