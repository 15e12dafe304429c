"""Each transform against its NumPy twin, and the promises that all of them keep."""

import copy
import inspect

import attrs
import numpy as np
import pytest
import tensorflow as tf
import twins
from nearness import assert_near

from tff_optim import hyperparameters, regularizers, transforms
from tff_optim.core import comparison

SCALES = [1e-3, 1.0, 1e3]
STEPS = 9
SHAPES = [(4, 3), (), (5,)]


def single(x):
    """What a Python number is in the graph: rounded to float32."""
    return float(np.float32(x))


def singles(**numbers):
    return {k: v if isinstance(v, bool) else single(v) for k, v in numbers.items()}


# name, transform, twin: defaults once, then every argument off its default
CASES = [
    ("momentum", transforms.Momentum(), twins.Momentum(single(0.9))),
    ("nesterov", transforms.Momentum(0.7, True), twins.Momentum(single(0.7), True)),
    ("ewma", transforms.EWMA(), twins.EWMA(single(0.9))),
    ("ewma_6", transforms.EWMA(0.6), twins.EWMA(single(0.6))),
    ("yogi_momentum", transforms.YogiMomentum(0.8), twins.YogiMomentum(single(0.8))),
    ("adagrad", transforms.Adagrad(), twins.Adagrad(single(1e-7))),
    ("adagrad_eps", transforms.Adagrad(0.3), twins.Adagrad(single(0.3))),
    ("rmsprop", transforms.RMSProp(), twins.RMSProp(single(0.9), single(1e-7))),
    ("rmsprop_6", transforms.RMSProp(0.6, 0.2), twins.RMSProp(single(0.6), single(0.2))),
    ("adam", transforms.Adam(), twins.Adam(single(0.9), single(0.99), single(1e-7))),
    (
        "amsgrad",
        transforms.Adam(0.7, 0.8, 1e-2, amsgrad=True),
        twins.Adam(**singles(beta_1=0.7, beta_2=0.8, epsilon=1e-2, amsgrad=True)),
    ),
    ("yogi", transforms.Yogi(), twins.Yogi(single(0.9), single(0.99), single(1e-7))),
    (
        "yogi_amsgrad",
        transforms.Yogi(0.7, 0.8, 1e-2, amsgrad=True),
        twins.Yogi(**singles(beta_1=0.7, beta_2=0.8, epsilon=1e-2, amsgrad=True)),
    ),
    ("clip", transforms.ClipByNorm(), twins.ClipByNorm()),
    ("clip_2", transforms.ClipByNorm(2.5), twins.ClipByNorm(2.5)),
    ("clip_global", transforms.ClipByGlobalNorm(), twins.ClipByGlobalNorm()),
    ("clip_global_2", transforms.ClipByGlobalNorm(2.5), twins.ClipByGlobalNorm(2.5)),
    ("fed_prox", regularizers.FedProx(), twins.FedProx(single(0.01))),
    ("fed_prox_5", regularizers.FedProx(0.5), twins.FedProx(0.5)),
    (
        "l1_l2",
        regularizers.Penalty(tf.keras.regularizers.L1L2(0.1, 0.2)),
        twins.L1L2(single(0.1), single(0.2)),
    ),
]
NOT_COMPARED_WITH_A_TWIN = {
    *("GaussianNoise", "GradientTransform", "KerasTransform"),
    "OptaxTransform",  # with optax itself, in test_optax_transform.py
}


def data(scale):
    """Gradients of changing size with exact zeros, one tensor always zero at first."""
    rng = np.random.default_rng(7)
    for t in range(STEPS):
        gradients = [scale * (1 + t % 3) * rng.normal(size=s) for s in SHAPES]
        gradients[0][rng.random(SHAPES[0]) < 0.3] = 0.0
        if t < 3:
            gradients[2] = np.zeros(SHAPES[2])
        yield [rng.normal(size=s) for s in SHAPES], gradients


@pytest.mark.parametrize(("transform", "twin"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_equals_numpy_twin(transform, twin):
    for scale in SCALES:
        state = transform.initialize([tf.TensorSpec(s, tf.float64) for s in SHAPES])
        fresh = copy.deepcopy(twin)
        for weights, gradients in data(scale):
            expected = fresh(weights, gradients)
            state, found = transform.next(
                state, [tf.constant(w) for w in weights], [tf.constant(g) for g in gradients]
            )
            for a, b in zip(found, expected, strict=True):
                assert np.all(np.isfinite(a))
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-300)


def test_every_transform_has_a_twin():
    compared = {type(case[1]).__name__ for case in CASES}
    for module in (transforms, regularizers):
        public = {
            name
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, transforms.GradientTransform)
            and not inspect.isabstract(value)
        }
        assert public
        assert public <= compared | NOT_COMPARED_WITH_A_TWIN


def test_noise_has_the_right_distribution_and_is_independent():
    noise = transforms.GaussianNoise(stddev=0.5, seed=3)
    specs = [tf.TensorSpec([4000]), tf.TensorSpec([4000])]
    state = noise.initialize(specs)
    zeros = [tf.zeros([4000])] * 2
    state, first = noise.next(state, zeros, zeros)
    state, second = noise.next(state, zeros, zeros)
    draws = np.array([*first, *second])
    assert abs(draws.mean()) < 0.02
    np.testing.assert_allclose(draws.std(axis=1), 0.5, rtol=0.05)
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 0.06
    # The fourth moment of a normal distribution is three times its squared variance.
    np.testing.assert_allclose((draws**4).mean() / 0.5**4, 3.0, rtol=0.1)


def test_noise_adds_to_gradients_and_leaves_none_alone():
    noise = transforms.GaussianNoise(stddev=0.5, seed=3)
    specs = [tf.TensorSpec([2]), tf.TensorSpec([2]), tf.TensorSpec([2])]
    state = noise.initialize(specs)
    shift = tf.constant([10.0, 20.0])
    _, plain = noise.next(state, None, [tf.zeros([2]), None, tf.zeros([2])])
    _, shifted = noise.next(state, None, [shift, None, shift])
    assert plain[1] is None
    assert_near(shifted[2], plain[2] + shift)
    # A tensor's noise depends on its position, not on which others have a gradient.
    _, all_there = noise.next(state, None, [tf.zeros([2])] * 3)
    np.testing.assert_array_equal(all_there[2], plain[2])


def test_noise_goes_on_after_a_restore_and_differs_between_seeds():
    def run(transform, state, steps):
        drawn = []
        for _ in range(steps):
            state, g = transform.next(state, None, tf.zeros([3]))
            drawn.append(g.numpy())
        return state, np.array(drawn)

    noise = transforms.GaussianNoise(seed=11)
    start = noise.initialize(tf.TensorSpec([3]))
    _, through = run(noise, start, 4)
    middle, _ = run(noise, start, 2)
    restored = tf.nest.map_structure(np.asarray, middle)
    _, rest = run(noise, restored, 2)
    np.testing.assert_array_equal(rest, through[2:])
    other = transforms.GaussianNoise(seed=12)
    _, different = run(other, other.initialize(tf.TensorSpec([3])), 4)
    assert not np.any(different == through)


def test_noise_without_seed_is_new_in_every_state_even_after_set_seed():
    noise = transforms.GaussianNoise()
    tf.random.set_seed(1)
    initialize = tf.function(lambda: noise.initialize(tf.TensorSpec([])))
    seeds = {tuple(initialize()["seed"].numpy()) for _ in range(4)}
    assert len(seeds) == 4


SCHEDULE = tf.keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 0.125])
ALL = [
    (transforms.Momentum, "beta"),
    (transforms.EWMA, "beta"),
    (transforms.YogiMomentum, "beta"),
    (transforms.Adagrad, "epsilon"),
    (transforms.RMSProp, "beta"),
    (transforms.RMSProp, "epsilon"),
    (transforms.Adam, "beta_1"),
    (transforms.Adam, "beta_2"),
    (transforms.Adam, "epsilon"),
    (transforms.Yogi, "beta_1"),
    (transforms.Yogi, "beta_2"),
    (transforms.Yogi, "epsilon"),
    (transforms.ClipByNorm, "max_norm"),
    (transforms.ClipByGlobalNorm, "max_norm"),
    (transforms.GaussianNoise, "stddev"),
    (regularizers.FedProx, "alpha"),
]
IDS = [f"{cls.__name__}.{name}" for cls, name in ALL]


def _make(cls, **arguments):
    return cls(**arguments, **({"seed": 5} if cls is transforms.GaussianNoise else {}))


def test_every_hyperparameter_is_in_the_table():
    found = {
        (cls, field.name)
        for cls in {cls for cls, _ in ALL}
        for field in attrs.fields(cls)
        if field.name not in ("nesterov", "amsgrad", "seed")
    }
    assert found == set(ALL)


@pytest.mark.parametrize(("cls", "name"), ALL, ids=IDS)
def test_schedule_equals_values_set_between_steps(cls, name):
    """The first step uses the first value, and so on, also after a restore of the state."""
    scheduled = _make(cls, **{name: SCHEDULE})
    numbers = _make(cls, **{name: 0.5})
    specs = [tf.TensorSpec([3], tf.float64)]
    a, b = scheduled.initialize(specs), numbers.initialize(specs)
    assert name not in a
    rng = np.random.default_rng(2)
    for value in (0.5, 0.25, 0.125, 0.125):
        w, g = [tf.constant(rng.normal(size=3))], [tf.constant(rng.normal(size=3))]
        b = numbers.set_hparams(b, numbers.get_hparams(b) | {name: value})
        a = tf.nest.map_structure(np.asarray, a)  # what a restore gives
        a, found = scheduled.next(a, w, g)
        b, expected = numbers.next(b, w, g)
        np.testing.assert_array_equal(found[0], expected[0])
        assert np.abs(found[0]).max() > 0


@pytest.mark.parametrize(("cls", "name"), ALL, ids=IDS)
def test_bad_hyperparameters_raise_with_one_message_form(cls, name):
    prefix = rf"`{name}` of `{cls.__name__}` must be a number .* or a Keras schedule; found"
    for wrong in ("0.5", None, True, [0.5], tf.constant(0.5), 1j, np.array([0.5])):
        with pytest.raises(TypeError, match=prefix):
            _make(cls, **{name: wrong})
    for wrong in (-0.1, float("nan"), float("inf"), -np.inf):
        with pytest.raises(ValueError, match=prefix):
            _make(cls, **{name: wrong})
    if name.startswith("beta"):
        with pytest.raises(ValueError, match=prefix):
            _make(cls, **{name: 1})
    elif name in ("epsilon", "max_norm"):
        with pytest.raises(ValueError, match=prefix):
            _make(cls, **{name: 0})
    for good in (np.float32(0.5), np.float64(0.5), np.array(0.5)):
        assert _make(cls, **{name: good}) == _make(cls, **{name: 0.5})
    if name in ("alpha", "stddev", "max_norm"):
        assert getattr(_make(cls, **{name: np.int32(2)}), name) == 2.0


@pytest.mark.parametrize(
    ("cls", "name", "value", "kept"),
    [
        (transforms.Adam, "beta_2", 1 - 1e-9, "1.0"),
        (transforms.Yogi, "beta_1", 1 - 1e-9, "1.0"),
        (transforms.Adagrad, "epsilon", 1e-50, "0.0"),
        (transforms.RMSProp, "epsilon", 1e-40, "0.0"),  # subnormal: 0 in TensorFlow's kernels
        (transforms.ClipByNorm, "max_norm", 1e39, "inf"),
    ],
)
def test_numbers_must_be_in_range_when_rounded_to_float32(cls, name, value, kept):
    with pytest.raises(ValueError, match=f"`{name}` of `{cls.__name__}` .* is {kept} when rounded"):
        cls(**{name: value})
    state = cls().initialize(tf.TensorSpec([2]))
    for given in (value, tf.constant(value, tf.float64)):
        with pytest.raises(ValueError, match=f"is {kept} when rounded to float32"):
            cls().set_hparams(state, {**cls().get_hparams(state), name: given})


def test_what_is_accepted_after_rounding_gives_finite_steps():
    for part in (transforms.Adam(beta_2=1 - 1e-7, epsilon=2e-38), transforms.Adagrad(2e-38)):
        g = tf.constant([0.0, 1.0])
        _, found = part.next(part.initialize(tf.TensorSpec([2])), None, g)
        np.testing.assert_allclose(found, [0.0, 1.0], rtol=1e-5)


def test_flags_and_seed_are_checked():
    with pytest.raises(TypeError, match="`nesterov` of `Momentum` must be True or False; found 1"):
        transforms.Momentum(nesterov=1)
    with pytest.raises(TypeError, match="`amsgrad` of `Adam` must be True or False; found 'no'"):
        transforms.Adam(amsgrad="no")
    for wrong in ("1", 1.0, True, -1, 2**63):
        with pytest.raises(ValueError, match="`seed` of `GaussianNoise` must be a whole number"):
            transforms.GaussianNoise(seed=wrong)
    with pytest.raises(TypeError, match="`regularizer` of `Penalty` must be a"):
        regularizers.Penalty(lambda w: 0.0)


def test_hparams_round_trip_and_reject_bad_values():
    adam = transforms.Adam(beta_1=0.5, beta_2=SCHEDULE)
    state = adam.initialize(tf.TensorSpec([]))
    hparams = adam.get_hparams(state)
    assert list(hparams) == ["beta_1", "epsilon"]
    assert all(isinstance(value, np.float32) for value in hparams.values())
    changed = adam.set_hparams(state, {"beta_1": 0.25, "epsilon": tf.constant(1e-3)})
    assert changed["beta_1"] == 0.25
    assert state["beta_1"] == 0.5
    partly = adam.set_hparams(state, {"beta_1": np.float64(0.25)})
    assert (partly["beta_1"], partly["epsilon"]) == (np.float32(0.25), state["epsilon"])
    assert partly["beta_1"].dtype == np.float32
    with pytest.raises(
        ValueError, match="`hparams` of `Adam` must hold some of beta_1, epsilon; found beta_2"
    ):
        adam.set_hparams(state, {"beta_2": 0.25})
    with pytest.raises(ValueError, match="`hparams` of `Adam` must be a mapping"):
        adam.set_hparams(state, [0.25])
    with pytest.raises(ValueError, match="`beta_1` of `Adam` must be a number in"):
        adam.set_hparams(state, hparams | {"beta_1": 2.0})
    with pytest.raises(TypeError, match="`beta_1` of `Adam` must be set to a number"):
        adam.set_hparams(state, hparams | {"beta_1": SCHEDULE})
    with pytest.raises(ValueError, match="`beta_1` of `Adam` must be a number in"):
        adam.set_hparams(state, hparams | {"beta_1": tf.constant(2.0)})


def test_tensors_are_set_as_float32_scalars_only():
    clip = transforms.ClipByNorm()
    state = clip.initialize(tf.TensorSpec([2]))
    for good in (tf.constant(2, tf.int32), tf.constant(2.0, tf.float64)):
        assert clip.set_hparams(state, {"max_norm": good})["max_norm"].dtype == np.float32
        traced = tf.function(lambda x: clip.set_hparams(state, {"max_norm": x})["max_norm"])
        assert traced(good).dtype == tf.float32
        assert traced(good).numpy() == 2.0
    for bad in (tf.constant([1.0, 2.0]), tf.constant(True), tf.constant("2")):
        traced = tf.function(lambda x: clip.set_hparams(state, {"max_norm": x})["max_norm"])
        for call in (lambda x: clip.set_hparams(state, {"max_norm": x}), traced):
            with pytest.raises(ValueError, match="`max_norm` of `ClipByNorm` must be one real num"):
                call(bad)


def test_a_schedule_must_give_one_number():
    class Rows(tf.keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return tf.constant([1.0, 2.0])

    clip = transforms.ClipByNorm(Rows())
    with pytest.raises(ValueError, match="`max_norm` of `ClipByNorm` must be one real number"):
        clip.next(clip.initialize([]), None, [tf.ones([2])])


def test_clipping_of_gradients_whose_squares_overflow():
    long = [tf.constant([3e20, 0.0]), tf.constant([4e20])]
    one, two = transforms.ClipByNorm(2.0), transforms.ClipByGlobalNorm(2.0)
    for compiled in (False, True):
        for part, expected in ((one, [[2, 0], [2]]), (two, [[1.2, 0], [1.6]])):
            step = tf.function(part.next, jit_compile=compiled)
            _, found = step(part.initialize([]), None, long)
            for a, b in zip(found, expected, strict=True):
                assert_near(a, b)
    rest = [*long, tf.zeros([2]), tf.zeros([0])]
    _, found = two.next(two.initialize([]), None, [tf.constant([3e200], tf.float64), *rest])
    np.testing.assert_allclose(found[0], [2.0], rtol=1e-12)
    for gradient in found[1:]:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    _, found = one.next(one.initialize([]), None, [tf.constant([np.inf, 1.0]), tf.ones([1])])
    assert np.isnan(found[0][0])  # a gradient that is not finite is not made to look so
    np.testing.assert_array_equal(found[1], [1.0])


def test_parts_are_frozen_and_compared_by_value():
    assert transforms.Adam(0.5) == transforms.Adam(0.5) != transforms.Adam(0.6)
    same = [
        transforms.Momentum(tf.keras.optimizers.schedules.ExponentialDecay(0.5, 3, rate))
        for rate in (0.9, 0.9, 0.8)
    ]
    assert same[0] == same[1] != same[2]
    assert hash(same[0]) == hash(same[1])
    l2 = [regularizers.Penalty(tf.keras.regularizers.L2(x)) for x in (0.1, 0.1, 0.2)]
    assert l2[0] == l2[1] != l2[2]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        same[0].beta = 0.1


class Capped(tf.keras.constraints.Constraint):
    """Says nothing about its argument: Keras' base class gives an empty configuration."""

    def __init__(self, most):
        self.most = most

    def __call__(self, w):
        return tf.minimum(w, self.most)


class Quartic(tf.keras.regularizers.Regularizer):
    """Has no configuration: Keras' base class raises."""

    def __call__(self, x):
        return tf.reduce_sum(x**4)


class Varying(tf.keras.constraints.Constraint):
    def __init__(self, *bounds):
        self.bounds = bounds


class Tabled(tf.keras.constraints.Constraint):
    def __init__(self, table):
        self.table = table

    def get_config(self):
        return {"table": self.table}


def test_keras_objects_are_equal_only_where_their_configuration_tells_everything():
    for make in (lambda: Capped(1.0), Quartic, lambda: Varying(1.0)):
        first, second = make(), make()
        assert comparison.key(first) == comparison.key(first) != comparison.key(second)
        assert hash(comparison.key(first)) == hash(comparison.key(first))
    # Long arrays and what is nested in a configuration are looked at too.
    tables = [np.zeros(5000) for _ in range(3)]
    tables[2][2500] = 1.0
    keys = [comparison.key(Tabled([{"x": table}])) for table in tables]
    assert keys[0] == keys[1] != keys[2]
    nested = [Tabled(Capped(1.0)) for _ in range(2)]
    assert comparison.key(nested[0]) == comparison.key(nested[0]) != comparison.key(nested[1])
    none = tf.keras.constraints.NonNeg
    assert comparison.key(none()) == comparison.key(none())
    penalty = regularizers.Penalty(Quartic())
    assert hash(penalty) == hash(penalty)
    np.testing.assert_allclose(penalty.next((), tf.constant(2.0), tf.constant(1.0))[1], 33.0)


def test_none_gradients_keep_slots_and_the_global_norm_ignores_them():
    momentum = transforms.Momentum()
    state = momentum.initialize([tf.TensorSpec([2]), tf.TensorSpec([2])])
    g = tf.constant([3.0, 4.0])
    state, _ = momentum.next(state, None, [g, g])
    new_state, out = momentum.next(state, None, [None, g])
    assert out[0] is None
    np.testing.assert_array_equal(new_state["velocity"][0], state["velocity"][0])
    assert np.all(new_state["velocity"][1] != state["velocity"][1])
    clip = transforms.ClipByGlobalNorm(1.0)
    _, out = clip.next(clip.initialize([]), None, [None, g])
    np.testing.assert_allclose(out[1], [0.6, 0.8], rtol=1e-6)


def test_penalties_that_are_not_one_number_or_do_not_depend_on_weights():
    class PerRow(tf.keras.regularizers.Regularizer):
        def __call__(self, x):
            return tf.reduce_sum(x, axis=0)

    with pytest.raises(ValueError, match="`regularizer` PerRow must return one number"):
        regularizers.Penalty(PerRow()).next((), tf.ones([2, 2]), tf.ones([2, 2]))
    for nothing in (tf.keras.regularizers.L1L2(0.0, 0.0), tf.keras.regularizers.Regularizer()):
        _, g = regularizers.Penalty(nothing).next((), tf.ones([2]), tf.constant([1.0, 2.0]))
        np.testing.assert_array_equal(g, [1.0, 2.0])


def test_slots_of_another_model_raise():
    adam = transforms.Adam()
    state = adam.initialize([tf.TensorSpec([3])])
    for wrong in (tf.ones([1]), tf.ones([3, 3]), tf.ones([3], tf.float64)):
        with pytest.raises(ValueError, match="`average` of `state` at '0' must match the gradient"):
            adam.next(state, [wrong], [wrong])
    with pytest.raises(ValueError, match="`average` of `state` must be nested as `gradients`"):
        adam.next(state, [tf.ones([3])] * 2, [tf.ones([3])] * 2)


@attrs.frozen
class Named(transforms.ElementwiseTransform):
    beta: float = hyperparameters.positive(0.5)
    slots: tuple = ()

    def rule(self, numbers, gradient, *slots):
        return numbers["beta"] * gradient, *slots


def test_names_of_numbers_and_slots_stay_apart_in_the_state():
    @attrs.frozen
    class Sized(transforms.ElementwiseTransform):
        step: float = hyperparameters.positive(0.5)

        def rule(self, numbers, gradient):
            return (numbers["step"] * gradient,)

    for given in (
        {},
        {"step": 2.0},
        {"step": tf.keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5)},
    ):
        with pytest.raises(ValueError, match="`step` of `Sized` must have another name"):
            Sized(**given)
    spec = [tf.TensorSpec([])]
    for slots in (("beta",), ("step",), ("a", "a")):
        with pytest.raises(ValueError, match="`slots` of `Named` must have names of their own"):
            Named(slots=slots).initialize(spec)
    part = Named(slots=("a", "b"))
    state = part.initialize(spec)
    for _ in range(3):
        state, gradients = part.next(state, [tf.constant(0.0)], [tf.constant(2.0)])
        assert float(gradients[0]) == 1.0


def test_hyperparameters_of_a_part_without_any():
    class Plain(transforms.GradientTransform):
        def initialize(self, specs):
            return ()

        def next(self, state, weights, gradients):
            return state, gradients

    assert hyperparameters.intervals(Plain()) == {}
    assert Plain().get_hparams(()) == {}
    assert Plain().set_hparams((), {}) == ()


def test_hyperparameters_of_a_process_are_completed_from_some_of_them():
    known = {
        "client_work": {"learning_rate": np.float32(0.5), "momentum": np.float64(0.25)},
        "finalizer": {"learning_rate": np.float32(1.0), "count": np.int32(3)},
        "aggregator": (),
    }
    found = hyperparameters.complete(
        known, {"client_work": {"learning_rate": np.float64(0.1)}, "finalizer": {"count": 5}}
    )
    assert found["client_work"] == {"learning_rate": np.float32(0.1), "momentum": 0.25}
    assert found["finalizer"] == {"learning_rate": 1.0, "count": 5}
    assert found["client_work"]["learning_rate"].dtype == np.float32
    assert found["finalizer"]["count"].dtype == np.int32
    assert found["aggregator"] == ()
    for given, message in (
        ({"client": {}}, r"`hparams` must hold some of client_work, .*; found \['client'\]"),
        (
            {"client_work": {"rate": 1}},
            "`hparams` at 'client_work' must hold some of learning_rate, mom",
        ),
        ({"client_work": 0.1}, "`hparams` at 'client_work' must be a mapping; found 0.1"),
        ({"client_work": {"momentum": [0.1]}}, "at 'client_work/momentum' must be a number"),
        ({"client_work": {"momentum": "x"}}, "at 'client_work/momentum' must be a number"),
        ({"client_work": {"momentum": np.nan}}, "at 'client_work/momentum' must be a finite"),
        ({"finalizer": {"count": 1.5}}, "at 'finalizer/count' must be a whole number; found 1.5"),
        ({"finalizer": {"learning_rate": 10**400}}, "'finalizer/learning_rate' must be a finite"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            hyperparameters.complete(known, given)
