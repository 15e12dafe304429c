"""Data that a process does not take: the message names the client, what was found, what to do."""

import collections
import re

import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_close

import aggregators
from tff_optim import ResidentProcess, simulation
from tff_optim.resident.client_data import ClientData

RNG = np.random.default_rng(1)
X, Y = (RNG.normal(size=[4, n]).astype(np.float32) for n in (2, 1))
OD = collections.OrderedDict
Pair = collections.namedtuple("Pair", ["x", "y"])
slices = tf.data.Dataset.from_tensor_slices


def spec(names):
    sizes = {"x": 2, "y": 1}
    return OD((name, tf.TensorSpec([None, sizes[name]])) for name in names)


# Names that are not in the order of the alphabet are where TensorFlow and TFF differ.
SPECS = {
    "named": spec("xy"),
    "other order": spec("yx"),
    "tuple": tuple(spec("xy").values()),
}


def element_of(name):
    return tff.types.tensorflow_to_type(SPECS[name])


def build(name):
    model = tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential(
            [tf.keras.layers.Dense(1, input_shape=(2,), kernel_initializer="ones")]
        ),
        tf.keras.losses.MeanSquaredError(),
        SPECS[name],
    )
    return tff.learning.algorithms.build_weighted_fed_avg(
        model, tff.learning.optimizers.build_sgdm(0.1)
    )


# What plain TFF takes: functions of x and y, in the order of the specification.
BY_POSITION = {
    "lists": lambda *parts: [list(parts), [one[:2] for one in parts]],
    "tuples": lambda *parts: [parts] * 3,
    "python numbers": lambda *parts: [[one.tolist() for one in parts]],
    "rows": lambda *parts: [[list(one) for one in parts]],
    "float64": lambda *parts: [tuple(one.astype(np.float64) / 3 for one in parts)] * 2,
    "whole numbers": lambda *parts: [tuple((one * 9).astype(np.int64) for one in parts)],
    "tensors": lambda *parts: [tuple(tf.constant(one, tf.float64) for one in parts)],
    "variables": lambda *parts: [tuple(tf.Variable(one) for one in parts)],
    "nothing": lambda *parts: [],
}
BY_NAME = {
    "mappings": lambda x, y: [OD(x=x, y=y), {"x": x[:3], "y": y[:3]}],
    "mappings in the other order": lambda x, y: [OD(y=y, x=x), {"y": y[:1], "x": x[:1]}],
    "named tuples": lambda x, y: [Pair(x, y)],
}


def forms_of(name):
    """Every form of data that plain TFF takes, each with numbers of its own."""
    rng, forms = np.random.default_rng(5), {}
    by_name = {} if name == "tuple" else BY_NAME
    for form, make in {**BY_POSITION, **by_name}.items():
        x, y = (rng.normal(size=[4, n]).astype(np.float32) for n in (2, 1))
        forms[form] = make(x, y) if form in by_name or name != "other order" else make(y, x)
    batch = SPECS[name]
    x, y = (rng.normal(size=[5, n]).astype(np.float32) for n in (2, 1))
    data = OD((k, {"x": x, "y": y}[k]) for k in batch) if name != "tuple" else (x, y)
    forms["data set"] = slices(data).batch(2)
    if name == "named":
        forms["data set of tuples"] = slices((x, y)).batch(3)
        forms["data set of a mapping"] = slices({"x": x, "y": y}).batch(3)
        forms["data set of named tuples"] = slices(Pair(x, y)).batch(3)
    return forms


PLACES = {
    "Python process": {},
    "worker": {"workers": 1},
}


@pytest.fixture(scope="module", params=selection.params([*SPECS], ["other order", "named"]))
def trained(request):
    """A process, its data, and plain TFF's weights after two rounds."""
    process, forms = build(request.param), forms_of(request.param)
    state = process.initialize()
    for _ in range(2):
        state, _ = process.next(state, list(forms.values()))
    return process, forms, process.get_model_weights(state)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_takes_what_plain_tff_takes(trained, place):
    process, forms, weights = trained
    with ResidentProcess(process, **PLACES[place]) as resident:
        state = resident.initialize()
        for _ in range(2):
            state, _ = resident.next(state, list(forms.values()))
        assert_close(resident.get_model_weights(state), weights)


def test_a_run_takes_what_plain_tff_takes(trained):
    process, forms, weights = trained
    history = simulation.run(process, forms, rounds=2, clients_per_round=len(forms))
    (state,) = history.states.values()
    assert_close(process.get_model_weights(state), weights)


def summing(name):
    """Adds up all numbers of a client, each part on its own."""

    @tff.tensorflow.computation(tff.SequenceType(element_of(name)))
    def total(dataset):
        def add(so_far, batch):
            parts = batch if isinstance(batch, tuple) else (batch["x"], batch["y"])
            return so_far + tf.stack([tf.reduce_sum(one) for one in parts])

        return dataset.reduce(tf.zeros([2]), add)

    return total


@pytest.mark.parametrize("name", SPECS)
def test_each_form_keeps_its_numbers(name):
    total, taken = summing(name), ClientData(tff.SequenceType(element_of(name)))
    for form, data in forms_of(name).items():
        np.testing.assert_array_equal(total(taken(data, form)), total(data), err_msg=form)


def test_batches_of_many_sizes_keep_their_order():
    taken = ClientData(tff.SequenceType(tff.TensorType(np.float32, [None])))
    batches = [[1.0], [2.0], [3.0, 4.0], [5.0], [], [6.0, 7.0, 8.0]]
    found = [batch.tolist() for batch in taken(batches, 0).as_numpy_iterator()]
    assert found == batches


def test_text_stays_text():
    taken = ClientData(tff.SequenceType(tff.TensorType(np.str_, [None])))
    batches = [["a", "ä"], np.array(["long text"]), [b"bytes"]]
    found = [batch.tolist() for batch in taken(batches, 0).as_numpy_iterator()]
    assert found == [[b"a", "ä".encode()], [b"long text"], [b"bytes"]]


def numbers(x, y, dtype=tf.float32, **options):
    """A generator, whose data set runs in the Python process alone."""
    return tf.data.Dataset.from_generator(
        lambda: iter([(x, y)] * 2), output_types=(dtype, tf.float32), **options
    )


SERIAL = [tf.io.serialize_tensor(one) for one in (X, Y)]


def text(array):
    return np.vectorize(str)(array)


RAGGED = tf.ragged.constant([[1.0, 2.0], [3.0], [], [4.0]])
SPARSE = tf.sparse.from_dense(X)
F64 = X.astype(np.float64)
IN = r"'x' has 1 dimension and not 2"
BAD = {
    "examples": (slices((X, Y)), f"examples and no batches: {IN}"),
    "examples by name": (slices(OD(x=X, y=Y)), f"examples and no batches: {IN}"),
    "examples with flat labels": (
        slices((X, Y[:, 0])),
        f"{IN}.*'y' has shape .None. and not .None, 1",
    ),
    "batched twice": (slices((X, Y)).batch(2).batch(2), "batched twice: 'x' has 3 dim"),
    "batched thrice, flat": (
        slices((X[:, None, :, None], Y[:, None, None])).batch(2),
        "batched twice: 'x' has 4 dim",
    ),
    "float64": (slices((F64, Y)).batch(2), "'x' is float64 and not float32"),
    "int labels": (slices((X, Y.astype(np.int64))).batch(2), "'y' is int64 and not float32"),
    "truth": (slices((X, Y > 0)).batch(2), "'y' is bool and not float32"),
    "complex": (slices((X.astype(np.complex64), Y)).batch(2), "'x' is complex64 and not"),
    "text": (slices((text(X), Y)).batch(2), "'x' is string and not float32"),
    "flat labels": (slices((X, Y[:, 0])).batch(2), r"'y' has shape \[None\] and not \[None, 1\]"),
    "flat float64 labels": (slices((X, F64[:, 0])).batch(2), "'y' is float64 .*'y' has shape"),
    "images": (
        slices((X[:, None], Y)).batch(2),
        r"'x' has shape \[None, 1, 2\] and not \[None, 2\]",
    ),
    "other order": (slices(dict(y=Y, x=X)).batch(2), "in an order that may not last"),
    "ordered otherwise": (slices(OD(y=Y, x=X)).batch(2), "in another container, or in an order"),
    "one name": (slices(OD(x=X, label=Y)).batch(2), "It has 'label' for 'y'"),
    "one more": (slices(OD(x=X, y=Y, z=Y)).batch(2), "It has 'z' besides"),
    "ragged": (slices((RAGGED, Y)).batch(2), "'x' is ragged"),
    "sparse": (slices((SPARSE, Y)).batch(2), "'x' is sparse"),
    "sparse examples": (slices((SPARSE, Y)), "examples and no batches.*'x' is sparse"),
    "windows": (slices((X, Y)).window(2), "windows, data sets themselves"),
    "windows by name": (slices(OD(x=X, y=Y[:, 0])).window(2), "windows.*'y' has shape"),
    "a generator": (numbers(X, Y), "calls functions of this Python process"),
    "unknown shapes": (
        slices(SERIAL)
        .batch(2)
        .map(lambda x: tuple(tf.io.parse_tensor(x[i], tf.float32) for i in (0, 1))),
        "Its shapes are known by reading alone",
    ),
    "a list of data sets": ([slices((X, Y)).batch(3)] * 2, "elements are data sets themselves"),
    "a list of data sets of examples": ([slices((X, Y))] * 2, "themselves. Batch 0: It is an exam"),
    "a generator of examples": (numbers(X[0], Y[0]), "Batch 0: It is an example and no batch"),
    "a generator of flat labels": (numbers(X, Y[:, 0]), "Batch 0: 'y' has shape"),
    "a generator of float64": (numbers(F64, Y, tf.float64), "functions of this Python"),
    "a function in Python": (
        slices((X, Y))
        .batch(2)
        .map(lambda x, y: (tf.py_function(lambda one: one, [x], x.dtype), y)),
        "calls functions of this Python process",
    ),
    "padded": (
        slices((X, Y)).padded_batch(2, ([None], [None])),
        r"'x' has shape \[None, None\] and not \[None, 2\]",
    ),
    "a pair of arrays": ((X, Y), "Arrays of all batches are no data set yet|examples and no b"),
    "a list of two arrays": ([X, F64[:, :1]], "Batch 0: .*examples and no batches.*float64"),
    "a mapping of arrays": ({"y": Y, "x": X}, "examples and no batches"),
    "a tuple of batches": (((X, Y), (X, Y)), "A tuple is no list"),
    "a list of examples": (
        [(X[0], Y[0]), (X[1], Y[1])],
        f"Batch 0: It is an example and no batch: {IN}",
    ),
    "lists of numbers": ([[[1, 2], [3]]], f"Batch 0: It is an example and no batch: {IN}"),
    "flat labels in a list": ([(X, Y), (X, Y[:, 0])], r"Batch 1: 'y' has shape \[4\] and not"),
    "text in a list": ([(X, Y), (text(X), Y)], "Batch 1: 'x' is string and not float32"),
    "bytes in a list": ([(X, [[b"1"]] * 4)], "Batch 0: 'y' is string and not float32"),
    "complex in a list": ([(X, Y * 1j)], "Batch 0: 'y' is complex64 and not float32"),
    "ragged lists": ([(X, Y), ([[1.0, 2.0], [3.0]], Y[:2])], "Batch 1: 'x' is ragged"),
    "ragged in a list": ([(RAGGED, Y)], "Batch 0: 'x' is ragged"),
    "sparse in a list": ([(SPARSE, Y)], "Batch 0: 'x' is sparse"),
    "names in a list": ([OD(x=X, label=Y)], "Batch 0: It has 'label' for 'y'"),
    "no batch": ([(X, Y), None], "Batch 1: It is None"),
    "none": (None, "found None. Give"),
}


def cure_of(error):
    """What the message says to give."""
    (code,) = re.findall(r"Give `(.*)`", str(error.value))
    return code


def cured(name):
    data, message = BAD[name]
    with pytest.raises(TypeError, match=message) as error:
        ClientData(tff.SequenceType(element_of("named")))(data, "ann")
    assert str(error.value).startswith("The data of client 'ann' must be batches of <x=float32")
    known = {"tf": tf, "np": np, "collections": collections, "data": data, "dataset": data}
    return eval(cure_of(error), known)


@pytest.fixture(scope="module")
def resident():
    with ResidentProcess(build("named"), device="CPU:0") as resident:
        yield resident


@pytest.mark.parametrize("name", BAD)
def test_what_a_message_says_to_give_trains(name, resident):
    state, _ = resident.next(resident.initialize(), [cured(name)])
    assert np.isfinite(resident.get_model_weights(state).trainable[0]).all()


def test_what_messages_say_to_give_trains_in_workers(resident):
    clients = {name: cured(name) for name in BAD}
    simulation.run(resident.process, clients, rounds=1, clients_per_round=len(clients))
    with ResidentProcess(resident.process, workers=1) as there:
        there.next(there.initialize(), list(clients.values()))


# What only words can help with: the data, the message, and data as the words say.
WORDS = {
    "wide": (
        slices((np.ones([4, 3], np.float32), Y)).batch(2),
        r"'x' has shape \[None, 3\] and not \[None, 2\]\. Give data of that shape",
        slices((X, Y)).batch(2),
    ),
    "other parts": (
        slices(OD(a=X, b=Y)).batch(2),
        "It lacks 'x', 'y' and has 'a', 'b' besides. Give each batch the parts",
        slices(OD(x=X, y=Y)).batch(2),
    ),
    "no labels": (
        slices(X).batch(2).map(lambda x: (x, None)),
        "'y' is None and not float32.*Give it v",
    ),
    "no labels in a list": ([(X, Y), (X, None)], "Batch 1: 'y' is None and not float32.*Give it v"),
    "one array": (
        [X, X, X],
        "Batch 0: It must hold 'x', 'y' together; found one array of shape .4, 2.*list of them",
    ),
    "too large": (
        [(F64 * 1e300, Y)],
        "Batch 0: 'x' holds numbers that are too large for float32. S",
    ),
    "anything": ([(object(), Y)], "Batch 0: .*must hold arrays of numbers or text; found <object"),
    "text and numbers": (
        [([["a", 1.0]], Y)],
        "Batch 0: 'x' is text, such as 'a', and not float32.*L",
    ),
    "words": (
        slices((np.full([4, 2], "cat"), Y)).batch(2),
        "'x' is text, such as b'cat', .*StringLook",
    ),
    "a number": (7, "found 7. Give a `tf.data.Dataset` of batches, or a list of them"),
    "an iterator": (iter([(X, Y)]), "Give a `tf.data.Dataset` of batches, or a list of them"),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_is_wrong_is_said(name):
    data, message, *good = WORDS[name]
    taken = ClientData(tff.SequenceType(element_of("named")))
    with pytest.raises(TypeError, match=message) as error:
        taken(data, "ann")
    assert str(error.value).startswith("The data of client 'ann' must be batches of")
    for one in good:
        taken(one, "ann")


def test_whole_numbers_that_do_not_fit_are_refused():
    taken = ClientData(tff.SequenceType(tff.TensorType(np.int32, [None])))
    (batch,) = taken([[1, 2**31 - 1]], 0).as_numpy_iterator()
    assert batch.tolist() == [1, 2**31 - 1]
    with pytest.raises(TypeError, match="Batch 1: The element holds numbers that are too large"):
        taken([[1], [2**40]], 0)
    with pytest.raises(
        TypeError, match=r"is float64 and not int32. Give `\[tf.cast\(batch, tf.int32"
    ):
        taken([[1.5]], 0)


@pytest.mark.parametrize("sizes", ["not batched", "other batches", "batched twice"])
def test_a_size_that_the_model_fixes(sizes):
    taken = ClientData(tff.SequenceType(tff.TensorType(np.float32, [2, 2])))
    data = slices(X)
    taken(data.batch(2, drop_remainder=True), 1)
    batched = {"other batches": data.batch(3), "batched twice": data.batch(2).batch(1)}
    dataset = batched.get(sizes, data)
    with pytest.raises(TypeError, match=r"client 1 .*drop_remainder=True") as error:
        taken(dataset, 1)
    again = taken(eval(cure_of(error), {"dataset": dataset}), 1)
    np.testing.assert_array_equal(list(again.as_numpy_iterator()), X.reshape(2, 2, 2))


def test_a_tuple_for_names_in_another_order_is_refused():
    """TensorFlow sorts by name and TFF does not: plain TFF gives x for y."""
    taken = ClientData(tff.SequenceType(element_of("other order")))
    dataset = slices((Y, X)).batch(4)
    with pytest.raises(TypeError, match="in an order that may not last") as error:
        taken(dataset, "ann")
    known = {"dataset": dataset, "collections": collections}
    (batch,) = taken(eval(cure_of(error), known), "ann").as_numpy_iterator()
    np.testing.assert_array_equal(batch["x"], X)


def test_what_is_no_sequence_is_left_to_tff():
    assert ClientData(tff.TensorType(np.float32))("anything", 0) == "anything"


def test_a_run_names_the_client_by_id(resident):
    clients = {"ann": slices((X, Y)).batch(2), "bob": slices((X, Y))}
    with pytest.raises(TypeError, match=r"The data of client 'bob' must be .*batch\(32\)"):
        simulation.run(resident.process, clients, rounds=1, clients_per_round=2)


def test_a_resident_process_names_the_client_by_position_and_goes_on(resident):
    good, bad = slices((X, Y)).batch(2), slices((F64, Y)).batch(2)
    state = resident.initialize()
    with pytest.raises(TypeError, match=r"The data of client 1 must be .*float64"):
        resident.next(state, [good, bad])
    resident.next(state, [good, good])


def test_data_that_call_python_are_told_from_others_in_workers(resident):
    """In the Python process they train."""
    good, bad = slices((X, Y)).batch(2), numbers(X, Y, output_shapes=([None, 2], [None, 1]))
    resident.next(resident.initialize(), [good, bad])
    clients = {"ann": good, "bob": bad}
    with pytest.raises(TypeError, match="client 'bob' must be those that a worker") as error:
        simulation.run(resident.process, clients, rounds=1, clients_per_round=2)
    assert cure_of(error) == "list(dataset)"
    with ResidentProcess(resident.process, workers=1) as there:
        state = there.initialize()
        with pytest.raises(TypeError, match="client 1 must be those that a worker can read"):
            there.next(state, [good, bad])
        there.next(state, [good, list(bad)])


def test_clients_that_keep_states_say_what_comes_with_data():
    process = aggregators.build_scaffold(
        tff.learning.models.functional_model_from_keras(
            tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
            tf.keras.losses.MeanSquaredError(),
            SPECS["named"],
        ),
        tff.learning.optimizers.build_sgdm(0.1),
        num_clients=1,
    )
    data = [(X, Y)]
    with ResidentProcess(process, device="CPU:0") as resident:
        state = resident.initialize()
        with pytest.raises(TypeError, match="client 0 must come with the place of its state"):
            resident.next(state, [data])
        with aggregators.ClientStates(["ann"]) as store:
            with store.cohort(["ann"], [data]) as cohort:
                resident.next(state, cohort)
            assert store.seen() == ("ann",)
