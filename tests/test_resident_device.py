"""A process on a device of the Python process, wholly or its server alone, against plain TFF."""

import asyncio
import copy
import gc
import os
import pickle
import signal
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import (
    assert_close,
    assert_equal,
    cohorts,
    hosts_of,
    plain_run,
    process,
)
from tensorflow.core.framework import dataset_options_pb2

from tff_optim import DevicePolicy, ResidentProcess
from tff_optim.resident import ResidentCheckpoints
from tff_optim.resident.clients.in_process.cohort import ClientTensors
from tff_optim.resident.parts import clients_at_once

# Where a process may run; the first is the truth of the others.
PLACES = {
    "worker": {},
    "device": {"device": "CPU:1", "clients_per_step": 2},
    "server": {"server_device": "CPU:1", "clients_per_step": 2},
}
ON_DEVICES = ["device", "server"]


@pytest.fixture(scope="module")
def places():
    made = {name: ResidentProcess(process(), **PLACES[name]) for name in PLACES}
    yield made
    for resident in made.values():
        resident.close()


@pytest.fixture(params=ON_DEVICES)
def on_device(request, places):
    return places[request.param]


def test_rounds_give_the_numbers_and_metrics_of_the_plain_process(on_device):
    state = on_device.initialize()
    assert_equal(on_device.materialize(state), plain_run()[0][0])
    for clients, (plain_state, plain_metrics) in zip(cohorts(), plain_run()[1:], strict=True):
        output = on_device.next(state, list(clients))
        assert isinstance(output, tff.learning.templates.LearningProcessOutput)
        state, metrics = output
        assert_close(metrics, plain_metrics)
        assert_close(on_device.materialize(state), plain_state)
    assert_close(on_device.get_model_weights(state), plain_run()[-1][0].global_model_weights)


def test_the_state_is_on_the_device(on_device):
    state, _ = on_device.next(on_device.initialize(), list(cohorts()[0]))
    variables = tf.nest.flatten(state)[0].held.variables
    assert len(variables) == len(tf.nest.flatten(state))
    assert {v.device.rpartition(":")[2] for v in variables} == {"1"}
    assert "CPU:1" in repr(tf.nest.flatten(state)[0])
    assert "CPU:1" in repr(on_device)


def test_a_state_that_is_kept_stays_what_it_was_and_the_others_take_turns(places):
    resident = places["device"]
    first = resident.initialize()
    plain = resident.materialize(first)
    state = first
    addresses = set()
    for _ in range(5):
        state, _ = resident.next(state, list(cohorts()[0]))
        held = tf.nest.flatten(state)[0].held
        addresses.add(id(held.variables[0]))
        del held
    gc.collect()
    assert_equal(resident.materialize(first), plain)
    assert len(addresses) == 2
    # Twice from one state: the same, and the state is as it was.
    one, _ = resident.next(first, list(cohorts()[1]))
    two, _ = resident.next(first, list(cohorts()[1]))
    assert_equal(resident.materialize(one), resident.materialize(two))
    assert_equal(resident.materialize(first), plain)


def test_weights_and_hparams_are_read_and_written(on_device):
    plain = plain_run()[2][0]
    state = on_device.restore(plain)
    assert_equal(on_device.materialize(state), plain)
    assert_equal(on_device.get_model_weights(state), process().get_model_weights(plain))
    hparams = process().get_hparams(plain)
    assert_equal(on_device.get_hparams(state), hparams)
    hparams["client_work"]["learning_rate"] = 0.02
    hparams["finalizer"]["learning_rate"] = 0.3
    changed = on_device.set_hparams(state, hparams)
    expected = process().set_hparams(plain, hparams)
    assert_equal(on_device.materialize(changed), expected)
    weights = tf.nest.map_structure(lambda w: w + 1, process().get_model_weights(plain))
    changed = on_device.set_model_weights(changed, weights)
    expected = process().set_model_weights(expected, weights)
    assert_equal(on_device.materialize(changed), expected)
    after, _ = on_device.next(changed, list(cohorts()[0]))
    expected, _ = process().next(expected, list(cohorts()[0]))
    assert_close(on_device.materialize(after), expected)
    assert_equal(on_device.materialize(state), plain)  # what was given stays as it was


def test_a_run_moves_from_place_to_place_by_checkpoints(places, tmp_path):
    # Every place writes once and reads what each other one wrote.
    order = ["worker", "device", "worker", "server", "device", "server", "worker"]
    plain = process().initialize()
    for version, name in enumerate(order, start=1):
        resident = places[name]
        checkpoints = ResidentCheckpoints(resident, tmp_path)
        state, last = checkpoints.resume()
        assert last == version - 1
        assert_close(resident.materialize(state), plain)
        state, _ = resident.next(state, list(cohorts()[version % 3]))
        plain, _ = process().next(plain, list(cohorts()[version % 3]))
        checkpoints.save_now(state, version)
        assert_equal(
            resident.materialize(checkpoints.load_now(version)), resident.materialize(state)
        )


def test_a_state_of_one_place_is_taken_over_by_the_others(places):
    for source in PLACES:
        state = places[source].restore(plain_run()[1][0])
        for target in PLACES:
            after, _ = places[target].next(state, list(cohorts()[1]))
            assert_close(places[target].materialize(after), plain_run()[2][0])


def test_tffs_manager_saves_and_loads(on_device, tmp_path):
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    state, _ = on_device.next(on_device.initialize(), list(cohorts()[0]))
    asyncio.run(manager.save(state, 1))
    loaded = asyncio.run(manager.load(1, state))
    assert_equal(loaded, on_device.materialize(state))
    resumed, _ = on_device.next(loaded, list(cohorts()[1]))
    assert_close(on_device.materialize(resumed), plain_run()[2][0])


@pytest.mark.parametrize("name", PLACES)
def test_states_behave_like_values(name, places):
    resident, plain = places[name], plain_run()[2][0]
    state = resident.restore(plain)
    for leaf, value in zip(tf.nest.flatten(state), tf.nest.flatten(plain), strict=True):
        assert leaf.shape == np.shape(value)
        assert leaf.dtype == np.asarray(value).dtype
        assert_equal(np.asarray(leaf), np.asarray(value))
        assert np.asarray(leaf, np.float64).dtype == np.float64
        assert_equal(tf.convert_to_tensor(leaf).numpy(), tf.convert_to_tensor(value).numpy())
        assert tf.convert_to_tensor(leaf).dtype == leaf.dtype
    variable = tf.Variable(tf.zeros([3, 2]))
    variable.assign(state.global_model_weights.trainable[0])
    np.testing.assert_array_equal(variable, plain.global_model_weights.trainable[0])
    model = tf.keras.Sequential(
        [tf.keras.layers.Dense(n, input_shape=(m,)) for m, n in ((3, 2), (2, 1))]
    )
    state.global_model_weights.assign_weights_to(model)
    for w, expected in zip(model.get_weights(), plain.global_model_weights.trainable, strict=True):
        np.testing.assert_array_equal(w, expected)
    for copied in (copy.deepcopy(state), copy.copy(state)):
        assert_equal(resident.materialize(copied), plain)
    assert_equal(pickle.loads(pickle.dumps(state)), plain)


@pytest.mark.parametrize("name", PLACES)
def test_a_plain_process_says_what_it_was_given(name, places):
    state = places[name].restore(plain_run()[1][0])
    with pytest.raises(NotImplementedError, match=r"`state` of a `ResidentProcess`.*`materialize"):
        process().next(state, list(cohorts()[1]))


@pytest.mark.parametrize("name", PLACES)
def test_what_does_not_fit_is_told_by_name(name, places):
    resident, plain = places[name], plain_run()[0][0]
    state = resident.restore(plain)
    for hparams, message in (
        ({"finalizer": {"learning_rate": "fast"}}, "at 'finalizer/learning_rate' must be a number"),
        ({"finalizer": {"rate": 0.1}}, "`hparams` at 'finalizer' must hold some of learning_rate"),
        ({"finalizer": {"learning_rate": 1e39}}, "must be a finite number in float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            resident.set_hparams(state, hparams)
    with pytest.raises(TypeError, match=r"`model_weights` must have the structure"):
        resident.set_model_weights(state, [1.0])
    narrow = tff.learning.algorithms.build_weighted_fed_avg(
        narrow_model_fn,
        tff.learning.optimizers.build_sgdm(0.05),
        tff.learning.optimizers.build_adam(0.1, beta_1=0.8),
    )
    with ResidentProcess(narrow, **PLACES[name]) as other:
        foreign = other.initialize()
        with pytest.raises(
            TypeError, match=r"`state` must hold float32\[3,2\] .*another `Resident"
        ):
            resident.next(foreign, list(cohorts()[0]))
    with pytest.raises(TypeError, match=r"`state` must hold .*another `Resident"):
        resident.next(foreign, list(cohorts()[0]))


def narrow_model_fn():
    model = tf.keras.Sequential(
        [tf.keras.layers.Dense(n, input_shape=(m,)) for m, n in ((4, 2), (2, 1))]
    )
    spec = (tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None, 1], tf.float32))
    return tff.learning.models.from_keras_model(
        model, loss=tf.keras.losses.MeanSquaredError(), input_spec=spec
    )


@pytest.mark.parametrize("name", PLACES)
def test_a_closed_process_and_its_states_say_so(name, places):
    with ResidentProcess(process(), **PLACES[name]) as closed:
        state = closed.restore(plain_run()[0][0])
        assert "closed" not in repr(closed)
    assert repr(closed) == "<ResidentProcess on nothing: closed>"
    with pytest.raises(RuntimeError, match="This `ResidentProcess` was closed"):
        closed.next(state, list(cohorts()[0]))
    with pytest.raises(RuntimeError, match=r"`state` lives in a .* that was closed.*materialize"):
        places[name].next(state, list(cohorts()[0]))
    with pytest.raises(RuntimeError, match=r"`state` lives in a .* that was closed.*materialize"):
        np.asarray(tf.nest.flatten(state)[0])
    closed.close()  # a second time changes nothing


def test_data_that_cannot_be_sent_to_a_worker(places):
    batches = list(cohorts()[0][0].as_numpy_iterator())
    spec = cohorts()[0][0].element_spec
    generated = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)

    def through_python(x, y):
        seen.append(1)
        return tf.ensure_shape(tf.py_function(lambda v: v, [x], tf.float32), [None, 3]), y

    seen = []
    mapped = cohorts()[0][0].map(through_python)
    resident = places["device"]
    state = resident.restore(plain_run()[0][0])
    expected, _ = process().next(plain_run()[0][0], [cohorts()[0][0]] * 3)
    after, _ = resident.next(state, [generated, mapped, batches])
    assert_close(resident.materialize(after), expected)
    assert seen


def test_what_a_client_prints_is_seen(capfd):
    @tff.tensorflow.computation(tff.SequenceType(np.float32))
    def count(data):
        @tf.function
        def total(data):
            tf.print("a client is here")
            return data.reduce(0.0, lambda a, b: a + b)

        return total(data)

    @tff.federated_computation
    def initialize():
        return tff.federated_value(0.0, tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(count.type_signature.parameter, tff.CLIENTS),
    )
    def next_fn(state, data):
        del state
        total = tff.federated_sum(tff.federated_map(count, data))
        return tff.learning.templates.LearningProcessOutput(total, total)

    summing = tff.learning.templates.LearningProcess(
        initialize,
        next_fn,
        tff.tensorflow.computation(lambda s: s, np.float32),
        tff.tensorflow.computation(lambda s, w: w, np.float32, np.float32),
    )
    with ResidentProcess(summing, device="CPU:0") as resident:
        state, metrics = resident.next(resident.initialize(), [[1.0, 2.0], [4.0]])
        assert metrics == 7.0
        assert resident.materialize(state) == 7.0
    assert capfd.readouterr().err.count("a client is here") == 2


def test_clients_run_side_by_side(places, tmp_path):
    def meet(name):
        """Comes, and goes on once two are there."""

        def wait():
            (tmp_path / name).touch()
            deadline = time.monotonic() + 30
            while len(list(tmp_path.iterdir())) < 2:
                assert time.monotonic() < deadline, "nobody came"
                time.sleep(0.01)
            return np.int64(0)

        def mapped(x, y):
            with tf.control_dependencies([tf.numpy_function(wait, [], tf.int64)]):
                return tf.identity(x), y

        return mapped

    clients = [cohorts()[0][i].take(1).map(meet(f"{i}")) for i in range(2)]
    resident = places["device"]
    resident.next(resident.initialize(), clients)


@pytest.mark.parametrize("compiled", [True, False, None])
def test_the_servers_step_compiled_or_not(compiled):
    with ResidentProcess(process(), device="CPU:0", compile_step=compiled) as resident:
        state = resident.initialize()
        for clients in cohorts()[:3]:
            state, _ = resident.next(state, list(clients))
        assert_close(resident.materialize(state), plain_run()[3][0])


def test_a_lost_worker_costs_only_time_where_the_server_is_elsewhere(places):
    resident = places["server"]
    state = resident.restore(plain_run()[1][0])
    os.kill(hosts_of(resident)[0].worker.pid, signal.SIGKILL)
    after, _ = resident.next(state, list(cohorts()[1]))
    assert_close(resident.materialize(after), plain_run()[2][0])


def test_two_workers_and_a_server_in_the_python_process():
    with ResidentProcess(process(), server_device="CPU:1", workers=2) as resident:
        state = resident.initialize()
        for clients, (plain, metrics) in zip(cohorts()[:4], plain_run()[1:], strict=False):
            state, measured = resident.next(state, list(clients))
            assert_close(resident.materialize(state), plain)
            assert_close(measured, metrics)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "GPU:7"}, ValueError, r"`device` must be .*CPU:1; found /GPU:7"),
        ({"server_device": "GPU:7"}, ValueError, r"`server_device` must be .*CPU:1; found /GPU:7"),
        ({"device": 0}, TypeError, r"`device` must be None, a string .* found int"),
        ({"server_device": 0}, TypeError, r"`server_device` must be None, a string .* found int"),
        ({"device": "CPU:0", "workers": 1}, ValueError, "`device` must be left out .*workers=1"),
        ({"device": "CPU:0", "server_device": "CPU:0"}, ValueError, "`device` must be left out"),
        ({"compile_step": True}, ValueError, "`compile_step` must be None without `device`"),
        ({"device": "CPU:0", "compile_step": 1}, ValueError, "`compile_step` must be True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ResidentProcess(process(), **arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data of client 1 must be .*; found int, 3. Give a `tf.data.Dataset`"),
        (tf.data.Dataset.range(3), "data of client 1 must be elements of .*float32.*; found int64"),
    ],
)
def test_bad_data_is_told_before_the_round(places, data, message):
    resident = places["device"]
    with pytest.raises(TypeError, match=message):
        resident.next(resident.initialize(), [cohorts()[0][0], data])


def test_a_policy_chooses_the_device():
    with ResidentProcess(process(), device=DevicePolicy(gpu=False, index=1)) as resident:
        assert "CPU:1" in repr(tf.nest.flatten(resident.initialize())[0])


@pytest.mark.gpu
@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
@pytest.mark.parametrize("argument", ["device", "server_device"])
def test_on_a_gpu(argument):
    with ResidentProcess(process(), **{argument: "GPU:0"}) as resident:
        state = resident.initialize()
        for clients, (plain, _) in zip(cohorts()[:3], plain_run()[1:], strict=False):
            state, _ = resident.next(state, list(clients))
            assert_close(resident.materialize(state), plain)
        for leaf, variable in zip(
            tf.nest.flatten(state), tf.nest.flatten(state)[0].held.variables, strict=True
        ):
            if np.issubdtype(leaf.dtype, np.floating):
                assert variable.device.endswith("GPU:0")


@pytest.mark.parametrize(
    ("cores", "parameters", "expected"),
    [
        (2, 10, 32),
        (2, 1 << 20, 4),
        (2, 1 << 18, 16),
        (16, 10, 32),
        (16, 1 << 20, 32),
        (64, 10, 128),
    ],
)
def test_more_clients_of_a_small_model_run_at_once(cores, parameters, expected, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    sent = tff.to_type([(np.float32, [parameters])])
    assert clients_at_once(sent, least=2, most=32) == expected


@pytest.mark.parametrize("autotune", [None, True, False])
@pytest.mark.parametrize("optimised", [None, True, False])
def test_pipelines_are_left_as_they_are_unless_their_options_say_otherwise(autotune, optimised):
    given = tf.data.Options()
    if autotune is not None:
        given.autotune.enabled = autotune
    if optimised is not None:
        given.experimental_optimization.apply_default_optimizations = optimised
    given.threading.private_threadpool_size = 3
    dataset = tf.data.Dataset.range(4).batch(2).with_options(given)
    (variant,) = ClientTensors(tff.SequenceType((np.int64, [None]))).of(dataset, [])
    batches = tf.data.experimental.from_variant(variant, dataset.element_spec)
    assert [batch.tolist() for batch in batches.as_numpy_iterator()] == [[0, 1], [2, 3]]
    graph = tf.compat.v1.GraphDef.FromString(
        tf.raw_ops.DatasetToGraphV2(input_dataset=variant).numpy()
    )
    found = dataset_options_pb2.Options()
    # Those of the pipeline come first in the graph, and those that are set later win.
    for node in graph.node:
        if node.op == "OptionsDataset":
            found.MergeFromString(node.attr["serialized_options"].s)
    assert found.autotune_options.enabled is bool(autotune)
    assert found.optimization_options.apply_default_optimizations is bool(optimised)
    assert found.threading_options.private_threadpool_size == 3
