"""ResidentProcess against the plain process that it wraps, in every place."""

import asyncio
import collections
import contextlib
import functools
import gc
import os
import pathlib
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import (
    assert_close,
    assert_equal,
    cohort,
    cohorts,
    connections_of,
    functional_model,
    is_running,
    plain_run,
    process,
)

from tff_optim import ResidentProcess
from tff_optim.resident import leaves
from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.in_workers import handover

# Where clients may be trained, and how near the numbers are to plain TFF's.
PLACES = {
    "here": ({"device": "CPU:1", "clients_at_once": 2}, assert_close),
    "a worker": ({"workers": 1}, assert_equal),
    "a worker, by two": ({"workers": 1, "clients_at_once": 2}, assert_equal),
    "two workers": ({"workers": 2, "clients_at_once": 1, "device": "CPU:1"}, assert_close),
}


@pytest.fixture(scope="module")
def places():
    made = {name: ResidentProcess(process(), **place) for name, (place, _) in PLACES.items()}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def resident(places):
    return places["a worker"]


@pytest.mark.parametrize("name", PLACES)
def test_rounds_are_those_of_plain_tff_over_changing_cohort_sizes(name, places):
    resident, check = places[name], PLACES[name][1]
    state = resident.initialize()
    assert_equal(resident.materialize(state), plain_run()[0][0])
    for clients, (plain_state, plain_metrics) in zip(cohorts(), plain_run()[1:], strict=True):
        output = resident.next(state, list(clients))
        assert isinstance(output, tff.learning.templates.LearningProcessOutput)
        state, metrics = output
        check(metrics, plain_metrics)
        check(resident.materialize(state), plain_state)
    check(resident.get_model_weights(state), plain_run()[-1][0].global_model_weights)


def test_states_are_values_a_second_round_from_one_state_gives_the_same(resident):
    state = resident.initialize()
    first = resident.next(state, list(cohorts()[0]))
    resident.next(first.state, list(cohorts()[1]))
    again = resident.next(state, list(cohorts()[0]))
    assert_equal(resident.materialize(again.state), resident.materialize(first.state))


def test_the_state_has_references_of_the_right_types_in_tffs_containers(resident):
    state = resident.initialize()
    plain = plain_run()[0][0]
    assert type(state) is type(plain)
    assert type(state.global_model_weights) is type(plain.global_model_weights)
    references = tf.nest.flatten(state)
    assert references
    for reference, value in zip(references, tf.nest.flatten(plain), strict=True):
        assert isinstance(reference, tff.program.MaterializableValueReference)
        assert reference.type_signature == tff.TensorType(value.dtype, value.shape)
        assert_equal(asyncio.run(reference.get_value()), value)
    assert "global_model_weights/trainable/0" in repr(references[0])


def test_weights_and_hparams_are_read_and_written(resident):
    plain = plain_run()[2][0]
    state = resident.restore(plain)
    assert_equal(resident.get_model_weights(state), process().get_model_weights(plain))
    assert_equal(resident.get_hparams(state), process().get_hparams(plain))

    weights = tf.nest.map_structure(lambda w: w + 1, process().get_model_weights(plain))
    changed = resident.set_model_weights(state, weights)
    assert_equal(resident.materialize(changed), process().set_model_weights(plain, weights))
    hparams = process().get_hparams(plain)
    hparams["finalizer"]["learning_rate"] = 0.5
    changed = resident.set_hparams(state, hparams)
    assert_equal(resident.materialize(changed), process().set_hparams(plain, hparams))
    partly = resident.set_hparams(state, {"finalizer": {"learning_rate": np.float64(0.5)}})
    assert_equal(resident.materialize(partly), process().set_hparams(plain, hparams))


def test_a_plain_or_mixed_state_is_taken_as_it_is(resident):
    plain = plain_run()[2][0]
    expected, _ = process().next(plain, list(cohorts()[2]))
    from_plain, _ = resident.next(plain, list(cohorts()[2]))
    assert_equal(resident.materialize(from_plain), expected)
    # Weights from one resident state, the rest from another.
    other = resident.restore(plain_run()[1][0])
    mixed = other._replace(
        global_model_weights=resident.restore(plain).global_model_weights,
    )
    expected, _ = process().next(
        plain_run()[1][0]._replace(global_model_weights=plain.global_model_weights),
        list(cohorts()[2]),
    )
    from_mixed, _ = resident.next(mixed, list(cohorts()[2]))
    assert_equal(resident.materialize(from_mixed), expected)


def test_a_state_of_one_place_is_taken_over_by_the_others(places):
    for source in ("here", "a worker"):
        state = places[source].restore(plain_run()[1][0])
        for target in ("a worker", "here", "two workers"):
            after, _ = places[target].next(state, list(cohorts()[1]))
            PLACES[target][1](places[target].materialize(after), plain_run()[2][0])


@pytest.mark.parametrize("way", ["in files", "in messages", "where no files are seen"])
def test_what_crosses_to_a_worker_is_the_same_whichever_way(way, monkeypatch):
    monkeypatch.setattr(handover, "FILES_FROM_BYTES", 0 if way != "in messages" else 1 << 30)
    saves = []
    real = handover.save_in_worker

    async def counted(*args):
        saves.append(args)
        await real(*args)

    async def see_nothing(connection):
        connection.shares_files = False

    monkeypatch.setattr(handover, "save_in_worker", counted)
    if way == "where no files are seen":
        monkeypatch.setattr(handover, "look_for_files", see_nothing)
    with ResidentProcess(process(), workers=1) as r:
        state = r.initialize()
        for clients, (plain, _) in zip(cohorts()[:2], plain_run()[1:], strict=False):
            state, _ = r.next(state, list(clients))
            assert_equal(r.materialize(state), plain)
    assert len(saves) == (2 if way == "in files" else 0)


def test_tffs_own_loop_with_managers(resident, tmp_path):
    def run(training_process, directory, rounds):
        released = []

        class Memory(tff.program.ReleaseManager):
            async def release(self, value, key):
                value = await tff.program.materialize_value(value)
                released.append({k: v for k, v in value.items() if "seconds" not in k})

        manager = tff.program.FileProgramStateManager(str(directory))
        state = tff.simulation.run_training_process(
            training_process,
            lambda r: list(cohorts()[r - 1]),
            rounds,
            evaluation_fn=lambda s, d: collections.OrderedDict(
                norm=sum(np.sum(w**2) for w in training_process.get_model_weights(s).trainable)
            ),
            evaluation_selection_fn=lambda r: None,
            program_state_manager=manager,
            metrics_managers=[Memory()],
        )
        return state, released, manager

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        plain_state, plain_released, plain_files = run(process(), tmp_path / "plain", 3)
        run(resident, tmp_path / "resident", 2)
        # A second call finds what the first one saved, a plain state, and goes on from it.
        state, released, files = run(resident, tmp_path / "resident", 3)
        assert_equal(resident.materialize(state), plain_state)
        assert_equal(released[-1], plain_released[-1])
        assert len(released) == 1
        for version in (1, 2, 3):
            assert_equal(
                loop.run_until_complete(files.load(version, state)),
                loop.run_until_complete(plain_files.load(version, plain_state)),
            )
    finally:
        asyncio.set_event_loop(None)
        loop.close()


# Fewer than are in the largest cohort, and more.
@pytest.mark.parametrize(("place", "several"), [({"device": "CPU:0"}, 4), ({"workers": 1}, 8)])
def test_how_many_clients_run_at_once_makes_no_difference(place, several):
    found = []
    for number in (1, several):
        with ResidentProcess(process(), clients_at_once=number, **place) as r:
            state, metrics = r.initialize(), []
            for clients in cohorts():
                state, measured = r.next(state, list(clients))
                metrics.append(measured)
            found.append((r.materialize(state), metrics))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("clients_at_once", [2, 4])
def test_clients_run_side_by_side(clients_at_once, tmp_path):
    def meet(name):
        """Comes, and goes on once two are there."""

        def wait(x, y):
            come = tf.io.write_file(f"{tmp_path}/{name}", "")
            deadline = tf.timestamp() + 30.0

            def look(found):
                with tf.control_dependencies([found]):  # or it would be looked for only once
                    return tf.size(tf.io.matching_files(f"{tmp_path}/*"))

            with tf.control_dependencies([come]):
                found = tf.while_loop(
                    lambda found: (found < 2) & (tf.timestamp() < deadline), look, [tf.constant(0)]
                )
            with tf.control_dependencies([tf.debugging.Assert(found[0] >= 2, ["nobody came"])]):
                return tf.identity(x), y

        return wait

    clients = [client.take(1).map(meet(i)) for i, client in enumerate(cohorts()[0])]
    with ResidentProcess(process(), workers=1, clients_at_once=clients_at_once) as r:
        r.next(r.initialize(), clients)


def test_split_deals_every_client_once_in_order():
    for total in range(0, 9):
        for workers in (1, 2, 3):
            data = list(range(total))
            shares = sizes.split(data, workers)
            assert [x for share in shares for x in share] == data
            assert len(shares) == min(workers, total)
            assert max(map(len, shares), default=0) - min(map(len, shares), default=0) <= 1


def two_pass_process():
    """The tiny process with a second aggregation, of the clients' distances from the first."""

    @tff.federated_computation(*process().next.type_signature.parameter)
    def twice(state, data):
        output = process().next(state, data)
        counts = tff.federated_map(
            tff.tensorflow.computation(lambda d: d.reduce(0.0, lambda a, b: a + 1.0)), data
        )
        mean = tff.federated_mean(counts)
        distances = tff.federated_map(
            tff.tensorflow.computation(lambda x, m: (x - m) ** 2),
            (counts, tff.federated_broadcast(mean)),
        )
        metrics = tff.federated_zip(collections.OrderedDict(spread=tff.federated_sum(distances)))
        return tff.learning.templates.LearningProcessOutput(output.state, metrics)

    return tff.learning.templates.LearningProcess(
        process().initialize, twice, process().get_model_weights, process().set_model_weights
    )


@pytest.mark.parametrize("arguments", [{}, {"workers": 1}])
def test_a_process_with_dependent_aggregations_is_refused_by_the_names_of_both(arguments):
    with pytest.raises(
        ValueError,
        match=r"`federated_sum` of float32@SERVER, which depends on the result of .*mean",
    ):
        ResidentProcess(two_pass_process(), **arguments)


@functools.cache
def with_secure_sums():
    return tff.learning.algorithms.build_weighted_fed_avg(
        functional_model(),
        tff.learning.optimizers.build_sgdm(0.05),
        model_aggregator=tff.learning.secure_aggregator(),
    )


@pytest.mark.parametrize("arguments", [{}, {"workers": 1}])
def test_a_process_with_secure_sums_is_refused(arguments):
    with pytest.raises(ValueError, match="`process` must be without secure sums"):
        ResidentProcess(with_secure_sums(), **arguments)


def counting_process(start, step, weights=lambda state: state):
    """A process of a state of any kind; a round takes a step and counts what clients have."""

    @tff.federated_computation
    def initialize():
        return tff.federated_eval(start, tff.SERVER)

    state_type = start.type_signature.result
    data_type = tff.FederatedType(tff.SequenceType(np.float32), tff.CLIENTS)
    total = tff.tensorflow.computation(lambda d: d.reduce(0.0, lambda a, b: a + b))

    @tff.federated_computation(initialize.type_signature.result, data_type)
    def next_fn(state, data):
        count = tff.federated_sum(tff.federated_map(total, data))
        return tff.learning.templates.LearningProcessOutput(tff.federated_map(step, state), count)

    getter = tff.tensorflow.computation(weights, state_type)
    setter = tff.tensorflow.computation(lambda s, w: s, state_type, getter.type_signature.result)
    return tff.learning.templates.LearningProcess(initialize, next_fn, getter, setter)


@pytest.mark.parametrize("place", [{}, {"workers": 1}])
def test_a_state_of_all_kinds_of_leaves(place):
    @tff.tensorflow.computation
    def start():
        return collections.OrderedDict(
            text=tf.constant("seed"),
            flag=tf.constant(True),
            half=tf.constant([1.5, np.nan], tf.float16),
            list=[tf.zeros([0], tf.int64), tf.constant(3, tf.uint8)],
            ragged=tf.compat.v1.placeholder_with_default([[1, 2]], [None, 2]),
            empty=(),
        )

    @tff.tensorflow.computation(start.type_signature.result)
    def grow(state):
        state["text"] = state["text"] + "!"
        state["flag"] = tf.logical_not(state["flag"])
        state["list"] = [tf.identity(state["list"][0]), state["list"][1] + tf.cast(1, tf.uint8)]
        state["ragged"] = tf.concat([state["ragged"], state["ragged"]], 0)
        return state

    odd = counting_process(start, grow, lambda state: state["half"])
    plain = odd.initialize()
    with ResidentProcess(odd, **place) as r:
        state = r.initialize()
        for n in (1, 2):
            state, metrics = r.next(state, [[1.0, 2.0]] * n)
            plain, plain_metrics = odd.next(plain, [[1.0, 2.0]] * n)
            assert_equal(metrics, plain_metrics)
            assert_equal(r.materialize(state), plain)
        assert_equal(r.materialize(r.restore(plain)), plain)


def test_a_state_that_holds_a_data_set_is_refused():
    start = tff.tensorflow.computation(lambda: [tf.data.Dataset.range(3), tf.constant(0)])
    same = tff.tensorflow.computation(lambda s: s, start.type_signature.result)
    with pytest.raises(ValueError, match=r"must have a state of tensors alone.* \['0'\]"):
        ResidentProcess(counting_process(start, same, lambda state: state[1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"process": 3}, TypeError, "`process` must be a .*LearningProcess.*found int"),
        ({"workers": 0}, ValueError, "`workers` must be None, a positive number"),
        ({"workers": True}, ValueError, "`workers` must be None"),
        ({"workers": []}, ValueError, "`workers` must be None"),
        ({"workers": ["localhost"]}, ValueError, "`workers` must name each worker 'host:port'"),
        ({"workers": ["a:1", "a:1"]}, ValueError, "`workers` must name each worker once"),
        (
            {"clients_at_once": 0},
            ValueError,
            "`clients_at_once` must be a whole number of at least 1",
        ),
        (
            {"clients_at_once": 1.5},
            ValueError,
            "`clients_at_once` must be a whole number of at least 1",
        ),
        ({"heartbeat": 0}, ValueError, "`heartbeat` must be a number greater than 0"),
        ({"start_timeout": "1"}, ValueError, "`start_timeout` must be a number greater than 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ResidentProcess(**{"process": process(), **arguments})


def test_bad_states_and_data(resident):
    plain = plain_run()[0][0]
    with pytest.raises(TypeError, match="`client_data` must be a list"):
        resident.next(plain, cohort(1, 0)[0])
    with pytest.raises(TypeError, match="`state` must have the structure"):
        resident.restore(plain[:2])
    weights = plain.global_model_weights
    wrong_shape = plain._replace(
        global_model_weights=weights._replace(
            trainable=[np.zeros([2, 3], np.float32), *weights.trainable[1:]]
        )
    )
    with pytest.raises(
        TypeError, match=r"float32\[3,2\] at global_model_weights/trainable/0; found float32\[2, 3"
    ):
        resident.restore(wrong_shape)
    wrong_dtype = plain._replace(
        global_model_weights=weights._replace(
            trainable=[weights.trainable[0].astype(np.float64), *weights.trainable[1:]]
        )
    )
    with pytest.raises(TypeError, match=r"trainable/0; found float64"):
        resident.restore(wrong_dtype)


def test_closing_ends_the_workers_and_later_calls_say_so():
    with ResidentProcess(process(), workers=2) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        pids = [one.worker.pid for one in connections_of(r)]
        directory = connections_of(r)[0].worker.directory
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)
    assert not tf.io.gfile.exists(directory)
    with pytest.raises(RuntimeError, match="was closed"):
        r.next(state, list(cohorts()[0]))
    with pytest.raises(RuntimeError, match="was closed"):
        r.materialize(state)
    with pytest.raises(RuntimeError, match="was closed"):
        r.initialize()
    r.close()  # a second time changes nothing


def memory_in_use(pids):
    """The least within half a second: a worker lets go of some of it after it has answered."""
    found = []
    for _ in range(10):
        time.sleep(0.05)
        texts = [pathlib.Path(f"/proc/{pid}/status").read_text() for pid in pids]
        found.append(sum(int(text.partition("VmRSS:")[2].split()[0]) for text in texts))
    return min(found) * 1024


def large_process(size):
    """A process of which a round is one Adam step on a tensor of `size` numbers."""

    def large_model_fn():
        model = tf.keras.Sequential(
            [
                tf.keras.layers.InputLayer(input_shape=(1,)),
                tf.keras.layers.Dense(size, use_bias=False),
            ]
        )
        spec = (tf.TensorSpec([None, 1]), tf.TensorSpec([None, 1]))
        return tff.learning.models.from_keras_model(
            model, loss=tf.keras.losses.MeanSquaredError(), input_spec=spec
        )

    return tff.learning.algorithms.build_weighted_fed_avg(
        large_model_fn,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.1),
        server_optimizer_fn=tff.learning.optimizers.build_adam(0.1),
    )


@contextlib.contextmanager
def collector_off():
    """Python's search for cycles would free in time what a cycle keeps, now and then."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("place", [{}, {"workers": 1}])
def test_memory_grows_with_neither_rounds_nor_clients(place, monkeypatch):
    # So that memory in use is what values need: these kernels come with a pool of their own.
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    size = 10_000_000  # so large that the system's allocator gives it back when it is freed
    client = tf.data.Dataset.from_tensors(([[1.0]], [[1.0]]))
    with ResidentProcess(large_process(size), clients_at_once=2, **place) as r, collector_off():
        state, _ = r.next(r.initialize(), [client] * 2)
        pids = [os.getpid(), *(c.worker.pid for c in (connections_of(r) if place else ()))]
        used = []
        for n in (2, 2, 2, 2, 8):
            state, _ = r.next(state, [client] * n)
            used.append(memory_in_use(pids))
    # Kept, each round would add four tensors, and each client two: 16 of them, and 28.
    assert used[-1] - used[0] < 4 * size * 8, used


def test_leaf_names_and_sizes():
    type_spec = tff.to_type(
        collections.OrderedDict(a=[np.float32, tff.TensorType(np.int64, [2, 3])], b=np.str_)
    )
    assert [leaf.name for leaf in leaves.leaves_of(type_spec)] == ["a/0", "a/1", "b"]
    assert leaves.num_bytes(type_spec) == 4 + 48
