"""First values of variables are left out where nothing can read them, and nowhere else."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident.graphs.first_values import without_unread
from tff_optim.resident.graphs.nodes import ancestors, unpack
from tff_optim.resident.parts import no_grappler


def overwritten(v, x):
    v.assign(x)
    return v + 1.0


def read_first(v, x):
    before = v.read_value()
    v.assign(x)
    return v + before


def added_to(v, x):
    v.assign_add(x)
    return v.read_value()


def overwritten_by_itself(v, x):
    v.assign(2.0 * v + x)
    return v.read_value()


def overwritten_if(v, x):
    if x > 0.0:
        v.assign(x)
    return v.read_value()


def overwritten_in_both_branches(v, x):
    # It could be left out, but what is in branches is not looked into.
    if x > 0.0:
        v.assign(x)
    else:
        v.assign(-x)
    return v.read_value()


def read_in_a_loop_first(v, x):
    total = tf.constant(0.0)
    for _ in tf.range(3):
        total += v
        v.assign(x)
    return total


def overwritten_before_a_loop(v, x):
    v.assign(x)
    for _ in tf.range(3):
        v.assign_add(x)
    return v.read_value()


def overwritten_in_a_function(v, x):
    tf.function(v.assign)(x)
    return v + x


def read_in_a_function_first(v, x):
    @tf.function
    def twice():
        before = v.read_value()
        v.assign(x)
        return before

    return twice() + v


def read_by_another_name(v, x):
    @tf.function
    def call(one, other):
        before = other.read_value()
        one.assign(x)
        return before

    return call(v, v)


def never_used(v, x):
    return x + 1.0


LEFT_OUT = [overwritten, overwritten_before_a_loop, overwritten_in_a_function, never_used]
KEPT = [
    read_first,
    added_to,
    overwritten_by_itself,
    overwritten_if,
    overwritten_in_both_branches,
    read_in_a_loop_first,
    read_in_a_function_first,
    read_by_another_name,
]


def computation_of(body):
    """A computation of one number that uses a variable, of first value 5, and another one."""

    @tff.tensorflow.computation(np.float32)
    def run(x):
        variable, other = tf.Variable(5.0), tf.Variable(7.0)

        @tf.function
        def call(x):
            return body(variable, x) + other

        return call(x)

    return run


def operations_at_first(computation):
    """What runs to give variables their first values."""
    proto = tff.framework.serialize_computation(computation).tensorflow
    nodes = {node.name: node for node in unpack(proto).node}
    return [nodes[name].op for name in ancestors(nodes, [proto.initialize_op])]


def number_of_first_values(computation):
    return operations_at_first(computation).count("AssignVariableOp")


@pytest.mark.parametrize("body", LEFT_OUT + KEPT, ids=lambda body: body.__name__)
def test_what_is_read_is_kept_and_nothing_else(body):
    before = computation_of(body)
    after = without_unread(before)
    assert after.type_signature == before.type_signature
    assert number_of_first_values(before) == 2
    assert number_of_first_values(after) == (1 if body in LEFT_OUT else 2)
    for x in (2.0, -3.0):
        for _ in range(2):
            assert after(x) == before(x)


def test_a_first_value_that_another_variable_starts_from_is_kept():
    @tff.tensorflow.computation(np.float32)
    def run(x):
        first = tf.Variable(5.0)
        with tf.control_dependencies([first.initializer]):
            second = tf.Variable(2.0 * first.read_value())

        @tf.function
        def call(x):
            first.assign(x)
            return first + second

        return call(x)

    assert without_unread(run)(1.0) == run(1.0) == 11.0


def test_a_computation_without_variables_stays_what_it_is():
    add = tff.tensorflow.computation(lambda x: x + 1.0, np.float32)
    assert without_unread(add) is add


def test_a_clients_work_does_not_draw_its_models_first_weights():
    def model_fn():
        keras_model = tf.keras.Sequential([tf.keras.layers.Dense(2, input_shape=(3,))])
        spec = (tf.TensorSpec([None, 3]), tf.TensorSpec([None, 2]))
        return tff.learning.models.from_keras_model(
            keras_model, tf.keras.losses.MeanSquaredError(), spec
        )

    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, tff.learning.optimizers.build_sgdm(0.1)
    )
    form = tff.backends.mapreduce.get_map_reduce_form_for_computation(process.next, no_grappler())
    assert any("Random" in name for name in operations_at_first(form.work))
    assert not any("Random" in name for name in operations_at_first(without_unread(form.work)))
