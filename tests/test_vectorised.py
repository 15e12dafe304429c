"""Clients side by side in one vectorised program, against the same clients one by one."""

import collections

import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_equal, assert_near, cohorts, model_fn, plain_run, process

import aggregators
from tff_optim import ResidentProcess
from tff_optim.resident.clients.in_process import side_by_side, vectorised
from tff_optim.resident.clients.in_process.batches import Reader, cut
from tff_optim.resident.clients.in_process.evaluation import evaluate, loop
from tff_optim.resident.clients.in_process.program import simplified, simplified_across_loops
from tff_optim.resident.clients.in_process.recording import record
from tff_optim.resident.clients.in_process.side_by_side import SideBySide, sum_over
from tff_optim.resident.graphs.imported import ImportedComputation
from tff_optim.simulation import ClientArrays

SGD = tff.learning.optimizers.build_sgdm(0.1)
NUMBERS = tff.SequenceType(tff.TensorType(np.float32, [None, 2]))


def variant(data):
    return tf.data.experimental.to_variant(data)


def batched(rows, size=4, width=2, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices(x).batch(size)


# Short batches at the end, none at all, one row, and short batches in the middle.
CLIENTS = [
    *(batched(rows, seed=i) for i, rows in enumerate([8, 13, 0, 1, 8, 7, 13])),
    batched(6, seed=7).repeat(3),
    batched(9, seed=8).map(lambda x: x * np.nan),
]


def one_by_one(computation, clients, context):
    function = ImportedComputation(computation, "/CPU:0")
    return [[x.numpy() for x in function([variant(data), *context])] for data in clients]


def all_at_once(computation, clients, context):
    """The results of each client; at the end whether the graph's assertions hold, if it has any."""
    return at_once(record(computation).program, clients, context)


def at_once(program, clients, context):
    together = SideBySide(program, [False] * len(context))
    batches, _ = Reader(NUMBERS.element)([variant(data) for data in clients])

    @tf.function(autograph=False)
    def run():
        return together([tf.constant(x) for x in context], {0: batches}, tf.constant(len(clients)))

    results = [x.numpy() for x in run()]
    return [list(of_client) for of_client in zip(*results, strict=True)]


@tff.tensorflow.computation(NUMBERS, tff.TensorType(np.float32, [2]))
def reduction(data, start):
    def step(state, batch):
        weights, rows, steps, rate = state  # the rate stays as it is
        gradient = tf.reduce_mean(batch * tf.tanh(weights), 0) - weights * tf.nn.l2_loss(batch)
        weights -= tf.cond(weights[0] > 0, lambda: rate, lambda: 2 * rate) * gradient
        return weights, rows + tf.shape(batch)[0], steps + 1, rate

    weights, rows, steps, _ = data.reduce((start, 0, 0, 0.1), step)
    # A second pass, which begins with what the first has found.
    loss = data.reduce(0.0, lambda total, batch: total + tf.reduce_mean((batch - weights) ** 2))
    return weights, rows, steps, loss, start * 2


class Counter:
    """A variable in a client's graph, one that a branch and a loop change, and an assertion."""

    def __init__(self):
        self.weights = tf.Variable(np.ones(2, np.float32))
        self.steps = tf.Variable(0)

    @tf.function
    def train(self, data, start):
        self.weights.assign(start)
        for batch in iter(data):
            tf.debugging.assert_less(tf.shape(batch)[0], 5)
            mean = tf.reduce_mean(batch, 0)
            if mean[0] > 0:
                self.weights.assign_add(mean)
            else:
                self.weights.assign_sub(2 * mean)
            power = 0
            while tf.reduce_sum(self.weights**2) > 1.0:
                self.weights.assign(self.weights / 2)
                power += 1
            self.steps.assign_add(power)
            if tf.shape(batch)[0] < 4:
                power = 0
            else:  # a variable that one branch alone changes
                self.steps.assign_add(100)
        return self.weights.read_value(), self.steps.read_value()


@tff.tensorflow.computation(NUMBERS, tff.TensorType(np.float32, [2]))
def variables(data, start):
    counter = Counter()  # which its function does not keep
    return counter.train(data, start)


@tff.tensorflow.computation(NUMBERS, tff.TensorType(np.float32, [2]))
@tf.function(autograph=False)
def optionals(data, start):
    iterator = iter(data)
    first = iterator.get_next_as_optional()
    return tf.while_loop(
        lambda optional, state: optional.has_value(),
        lambda optional, state: (
            iterator.get_next_as_optional(),
            state * 0.5 + tf.reduce_mean(optional.get_value(), 0),
        ),
        (first, start),
    )[1]


@tff.tensorflow.computation(NUMBERS, tff.TensorType(np.float32, [2]))
def other_forms(data, start):
    """Operations that TensorFlow vectorises not at all, or wrongly."""

    def step(total, batch):
        own = batch * total[0]
        segments = tf.range(tf.shape(batch)[0]) // 2 * 2  # between them empty ones
        sums = tf.math.segment_sum(own, segments)
        most = tf.math.segment_max(-tf.abs(own), segments)
        # Of those below 0 nothing is taken.
        some = tf.math.unsorted_segment_sum(own, tf.where(own[:, 0] > 0, 1, -2), 2)
        lowest = tf.math.unsorted_segment_min(own, tf.where(own[:, 0] > 0, -2, 1), 2)
        place = tf.cast(total[0] > 0, tf.int32) - 1  # the first or the last
        row = own[place]
        total = tf.tensor_scatter_nd_add(
            total, [[0], [1], [1]], own[0, 0] * tf.constant([1.0, 2, 3])
        )
        total += tf.stack([tf.squeeze(tf.reduce_sum(own, keepdims=True)), own[0, 0]])
        total += tf.squeeze(own[:1], [0])
        total += tf.reduce_mean(sums, 0) + 2 * tf.reduce_mean(most, 0) + row
        total += tf.reduce_sum(some, 0) + tf.reduce_sum(tf.clip_by_value(lowest, -3.0, 3.0), 0)
        never = tf.reduce_sum(own) > 1e6
        sized = tf.cond(never, lambda: tf.cast(tf.size(own), tf.float32), lambda: 1.0)
        return tf.tanh(total / 10) * sized

    return data.reduce(start, step)


@pytest.mark.parametrize("computation", [reduction, variables, optionals, other_forms])
def test_each_client_gets_what_it_gets_alone(computation):
    context = [np.array([0.5, -1.5], np.float32)]
    together = all_at_once(computation, CLIENTS, context)
    alone = one_by_one(computation, CLIENTS, context)
    for one, expected in zip(together, alone, strict=True):
        assert_near(one[: len(expected)], expected)
        assert all(one[len(expected) :])  # what the graph asserts


@pytest.mark.parametrize("at_once", [False, True])
def test_a_batch_is_what_the_data_set_has_in_every_structure_and_dtype(at_once):
    spec = collections.OrderedDict(
        text=tf.TensorSpec([None], tf.string),
        image=tf.TensorSpec([None, 2, 1], tf.uint8),
        tokens=tf.TensorSpec([None, None], tf.int64),
        number=tf.TensorSpec([], tf.float64),
        pair=tf.TensorSpec([2], tf.float32),
    )
    if at_once:  # with a known number of batches, in which only rows may differ
        del spec["tokens"]
    rng = np.random.default_rng(0)

    def batches(number):
        for rows in rng.integers(1, 4, number):
            length = rng.integers(1, 5)
            whole = collections.OrderedDict(
                text=np.array([f"{rng.random()}" for _ in range(rows)]),
                image=rng.integers(0, 255, (rows, 2, 1)).astype(np.uint8),
                tokens=rng.integers(0, 9, (rows, length)),
                number=rng.random(),
                pair=rng.random(2).astype(np.float32),
            )
            yield collections.OrderedDict((name, whole[name]) for name in spec)

    lists = [list(batches(n)) for n in (5, 0, 3, 9)]
    data = [
        tf.data.Dataset.from_generator(lambda x=x: iter(x), output_signature=spec) for x in lists
    ]
    if at_once:
        counted = tf.data.experimental.assert_cardinality
        data = [one.apply(counted(len(x))) for one, x in zip(data, lists, strict=True)]
    reader = Reader(tff.types.tensorflow_to_type(spec))
    variants = [variant(one) for one in data]
    assert reader(variants, most_bytes=1)[1] == 1
    read, number = reader(variants)
    assert number == len(data)
    found = [[] for _ in lists]
    first = 0
    specs = tf.nest.flatten(spec)
    for step, last in enumerate(read.ends.numpy()):
        who = read.clients[first:last]
        assert len(set(who.numpy())) == last - first
        shapes = [one.shape for one in specs]
        parts = side_by_side.parts_of_step(read, step, last - first, shapes)
        for i, client in enumerate(who.numpy()):
            found[client].append([part[i].numpy() for part in parts])
        assert read.everyone[step] == np.array_equal(who, range(len(lists)))
        first = last
    for one, batches_of_client in zip(found, lists, strict=True):
        for parts, batch in zip(one, batches_of_client, strict=True):
            for a, e in zip(parts, tf.nest.flatten(batch), strict=True):
                np.testing.assert_array_equal(np.asarray(a).astype(str), np.asarray(e).astype(str))


def test_clients_that_are_short_of_rows_wait_for_others():
    read, number = Reader(NUMBERS.element)([variant(batched(n)) for n in (1, 5, 5)])
    assert number == 3
    assert read.ends.numpy().tolist() == [2, 5]
    assert read.everyone.numpy().tolist() == [False, True]


def test_no_client_is_added_to_a_group_that_has_its_bytes():
    rows = [8, 5, 5]
    data = {i: np.zeros([n, 2], np.float32) for i, n in enumerate(rows)}
    clients = ClientArrays(data, batch_size=4).cohort(data, 1)
    data_sets = [variant(batched(n)) for n in rows]
    size = 8 * 2 * 4
    for first, most, number in ((0, size, 1), (0, size + 1, 2), (0, size * 2, 3), (1, size, 2)):
        order, edges, counts = cut(clients, first, 3, most)
        assert len(counts) == number
        assert order.tolist() == list(range(8 * first, 8 * first + sum(rows[first:][:number])))
        assert edges[-1] == len(order)
        if first == 0:  # where the shapes of two batches come with each client
            of_shapes = 2 * 2 * 4 * (most // size)
            assert Reader(NUMBERS.element)(data_sets, most + of_shapes)[1] == number


@pytest.mark.parametrize("form", [simplified, simplified_across_loops])
def test_every_client_draws_numbers_of_its_own(form):
    """In each step and each branch, by operations that are written alike."""

    def draw():
        return tf.raw_ops.RandomUniform(shape=[1], dtype=tf.float32)

    @tff.tensorflow.computation(NUMBERS, np.bool_)
    def drawn(data, flag):
        def draw_in_a_branch():
            return tf.cond(flag, draw, lambda: tf.zeros([1]))

        def step(state, batch):
            return tf.concat([state[3:], draw(), draw(), draw_in_a_branch()], 0)

        return data.reduce(tf.zeros([6]), step), draw(), draw_in_a_branch()

    program = form(record(drawn).program)
    same = [batched(8)] * 5
    found = at_once(program, same, [True])
    numbers = np.concatenate([x for of_client in found for x in of_client])
    assert len(set(numbers)) == 5 * (2 * 3 + 2)
    assert np.all((numbers > 0) & (numbers < 1))


ACCUMULATIONS = {
    "a sum": lambda total, update: total + update * 2,
    "a sum of texts": lambda total, update: total + update,
    "a difference": lambda total, update: total - update,
    "a product": lambda total, update: total * update,
    "of a product": lambda total, update: (total + 1) * update,
    "with a product": lambda total, update: total + total * update,
    "twice": lambda total, update: total + total,
}


@pytest.mark.parametrize("name", ACCUMULATIONS)
def test_updates_are_added_up_as_one_after_the_other(name):
    values, first = [0.5, -2.0, 3.0], 0.25
    if name == "a sum of texts":
        values, first = ["a", "b", "c"], "z"
    pair = tff.to_type([np.float32 if isinstance(first, float) else np.str_, np.int32])

    @tff.tensorflow.computation(pair, pair)
    def accumulate(total, update):
        return ACCUMULATIONS[name](total[0], update[0]), total[1] + update[1]

    program = record(accumulate).program
    updates = [tf.constant(values), tf.constant([1, 2, 4])]
    total = [tf.constant(first), tf.constant(1)]
    traced = tf.function(lambda: sum_over(program, total, updates, tf.constant(3)))
    kinds = {op.type for op in traced.get_concrete_function().graph.get_operations()}
    assert ("While" in kinds or "StatelessWhile" in kinds) is (name != "a sum")
    expected = total
    for i in range(3):
        expected = [ACCUMULATIONS[name](expected[0], updates[0][i]), expected[1] + updates[1][i]]
    found = [x.numpy() for x in traced()]
    if name == "a sum of texts":
        assert found[0] == b"zabc"
    else:
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert found[1] == 8


def test_operations_that_give_back_an_input_are_left_out_to_the_bit():
    @tff.tensorflow.computation(np.float32, tff.TensorType(np.float32, [None]), np.int32)
    def compute(number, x, whole):
        one = tf.raw_ops.Tile(input=tf.reshape(number * 1.0, []), multiples=tf.zeros([0], tf.int32))
        rest = tf.reshape(x * 2.0, [-1, 1]) * 1.0
        return one, tf.raw_ops.Mul(x=tf.constant(1.0), y=x), tf.tile(rest, [1, 2]), whole * 1

    program = record(compute).program
    left = simplified(program)
    assert [one.kind for one in left.operations if one.kind != "Const"] == [
        "Mul",
        "Reshape",
        "Tile",
        "Mul",
    ]
    x = [np.float32(-0.0), np.float32([-0.0, np.nan, 3.0, np.inf]), np.int32(7)]

    def run(program):
        return tf.function(lambda *given: evaluate(program, given, {}), autograph=False)(*x)

    before, after = run(program), run(left)
    for ours, theirs in zip(after, before, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()


def test_a_loop_may_end_with_what_does_not_change_in_it():
    def run(number, x):
        return loop(
            lambda state, others: state[0] < others[0],
            lambda state, others: [state[0] + others[1], others[2], state[1]],
            [tf.constant(0), tf.constant(1.0), tf.constant(2.0)],
            [number, tf.constant(1), x],
            2,
        )

    specs = [tf.TensorSpec([], tf.int32), tf.TensorSpec([], tf.float32)]
    function = tf.compat.v1.wrap_function(run, specs)
    for number, expected in ((0, [0, 1, 2]), (1, [1, 5, 1]), (3, [3, 5, 5])):
        assert [float(x) for x in function(tf.constant(number), tf.constant(5.0))] == expected


def printing(data):
    def step(total, batch):
        tf.print("a step")
        return total + tf.reduce_sum(batch)

    return data.reduce(0.0, step)


def own_pipeline(data):
    return data.skip(1).reduce(0.0, lambda s, x: s + 1)


def by_case(data):
    def step(total, batch):
        ways = [lambda: total, lambda: total + 1, lambda: tf.reduce_sum(batch)]
        return tf.switch_case(tf.shape(batch)[0], ways)

    return data.reduce(0.0, step)


def repeated(data):
    return data.repeat(2).reduce(0.0, lambda s, x: s + 1)


@tf.function(autograph=False)
def two_at_a_time(data):
    iterator = iter(data)

    def turn(optional, total):
        iterator.get_next_as_optional()
        return iterator.get_next_as_optional(), total + tf.reduce_sum(optional.get_value())

    start = (iterator.get_next_as_optional(), 0.0)
    return tf.while_loop(lambda optional, _: optional.has_value(), turn, start)[1]


@tf.function
def ends_early(data):
    total = 0.0
    for batch in iter(data):
        total += tf.reduce_sum(batch)
        if total > 3.0:
            break
    return total


@tf.function
def in_pairs(data):
    iterator = iter(data)
    total = 0.0
    for batch in iterator:
        total += tf.reduce_sum(batch) + tf.reduce_sum(next(iterator))
    return total


def in_a_loop(data):
    return tf.while_loop(
        lambda i, s: i < 3,
        lambda i, s: (i + 1, s + data.reduce(0.0, lambda t, x: t + tf.reduce_sum(x))),
        [0, 0.0],
    )[1]


def convolution(data):
    def step(kernel, batch):
        image = tf.reshape(batch, [-1, 2, 1, 1])
        return kernel + tf.reduce_mean(tf.nn.conv2d(image, kernel, 1, "SAME"))

    return data.reduce(tf.ones([1, 1, 1, 1]), step)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (printing, "PrintV2"),
        (own_pipeline, "SkipDataset"),
        (repeated, "RepeatDataset"),
        (by_case, "Case"),
        (two_at_a_time, "IteratorGetNextAsOptional"),
        (ends_early, "a loop over data that may end before the data do"),
        (in_pairs, "IteratorGetNext"),
        (in_a_loop, "a pass over the data in a loop"),
        (convolution, "Conv2D"),
    ],
)
def test_what_cannot_be_vectorised_is_refused_by_name(function, found):
    computation = tff.tensorflow.computation(function, NUMBERS)
    with pytest.raises(ValueError, match=f"`vectorize` needs .*; found .*{found}.* Leave `vec"):
        all_at_once(computation, [batched(8)], [])


def cohort(number, nan=None):
    rng = np.random.default_rng(number)
    clients = []
    for i in range(number):
        rows = int(rng.integers(0, 15))
        x = rng.normal(size=(rows, 3)).astype(np.float32)
        y = x[:, :1] * (np.nan if i == nan else 2.0)
        clients.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(4))
    return clients


def test_rounds_are_plain_tffs_to_rounding():
    with ResidentProcess(process(), device="CPU:1", vectorize=True, clients_at_once=2) as together:
        state = together.initialize()
        for clients, (expected, metrics) in zip(cohorts(), plain_run()[1:], strict=True):
            state, found = together.next(state, list(clients))
            assert_near(together.materialize(state), expected)
            assert_near(found, metrics)


@pytest.mark.slow
def test_arrays_give_the_numbers_of_the_data_sets_that_they_stand_for(monkeypatch):
    rng = np.random.default_rng(5)
    rows = {f"c{i}": int(n) for i, n in enumerate(rng.integers(0, 30, 20))}
    arrays = ClientArrays(
        {
            name: (rng.normal(size=(n, 3)).astype(np.float32), rng.random((n, 1), np.float32))
            for name, n in rows.items()
        },
        batch_size=4,
        epochs=2,
        shuffle=True,
    )
    with ResidentProcess(process(), device="CPU:0", vectorize=True, clients_at_once=7) as together:
        state = together.initialize()
        for number in (1, 2):
            chosen = arrays.cohort(list(rows)[number:], number)
            data_sets = list(arrays.cohort(list(rows)[number:], number))
            assert type(chosen) is not type(data_sets)
            expected = together.next(state, data_sets)
            if number == 2:
                monkeypatch.setattr(vectorised, "_MOST_BYTES", 600)  # groups of other sizes
            found = together.next(state, chosen)
            assert_near(found.metrics, expected.metrics)
            state = found.state
            assert_near(together.materialize(state), together.materialize(expected.state))


@pytest.mark.slow
def test_any_cohort_by_one_trace_gives_the_numbers_of_clients_one_by_one(monkeypatch):
    with (
        ResidentProcess(process(), device="CPU:1") as alone,
        ResidentProcess(process(), device="CPU:1", vectorize=True, clients_at_once=40) as together,
    ):
        assert "vectorised" in repr(together)

        def no_tracing(*unused, **named):
            raise AssertionError("a function is made")

        begin = alone.materialize(alone.initialize())
        alone.next(begin, cohort(3))
        together.next(begin, cohort(3))
        monkeypatch.setattr(side_by_side, "evaluate", no_tracing)
        states = [begin, begin]
        for number in (1, 3, 17, 0, 101, 2, 5, 40, 41, 12):
            clients = cohort(number, nan=number - 2 if number in (3, 17) else None)
            outputs = [
                place.next(state, clients)
                for place, state in zip((alone, together), states, strict=True)
            ]
            assert_near(outputs[1].metrics, outputs[0].metrics)
            states = [
                place.materialize(o.state)
                for place, o in zip((alone, together), outputs, strict=True)
            ]
            assert_near(states[1], states[0])


LAYERS = tf.keras.layers
INPUTS = {
    "numbers": lambda rng, n: rng.normal(size=(n, 6)).astype(np.float32),
    "images": lambda rng, n: rng.normal(size=(n, 6, 6, 1)).astype(np.float32),
    "tokens": lambda rng, n: rng.integers(0, 9, (n, 5)),
}
CLIPPINGS = {
    "examples clipped": aggregators.ExampleClipping(0.3),
    "examples clipped by tensor": aggregators.ExampleClipping(0.2, 0.0, 3, per_tensor=True),
    "examples of no finite gradient left out": aggregators.ExampleClipping(np.inf),
    "noise of a seed": aggregators.ExampleClipping(0.3, 0.5, 4, seed=1),
}
MODELS = {
    "dense": ("numbers", lambda: []),
    **dict.fromkeys(CLIPPINGS, ("numbers", lambda: [])),
    "batch normalisation": (
        "numbers",
        lambda: [LAYERS.Dense(4, use_bias=False), LAYERS.BatchNormalization()],
    ),
    "an embedding": ("tokens", lambda: [LAYERS.Embedding(9, 4), LAYERS.Flatten()]),
    "dropout": ("numbers", lambda: [LAYERS.Dense(16), LAYERS.Dropout(0.5)]),
    "a convolution": ("images", lambda: [LAYERS.Conv2D(2, 3), LAYERS.Flatten()]),
    "a recurrent layer": ("tokens", lambda: [LAYERS.Embedding(9, 4), LAYERS.LSTM(3)]),
}
REFUSED = {
    "noise of a seed": "Fingerprint",
    "a convolution": "Conv2D",
    "a recurrent layer": "While",
}


def model_process(name, first, layers):
    """A process with a model that begins with some layers, and one client of a few short batches."""
    example = INPUTS[first](np.random.default_rng(0), 1)
    tf.keras.utils.set_random_seed(1)
    keras_model = tf.keras.Sequential(
        [
            LAYERS.InputLayer(input_shape=example.shape[1:], dtype=example.dtype),
            *layers(),
            LAYERS.Dense(3, "relu"),
            LAYERS.Dense(2),
        ]
    )
    weights = keras_model.get_weights()

    def model_fn():
        model = tf.keras.models.clone_model(keras_model)
        model.set_weights(weights)
        spec = (
            tf.TensorSpec([None, *example.shape[1:]], example.dtype),
            tf.TensorSpec([None, 2], tf.float32),
        )
        loss = tf.keras.losses.MeanSquaredError()
        metrics = [tf.keras.metrics.MeanAbsoluteError()]
        return tff.learning.models.from_keras_model(model, loss, spec, metrics=metrics)

    if name in CLIPPINGS:
        return aggregators.build_fed_avg(model_fn, SGD, example_clipping=CLIPPINGS[name])
    return tff.learning.algorithms.build_weighted_fed_avg(model_fn, SGD)


@pytest.mark.parametrize("name", selection.params(list(MODELS), ["an embedding", "a convolution"]))
def test_models_give_the_numbers_of_clients_one_by_one_or_are_refused_by_name(name):
    first, layers = MODELS[name]
    process = model_process(name, first, layers)
    together = None
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"`vectorize` needs .* found .*{REFUSED[name]}"):
            ResidentProcess(process, device="CPU:0", vectorize=True)
    else:
        together = ResidentProcess(process, device="CPU:0", vectorize=True)
    rng = np.random.default_rng(2)
    data = [
        (INPUTS[first](rng, n), rng.normal(size=(n, 2)).astype(np.float32))
        for n in (9, 4, 0, 11, 1, 1)
    ]
    if name in CLIPPINGS:  # in batches that are whole, short, and of a single example
        for client, row in ((0, 2), (1, 0), (1, 3), (3, 9), (5, 0)):
            data[client][1][row] = np.nan
    clients = ClientArrays(data, batch_size=4)
    cohort = clients.cohort(clients.ids, 1)
    with ResidentProcess(process, device="CPU:0") as alone:
        state = alone.materialize(alone.initialize())
        for _ in range(2):
            expected = alone.next(state, list(cohort))
            after = alone.materialize(expected.state)
            if name != "dropout":  # which draws anew in every round
                found = alone.next(state, cohort)
                assert_equal(alone.materialize(found.state), after)
                assert_equal(found.metrics, expected.metrics)
            if together is not None:
                found = together.next(state, cohort)
                rounding = 2e-6 if name != "dropout" else np.inf
                assert_near(together.materialize(found.state), after, rounding)
                assert_near(found.metrics, expected.metrics, rounding)
            state = after


def test_a_large_model_is_warned_of():
    large = tff.to_type([np.float32, (np.float32, [40_001])])
    with pytest.warns(UserWarning, match="a client is sent more than 40,000 numbers; found 40,002"):
        vectorised._warn_if_large(large)


def test_what_a_graph_asserts_is_asserted_of_each_client():
    clients = [batched(8), batched(9, size=9), batched(0), batched(5, size=5)]
    found = all_at_once(variables, clients, [np.ones(2, np.float32)])
    fine = [of_client[-1] for of_client in found]
    assert fine == [True, False, True, False]
    program = record(variables).program
    assert program.first(1, True).outputs == (program.outputs[0], program.outputs[-1])
    assert program.first(1, False).outputs == program.outputs[:1]
    vectorised._check([tf.constant([True, True])], 0, ("assert_less",))
    told = r"for the clients at \[41, 43\], one of assert_less"
    with pytest.raises(tf.errors.InvalidArgumentError, match=told):
        vectorised._check([tf.constant(fine)], 40, ("assert_less",))


def test_clients_with_states_in_files_are_refused_by_name():
    process = aggregators.build_scaffold(model_fn, SGD, num_clients=2)
    with pytest.raises(ValueError, match=r"`vectorize` needs .* found RestoreV2"):
        ResidentProcess(process, device="CPU:0", vectorize=True)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`vectorize` must be True or False; found 1"):
        ResidentProcess(process(), vectorize=1)
    with pytest.raises(ValueError, match="`vectorize` must be False where there are `workers`"):
        ResidentProcess(process(), vectorize=True, workers=1)
