"""The laws that every optimizer of `tff_optim` keeps, wherever TFF runs it.

A case is an optimizer together with an independent truth. `test_optimizer_laws.py` puts every case
through every law, and fails when a public optimizer has no case.
"""

import asyncio
import collections
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim

Arrays = list[np.ndarray]
# weights, gradients of each step -> weights after the last step
Reference = Callable[[Arrays, Sequence[Sequence[Any]]], Arrays]

STEPS = 10
RTOL, ATOL = 1e-6, 1e-6


@attrs.frozen
class Case:
    """An optimizer and its truth.

    `couples_weights`: one weight's gradient has a say in another's step, as in global clipping.
    """

    make: Callable[[], tff.learning.optimizers.Optimizer]
    reference: Reference
    couples_weights: bool = False


def keras_case(make_keras: Callable[[], Any], **options: Any) -> Case:
    """A case whose truth is eager Keras on real variables."""

    def reference(weights: Arrays, steps: Sequence[Sequence[Any]]) -> Arrays:
        variables = [tf.Variable(w) for w in weights]
        optimizer = make_keras()
        optimizer.build(variables)
        for gradients in steps:
            optimizer.apply_gradients(zip(gradients, variables))
        return [v.numpy() for v in variables]

    return Case(lambda: tff_optim.build_keras_optimizer(make_keras), reference, **options)


# ------------------------------------------------------------------------------------------- inputs


def make_problem(seed: int = 0, dtype: str = "float32", steps: int = STEPS) -> tuple[Arrays, list]:
    """Two weights and gradients of several scales with exact zeros."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=shape).astype(dtype) for shape in [(3, 2), (2,)]]
    gradients = []
    for step in range(steps):
        scale = 10.0 ** (step % 3 - 1)
        row = [(rng.normal(size=w.shape) * scale).astype(dtype) for w in weights]
        row[0][0, 1] = 0.0
        gradients.append(row)
    return weights, gradients


def specs_of(weights: Any) -> Any:
    return tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), weights)


def run(
    step: Callable[..., Any], state: Any, weights: Any, steps: Sequence[Any]
) -> tuple[Any, Any]:
    for gradients in steps:
        state, weights = step(state, weights, gradients)
    return state, weights


def assert_close(found: Any, expected: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
    found, expected = tf.nest.flatten(found), tf.nest.flatten(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(np.asarray(a, "f8"), np.asarray(b, "f8"), rtol, atol)


def assert_equal(found: Any, expected: Any) -> None:
    tf.nest.assert_same_structure(found, expected)
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected)):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def tensors(structure: Any) -> Any:
    return tf.nest.map_structure(tf.constant, structure)


# -------------------------------------------------------------------------------- laws: every place


def in_eager_code(optimizer, weights, gradients):
    return run(optimizer.next, optimizer.initialize(specs_of(weights)), weights, gradients)[1]


def in_a_tf_function(optimizer, weights, gradients):
    step = tf.function(optimizer.next)
    return run(step, optimizer.initialize(specs_of(weights)), tensors(weights), tensors(gradients))[
        1
    ]


def in_xla(optimizer, weights, gradients):
    step = tf.function(optimizer.next, jit_compile=True)
    state = tensors(optimizer.initialize(specs_of(weights)))
    return run(step, state, tensors(weights), tensors(gradients))[1]


def in_tff_computations(optimizer, weights, gradients):
    weights_type = tff.types.tensorflow_to_type(specs_of(weights))
    initialize, step = tff_optim.build_optimizer_computations(optimizer, weights_type)
    return run(step, initialize(), weights, gradients)[1]


def in_the_server_finalizer(optimizer, weights, gradients):
    weights_type = tff.to_type(
        tff.learning.models.ModelWeights([tff.TensorType(np.float32, w.shape) for w in weights], ())
    )
    finalizer = tff.learning.templates.build_apply_optimizer_finalizer(optimizer, weights_type)
    state, model = finalizer.initialize(), tff.learning.models.ModelWeights(weights, ())
    for update in gradients:
        output = finalizer.next(state, model, update)
        state, model = output.state, output.result
    return model.trainable


def _linear_model(weights: Arrays) -> Any:
    """A functional model whose gradient is whatever the batch says: loss = sum(w * batch)."""
    element = collections.OrderedDict(
        x=tuple(tf.TensorSpec((1, *w.shape), tf.float32) for w in weights),
        y=tf.TensorSpec((1,), tf.float32),
    )

    @tf.function
    def predict_on_batch(model_weights, x, training):
        del training
        trainable, _ = model_weights
        return tf.add_n([tf.reduce_sum(w * tf.squeeze(g, 0)) for w, g in zip(trainable, x)])[None]

    @tf.function
    def loss(output, label, sample_weight=None):
        del label, sample_weight
        return tf.reduce_sum(output)

    return tff.learning.models.FunctionalModel(
        initial_weights=(tuple(weights), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        input_spec=element,
    )


def _in_a_client_reduction(optimizer, weights, gradients, loop):
    work = tff.learning.templates.build_functional_model_delta_client_work(
        model=_linear_model(weights),
        optimizer=optimizer,
        client_weighting=tff.learning.ClientWeighting.UNIFORM,
        loop_implementation=loop,
    )
    columns = tuple(np.stack([row[i] for row in gradients]) for i in range(len(weights)))
    data = tf.data.Dataset.from_tensor_slices(
        collections.OrderedDict(x=columns, y=np.zeros(len(gradients), "float32"))
    ).batch(1, drop_remainder=True)
    model = tff.learning.models.ModelWeights(tuple(weights), ())
    output = work.next(work.initialize(), [model], [data])
    return [w - np.asarray(d) for w, d in zip(weights, output.result[0].update)]


def in_a_client_reduction(optimizer, weights, gradients):
    loop = tff.learning.LoopImplementation.DATASET_REDUCE
    return _in_a_client_reduction(optimizer, weights, gradients, loop)


def in_a_client_loop(optimizer, weights, gradients):
    loop = tff.learning.LoopImplementation.DATASET_ITERATOR
    return _in_a_client_reduction(optimizer, weights, gradients, loop)


def _agrees(case: Case, *places: Callable[..., Any]) -> None:
    weights, gradients = make_problem()
    expected = case.reference(weights, gradients)
    assert not np.allclose(expected[0], weights[0], atol=1e-3), "the truth does not move"
    for place in places:
        try:
            assert_close(place(case.make(), weights, gradients), expected, rtol=2e-6, atol=2e-6)
        except AssertionError as error:
            raise AssertionError(f"{place.__name__}: {error}") from error


def agrees_in_python(case: Case) -> None:
    _agrees(case, in_eager_code, in_a_tf_function)


def agrees_in_xla(case: Case) -> None:
    _agrees(case, in_xla)


def agrees_in_tff(case: Case) -> None:
    _agrees(
        case,
        in_tff_computations,
        in_the_server_finalizer,
        in_a_client_reduction,
        in_a_client_loop,
    )


# ------------------------------------------------------------------------------ laws: every structure


def takes_nested_weights(case: Case) -> None:
    weights, gradients = make_problem()
    pack = lambda flat: {"layer": {"kernel": flat[0], "bias": flat[1]}}  # noqa: E731
    # Dictionaries are flattened by key, so the truth sees the bias first.
    expected = case.reference(weights[::-1], [row[::-1] for row in gradients])
    optimizer = case.make()
    state = optimizer.initialize(specs_of(pack(weights)))
    _, nested = run(optimizer.next, state, pack(weights), [pack(row) for row in gradients])
    assert_close([nested["layer"]["bias"], nested["layer"]["kernel"]], expected)


def takes_a_scalar_and_nothing(case: Case) -> None:
    weight, steps = np.float32(0.7), [np.float32(g) for g in (0.5, 0.0, -2.0, 1.0)]
    optimizer = case.make()
    state = optimizer.initialize(tf.TensorSpec((), tf.float32))
    _, found = run(optimizer.next, state, weight, steps)
    assert_close([found], case.reference([weight], [[g] for g in steps]))

    state = optimizer.initialize(())
    new_state, nothing = optimizer.next(state, (), ())
    assert nothing == ()
    tf.nest.assert_same_structure(new_state, state)


def keeps_mixed_dtypes(case: Case) -> None:
    if case.couples_weights:
        pytest.skip("Keras itself cannot add up norms of several dtypes")
    dtypes = ["float32", "float16", "float64", tf.bfloat16.as_numpy_dtype]
    problems = [make_problem(seed, dtype, steps=4) for seed, dtype in enumerate(dtypes)]
    weights = [weights[1] for weights, _ in problems]
    steps = [[gradients[t][1] for _, gradients in problems] for t in range(4)]
    optimizer = case.make()
    _, found = run(optimizer.next, optimizer.initialize(specs_of(weights)), weights, steps)
    for i, tolerance in enumerate([1e-6, 2e-2, 1e-6, 1e-1]):
        expected = case.reference([weights[i]], [[row[i]] for row in steps])[0]
        assert found[i].dtype == weights[i].dtype
        assert_close(found[i], expected, rtol=tolerance, atol=tolerance)


def leaves_a_weight_without_gradient_alone(case: Case) -> None:
    weights, gradients = make_problem(steps=3)
    steps = [gradients[0], [gradients[1][0], None], gradients[2]]
    optimizer = case.make()
    state, found = run(optimizer.next, optimizer.initialize(specs_of(weights)), weights, steps)
    assert_close(found, case.reference(weights, steps))

    before, after = optimizer.next(state, found, [None, gradients[0][1]])
    np.testing.assert_array_equal(after[0], found[0])
    tf.nest.assert_same_structure(before, state)


def sums_repeated_and_changing_rows(case: Case) -> None:
    rng = np.random.default_rng(5)
    weights = [rng.normal(size=(5, 2)).astype("float32")]
    steps = []
    for rows in ([1, 3, 1], [0, 3, 3], [4, 1, 1]):
        values = tf.constant(rng.normal(size=(3, 2)).astype("float32"))
        steps.append([tf.IndexedSlices(values, tf.constant(rows), tf.constant([5, 2]))])
    optimizer = case.make()
    state = optimizer.initialize(specs_of(weights))
    expected = case.reference(weights, steps)
    assert_close(run(optimizer.next, state, weights, steps)[1], expected)
    _, traced = run(tf.function(optimizer.next), tensors(state), tensors(weights), steps)
    assert_close(traced, expected)


# -------------------------------------------------------------------- laws: state and hyper-parameters


def keeps_types_and_makes_no_variables(case: Case) -> None:
    weights, gradients = make_problem(steps=1)
    optimizer = case.make()
    state = optimizer.initialize(specs_of(weights))
    new_state, new_weights = optimizer.next(state, weights, gradients[0])
    tf.nest.assert_same_structure(new_state, state)
    for old, new in zip(
        tf.nest.flatten([state, weights]), tf.nest.flatten([new_state, new_weights])
    ):
        assert np.asarray(old).dtype == np.asarray(new).dtype
        assert np.shape(old) == np.shape(new)
    step = tf.function(optimizer.next).get_concrete_function(
        tensors(state), tensors(weights), tensors(gradients[0])
    )
    assert not step.graph.variables
    assert not step.graph.captures
    definition = step.graph.as_graph_def()
    functions = [node for f in definition.library.function for node in f.node_def]
    used = {node.op for node in [*definition.node, *functions]}
    assert not {op for op in used if "Variable" in op or op == "VarHandleOp"}


def resumes_bit_for_bit(case: Case, directory: str) -> None:
    weights, gradients = make_problem()
    optimizer = case.make()
    step = tf.function(optimizer.next)
    start = tensors(optimizer.initialize(specs_of(weights)))
    state, middle = run(step, start, tensors(weights), tensors(gradients[:4]))
    undisturbed = run(step, state, middle, tensors(gradients[4:]))

    manager = tff.program.FileProgramStateManager(directory)
    asyncio.run(manager.save((state, middle), 4))
    fresh = case.make()
    structure = (fresh.initialize(specs_of(weights)), weights)
    loaded_state, loaded_weights = asyncio.run(manager.load(4, structure))
    resumed = run(
        tf.function(fresh.next),
        tensors(loaded_state),
        tensors(loaded_weights),
        tensors(gradients[4:]),
    )
    assert_equal(resumed, undisturbed)


def carries_hparams(case: Case) -> None:
    weights, gradients = make_problem()
    optimizer = case.make()
    state = optimizer.initialize(specs_of(weights))
    hparams = optimizer.get_hparams(state)
    # TFF's client work makes a federated value of them outside of any graph.
    assert all(isinstance(value, int | float | np.number) for value in hparams.values())
    assert_equal(optimizer.set_hparams(state, hparams), state)
    assert_equal(optimizer.set_hparams(state, {}), state)
    step, problem = tf.function(optimizer.next), (tensors(weights), tensors(gradients))
    _, usual = run(step, tensors(state), *problem)
    for name, value in hparams.items():
        effects = []
        for other in (value * 0.5 + 0.03, value + 2.0):
            try:
                changed = optimizer.set_hparams(state, {name: np.float64(other)})
            except ValueError as error:
                assert name.rpartition(".")[2] in str(error)  # noqa: PT017
                continue  # out of range, and refused by name
            assert np.isclose(float(optimizer.get_hparams(changed)[name]), other), name
            assert_equal(optimizer.set_hparams(changed, hparams), state)
            _, found = run(step, tensors(changed), *problem)
            effects.append(any(np.any(a != b) for a, b in zip(found, usual)))
        assert any(effects), f"{name} has no effect"


def follows_a_schedule_of_rounds(case: Case) -> None:
    weights, gradients = make_problem(steps=3)
    optimizer = case.make()
    if tff.learning.optimizers.LEARNING_RATE_KEY not in optimizer.initialize(specs_of(weights)):
        pytest.skip("the rate is a schedule already")
    rates = [0.3, 0.2, 0.1]
    scheduled = tff.learning.optimizers.schedule_learning_rate(
        optimizer, lambda i: tf.gather(tf.constant([*rates, 0.0]), i)
    )
    _, found = run(
        tf.function(scheduled.next), scheduled.initialize(specs_of(weights)), weights, gradients
    )
    state, expected = optimizer.initialize(specs_of(weights)), weights
    for rate, row in zip(rates, gradients):
        hparams = {**optimizer.get_hparams(state), "learning_rate": np.float32(rate)}
        state = optimizer.set_hparams(state, hparams)
        state, expected = optimizer.next(state, expected, row)
    assert_close(found, expected)


# ------------------------------------------------------------------------------------ laws: bad input


def _raises(message: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        function(*arguments)


def names_what_does_not_fit(case: Case) -> None:
    weights, gradients = make_problem(steps=1)
    optimizer = case.make()
    state = optimizer.initialize(specs_of(weights))
    step = optimizer.next
    _raises("`gradients`", step, state, weights, gradients[0][:1])
    _raises("`gradients`", step, state, weights, [gradients[0][0], gradients[0][0]])
    _raises("`gradients`", step, state, weights, [g.astype("float64") for g in gradients[0]])
    _raises("`state`", step, (), weights, gradients[0])
    _raises("`hparams`", optimizer.set_hparams, state, {"no_such_number": 1.0})
    for name in optimizer.get_hparams(state):
        for wrong in (float("nan"), float("inf"), 10**400, [0.5], "fast", None, True):
            message = f"`{name.rpartition('.')[2]}` of "
            _raises(message, optimizer.set_hparams, state, {name: wrong})
        if name.endswith("learning_rate"):
            _raises("`learning_rate` of ", optimizer.set_hparams, state, {name: -0.1})
    if any(np.size(leaf) > 1 for leaf in tf.nest.flatten(state)):  # the state knows the weights
        one = optimizer.initialize(specs_of(weights[:1]))
        _raises("`state`", step, one, weights, gradients[0])
        wide = [np.zeros((3, 3), "float32"), np.zeros((2,), "float32")]
        _raises("`state`", step, state, wide, wide)
        double = [w.astype("float64") for w in weights]
        _raises("`state`", step, state, double, double)
    # Two weights of one path would share the slots that are named after it.
    twice = {"a/b": weights[1], "a": {"b": weights[1]}}
    _raises("`specs` must have paths .* found 'a/b' twice", optimizer.initialize, specs_of(twice))
    _raises("`weights` must have paths .* found 'a/b' twice", step, state, twice, twice)


LAWS = [
    agrees_in_python,
    agrees_in_xla,
    agrees_in_tff,
    takes_nested_weights,
    takes_a_scalar_and_nothing,
    keeps_mixed_dtypes,
    leaves_a_weight_without_gradient_alone,
    sums_repeated_and_changing_rows,
    keeps_types_and_makes_no_variables,
    resumes_bit_for_bit,
    carries_hparams,
    follows_a_schedule_of_rounds,
    names_what_does_not_fit,
]
