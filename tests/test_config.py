"""Configurations: round trips through JSON, trust, and entries that do not fit."""

import copy
import json
import sys

import attrs
import contracts
import numpy as np
import optax
import optax_cases
import pytest
import selection
import tensorflow as tf

import tff_optim
from tff_optim import projections, regularizers, schedules, transforms
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import classes as keras_classes

K = tf.keras.optimizers
DECAY = K.schedules.ExponentialDecay(0.3, 2, 0.5, staircase=True)
HERE = __name__.partition(".")[0]
SHARED = {
    "clipnorm": 0.9,
    "weight_decay": 0.03,
    "use_ema": True,
    "ema_momentum": 0.7,
    "ema_overwrite_frequency": 2,
}
# Every optimizer of Keras, every argument off its default.
KERAS = {
    "SGD": lambda: K.SGD(0.3, momentum=0.7, nesterov=True, **SHARED),
    "Adam": lambda: K.Adam(0.3, 0.7, 0.8, 1e-3, amsgrad=True, **SHARED),
    "AdamW": lambda: K.AdamW(
        0.3, beta_1=0.7, beta_2=0.8, epsilon=1e-3, amsgrad=True, **SHARED, name="mine"
    ),
    "Adamax": lambda: K.Adamax(0.3, 0.7, 0.8, 1e-3, **SHARED),
    "Nadam": lambda: K.Nadam(DECAY, 0.7, 0.8, 1e-3, **SHARED),
    "Adagrad": lambda: K.Adagrad(0.3, 0.2, 1e-3, **SHARED),
    "Adadelta": lambda: K.Adadelta(0.3, 0.8, 1e-3, **SHARED),
    "RMSprop": lambda: K.RMSprop(0.3, 0.7, 0.4, 1e-3, centered=True, **SHARED),
    "Ftrl": lambda: K.Ftrl(0.3, -0.6, 0.2, 0.01, 0.02, 0.03, 0.1, **SHARED),
    "Adafactor": lambda: K.Adafactor(0.3, -0.7, 1e-5, 1e-2, 0.9, relative_step=False, **SHARED),
    "Lion": lambda: K.Lion(DECAY, 0.7, 0.8, **SHARED),
}
OFF_DEFAULT_IS_NOT_POSSIBLE = {
    "name",  # its default is the class's name
    "jit_compile",  # Keras turns it off where there is no GPU
    "global_clipnorm",  # not together with clipnorm
    "clipvalue",  # likewise
}


def through_json(optimizer, **options):
    config = json.loads(json.dumps(tff_optim.get_config(optimizer), allow_nan=False))
    before = copy.deepcopy(config)
    built = tff_optim.from_config(config, **options)
    assert config == before
    return built


def assert_equal_steps(a, b):
    weights, gradients = contracts.make_problem(steps=5)
    specs = contracts.specs_of(weights)
    contracts.assert_equal(a.initialize(specs), b.initialize(specs))
    expected = contracts.run(a.next, a.initialize(specs), weights, gradients)
    contracts.assert_equal(contracts.run(b.next, b.initialize(specs), weights, gradients), expected)


def keras_config(**changes):
    config = tff_optim.get_config(tff_optim.build_keras_optimizer(K.Adam(0.1)))
    config["optimizer"]["config"].update(changes)
    return config


@pytest.mark.parametrize("make", KERAS.values(), ids=KERAS)
def test_keras_round_trip_with_every_argument_off_its_default(make):
    keras = make()
    defaults = type(keras)().get_config()
    for name, value in keras.get_config().items():
        if name not in OFF_DEFAULT_IS_NOT_POSSIBLE and name != "is_legacy_optimizer":
            assert value != defaults[name], name
    optimizer = tff_optim.build_keras_optimizer(keras)
    built = through_json(optimizer)
    assert built == optimizer
    assert json.dumps(built.keras_optimizer.get_config(), default=float) == json.dumps(
        keras.get_config(), default=float
    )
    assert_equal_steps(built, optimizer)


def test_every_keras_optimizer_has_a_round_trip():
    public = {
        name
        for name, value in vars(K).items()
        if isinstance(value, type) and issubclass(value, K.Optimizer) and value is not K.Optimizer
    }
    assert public == set(KERAS)


def _keras_takes_none(cls, name):
    """Whether Keras takes a step with None as this argument."""
    more = {"use_ema": True} if name.startswith("ema") else {}
    variable = tf.Variable([1.0, 2.0])
    try:
        cls(**{name: None, **more}).apply_gradients([(tf.constant([0.5, 0.5]), variable)])
    except (TypeError, ValueError):
        return False
    return bool(np.isfinite(variable).all())


NUMBERS = {
    f"{cls.__name__}-{name}": (cls, name)
    for cls in dict.fromkeys(type(make()) for make in KERAS.values())
    for name in keras_arguments.parameters(cls)
    if keras_arguments.ARGUMENTS[name].allowed is not None
}
# The optimizers whose arguments are read like no others.
QUICK = [name for name in NUMBERS if name.partition("-")[0] in ("SGD", "Adafactor", "Ftrl")]


@pytest.mark.parametrize(("cls", "name"), selection.params(NUMBERS, QUICK, unpack=True))
def test_none_is_taken_where_keras_takes_it(cls, name):
    more = {"use_ema": True} if name.startswith("ema") else {}
    config = [cls.__name__, {name: None, **more}]
    if not _keras_takes_none(cls, name):
        with pytest.raises((TypeError, ValueError), match=f"{name}|[Ww]eight.decay"):
            tff_optim.from_config(config)
        return
    optimizer = tff_optim.from_config(config)
    assert optimizer == tff_optim.build_keras_optimizer(lambda: cls(**{name: None, **more}))
    assert getattr(optimizer.keras_optimizer, name) is None
    assert through_json(optimizer) == optimizer
    if cls in (K.Ftrl, K.Adafactor) or more:
        return  # no gradient transform
    transform = transforms.KerasTransform(lambda: cls(**{name: None}))
    pipeline = tff_optim.build_optimizer(0.1, transforms=[transform])
    assert through_json(pipeline) == pipeline


def test_every_argument_of_every_keras_class_is_known():
    for kind in keras_classes.KINDS:
        assert len(kind.classes) >= 4
        for cls in kind.classes.values():
            if keras_arguments.of_keras(cls):
                assert set(keras_arguments.parameters(cls)) <= set(keras_arguments.ARGUMENTS), cls


DECAY_ARGUMENTS = {"initial_learning_rate": 0.3, "decay_steps": 2, "decay_rate": 0.5}


@pytest.mark.parametrize(
    ("short", "make"),
    [
        ("adam", K.Adam),
        ("Adam", K.Adam),
        (["sgd", {"momentum": 0.5}], lambda: K.SGD(momentum=0.5)),
        ({"class_name": "AdamW"}, K.AdamW),
        ({"kind": "keras", "optimizer": "lion"}, K.Lion),
        (
            ["SGD", {"learning_rate": ["ExponentialDecay", DECAY_ARGUMENTS]}],
            lambda: K.SGD(K.schedules.ExponentialDecay(0.3, 2, 0.5)),
        ),
        (
            # JSON may be written without the point of a number.
            ["SGD", {"learning_rate": ["ExponentialDecay", DECAY_ARGUMENTS | {"decay_rate": 1}]}],
            lambda: K.SGD(K.schedules.ExponentialDecay(0.3, 2, 1.0)),
        ),
        (K.serialize(K.RMSprop(0.5, rho=0.5)), lambda: K.RMSprop(0.5, rho=0.5)),
    ],
    ids=lambda value: None if callable(value) else str(value)[:40],
)  # fmt: skip
def test_short_forms_texts_and_files(short, make, tmp_path):
    expected = tff_optim.build_keras_optimizer(make)
    assert tff_optim.from_config(short) == expected
    text = json.dumps(short, default=float)
    assert tff_optim.from_config(text) == expected
    path = tmp_path / "optimizer.json"
    path.write_text(text)
    assert tff_optim.from_config(path) == tff_optim.from_config(str(path)) == expected


def test_short_forms_of_schedules_stand_wherever_a_number_may():
    decay = ["ExponentialDecay", DECAY_ARGUMENTS]
    built = tff_optim.from_config(
        {
            "kind": "pipeline",
            "learning_rate": ["Warmup", {"first": 0.5, "steps": 2, "then": decay}],
            "weight_decay": decay,
            "regularizers": [["FedProx", {"alpha": decay}], ["Penalty", {"regularizer": "L2"}]],
            "transforms": [["KerasTransform", {"optimizer": ["Adam", {"beta_1": 0.5}]}]],
        }
    )
    schedule = K.schedules.ExponentialDecay(0.3, 2, 0.5)
    assert built == tff_optim.build_optimizer(
        schedules.Warmup(0.5, 2, schedule),
        weight_decay=schedule,
        regularizers=[regularizers.FedProx(schedule), tf.keras.regularizers.L2()],
        transforms=[transforms.KerasTransform(K.Adam(beta_1=0.5))],
    )


@pytest.mark.parametrize(
    "options", [{"global_clipnorm": 0.3}, {"clipvalue": 0.2}, {"name": "other"}]
)
def test_keras_round_trip_of_arguments_that_exclude_others(options):
    optimizer = tff_optim.build_keras_optimizer(K.SGD(0.2, **options))
    built = through_json(optimizer)
    assert built == optimizer
    for name, value in options.items():
        assert getattr(built.keras_optimizer, name) == value
    assert_equal_steps(built, optimizer)


def test_keras_round_trip_keeps_what_keras_configs_leave_out():
    keras = K.AdamW(0.1, weight_decay=0.5)
    keras.exclude_from_weight_decay(var_names=["bias"])
    optimizer = tff_optim.build_keras_optimizer(
        keras, device="/CPU:1", weight_names=["kernel", "bias"]
    )
    built = through_json(optimizer)
    assert (built.device, built.weight_names) == ("/CPU:1", ("kernel", "bias"))
    assert built == optimizer
    assert_equal_steps(built, optimizer)
    without = tff_optim.get_config(optimizer) | {"exclude_from_weight_decay": []}
    assert tff_optim.from_config(without) != optimizer


def test_pipeline_round_trip_with_every_part_and_argument_off_its_default():
    optimizer = tff_optim.build_optimizer(
        DECAY,
        regularizers=[
            regularizers.FedProx(0.5),
            tf.keras.regularizers.L1L2(0.1, 0.2),
            regularizers.FedProx(DECAY),
        ],
        transforms=[
            transforms.Momentum(0.5, nesterov=True),
            transforms.EWMA(0.5),
            transforms.YogiMomentum(0.5),
            transforms.Adagrad(0.5),
            transforms.RMSProp(0.5, 0.25),
            transforms.Adam(0.5, DECAY, 0.25, amsgrad=True),
            transforms.Yogi(0.5, 0.75, 0.25, amsgrad=True),
            transforms.ClipByNorm(2.0),
            transforms.ClipByGlobalNorm(3.0),
            transforms.GaussianNoise(0.5, seed=9),
            transforms.KerasTransform(K.Nadam(beta_1=0.5, clipvalue=0.3)),
            transforms.OptaxTransform(
                tff_optim.build_optax_optimizer(optax.trace, decay=0.5, nesterov=True)
            ),
        ],
        weight_decay=K.schedules.PiecewiseConstantDecay([2, 4], [0.1, 0.2, 0.3]),
        projection=[
            tf.keras.constraints.MaxNorm(3.0, axis=0),
            projections.Projection(projections.Box(-1.0, 2.0), where="0"),
        ],
        device="/CPU:1",
        jit_compile=True,
    )
    pipeline = optimizer.pipeline
    used = {type(part) for part in (*pipeline.transforms, *pipeline.regularizers)}
    every = {*tff_optim.list_transforms().values(), regularizers.FedProx, regularizers.Penalty}
    assert {cls for cls in every if cls.__module__.startswith("tff_optim.")} <= used
    for part in (*pipeline.transforms, *pipeline.regularizers):
        if isinstance(part, transforms.KerasTransform | regularizers.Penalty):
            continue
        for field in attrs.fields(type(part)):
            assert getattr(part, field.name) != field.default, (part, field.name)

    built = through_json(optimizer)
    assert built == optimizer
    assert hash(built) == hash(optimizer)
    assert built.pipeline.device == "/CPU:1"
    assert built.pipeline.jit_compile is True
    plain = tff_optim.get_config(optimizer) | {"jit_compile": False, "device": None}
    reference = tff_optim.from_config(plain)
    assert reference != optimizer
    assert_equal_steps(tff_optim.from_config(plain), reference)


@pytest.mark.parametrize("case", optax_cases.RUNS.values(), ids=optax_cases.RUNS)
def test_an_optax_optimizer_of_a_public_factory_and_plain_arguments_is_written(case):
    is_plain = not any(map(callable, case.arguments.values())) and not any(
        isinstance(value, tuple) for value in case.arguments.values()
    )
    optimizer = case.ours(weight_names=["first", "second"])
    if not is_plain or isinstance(case.made, optax.GradientTransformation):
        with pytest.raises(ValueError, match="No configuration can hold"):
            tff_optim.get_config(optimizer)
        return
    assert through_json(optimizer) == optimizer


def test_an_optax_round_trip_keeps_numbers_names_and_device():
    # A zero that is given is a number of the state, unlike the same zero by default.
    optimizer = tff_optim.build_optax_optimizer(
        optax.adam,
        learning_rate=0.3,
        eps_root=0.0,
        nesterov=True,
        weight_names="ab",
        device="CPU:1",
    )
    built = through_json(optimizer)
    assert built == optimizer
    assert (built.device, built.weight_names) == ("/CPU:1", ("a", "b"))
    assert_equal_steps(built, optimizer)
    short = {"kind": "optax", "transformation": "sgd", "arguments": {"learning_rate": 1}}
    assert tff_optim.from_config(short) == tff_optim.build_optax_optimizer(
        optax.sgd, learning_rate=1.0
    )


def test_a_torch_round_trip_leaves_the_python_to_the_machine():
    def build(name="Adam", **more):
        return tff_optim.build_torch_optimizer(name, python=sys.executable, lr=0.1, **more)

    for optimizer in (
        build(betas=(0.8, 0.9)),
        build(lr_scheduler=("StepLR", {"step_size": 3})),
        build("own.Fancy", trusted_packages=["own"]),
    ):
        options = {"trusted_packages": ["own", "other"], "torch_python": sys.executable}
        assert through_json(optimizer, **options) == optimizer
        assert "python" not in tff_optim.get_config(optimizer)
    with pytest.raises(
        ValueError, match=r"`trusted_packages` \[\], not of 'own'; found 'own.Fancy'"
    ):
        through_json(optimizer, torch_python=sys.executable)
    with pytest.raises(
        ValueError, match="`config` cannot be built: `python` must be the Python of"
    ):
        through_json(build())


def test_names_and_partial_entries_are_read_as_in_declearn():
    built = tff_optim.from_config(
        {
            "kind": "pipeline",
            "learning_rate": 0.5,
            "regularizers": ["FedProx", ["L2", {"l2": 0.25}], ("L1", {"l1": 0.5})],
            "transforms": ["ClipByNorm", ["Adam", {"amsgrad": True}]],
            "projection": ["NonNeg", ["Ball", {"radius": 2}]],
        }
    )
    assert built == tff_optim.build_optimizer(
        0.5,
        regularizers=[
            regularizers.FedProx(),
            tf.keras.regularizers.L2(0.25),
            tf.keras.regularizers.L1(0.5),
        ],
        transforms=[transforms.ClipByNorm(), transforms.Adam(amsgrad=True)],
        projection=[tf.keras.constraints.NonNeg(), projections.Ball(2.0)],
    )
    assert through_json(built) == built


def test_lists_say_what_may_be_named():
    assert {"Momentum", "Adam", "KerasTransform"} <= set(tff_optim.list_transforms())
    assert {"FedProx", "L1", "L2", "L1L2"} <= set(tff_optim.list_regularizers())
    assert "GradientTransform" not in tff_optim.list_transforms()
    assert not set(tff_optim.list_transforms()) & {"FedProx", "L2"}


@tff_optim.register_transform
@attrs.frozen
class Median(transforms.GradientTransform):
    window: int = 3

    def initialize(self, specs):
        return ()

    def next(self, state, weights, gradients):
        return state, tf.nest.map_structure(lambda g: g * self.window, gradients)


@tff_optim.register_transform
class Shifted(transforms.GradientTransform):
    """No attrs class, but with `get_config`, as Keras objects have."""

    def __init__(self, by):
        self.by = by

    def get_config(self):
        return {"by": np.float64(self.by)}

    def initialize(self, specs):
        return ()

    def next(self, state, weights, gradients):
        return state, tf.nest.map_structure(lambda g: g + self.by, gradients)


class Slow(K.schedules.LearningRateSchedule):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + tf.cast(step, tf.float32))

    def get_config(self):
        return {"rate": self.rate}


class Signs(K.Optimizer):
    def __init__(self, learning_rate=0.1, power=1.0, name="Signs", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.power = power

    def update_step(self, gradient, variable):
        rate = tf.cast(self.learning_rate, variable.dtype)
        variable.assign_sub(rate * tf.sign(gradient) * tf.abs(gradient) ** self.power)

    def get_config(self):
        config = super().get_config()
        rate = self._serialize_hyperparameter(self._learning_rate)
        return config | {"learning_rate": rate, "power": self.power}


def test_classes_of_other_packages_need_trust():
    pipeline = tff_optim.build_optimizer(
        Slow(0.5), regularizers=[Median(2)], transforms=[Median(4), Shifted(1.5)]
    )
    config = tff_optim.get_config(pipeline)
    assert config["transforms"] == [
        [f"{HERE}.Median", {"window": 4}],
        [f"{HERE}.Shifted", {"by": 1.5}],
    ]
    assert f"{HERE}.Median" in tff_optim.list_transforms()
    assert f"{HERE}.Median" in tff_optim.list_regularizers()
    built = through_json(pipeline, trusted_packages=[HERE])
    assert built.pipeline.transforms[0] == Median(4)
    assert_equal_steps(built, pipeline)
    with pytest.raises(ValueError, match="/module' must be of Keras or of a package in `trusted_"):
        tff_optim.from_config(config)
    with pytest.raises(
        ValueError,
        match="at 'regularizers/0/0' must be of Keras or of a package in `trusted_packages`",
    ):
        tff_optim.from_config(config | {"learning_rate": 0.1})
    keras = tff_optim.build_keras_optimizer(Signs(0.2, 0.5))
    assert through_json(keras, trusted_packages=[HERE]) == keras
    with pytest.raises(ValueError, match="/module' must be of Keras or of a package in `trusted_"):
        through_json(keras)


def test_nothing_is_imported_and_no_other_class_is_built(monkeypatch):
    config = keras_config()
    config["optimizer"] |= {"module": "antigravity", "class_name": "Adam"}
    with pytest.raises(ValueError, match="at 'optimizer/module' must be imported already"):
        tff_optim.from_config(config, trusted_packages=["antigravity"])
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="at 'optimizer/module' must be of Keras or of a package"):
        tff_optim.from_config(config)
    config["optimizer"] |= {"module": "subprocess", "class_name": "Popen"}
    with pytest.raises(
        ValueError, match="at 'optimizer/class_name' must be the class of a Keras opt"
    ):
        tff_optim.from_config(config, trusted_packages=["subprocess"])
    # A trusted module that merely imports a class does not vouch for it.
    monkeypatch.setattr(contracts, "Slow", Slow, raising=False)
    schedule = {"module": "contracts", "class_name": "Slow", "config": {"rate": 0.1}}
    config = {"kind": "pipeline", "learning_rate": schedule}
    with pytest.raises(ValueError, match=f"not of '{HERE}'"):
        tff_optim.from_config(config, trusted_packages=["contracts"])
    assert tff_optim.from_config(config, trusted_packages=["contracts", HERE])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"beta_3": 0.5},
            r"at 'optimizer/config' .*; found unknown \['beta_3'\] \(did you mean 'beta_2'\?\)",
        ),
        (
            {"beta_1": "0.5"},
            r"at 'optimizer/config/beta_1' .* must be a number in \[0, 1\); found '0.5'",
        ),
        ({"beta_1": True}, r"`beta_1` of `Adam` must be a number in \[0, 1\); found True"),
        ({"amsgrad": 1}, "`amsgrad` of `Adam` must be True or False; found 1"),
        (
            {"clipnorm": "x"},
            "`clipnorm` of `Adam` must be a number greater than 0 or None; found 'x'",
        ),
        (
            {"learning_rate": None},
            "`learning_rate` of `Adam` must be a number of at least 0 or a schedule",
        ),
        ({"name": 3}, "`name` of `Adam` must be a string or None; found 3"),
        ({"epsilon": float("nan")}, "at 'optimizer/config/epsilon' must be a finite number"),
        ({"is_legacy_optimizer": True}, "/is_legacy_optimizer' must be False"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_keras_entries_that_do_not_fit(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tff_optim.from_config(keras_config(**change))


def test_missing_keras_entries_are_defaults_where_there_are_any():
    full = keras_config()
    assert tff_optim.from_config(full) == tff_optim.build_keras_optimizer(K.Adam(0.1))
    for name in ("beta_1", "weight_decay", "is_legacy_optimizer"):
        config = keras_config()
        del config["optimizer"]["config"][name]
        assert tff_optim.from_config(config) == tff_optim.from_config(full)
    config = keras_config()
    del config["optimizer"]["config"]["learning_rate"]
    assert tff_optim.from_config(config) == tff_optim.build_keras_optimizer(K.Adam())
    for name in ("device", "weight_names", "exclude_from_weight_decay"):
        config = keras_config()
        del config[name]
        assert tff_optim.from_config(config) == tff_optim.from_config(full)
    config = keras_config()
    del config["optimizer"]
    with pytest.raises(ValueError, match=r"`config` must .* found missing \['optimizer'\]"):
        tff_optim.from_config(config)
    config = keras_config()
    del config["optimizer"]["class_name"]
    with pytest.raises(ValueError, match="at 'optimizer' must be a Keras optimizer: a name"):
        tff_optim.from_config(config)
    schedule = {"class_name": "ExponentialDecay", "config": {"decay_steps": 3, "steps": 2}}
    with pytest.raises(
        ValueError,
        match=r"unknown \['steps'\].*, missing \['initial_learning_rate', 'decay_rate'\]",
    ):
        tff_optim.from_config(keras_config(learning_rate=schedule))


def test_legacy_and_unknown_keras_classes():
    config = keras_config()
    config["optimizer"]["module"] = "keras.optimizers.legacy"
    with pytest.raises(
        ValueError, match=r"not be that of a legacy optimizer; .*Use `tf\.keras\.optimizers\.Adam`"
    ):
        tff_optim.from_config(config)
    for name in ("Adan", "get", "Optimizer.x", "schedules"):
        config["optimizer"] |= {"module": "keras.optimizers", "class_name": name}
        with pytest.raises(
            ValueError, match="at 'optimizer/class_name' must be the name of a Keras optimizer"
        ):
            tff_optim.from_config(config)
    config["optimizer"]["class_name"] = ["Adam"]
    with pytest.raises(
        TypeError, match="at 'optimizer/class_name' must be the name of a Keras optimizer"
    ):
        tff_optim.from_config(config)
    config = keras_config()
    config["optimizer"] = {
        "module": "keras.regularizers",
        "class_name": "L2",
        "config": {"l2": 0.5},
    }
    with pytest.raises(
        ValueError, match=r"at .optimizer/class_name. must be .* optimizer; found .L2."
    ):
        tff_optim.from_config(config)


def piecewise(**changes):
    arguments = {"boundaries": [1, 2], "values": [0.1, 0.2, 0.3], "name": None} | changes
    return {
        "module": "keras.optimizers.schedules",
        "class_name": "PiecewiseConstantDecay",
        "config": arguments,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "adam"},
            r"at 'kind' must be one of \['keras', 'optax', 'pipeline', 'torch'\]; found 'adam'",
        ),
        ({"rate": 0.1}, r"`config` must have the entries that it takes; found unknown \['rate'\]"),
        ({"learning_rate": "fast"}, "at 'learning_rate' must be a number or a schedule"),
        ({"learning_rate": -1}, "`learning_rate` of `Pipeline` must be a number of at least 0"),
        ({"transforms": "Adam"}, "at 'transforms' must be a list; found 'Adam'"),
        ({"transforms": [3]}, "at 'transforms/0' must be like 'Name' or"),
        ({"transforms": [["Adam"]]}, "at 'transforms/0' must be like 'Name' or"),
        ({"transforms": [["Adam", 3]]}, "at 'transforms/0/1' must be a mapping; found 3"),
        (
            {"transforms": ["adam"]},
            "at 'transforms/0' must be .*did you mean 'Adam'.*; found 'adam'",
        ),
        ({"transforms": ["FedProx"]}, "at 'transforms/0' must be the name"),
        (
            {"transforms": [["Adam", {"beta": 1}]]},
            r"at 'transforms/0/1' .*; found unknown \['beta'\]",
        ),
        (
            {"transforms": [["Adam", {"beta_1": "x"}]]},
            "at 'transforms/0/1/beta_1' must be a number",
        ),
        (
            {"transforms": ["KerasTransform"]},
            r"at 'transforms/0' .* found missing \['optimizer'\]",
        ),
        ({"regularizers": ["Adam"]}, "at 'regularizers/0' must be the name"),
        ({"regularizers": [["L2", {"l3": 1}]]}, r"at 'regularizers/0/1' .* unknown \['l3'\]"),
        ({"regularizers": [["L2", {"l2": "x"}]]}, "`l2` of `L2` must be a number of at least 0"),
        (
            {"learning_rate": piecewise(boundaries=["a", "b"])},
            r"`boundaries` of `PiecewiseConstantDecay` must be .* found \['a', 'b'\]",
        ),
        (
            {"learning_rate": piecewise(boundaries=[1])},
            "at 'learning_rate' cannot be built: The length of boundaries",
        ),
        ({"projection": ["Adam"]}, "at 'projection/0' must be the name"),
        (
            {"projection": [{"function": "NonNeg", "when": 1}]},
            r"at 'projection/0' .*; found unknown \['when'\]",
        ),
        ({"jit_compile": "yes"}, "`jit_compile` of `Pipeline` must be True or False"),
        ({"device": "/GPU:7"}, "`device` must be one .* found /GPU:7"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_pipeline_entries_that_do_not_fit(change, message):
    config = {"kind": "pipeline", "learning_rate": 0.1} | change
    with pytest.raises((TypeError, ValueError), match=message):
        tff_optim.from_config(config)


class Silent(tf.keras.constraints.Constraint):
    def __init__(self, most):
        self.most = most

    def __call__(self, w):
        return w


class Nameless(tf.keras.regularizers.Regularizer):
    def __call__(self, x):
        return 0.0


def test_parts_whose_configuration_is_missing_or_incomplete_are_not_written():
    for options, name in (
        ({"projection": Silent(1.0)}, "Silent"),
        ({"regularizers": [Nameless()]}, "Nameless"),
    ):
        with pytest.raises(
            ValueError, match=f"`get_config` of `{name}` must return every argument"
        ):
            tff_optim.get_config(tff_optim.build_optimizer(0.1, **options))


def test_what_cannot_be_written():
    def build(**options):
        return tff_optim.build_optimizer(0.1, **options)

    with pytest.raises(
        TypeError, match="`optimizer` must be one that a `build_` function of tff_optim"
    ):
        tff_optim.get_config(K.Adam())
    with pytest.raises(ValueError, match="that a configuration can name"):
        tff_optim.get_config(build(projection=lambda w: w))
    where = projections.Projection(tf.keras.constraints.NonNeg(), where=lambda path, spec: True)
    with pytest.raises(ValueError, match="`where` of `Projection` must be a regular expression"):
        tff_optim.get_config(build(projection=where))

    class Local(tf.keras.regularizers.L2):
        pass

    with pytest.raises(ValueError, match="must be defined at the top of a module"):
        tff_optim.get_config(build(regularizers=[Local(0.1)]))

    class Unregistered(transforms.GradientTransform):
        initialize = next = None

    with pytest.raises(ValueError, match="Decorate transforms with `tff_optim"):
        tff_optim.get_config(build(transforms=[Unregistered()]))
    with pytest.raises(TypeError, match="`cls` must be a subclass"):
        tff_optim.register_transform(K.Adam)
    with pytest.raises(TypeError, match="`config` must be a mapping with `kind`"):
        tff_optim.from_config(3)
    with pytest.raises(TypeError, match="`trusted_packages` must be a collection"):
        tff_optim.from_config({}, trusted_packages="tests")
