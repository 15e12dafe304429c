"""Graphs of TFF's computations in the Python process: what they keep is each call's, and where they run."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import assert_equal

from tff_optim import ResidentProcess

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
    queue = tf.queue.FIFOQueue(10, [tf.string], [[]])
    with tf.control_dependencies([queue.enqueue(data.reduce("", lambda a, b: a + b))]):
        return state + tf.cast(tf.strings.length(queue.dequeue()), tf.int64)


CLIENTS = [["a", "b", "c"], ["b", "b", "a", "bb"], ["a", "a", "a"]]


@pytest.mark.parametrize("place", [{}, {"workers": 1}])
@pytest.mark.parametrize("work", [known_words, different_words, words_in_turn])
def test_tables_and_iterators_are_each_calls_own(work, place):
    counting = counting_process(work)
    with ResidentProcess(counting, **place) as resident:
        state = plain = counting.initialize()
        for clients in (CLIENTS, CLIENTS[:1], CLIENTS[::-1] * 2):
            state, metrics = resident.next(state, clients)
            plain, plain_metrics = counting.next(plain, clients)
            assert_equal(metrics, plain_metrics)
            assert_equal(resident.materialize(state), plain)
    assert plain > 100
