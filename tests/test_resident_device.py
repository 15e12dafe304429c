"""What holds of states, and of a process whose clients are trained in the Python process."""

import asyncio
import copy
import gc
import os
import pickle
import threading
import time
import weakref

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_close, assert_equal, cohorts, plain_run, process
from tensorflow.core.framework import dataset_options_pb2

from tff_optim import DevicePolicy, ResidentProcess, set_device_policy
from tff_optim.resident import ResidentCheckpoints
from tff_optim.resident import process as process_lib
from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.in_process.data import ClientTensors
from tff_optim.resident.state import variables as variables_lib

PLACES = {
    "device": {"device": "CPU:1", "clients_at_once": 2},
    "worker": {"device": "CPU:1", "workers": 1},
}


@pytest.fixture(scope="module")
def places():
    made = {name: ResidentProcess(process(), **PLACES[name]) for name in PLACES}
    yield made
    for resident in made.values():
        resident.close()


@pytest.fixture(params=PLACES)
def resident(request, places):
    return places[request.param]


def test_a_state_that_is_kept_stays_what_it_was_and_the_others_take_turns(resident):
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


def test_weights_and_hparams_are_read_and_written(resident):
    plain = plain_run()[2][0]
    state = resident.restore(plain)
    assert_equal(resident.materialize(state), plain)
    assert_equal(resident.get_model_weights(state), process().get_model_weights(plain))
    hparams = process().get_hparams(plain)
    assert_equal(resident.get_hparams(state), hparams)
    hparams["client_work"]["learning_rate"] = 0.02
    hparams["finalizer"]["learning_rate"] = 0.3
    changed = resident.set_hparams(state, hparams)
    expected = process().set_hparams(plain, hparams)
    assert_equal(resident.materialize(changed), expected)
    weights = tf.nest.map_structure(lambda w: w + 1, process().get_model_weights(plain))
    changed = resident.set_model_weights(changed, weights)
    expected = process().set_model_weights(expected, weights)
    assert_equal(resident.materialize(changed), expected)
    partly = resident.set_hparams(changed, {"finalizer": {"learning_rate": np.float64(0.3)}})
    assert_equal(resident.materialize(partly), expected)
    after, _ = resident.next(changed, list(cohorts()[0]))
    expected, _ = process().next(expected, list(cohorts()[0]))
    assert_close(resident.materialize(after), expected)
    assert_equal(resident.materialize(state), plain)  # what was given stays as it was


def test_a_run_moves_from_place_to_place_by_checkpoints(places, tmp_path):
    # Every place writes once and reads what each other one wrote.
    order = ["worker", "device", "device", "worker", "worker"]
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


def test_tffs_manager_saves_and_loads(resident, tmp_path):
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    state, _ = resident.next(resident.initialize(), list(cohorts()[0]))
    asyncio.run(manager.save(state, 1))
    loaded = asyncio.run(manager.load(1, state))
    assert_equal(loaded, resident.materialize(state))
    resumed, _ = resident.next(loaded, list(cohorts()[1]))
    assert_close(resident.materialize(resumed), plain_run()[2][0])


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
        with pytest.raises(TypeError, match=r"`state` must hold float32\[3,2\] .*another model"):
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


@pytest.mark.skipif(
    os.environ.get("TF_NUM_INTEROP_THREADS") == "1", reason="TensorFlow has one thread for all"
)
def test_as_many_clients_are_trained_at_once_as_asked(places):
    came, here, most = [], set(), []

    def meet(number):
        """Comes, and goes on once two have come."""

        def wait():
            came.append(number)
            here.add(number)
            most.append(len(here))
            deadline = time.monotonic() + 60
            while len(came) < 2:
                assert time.monotonic() < deadline, "nobody came"
                time.sleep(0.01)
            time.sleep(0.05)
            here.discard(number)
            return np.int64(0)

        def mapped(x, y):
            with tf.control_dependencies([tf.numpy_function(wait, [], tf.int64)]):
                return tf.identity(x), y

        return mapped

    clients = [cohorts()[0][i % 2].take(1).map(meet(i)) for i in range(6)]
    resident = places["device"]
    resident.next(resident.initialize(), clients)
    assert sorted(came) == list(range(6))
    assert max(most) == 2


@pytest.mark.parametrize("compiled", [True, False, None])
def test_the_servers_step_compiled_or_not(compiled):
    with ResidentProcess(process(), device="CPU:0", compile_step=compiled) as resident:
        state = resident.initialize()
        for clients in cohorts()[:3]:
            state, _ = resident.next(state, list(clients))
        assert_close(resident.materialize(state), plain_run()[3][0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "GPU:7"}, ValueError, r"`device` must be .*CPU:1; found /GPU:7"),
        ({"device": 0}, TypeError, r"`device` must be None, a string .* found int"),
        ({"compile_step": 1}, ValueError, "`compile_step` must be True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ResidentProcess(process(), **arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data of client 1 must be .*; found 3. Give a `tf.data.Dataset`"),
        (
            tf.data.Dataset.range(3),
            "data of client 1 must be .*float32.*; found a data set of int64",
        ),
    ],
)
def test_bad_data_is_told_before_the_round(places, data, message):
    resident = places["device"]
    with pytest.raises(TypeError, match=message):
        resident.next(resident.initialize(), [cohorts()[0][0], data])


def test_a_policy_chooses_the_device():
    with ResidentProcess(process(), device=DevicePolicy(gpu=False, index=1)) as resident:
        assert "CPU:1" in repr(tf.nest.flatten(resident.initialize())[0])


def test_without_a_device_it_is_the_one_of_the_policy_or_the_first_gpu_or_the_cpu(monkeypatch):
    with ResidentProcess(process()) as one:
        gpus = bool(tf.config.list_logical_devices("GPU"))
        assert one.device == ("GPU:0" if gpus else "CPU:0")
        assert one.device in repr(one)
    set_device_policy(gpu=False, index=1)
    try:
        with ResidentProcess(process()) as one:
            assert one.device == "CPU:1"
    finally:
        set_device_policy(gpu=None)
    seen = tf.config.list_logical_devices
    monkeypatch.setattr(
        tf.config, "list_logical_devices", lambda kind=None: seen("CPU" if kind == "GPU" else kind)
    )
    assert process_lib._chosen(None) == "/GPU:0"  # as where there is one


@pytest.mark.gpu
@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
@pytest.mark.parametrize("place", [{}, {"workers": 1}])
def test_on_a_gpu(place):
    with ResidentProcess(process(), device="GPU:0", **place) as resident:
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
        (64, 11_000_000, 12),  # a ResNet-18: 512 MB
        (2, 1 << 29, 1),
    ],
)
def test_clients_at_once_are_bounded_by_bytes_and_by_the_cores_that_may_be_used(
    cores, parameters, expected, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    sent = tff.to_type([(np.float32, [parameters])])
    assert sizes.at_once(sent, per_core=2, small=32) == expected


def test_cohorts_of_every_size_are_trained_by_one_function():
    with ResidentProcess(process(), clients_at_once=4) as resident:
        state = plain_run()[0][0]
        for number in (3, 5, 1, 11, 0):
            data = [cohorts()[0][i % 3] for i in range(number)]
            ours, metrics = resident.next(state, data)
            theirs, plain_metrics = process().next(state, data)
            assert_close(resident.materialize(ours), theirs)
            assert_close(metrics, plain_metrics)


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


def test_a_plain_state_that_is_read_keeps_its_variables_until_then(places, monkeypatch):
    """Another thread takes variables as soon as any are given back."""
    resident = places["device"]
    state = plain_run()[2][0]
    other = tf.nest.map_structure(lambda x: np.zeros_like(x), state)
    held = []
    real = resident._server._function

    def interleaved(computation):
        function = real(computation)

        def call(arguments):
            thread = threading.Thread(target=lambda: held.append(resident.restore(other)))
            thread.start()
            thread.join()
            return function(arguments)

        return call

    monkeypatch.setattr(resident._server, "_function", interleaved)
    found = resident.get_model_weights(state)
    assert len(held) == 1
    assert_equal(found, process().get_model_weights(state))
    hparams = process().get_hparams(state)
    changed = resident.set_hparams(state, hparams)
    assert_equal(resident.materialize(changed), state)


def test_threads_that_read_and_train_one_process_get_the_numbers_of_their_own_states(places):
    resident = places["device"]
    plain, found = [plain_run()[i][0] for i in range(3)], []

    def play(number):
        for _ in range(3):
            weights = resident.get_model_weights(plain[number])
            after, _ = resident.next(plain[number], list(cohorts()[number]))
            found.append((number, weights, resident.materialize(after)))

    threads = [threading.Thread(target=play, args=(i,)) for i in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for number, weights, after in found:
        assert_equal(weights, plain[number].global_model_weights)
        assert_close(after, plain_run()[number + 1][0])


def test_weights_are_read_while_a_round_is_running(places):
    resident, state = places["device"], plain_run()[1][0]
    began, go_on = threading.Event(), threading.Event()

    def wait():
        began.set()
        assert go_on.wait(60)
        return np.int64(0)

    def mapped(x, y):
        with tf.control_dependencies([tf.numpy_function(wait, [], tf.int64)]):
            return tf.identity(x), y

    data = [cohorts()[1][0].map(mapped), cohorts()[1][1]]
    thread = threading.Thread(target=resident.next, args=(state, data))
    thread.start()
    try:
        assert began.wait(60)
        assert_equal(resident.get_model_weights(state), state.global_model_weights)
        assert_equal(resident.materialize(resident.restore(state)), state)
        assert_equal(resident.materialize(resident.initialize()), plain_run()[0][0])
    finally:
        go_on.set()
        thread.join()


def test_a_leaf_that_is_read_is_the_only_one_fetched(places, monkeypatch):
    state = places["device"].restore(plain_run()[1][0])
    read = []
    real = variables_lib.plain
    monkeypatch.setattr(variables_lib, "plain", lambda v: read.append(v) or real(v))
    leaf = state.global_model_weights.trainable[1]
    for _ in range(3):
        np.testing.assert_array_equal(leaf, plain_run()[1][0].global_model_weights.trainable[1])
    assert len(read) == 3
    assert {v.shape.as_list()[0] for v in read} == {2}


def variables_there():
    return {id(x): weakref.ref(x) for x in gc.get_objects() if isinstance(x, tf.Variable)}


def test_closing_gives_the_memory_back_of_states_that_are_kept_too():
    before = variables_there()
    resident = ResidentProcess(process(), device="CPU:1", clients_at_once=2)
    state, _ = resident.next(resident.initialize(), list(cohorts()[0]))
    state, _ = resident.next(state, list(cohorts()[0]))
    resident.get_model_weights(state)
    made = {key: ref for key, ref in variables_there().items() if key not in before}
    assert len(made) == 2 * len(tf.nest.flatten(state))
    resident.close()  # as in a notebook, where both names go on
    gc.collect()
    assert not [ref() for ref in made.values() if ref() is not None]
    assert "closed" in repr(tf.nest.flatten(state)[0])
