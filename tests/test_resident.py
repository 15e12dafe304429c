"""ResidentProcess against the plain process that it wraps."""

import asyncio
import collections
import contextlib
import gc
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import (
    assert_close,
    assert_equal,
    cohort,
    cohorts,
    hosts_of,
    is_running,
    model_fn,
    plain_run,
    process,
    wait_until,
)

import aggregators
from tff_optim import ResidentProcess, build_keras_optimizer
from tff_optim.resident import leaves
from tff_optim.resident.clients.in_workers import compiled, handover
from tff_optim.resident.clients.in_workers import connection as host_lib


@pytest.fixture(scope="module")
def resident():
    with ResidentProcess(process()) as r:
        yield r


def test_every_round_is_bit_identical_over_changing_cohort_sizes(resident):
    state = resident.initialize()
    assert_equal(resident.materialize(state), plain_run()[0][0])
    for clients, (plain_state, plain_metrics) in zip(cohorts(), plain_run()[1:], strict=True):
        output = resident.next(state, list(clients))
        assert isinstance(output, tff.learning.templates.LearningProcessOutput)
        state, metrics = output
        assert_equal(metrics, plain_metrics)
        assert_equal(resident.materialize(state), plain_state)


ADAM = tff.learning.optimizers.build_adam(0.1)
SGD = tff.learning.optimizers.build_sgdm(0.05)
OTHERS = {
    # Zeroing and clipping at norms that move with the rounds.
    "robust aggregation": lambda: tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, SGD, ADAM, model_aggregator=tff.learning.robust_aggregator()
    ),
    "state at the clients": lambda: tff.learning.algorithms.build_weighted_mime_lite(
        model_fn, tff.learning.optimizers.build_sgdm(0.1, momentum=0.9), SGD
    ),
    "Keras optimizers, KL weights": lambda: aggregators.build_fed_kl(
        model_fn,
        build_keras_optimizer(tf.keras.optimizers.SGD(0.1)),
        build_keras_optimizer(tf.keras.optimizers.Nadam(0.01)),
    ),
    "a gate over two means": lambda: aggregators.build_fed_med(model_fn, SGD),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_processes_are_bit_identical_too(name):
    plain_process = OTHERS[name]()
    plain = plain_process.initialize()
    with ResidentProcess(plain_process, clients_per_step=2) as r:
        state = r.restore(plain)
        for clients in cohorts()[1:4]:
            state, metrics = r.next(state, list(clients))
            plain, plain_metrics = plain_process.next(plain, list(clients))
            assert_equal(metrics, plain_metrics)
            assert_equal(r.materialize(state), plain)


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


def test_a_state_of_another_resident_process_is_taken_over(resident):
    with ResidentProcess(process()) as other:
        state = other.restore(plain_run()[1][0])
        state, _ = resident.next(state, list(cohorts()[1]))
        assert_equal(resident.materialize(state), plain_run()[2][0])


def test_values_cross_in_files_as_in_messages(resident, monkeypatch):
    state = resident.restore(plain_run()[3][0])
    by_message = resident.materialize(state)
    monkeypatch.setattr(handover, "FILES_FROM_BYTES", 0)
    saves = []
    real = handover.save_in_worker

    async def counted(*args):
        saves.append(args)
        await real(*args)

    monkeypatch.setattr(handover, "save_in_worker", counted)
    by_file = resident.materialize(resident.restore(by_message))
    assert len(saves) == 1
    assert_equal(by_file, plain_run()[3][0])
    assert_equal(by_message, plain_run()[3][0])


def test_without_room_in_the_shared_directory_it_warns_and_uses_messages(resident, monkeypatch):
    monkeypatch.setattr(handover, "FILES_FROM_BYTES", 0)
    Usage = collections.namedtuple("Usage", "total used free")
    monkeypatch.setattr(handover.shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    with pytest.warns(UserWarning, match="has 0 bytes left"):
        state = resident.restore(plain_run()[1][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(resident.materialize(state), plain_run()[1][0])


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


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"clients_per_step": 1}, True),
        ({"clients_per_step": 2}, True),
        ({"clients_per_step": 4}, True),
        ({"clients_per_step": 8}, True),
        ({"workers": 2}, False),
        ({"workers": 2, "clients_per_step": 1}, False),
    ],
)
def test_steps_give_the_same_bits_and_workers_the_same_to_rounding(settings, exact):
    check = assert_equal if exact else assert_close
    with ResidentProcess(process(), **settings) as r:
        state = r.initialize()
        for clients, (plain_state, plain_metrics) in zip(cohorts(), plain_run()[1:], strict=True):
            state, metrics = r.next(state, list(clients))
            check(r.materialize(state), plain_state)
            check(metrics, plain_metrics)


@pytest.mark.parametrize("clients_per_step", [2, 4])
def test_clients_run_side_by_side(clients_per_step, tmp_path):
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
    with ResidentProcess(process(), clients_per_step=clients_per_step) as r:
        r.next(r.initialize(), clients)


def test_pieces_without_shared_files(monkeypatch):
    async def see_nothing(executor):
        executor.host.shares_files = False

    monkeypatch.setattr(handover, "look_for_files", see_nothing)
    with ResidentProcess(process(), workers=2, clients_per_step=2) as r:
        state = r.initialize()
        for clients in cohorts():
            state, _ = r.next(state, list(clients))
        assert_close(r.materialize(state), plain_run()[-1][0])


def test_split_deals_every_client_once_in_order():
    for total in range(0, 9):
        for workers in (1, 2, 3):
            data = list(range(total))
            shares = compiled.split(data, workers)
            assert [x for share in shares for x in share] == data
            assert 1 <= len(shares) <= workers
            assert all(shares) or shares == [[]]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


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


def test_a_process_with_dependent_aggregations_says_which_or_runs_on_all_clients_at_once():
    two_pass = two_pass_process()
    with pytest.raises(ValueError, match=r"`federated_sum` of float32@SERVER depends on .*mean"):
        ResidentProcess(two_pass, clients_per_step=2)
    with ResidentProcess(two_pass) as r:
        state = r.initialize()
        plain = two_pass.initialize()
        for n in (3, 1, 2):
            clients = [cohort(1, n + i, batches=i + 1)[0] for i in range(n)]
            state, metrics = r.next(state, clients)
            plain, plain_metrics = two_pass.next(plain, clients)
            assert_equal(metrics, plain_metrics)
            assert_equal(r.materialize(state), plain)
        assert metrics["spread"] == 0.5


@pytest.mark.parametrize("arguments", [{}, {"clients_per_step": 2}, {"device": "CPU:0"}])
def test_a_process_with_secure_sums_is_refused(arguments):
    secure = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, SGD, model_aggregator=tff.learning.secure_aggregator()
    )
    with pytest.raises(ValueError, match="without secure sums, which TFF's worker cannot take"):
        ResidentProcess(secure, **arguments)


def test_a_state_of_all_kinds_of_leaves(monkeypatch):
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

    @tff.federated_computation
    def initialize():
        return tff.federated_eval(start, tff.SERVER)

    @tff.tensorflow.computation(start.type_signature.result)
    def grow(state):
        state["text"] = state["text"] + "!"
        state["flag"] = tf.logical_not(state["flag"])
        state["list"] = [tf.identity(state["list"][0]), state["list"][1] + tf.cast(1, tf.uint8)]
        state["ragged"] = tf.concat([state["ragged"], state["ragged"]], 0)
        return state

    data_type = tff.FederatedType(tff.SequenceType(np.float32), tff.CLIENTS)

    @tff.federated_computation(initialize.type_signature.result, data_type)
    def next_fn(state, data):
        count = tff.federated_sum(
            tff.federated_map(
                tff.tensorflow.computation(lambda d: d.reduce(0.0, lambda a, b: a + b)), data
            )
        )
        return tff.learning.templates.LearningProcessOutput(tff.federated_map(grow, state), count)

    odd = tff.learning.templates.LearningProcess(
        initialize,
        next_fn,
        tff.tensorflow.computation(lambda s: s["half"], start.type_signature.result),
        tff.tensorflow.computation(
            lambda s, w: s, start.type_signature.result, tff.TensorType(np.float16, [2])
        ),
    )
    plain = odd.initialize()
    monkeypatch.setattr(handover, "FILES_FROM_BYTES", 0)
    with ResidentProcess(odd) as r:
        state = r.initialize()
        for n in (1, 2):  # the second cohort's size moves the state
            state, metrics = r.next(state, [[1.0, 2.0]] * n)
            plain, plain_metrics = odd.next(plain, [[1.0, 2.0]] * n)
            assert_equal(metrics, plain_metrics)
            assert_equal(r.materialize(state), plain)
        assert_equal(r.materialize(r.restore(plain)), plain)


def test_dropped_states_free_their_memory_at_once(resident):
    state = resident.initialize()
    host = hosts_of(resident)[0]
    disposed = []
    real = host._stub._stub.dispose
    host._stub._stub.dispose = lambda request: disposed.append(request) or real(request)
    try:
        resident.next(state, list(cohorts()[0]))
        before = len(disposed)
        del state
        gc.collect()
        wait_until(lambda: len(disposed) > before, 5)
    finally:
        host._stub._stub.dispose = real


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"process": 3}, TypeError, "`process` must be a .*LearningProcess.*found int"),
        ({"workers": 0}, ValueError, "`workers` must be None, a positive number"),
        ({"workers": True}, ValueError, "`workers` must be None"),
        ({"workers": []}, ValueError, "`workers` must be None"),
        ({"workers": ["localhost"]}, ValueError, "`workers` must name each worker 'host:port'"),
        ({"workers": ["a:1", "a:1"]}, ValueError, "`workers` must name each worker once"),
        ({"clients_per_step": 0}, ValueError, "`clients_per_step` must be a positive integer"),
        ({"clients_per_step": 1.5}, ValueError, "`clients_per_step` must be a positive integer"),
        ({"heartbeat": 0}, ValueError, "`heartbeat` must be a positive number"),
        ({"start_timeout": "1"}, ValueError, "`start_timeout` must be a positive number"),
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
        pids = [host.worker.pid for host in hosts_of(r)]
        directory = hosts_of(r)[0].worker.directory
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


def test_more_cohort_sizes_than_executors_are_kept(monkeypatch):
    monkeypatch.setattr(host_lib, "_NUM_EXECUTORS", 2)
    two_pass = two_pass_process()
    with ResidentProcess(two_pass) as r:
        first = state = r.initialize()
        plain = two_pass.initialize()
        for n in (3, 1, 2, 4):
            clients = cohort(n, n, batches=1)
            state, _ = r.next(state, clients)
            plain, _ = two_pass.next(plain, clients)
        assert_equal(r.materialize(state), plain)
        assert len(hosts_of(r)[0]._executors) == 2
        # A state outlives the place of its executor among the kept ones.
        assert_equal(r.materialize(first), plain_run()[0][0])


def memory_in_use(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) * 1024


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


@pytest.mark.parametrize("what", ["rounds", "clients"])
def test_the_workers_memory_grows_with_neither(what, monkeypatch):
    # So that memory in use is what values need: these kernels come with a pool of their own.
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    size = 10_000_000  # so large that the system's allocator gives it back when it is freed
    client = tf.data.Dataset.from_tensors(([[1.0]], [[1.0]]))
    with ResidentProcess(large_process(size), clients_per_step=2) as r, collector_off():
        state, _ = r.next(r.initialize(), [client] * 2)
        used = []
        for n in [2] * 8 if what == "rounds" else [4, 12]:
            state, _ = r.next(state, [client] * n)
            used.append(memory_in_use(hosts_of(r)[0].worker.pid))
    # Kept, each round would add four tensors, and each client two: 28 and 16 of them.
    assert used[-1] - used[0] < 4 * size * 8, used


def test_leaf_names_and_sizes():
    type_spec = tff.to_type(
        collections.OrderedDict(a=[np.float32, tff.TensorType(np.int64, [2, 3])], b=np.str_)
    )
    assert [leaf.name for leaf in leaves.leaves_of(type_spec)] == ["a/0", "a/1", "b"]
    assert leaves.num_bytes(type_spec) == 4 + 48
