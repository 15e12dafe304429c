"""Graphs of TFF's computations in the Python process: what each call has, and where they run."""

import collections
import concurrent.futures
import functools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_close, assert_equal, cohorts, plain_run, process
from tensorflow.python.eager import context

from tff_optim import ResidentProcess
from tff_optim.resident.clients.in_process import cohort, one_by_one
from tff_optim.resident.graphs.imported import ImportedComputation, call_as_it_is
from tff_optim.simulation import ClientArrays

WORDS = tff.SequenceType(np.str_)


def counting_process(work):
    """A process that adds up what `work` makes of each client's words, and looks up its next step."""

    @tff.tensorflow.computation(np.int64, np.int64)
    def step(state, total):
        keys = tf.constant([0, 1, 2], tf.int64)
        steps = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(keys, 10 ** (keys + 1)), -1
        )
        return state + total * tf.ensure_shape(steps.lookup(state % 3), [])

    @tff.federated_computation(
        tff.FederatedType(np.int64, tff.SERVER), tff.FederatedType(WORDS, tff.CLIENTS)
    )
    def next_fn(state, data):
        computation = tff.tensorflow.computation(work, WORDS, np.int64)
        found = tff.federated_map(computation, (data, tff.federated_broadcast(state)))
        total = tff.federated_sum(found)
        state = tff.federated_map(step, (state, total))
        return tff.learning.templates.LearningProcessOutput(state, total)

    def get(state):
        return state

    return tff.learning.templates.LearningProcess(
        tff.federated_computation(lambda: tff.federated_eval(START, tff.SERVER)),
        next_fn,
        tff.tensorflow.computation(get, np.int64),
        tff.tensorflow.computation(lambda state, new: new, np.int64, np.int64),
    )


START = tff.tensorflow.computation(lambda: tf.constant(1, tf.int64))


def known_words(data, state):
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(["a", "b"], tf.constant([1, 5], tf.int64)), -2
    )
    values = data.map(table.lookup)
    return state + values.reduce(tf.constant(0, tf.int64), lambda x, y: 3 * x + y)


def different_words(data, state):
    """Each is counted once by a client, however often others have it."""
    seen = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, 0)

    @tf.function
    def count(data):
        for word in data:
            seen.insert(word, seen.lookup(word) + state)
        return tf.ensure_shape(seen.size() + tf.reduce_max(seen.export()[1]), [])

    return count(data)


def words_in_turn(data, state):
    words = tf.compat.v1.data.make_initializable_iterator(data.batch(2))
    with tf.control_dependencies([words.initializer]):
        first = words.get_next()
    with tf.control_dependencies([first]):
        second = words.get_next()
    return state * tf.size(first, tf.int64) + tf.size(second, tf.int64)


def words_in_a_queue(data, state):
    """Finds its own words in the queue: counts that were exchanged would show."""
    queue = tf.queue.FIFOQueue(10, [tf.string], [[]])
    words = data.reduce("", lambda a, b: a + b)
    with tf.control_dependencies([queue.enqueue_many([[words, words + "c"]])]):
        first = queue.dequeue()
    with tf.control_dependencies([first]):
        found = tf.strings.length([first, words]) + queue.size()
    return state + tf.cast(tf.reduce_prod(found), tf.int64)


CLIENTS = [["a", "b", "c"], ["b", "b", "a", "bb"], ["a", "a", "a"]]


@pytest.mark.parametrize(
    ("work", "place"),
    [
        *((known_words, place) for place in ({}, {"workers": 1})),
        *((different_words, place) for place in ({}, {"workers": 1})),
        *((words_in_a_queue, place) for place in ({"workers": 1}, {"workers": 2})),
    ],
)
def test_tables_and_queues_are_each_calls_own(work, place):
    counting = counting_process(work)
    with ResidentProcess(counting, **place) as resident:
        state = plain = counting.initialize()
        for clients in (CLIENTS, CLIENTS[:1], CLIENTS[::-1] * 2):
            state, metrics = resident.next(state, clients)
            plain, plain_metrics = counting.next(plain, clients)
            assert_equal(metrics, plain_metrics)
            assert_equal(resident.materialize(state), plain)
    assert plain > 100


@pytest.mark.parametrize("place", [{}, {"workers": 1}, {"workers": 2}])
def test_iterators_are_each_calls_own(place):
    """In plain TFF, clients that are trained beside each other lose them, and the round fails."""
    with ResidentProcess(counting_process(words_in_turn), **place) as resident:
        state = 2
        for clients in (CLIENTS, CLIENTS[:1], CLIENTS[::-1] * 4):
            new, total = resident.next(state, clients)
            # Of each client's first batches of two, the first counts as often as the state says.
            assert total == sum(state * 2 + len(words[2:4]) for words in clients)
            assert resident.materialize(new) == state + total * 10 ** (state % 3 + 1)
            state = resident.materialize(new)


def test_a_queue_is_refused_by_name():
    message = r"lookup tables and iterators.*; found FIFOQueueV2 \(.*or with `workers`"
    with pytest.raises(ValueError, match=message):
        ResidentProcess(counting_process(words_in_a_queue))


def test_two_operations_that_find_one_table_are_refused():
    @tff.tensorflow.computation(np.int64)
    def twice(x):
        tables = [
            tf.raw_ops.MutableHashTableV2(
                key_dtype=tf.int64, value_dtype=tf.int64, shared_name="one"
            )
            for _ in range(2)
        ]
        with tf.control_dependencies(
            [tf.raw_ops.LookupTableInsertV2(table_handle=tables[0], keys=x, values=x)]
        ):
            return tf.raw_ops.LookupTableSizeV2(table_handle=tables[1])

    assert twice(3) == 1
    with pytest.raises(ValueError, match="each made once; found MutableHashTableV2"):
        ImportedComputation(twice, "/CPU:0")


def test_calls_of_one_function_beside_each_other_have_variables_of_their_own():
    @tff.tensorflow.computation(np.int64)
    def add_up(x):
        total = tf.Variable(x)

        @tf.function
        def count():
            for _ in tf.range(10_000):
                total.assign_add(x)
            return total.read_value()

        return count()

    function = ImportedComputation(add_up, "/CPU:0", apart=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: function([np.int64(x)])[0].numpy(), range(8)))
    assert found == [10_001 * x for x in range(8)]


# What takes values, and the order of operations, from device to device.
MOVES = {
    "_Arg",
    "_DeviceArg",
    "_EagerConst",
    "_Retval",
    "_DeviceRetval",
    "_Send",
    "_Recv",
    "_HostRecv",
}
MOVES |= {"Enter", "Merge", "Switch", "NextIteration", "Exit", "Identity", "Const"}


@pytest.mark.parametrize("place", [{}, {"workers": 1}])
def test_every_variable_and_operation_of_the_server_is_on_the_device(place):
    """As TensorFlow places them; of functions that are called in functions it shows the call alone."""
    with ResidentProcess(process(), device="CPU:1", **place) as resident:
        context.enable_run_metadata()
        try:
            # The rows of other data sets are put together on the host.
            data = [one.map(lambda x, y: (x, y)) for one in cohorts()[0]]
            state, _ = resident.next(resident.initialize(), data)
            state = resident.set_hparams(state, resident.get_hparams(state))
            resident.get_model_weights(state)
            found = context.export_run_metadata().function_graphs
        finally:
            context.disable_run_metadata()
        assert_close(resident.materialize(state), plain_run()[1][0])
        variables = tf.nest.flatten(state)[0].held.variables
        nodes = [node for one in found for graph in one.partition_graphs for node in graph.node]
    assert all(variable.device.endswith("CPU:1") for variable in variables)
    here = collections.Counter(node.op for node in nodes if node.device.endswith("CPU:1"))
    # A step of Adam.
    assert {"Sqrt", "RealDiv", "Mul", "AssignVariableOp", "ReadVariableOp"} <= set(here)
    # Data sets are the host's, and the number of the client that comes next.
    others = [node for node in nodes if not node.device.endswith("CPU:1")]
    for node in others:
        assert node.op in MOVES or node.attr["T"].type != tf.float32.as_datatype_enum, node
        assert "Variable" not in node.op


def where_it_runs(function, arguments, data, apart):
    """The device, the operation, and the dtypes of the results of all that a function runs.

    Of eager calls TensorFlow shows no more than the outermost function. So the call is made again in
    a session, which shows all that is run: with the same graph, its arguments where they were. Functions
    apart are added at the end, since TensorFlow cannot tell the shapes in a function with a loop.
    """
    config = tf.compat.v1.ConfigProto(device_count={"CPU": 2})
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
    seen = tf.compat.v1.RunMetadata()
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        given, feeds = {}, {}
        for name, argument in zip((x.name for x in function.inputs), arguments, strict=True):
            with tf.device(argument.device):
                if argument.dtype == tf.variant:
                    packed = [[tf.data.experimental.to_variant(one())] for one in data]
                    given[name] = tf.stack(
                        [tf.raw_ops.OptionalFromValue(components=one) for one in packed]
                    )
                else:
                    given[name] = tf.compat.v1.placeholder(argument.dtype, argument.shape)
                    feeds[given[name]] = argument.numpy()
        graph = function.graph.as_graph_def()
        names = [one.name for one in apart]
        others = [one for one in graph.library.function if one.signature.name.encode() not in names]
        del graph.library.function[:]
        graph.library.function.extend(others)
        results = tf.graph_util.import_graph_def(graph, given, [x.name for x in function.outputs])
        for one in apart:
            one.add_to_graph(tf.compat.v1.get_default_graph())
        session.run(results, feeds, options, seen)
    for device in seen.step_stats.dev_stats:
        for node in device.node_stats:
            op = node.timeline_label.partition(" = ")[2].partition("(")[0]
            dtypes = [one.tensor_description.dtype for one in node.output]
            yield device.device, op, [tf.as_dtype(one) for one in dtypes if one]


def rows(client):
    rng = np.random.default_rng(client)
    return tuple(np.float32(rng.normal(size=(6, size))) for size in (3, 1))


READ = {
    "rows": lambda batches: batches,
    "one read": lambda batches: batches.map(lambda x, y: (x, y)),
    "an iterator": lambda batches: batches.filter(lambda x, y: True),
}


def data_set(client, how):
    return READ[how](tf.data.Dataset.from_tensor_slices(rows(client)).batch(3))


@pytest.fixture(
    params=[{}, {"vectorize": True}], ids=["one by one", "side by side"], scope="module"
)
def resident(request):
    with ResidentProcess(process(), device="CPU:1", **request.param) as made:
        yield made


@pytest.mark.parametrize("how", [*READ, "arrays"])
def test_every_operation_of_the_clients_is_on_the_device(resident, how, monkeypatch):
    if how == "arrays":
        data = []
        clients = ClientArrays({i: rows(i) for i in range(2)}, batch_size=3).cohort([0, 1], 1)
    else:
        data = [functools.partial(data_set, i, how) for i in range(2)]
        clients = [one() for one in data]
    calls = []

    def call(function, arguments, specs):
        calls.append((function, list(arguments)))
        return call_as_it_is(function, arguments, specs)

    for module in (cohort, one_by_one):
        monkeypatch.setattr(module, "call_as_it_is", call)
    of_group = getattr(resident._clients, "_add", None)  # side by side

    def call_group(*arguments):
        calls.append((of_group, [*tf.nest.flatten(arguments), *of_group.captured_inputs]))
        return of_group(*arguments)

    if of_group is not None:
        monkeypatch.setattr(resident._clients, "_add", call_group)
    resident.next(resident.initialize(), clients)
    ((function, arguments),) = calls
    of_client = getattr(getattr(resident._clients, "_of_arrays", None), "_work", None)
    apart = [of_client] if how in ("rows", "arrays") and of_client is not None else []
    seen = list(where_it_runs(function, arguments, data, apart))
    here = {op for device, op, _ in seen if device.endswith("CPU:1")}
    assert any("MatMul" in op for op in here)
    assert {"Mul", "DivNoNan", "IsFinite", "Sum"} <= here
    for device, op, dtypes in seen:
        if not device.endswith("CPU:1") and op not in MOVES:
            assert not any(dtype.is_floating for dtype in dtypes), op
            assert "Variable" not in op, op
