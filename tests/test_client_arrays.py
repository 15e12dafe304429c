"""ClientArrays: batches of rows, the same in every place; and data sets that are read in one go."""

import collections
import threading

import numpy as np
import pytest
import resident_cases
import selection
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_equal

import aggregators
from tff_optim import ResidentProcess, simulation
from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.in_process import data as data_lib
from tff_optim.resident.clients.in_process import one_by_one, slices
from tff_optim.resident.clients.in_process.program import NoProgramError
from tff_optim.resident.parts import RoundParts
from tff_optim.simulation import ClientArrays

OD = collections.OrderedDict
ROWS = (12, 11, 3, 0, 8, 25)


def arrays(sizes=ROWS, seed=5):
    rng = np.random.default_rng(seed)
    return {
        f"client {i}": (
            rng.normal(size=(n, 3)).astype(np.float32),
            rng.normal(size=(n, 1)).astype(np.float32),
        )
        for i, n in enumerate(sizes)
    }


def batches_of(clients, client, number=1):
    return list(clients.cohort([client], number)[0].as_numpy_iterator())


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("most", [None, 1, 4])
def test_batches_are_those_of_a_pipeline(drop, most):
    data = arrays()
    clients = ClientArrays(data, batch_size=4, epochs=2, drop_remainder=drop, max_batches=most)
    for client, parts in data.items():
        expected = tf.data.Dataset.from_tensor_slices(parts).batch(4, drop).repeat(2)
        expected = list(expected.take(-1 if most is None else most).as_numpy_iterator())
        assert_equal(batches_of(clients, client), expected)
    # Several at once are those of each one alone.
    together = clients.cohort(list(data)[::-1], 1)
    for client, one in zip(list(data)[::-1], together, strict=True):
        assert_equal(list(one.as_numpy_iterator()), batches_of(clients, client))


def orders(number=1, ids=("ann", "bob"), **options):
    data = {client: np.arange(7) for client in ids}
    clients = ClientArrays(data, batch_size=3, epochs=2, shuffle=True, **options)
    return {client: np.concatenate(batches_of(clients, client, number)) for client in ids}


def test_an_order_depends_on_client_round_epoch_and_seed_alone():
    first = orders()
    assert_equal(orders(ids=("bob", "eve", "ann"))["bob"], first["bob"])
    others = [first["bob"], orders(2)["ann"], orders(seed=1)["ann"], orders(seed=-1)["ann"]]
    epochs = [half for one in (first["ann"], *others) for half in (one[:7], one[7:])]
    assert all(sorted(half) == list(range(7)) for half in epochs)
    assert len({tuple(half) for half in epochs}) == len(epochs)


def test_every_order_is_as_likely_as_every_other():
    data = {i: np.arange(4) for i in range(400)}
    clients = ClientArrays(data, batch_size=4, shuffle=True)
    found = collections.Counter()
    for number in range(30):
        batches = clients.cohort(range(400), number).batches
        rows = batches.order.reshape(400, 4) - 4 * np.arange(400)[:, np.newaxis]
        found.update(map(tuple, rows.tolist()))
    expected = 400 * 30 / 24
    chi_squared = sum((n - expected) ** 2 / expected for n in found.values())
    assert len(found) == 24
    assert chi_squared < 50  # 1 in 1,000 with 23 degrees of freedom


@pytest.fixture(scope="module")
def resident():
    with ResidentProcess(resident_cases.process(), device="CPU:1", clients_at_once=1) as resident:
        yield resident


@pytest.fixture
def read(monkeypatch):
    """Has data sets read, those too that are rows of tensors."""
    monkeypatch.setattr(slices, "rows_of", lambda cohort: None)


def test_cohorts_of_many_sizes(resident, read):
    """As data sets, whose batches are read one by one or at once, and as arrays: the same bits."""
    clients = ClientArrays(arrays([i % 9 for i in range(101)]), batch_size=4, shuffle=True)
    state = resident.initialize()
    for number, size in enumerate((0, 1, 3, 17, 101)):
        cohort = clients.cohort(clients.ids[:size], number)
        one = resident.next(state, cohort)
        assert repr(cohort) == f"<data of {size} clients in arrays>"
        assert not cohort._made, "data sets were made"
        two = resident.next(state, list(cohort))
        assert_equal(resident.materialize(one.state), resident.materialize(two.state))
        assert_equal(one.metrics, two.metrics)


def test_groups_are_bounded_by_bytes(resident, read, monkeypatch):
    clients = ClientArrays(arrays(), batch_size=4, shuffle=True)
    state, cohort = resident.initialize(), clients.cohort(clients.ids, 1)
    expected = resident.next(state, list(cohort))
    monkeypatch.setattr(one_by_one, "_MOST_BYTES", 200)  # of rows of 16
    found = resident.next(state, cohort)
    assert_equal(resident.materialize(found.state), resident.materialize(expected.state))


def test_a_graph_that_does_more_than_compute_is_given_data_sets(capfd):
    def model_fn():
        model = resident_cases.model_fn()
        plain = model.forward_pass

        def forward_pass(*arguments, **named):
            tf.print("a step")
            return plain(*arguments, **named)

        model.forward_pass = forward_pass
        return model

    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, tff.learning.optimizers.build_sgdm(0.05)
    )
    clients = ClientArrays(arrays((4, 3)), batch_size=2)
    with ResidentProcess(process, device="CPU:0") as resident:
        resident.next(resident.initialize(), clients.cohort(clients.ids, 1))
    assert capfd.readouterr().err.count("a step") == 4


@tff.tensorflow.computation(
    tff.SequenceType(tff.TensorType(np.float32, [None, 2, 2, 1])), np.float32
)
def pooling(data, start):
    @tf.function
    def step(weight, batch):
        with tf.GradientTape() as tape:
            tape.watch(weight)
            loss = tf.reduce_sum(tf.nn.max_pool2d(batch * weight, 2, 1, "VALID"))
        return weight - tape.gradient(loss, weight)

    return [data.reduce(start, step)]


def test_pooling_keeps_its_fast_kernel():
    """Which TensorFlow takes in a function, and in a loop only by chance."""
    parts = RoundParts(
        prepare=None,
        zero=tff.tensorflow.computation(lambda: 0.0),
        work=pooling,
        accumulate=tff.tensorflow.computation(lambda x, y: x + y, [np.float32, np.float32]),
        merge=None,
        report=None,
        update=None,
    )
    with pytest.raises(NoProgramError, match="found MaxPoolGrad"):
        one_by_one.OneByOne(parts, "/CPU:0", 2)


def test_plain_tff_and_a_worker_take_the_same_batches():
    clients = ClientArrays(arrays(), batch_size=4, epochs=2, shuffle=True, seed=3)
    process = resident_cases.process()
    state = process.initialize()
    with ResidentProcess(process, workers=1) as there:
        theirs = there.restore(state)
        for number in (1, 2):
            cohort = clients.cohort(clients.ids[number:], number)
            state, metrics = process.next(state, clients.cohort(clients.ids[number:], number))
            theirs, their_metrics = there.next(theirs, cohort)
            assert_equal(there.materialize(theirs), state)
            assert_equal(their_metrics, metrics)


PLACES = {
    "plain": None,
    "worker": {"workers": 1},
    "device": {"device": "CPU:1"},
    "side by side": {"device": "CPU:1", "vectorize": True},
}


@pytest.mark.parametrize("name", selection.params(list(PLACES), ["plain", "worker", "device"]))
def test_a_run_that_stops_and_goes_on_draws_the_same_batches(name, tmp_path):
    def run(rounds, directory):
        clients = ClientArrays(arrays(), batch_size=4, shuffle=True)
        process = resident_cases.process()
        if PLACES[name] is not None:
            process = ResidentProcess(process, **PLACES[name])
        history = simulation.run(
            lambda seed: process,
            clients,
            rounds=rounds,
            clients_per_round=2,
            directory=tmp_path / directory,
            progress=False,
        )
        (state,) = history.states.values()
        return state

    run(2, "stopped")
    assert_equal(run(4, "stopped"), run(4, "whole"))


def test_a_run_knows_its_arrays(tmp_path):
    def run(data, rounds=1, **options):
        clients = ClientArrays(data, **{"batch_size": 4, **options})
        simulation.run(
            resident_cases.process(),
            clients,
            rounds=rounds,
            clients_per_round=1,
            directory=tmp_path,
            progress=False,
        )

    run(arrays())
    run(arrays())
    changed = arrays()
    changed["client 5"][0][-1] += 1
    for data, options in (
        (changed, {}),
        (arrays(), {"batch_size": 5}),
        (arrays(), {"shuffle": True}),
    ):
        with pytest.raises(ValueError, match="data of client"):
            run(data, 2, **options)


def test_the_same_clients_from_everything():
    data = arrays()
    expected = ClientArrays(data, batch_size=4)
    tables = {
        "client": [client for client, (x, _) in data.items() for _ in x],
        "0": np.concatenate([x for x, _ in data.values()]),
        "1": np.concatenate([y for _, y in data.values()]),
    }
    forms = {
        "a list": ClientArrays(list(data.values()), batch_size=4),
        "data sets": ClientArrays(
            {one: tf.data.Dataset.from_tensor_slices(parts) for one, parts in data.items()},
            batch_size=4,
        ),
        "TFF": ClientArrays(
            tff.simulation.datasets.TestClientData(
                {one: OD(zip("01", parts)) for one, parts in data.items() if len(parts[0])}
            ),
            batch_size=4,
        ),
        "a table": ClientArrays(tables, batch_size=4, client_column="client"),
    }
    for name, clients in forms.items():
        for i, client in enumerate(expected.ids):
            given = i if name == "a list" else client
            if given in clients.ids:
                found = [tuple(tf.nest.flatten(batch)) for batch in batches_of(clients, given)]
                assert_equal(found, batches_of(expected, client))


def test_structures_texts_and_small_numbers(resident):
    del resident
    data = {
        "ann": OD(text=["a", "ä"], more=(np.array([1, 2], np.uint8), np.zeros([2, 0], np.float16))),
        "bob": OD(text=[], more=([], [])),
    }
    clients = ClientArrays(data, batch_size=2)
    (batch,) = batches_of(clients, "ann")
    assert batch["text"].tolist() == [b"a", "ä".encode()]
    assert batch["more"][0].dtype == np.uint8
    assert batch["more"][1].shape == (2, 0)
    assert batches_of(clients, "bob") == []
    assert tf.nest.map_structure(lambda spec: spec.dtype, clients.element_spec) == OD(
        text=tf.string, more=(tf.uint8, tf.float16)
    )


X, Y = np.ones([4, 3], np.float32), np.ones([4, 1], np.float32)
BAD = {
    "rows": (
        {"ann": (X, Y[:3])},
        {},
        r"client 'ann' must have the same number .* 4 at '0', 3 at '1'",
    ),
    "shape": (
        {"ann": (X, Y), "bob": (X[:, :2], Y)},
        {},
        r"'bob' must be like .*\[None, 3\] at '0'",
    ),
    "dtype": ({"ann": (X, Y), "bob": (X, Y > 0)}, {}, "'bob' must be like .* at '1'; found bool"),
    "parts": ({"ann": OD(x=X), "bob": OD(y=X)}, {}, "'bob' must be those .* 'x'; found 'y'"),
    "ragged": ({"ann": [[1], [2, 3]]}, {}, "client 'ann' must be arrays of numbers or text"),
    "objects": ({"ann": (X, [None] * 4)}, {}, "client 'ann' must be arrays .* at '1'"),
    "a number": ({"ann": 3.0}, {}, "client 'ann' must be arrays .* found 3.0 at the only part"),
    "ids": ({1: X, "1": X}, {}, "ids that differ, also as strings; found 1 and '1'"),
    "no client": ({}, {}, "at least one client"),
    "batch size": (
        {"ann": X},
        {"batch_size": 0},
        "`batch_size` must be a whole number of at least 1",
    ),
    "epochs": ({"ann": X}, {"epochs": 0.5}, "`epochs` must be a whole number"),
    "most": ({"ann": X}, {"max_batches": 0}, "`max_batches` must be a whole number"),
    "seed": ({"ann": X}, {"seed": None}, "`seed` must be a whole number"),
    "shuffle": ({"ann": X}, {"shuffle": 1}, "`shuffle` must be True or False; found 1"),
    "column": ({"x": X}, {"client_column": "id"}, "`client_column` must be one of several"),
    "columns": (
        {"id": [1], "x": X},
        {"client_column": "id"},
        r"as many rows .* 1; .*\[4, 3\] at 'x'",
    ),
    "no id": ({"id": [1.0, float("nan")], "x": X[:2]}, {"client_column": "id"}, "found nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together_is_told_by_client_and_part(name):
    data, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ClientArrays(data, **{"batch_size": 2, **options})


def test_what_is_no_federation_is_refused():
    with pytest.raises(TypeError, match=r"`data` must be a mapping from ids .* found 3"):
        ClientArrays(3, batch_size=2)
    clients = ClientArrays({"ann": X, "bob": X}, batch_size=2)
    for ids, message in ((["eve"], "found 'eve'"), (["ann", "ann"], "found 'ann' twice")):
        with pytest.raises(ValueError, match=message):
            clients.cohort(ids, 1)


def test_arrays_that_the_model_does_not_take_are_told_before_the_first_round(resident):
    message = (
        r"client 'ann' must be batches of .*'1' is float64 and not float32. Give `ClientArrays`"
    )
    clients = ClientArrays({"ann": (X, Y.astype(np.float64))}, batch_size=2)
    with pytest.raises(TypeError, match=message):
        simulation.run(resident, clients, rounds=1, clients_per_round=1)
    with pytest.raises(TypeError, match=message):
        resident.next(resident.initialize(), clients.cohort(["ann"], 1))


def test_clients_with_states_take_arrays_as_data_sets():
    data = {f"client {i}": [(x, y)] for i, (x, y) in enumerate(arrays([4, 4]).values())}
    clients = ClientArrays({one: parts[0] for one, parts in data.items()}, batch_size=4)
    process = aggregators.build_scaffold(
        resident_cases.model_fn, tff.learning.optimizers.build_sgdm(0.1), num_clients=2
    )
    with ResidentProcess(process, device="CPU:0") as resident:
        found = [
            simulation.run(
                resident,
                given,
                rounds=2,
                clients_per_round=2,
                client_states=aggregators.ClientStates,
                progress=False,
            ).states
            for given in (data, clients)
        ]
        one, two = (resident.materialize(next(iter(states.values()))) for states in found)
        assert_equal(one, two)


def pipelines():
    """Data sets; whether they are rows of tensors, and whether they are known to fit one read."""
    x, y = arrays([11])["client 0"]
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    ready = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 11, 3)]
    return {
        "batched": (rows.batch(3), True, True),
        "a map behind": (rows.batch(3).map(lambda x, y: (x, y)).prefetch(1), False, True),
        "whole batches": (rows.batch(3, drop_remainder=True), True, True),
        "a short one in the middle": (rows.batch(3).repeat(2), True, True),
        "shuffled": (rows.shuffle(20, seed=4).batch(3), False, True),
        "a list": (ready, True, True),
        "no elements": (rows.take(0).batch(3), True, False),
        "of unknown number": (rows.filter(lambda x, y: True).batch(3), False, False),
        "of unknown batches": (rows.batch(2).unbatch().batch(3), False, False),
        "in large batches": (rows.batch(10**6), True, False),
    }


def test_pipelines_are_read_at_once_where_they_fit(resident, monkeypatch):
    state = resident.initialize()
    for name, (data, are_rows, at_once) in pipelines().items():
        given = resident._taken(data, 0)
        assert (slices.rows_of([given]) is not None) == are_rows, name
        after, metrics = resident.next(state, [data, data])
        found, seen = [(resident.materialize(after), metrics)], []
        monkeypatch.setattr(slices, "rows_of", lambda cohort: None)
        for most in (data_lib.MOST_BYTES, -1):
            monkeypatch.setattr(data_lib, "MOST_BYTES", most)
            made = data_lib._as_it_is(given)
            seen.append(int(tf.raw_ops.DatasetCardinality(input_dataset=made)) > 0)
            after, metrics = resident.next(state, [data, data])
            found.append((resident.materialize(after), metrics))
        monkeypatch.undo()
        assert seen == [at_once, False], name
        if name != "shuffled":  # each reading draws another order
            assert_equal(found[0], found[1])
            assert_equal(found[0], found[2])


def random_pipeline(rng):
    """A data set of some steps, each of which takes rows and batches to others."""
    x = rng.normal(size=(int(rng.integers(0, 12)), 2)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices({"y": np.arange(len(x)), "x": x})
    number = int(rng.integers(1, 4))
    steps = {
        "take": lambda data: data.take(int(rng.integers(-1, 8))),
        "skip": lambda data: data.skip(int(rng.integers(0, 3))),
        "repeat": lambda data: data.repeat(int(rng.integers(0, 3))),
        "prefetch": lambda data: data.prefetch(1),
        "options": lambda data: data.with_options(tf.data.Options()),
        "concatenate": lambda data: data.concatenate(data.take(2)),
    }
    for kind in rng.choice(list(steps), int(rng.integers(0, 3))):
        data = steps[kind](data)
    data = data.batch(number, drop_remainder=bool(rng.integers(2)))
    for kind in rng.choice(list(steps), int(rng.integers(0, 3))):
        data = steps[kind](data)
    return data


def test_rows_of_tensors_are_the_batches_that_tensorflow_makes_of_them():
    rng = np.random.default_rng(0)
    every = [random_pipeline(rng) for _ in range(60)]
    for some in (every[:1], every[1:4], every[4:]):
        clients = slices.joined(slices.rows_of(some))
        for ours, theirs in zip(clients, some, strict=True):
            ours, theirs = (list(data.as_numpy_iterator()) for data in (ours, theirs))
            assert_equal(ours, theirs)


def test_batches_that_are_ready_are_rows_of_tensors_too():
    rng = np.random.default_rng(1)
    long, short = (rng.normal(size=(n, rows, 2)) for n, rows in ((3, 4), (1, 2)))
    data = tf.data.Dataset.from_tensor_slices(long)
    data = data.concatenate(tf.data.Dataset.from_tensor_slices(short)).concatenate(data.skip(1))
    data = data.concatenate(tf.data.Dataset.from_tensors(long[0]))
    (found,) = slices.joined(slices.rows_of([data]))
    assert_equal(list(found.as_numpy_iterator()), [*long, *short, *long[1:], long[0]])


SIX = np.ones([6, 2], np.float32)
NO_ROWS = {
    "a function": lambda rows: rows.batch(2).map(lambda x: x),
    "an order that is drawn": lambda rows: rows.shuffle(6, seed=1).batch(2),
    "endless": lambda rows: rows.batch(2).repeat(),
    "batches of batches": lambda rows: rows.batch(2).batch(2),
    "not of tensors": lambda rows: tf.data.Dataset.range(4),
    "numbers": lambda rows: tf.data.Dataset.from_tensor_slices(np.arange(4)),
    "batches of no row": lambda rows: tf.data.Dataset.from_tensor_slices(np.ones([3, 0, 2])),
    "parts of other rows": lambda rows: tf.data.Dataset.from_tensor_slices(
        (np.ones([3, 2]), SIX[:3, None])
    ),
    "ragged": lambda rows: tf.data.Dataset.from_tensor_slices(
        tf.ragged.constant([[1], [2, 3]])
    ).batch(2),
    "sparse": lambda rows: tf.data.Dataset.from_tensor_slices(tf.sparse.eye(4)).batch(2),
    "of another shape in one half": lambda rows: rows.batch(2).concatenate(
        rows.batch(2).map(lambda x: x)
    ),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_all_other_data_sets_are_read(name):
    assert slices.rows_of([NO_ROWS[name](tf.data.Dataset.from_tensor_slices(SIX))]) is None


def test_rows_are_alike_and_not_too_many(monkeypatch):
    data, other = (tf.data.Dataset.from_tensor_slices(x).batch(2) for x in (SIX, SIX[:, :1]))
    assert slices.rows_of([data, other]) is None
    monkeypatch.setattr(slices, "MOST_BYTES", SIX.nbytes)
    assert slices.rows_of([data]) is not None
    # Nothing is copied to find that it is too large.
    for large in (data.repeat(10**12).take(1), data.repeat(2), data.concatenate(data)):
        assert slices.rows_of([large]) is None
    monkeypatch.setattr(slices, "MOST_BYTES", SIX.nbytes - 1)
    assert slices.rows_of([data]) is None


def test_the_rules_of_aggregators_add_up_arrays_as_they_add_up_data_sets(read):
    """Their sums have constants, which the loop over clients cannot hold."""
    process = aggregators.build_fed_avg(
        resident_cases.model_fn,
        tff.learning.optimizers.build_sgdm(0.05),
        rule=aggregators.rules.redescending_mean(),
    )
    clients = ClientArrays(arrays(), batch_size=4)
    with ResidentProcess(process, device="CPU:0") as resident:
        states = [resident.initialize()] * 2
        for number in range(3):
            cohort = clients.cohort(clients.ids, number)
            given = (cohort, list(cohort))
            states = [resident.next(s, data).state for s, data in zip(states, given, strict=True)]
        one, two = map(resident.materialize, states)
    assert_equal(one, two)


class Meeting:
    """Holds whoever comes first until a second one is there."""

    def __init__(self):
        self.seen, self.met = 0, []
        self._lock, self._second = threading.Lock(), threading.Event()

    def __call__(self, value):
        with self._lock:
            self.seen += 1
            if self.seen > 1:
                self._second.set()
        self.met.append(self._second.wait(timeout=20))
        return value


@pytest.mark.skipif(sizes.cores() < 2, reason="TensorFlow has a thread for each core")
def test_a_few_small_clients_are_trained_at_once(monkeypatch):
    meeting, graphs = Meeting(), []

    def model_fn():
        with tf.init_scope():  # the graph keeps the function, but nothing keeps the graph
            graphs.append(tf.compat.v1.get_default_graph())
        model = resident_cases.model_fn()
        plain = model.forward_pass

        def forward_pass(batch, **named):
            x = tf.ensure_shape(tf.numpy_function(meeting, [batch[0]], tf.float32), [None, 3])
            return plain((x, batch[1]), **named)

        model.forward_pass = forward_pass
        return model

    plain_client = one_by_one._client

    def client(*given):
        *others, begin, end = given
        begin = tf.ensure_shape(tf.numpy_function(meeting, [begin], tf.int32), [])
        return plain_client(*others, begin, end)

    monkeypatch.setattr(one_by_one, "_client", client)
    meets = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, tff.learning.optimizers.build_sgdm(0.05)
    )
    for of_arrays, process in ((True, resident_cases.process()), (False, meets)):
        with ResidentProcess(process, device="CPU:0") as resident:
            for number in (3, 15):
                clients = ClientArrays(arrays([4] * number), batch_size=4)
                cohort = clients.cohort(clients.ids, 1)
                meeting.__init__()
                resident.next(resident.initialize(), cohort if of_arrays else list(cohort))
                assert meeting.seen == number
                assert all(meeting.met), "the first client ended before another one began"
