"""The server step on a device of this process, against the composed process in the worker."""

import asyncio

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_close, assert_equal, cohorts, model_fn

from tff_optim.resident import ServerDeviceProcess
from tff_optim.resident.in_worker import handover

SERVER = tff.learning.optimizers.build_adam(0.1, beta_1=0.8)


def parts():

    @tff.tensorflow.computation
    def initial_weights():
        return tff.learning.models.ModelWeights.from_model(model_fn())

    weights_type = initial_weights.type_signature.result
    client_work = tff.learning.templates.build_model_delta_client_work(
        model_fn,
        optimizer=tff.learning.optimizers.build_sgdm(0.05),
        client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
    )
    # Its state, a moving norm, is one that stays in the worker.
    aggregator = tff.aggregators.MeanFactory(
        tff.aggregators.clipping_factory(
            tff.aggregators.PrivateQuantileEstimationProcess.no_noise(0.1, 0.5, 0.5),
            tff.aggregators.SumFactory(),
        )
    ).create(weights_type.trainable, tff.TensorType(np.float32))
    return (
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        client_work,
        aggregator,
    )


@pytest.fixture(scope="module")
def plain():
    pieces = parts()
    return tff.learning.templates.compose_learning_process(
        *pieces,
        tff.learning.templates.build_apply_optimizer_finalizer(
            SERVER, pieces[0].type_signature.result
        ),
    )


@pytest.fixture(scope="module")
def plain_states(plain):
    states, metrics = [plain.initialize()], [None]
    for clients in cohorts()[:4]:
        state, measured = plain.next(states[-1], list(clients))
        states.append(state)
        metrics.append(measured)
    return states, metrics


@pytest.fixture(scope="module")
def on_device():
    with ServerDeviceProcess(*parts(), SERVER, server_device="CPU:1") as process:
        yield process


def test_rounds_give_the_numbers_and_metrics_of_the_composed_process(on_device, plain_states):
    states, metrics = plain_states
    state = on_device.initialize()
    assert_equal(on_device.materialize(state), states[0])
    for i, clients in enumerate(cohorts()[:4], start=1):
        output = on_device.next(state, list(clients))
        assert isinstance(output, tff.learning.templates.LearningProcessOutput)
        state, measured = output
        assert_close(on_device.materialize(state), states[i])
        assert_close(measured, metrics[i])
    assert_close(on_device.get_model_weights(state), states[-1].global_model_weights)


def test_weights_and_optimizer_state_are_on_the_device(on_device):
    state, _ = on_device.next(on_device.initialize(), list(cohorts()[0]))
    for reference in tf.nest.flatten((state.global_model_weights, state.finalizer)):
        assert reference.device.endswith("/device:CPU:1")
    for reference in tf.nest.flatten(state.aggregator):
        assert reference.device is None
        assert isinstance(reference, tff.program.MaterializableValueReference)
    assert tf.nest.flatten(state.aggregator)


def test_a_tensor_elsewhere_is_an_error(on_device, monkeypatch):
    state = on_device.initialize()
    held = tf.nest.flatten(state)[0].held
    with tf.device("/device:CPU:0"):
        astray = [tf.identity(w) for w in held.optimizer_state]
    with pytest.raises(RuntimeError, match=r"finalizer/.* is on .*CPU:0"):
        on_device._new_state(held.inner, held.weights, astray)

    real = on_device._step

    def step_elsewhere(*args):
        new_state, weights, flag = real(*args)
        with tf.device("/device:CPU:0"):
            return new_state, [tf.identity(w) for w in weights], flag

    monkeypatch.setattr(on_device, "_step", step_elsewhere)
    with pytest.raises(RuntimeError, match=r"global_model_weights/.* is on .*CPU:0"):
        on_device.next(state, list(cohorts()[0]))


def test_states_are_saved_and_resumed_by_tffs_manager(on_device, plain_states, tmp_path):
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    state, _ = on_device.next(on_device.initialize(), list(cohorts()[0]))
    asyncio.run(manager.save(state, 1))
    loaded = asyncio.run(manager.load(1, state))
    assert_equal(loaded, on_device.materialize(state))
    resumed, _ = on_device.next(loaded, list(cohorts()[1]))
    straight, _ = on_device.next(state, list(cohorts()[1]))
    assert_equal(on_device.materialize(resumed), on_device.materialize(straight))
    assert_close(on_device.materialize(resumed), plain_states[0][2])


def test_a_plain_state_is_restored(on_device, plain_states):
    plain_state = plain_states[0][2]
    state = on_device.restore(plain_state)
    assert_equal(on_device.materialize(state), plain_state)
    state, _ = on_device.next(plain_state, list(cohorts()[2]))
    assert_close(on_device.materialize(state), plain_states[0][3])


def test_weights_and_hparams_are_read_and_written(on_device, plain, plain_states):
    plain_state = plain_states[0][2]
    state = on_device.restore(plain_state)
    hparams = plain.get_hparams(plain_state)
    assert_equal(on_device.get_hparams(state), hparams)
    hparams["client_work"]["learning_rate"] = 0.02
    hparams["finalizer"]["learning_rate"] = 0.3
    changed = on_device.set_hparams(state, hparams)
    expected = plain.set_hparams(plain_state, hparams)
    assert_equal(on_device.materialize(changed), expected)

    weights = tf.nest.map_structure(lambda w: w + 1, plain.get_model_weights(plain_state))
    changed = on_device.set_model_weights(changed, weights)
    expected = plain.set_model_weights(expected, weights)
    assert_equal(on_device.materialize(changed), expected)
    after, _ = on_device.next(changed, list(cohorts()[0]))
    expected, _ = plain.next(expected, list(cohorts()[0]))
    assert_close(on_device.materialize(after), expected)
    # What was given stays as it was.
    assert_equal(on_device.materialize(state), plain_state)


def test_both_ways_of_crossing_are_measured_and_give_the_same(on_device, monkeypatch):
    state = on_device.initialize()
    on_device.next(state, list(cohorts()[0]))
    times = on_device.handover_times
    assert times.num_bytes == 2 * 4 * (3 * 2 + 2 + 2 + 1)
    assert times.file_seconds > 0
    assert times.message_seconds > 0
    faster = "file" if times.file_seconds < times.message_seconds else "message"
    assert times.chosen == faster
    results = []
    for files in (True, False):
        monkeypatch.setattr(on_device, "_files", files)
        state_after, _ = on_device.next(state, list(cohorts()[0]))
        results.append(on_device.materialize(state_after))
    assert_equal(results[0], results[1])


def test_without_shared_files_messages_are_measured_alone(monkeypatch, plain_states):
    async def see_nothing(executor):
        executor.host.shares_files = False

    monkeypatch.setattr(handover, "look_for_files", see_nothing)
    with ServerDeviceProcess(
        *parts(), SERVER, server_device="CPU:0", clients_per_step=2
    ) as process:
        state, _ = process.next(process.initialize(), list(cohorts()[0]))
        assert process.handover_times.file_seconds is None
        assert process.handover_times.chosen == "message"
        assert_close(process.materialize(state), plain_states[0][1])


def test_an_aggregate_that_is_not_finite_changes_nothing_and_is_counted(on_device, monkeypatch):
    state = on_device.initialize()
    real = on_device._inner.read

    def read(name, *args):
        value = real(name, *args)
        if name == "aggregate":
            value = tf.nest.map_structure(np.array, value)
            value[0][0, 0] = np.nan
        return value

    monkeypatch.setattr(on_device._inner, "read", read)
    after, metrics = on_device.next(state, list(cohorts()[0]))
    assert metrics["finalizer"]["update_non_finite"] == 1
    before = on_device.materialize(state)
    after = on_device.materialize(after)
    assert_equal(after.global_model_weights, before.global_model_weights)
    assert_equal(after.finalizer, before.finalizer)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`server_device` names no device .*GPU:7.*CPU:1"):
        ServerDeviceProcess(*parts(), SERVER, server_device="GPU:7")
    with pytest.raises(TypeError, match=r"`server_device` must be a string .* found int"):
        ServerDeviceProcess(*parts(), SERVER, server_device=0)
    with pytest.raises(TypeError, match=r"`server_optimizer` must be .*found SGD"):
        ServerDeviceProcess(*parts(), tf.keras.optimizers.SGD(), server_device="CPU:0")


@pytest.mark.gpu
@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
def test_on_a_gpu(plain_states):
    with ServerDeviceProcess(*parts(), SERVER, server_device="GPU:0") as process:
        state = process.initialize()
        for i, clients in enumerate(cohorts()[:3], start=1):
            state, _ = process.next(state, list(clients))
            assert_close(process.materialize(state), plain_states[0][i])
        for reference in tf.nest.flatten((state.global_model_weights, state.finalizer)):
            if np.issubdtype(reference.type_signature.dtype, np.floating):
                assert reference.device.endswith("GPU:0")
