"""declearn's configurations: equal steps to declearn's own, or a refusal with the reason.

The steps are in `declearn_vectors.json`, which `examples/benchmarks/declearn_vectors.py` makes.
"""

import copy
import json
import pathlib
import tomllib

import contracts
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from tff_optim import schedules, transforms
from tff_optim.config import declearn as declearn_configs

GOLDEN = json.loads((pathlib.Path(__file__).parent / "declearn_vectors.json").read_text())
WEIGHTS = [np.array(w) for w in GOLDEN["weights"]]


@pytest.mark.parametrize("run", GOLDEN["runs"].values(), ids=GOLDEN["runs"])
def test_steps_equal_those_of_declearn(run):
    config = copy.deepcopy(run["config"])
    optimizer = tff_optim.from_config(config)
    assert config == run["config"]
    state, weights = optimizer.initialize(contracts.specs_of(WEIGHTS)), WEIGHTS
    step = tf.function(optimizer.next)
    state, weights = contracts.tensors(state), contracts.tensors(weights)
    for gradients, expected in zip(GOLDEN["gradients"], run["weights"], strict=True):
        gradients = [tf.constant(g, tf.float64) for g in gradients]
        state, weights = step(state, weights, gradients)
        # Rates and other numbers are kept in float32.
        contracts.assert_close(weights, [np.array(w) for w in expected], rtol=1e-6, atol=1e-6)
    again = tff_optim.from_config(json.dumps(tff_optim.get_config(optimizer)))
    assert again == optimizer


def test_every_name_of_declearn_is_built_or_refused_with_a_reason():
    known = {
        "modules": {**declearn_configs._MODULES, **declearn_configs._NO_COUNTERPART},
        "regularizers": declearn_configs._REGULARIZERS,
        "schedulers": {**declearn_configs._SCHEDULES, **declearn_configs._NO_COUNTERPART},
    }
    for kind, names in GOLDEN["names"].items():
        assert len(names) >= 3
        assert set(names) <= set(known[kind])
    run = " ".join(json.dumps(run["config"]) for run in GOLDEN["runs"].values())
    for name in (
        *declearn_configs._MODULES,
        *declearn_configs._REGULARIZERS,
        *declearn_configs._SCHEDULES,
    ):
        assert f'["{name}", ' in run or name in ("gaussian-noise", "tensorflow-optim")


TOML = """
[optim.client_opt]
lrate = 0.05
w_decay = 0.01
modules = [["momentum", {beta = 0.5}], ["tensorflow-optim", {optim = "adam"}]]
[optim.server_opt]
lrate = 1.0
modules = [["tensorflow-optim", {optim = {class_name = "RMSprop", config = {rho = 0.5}}}]]
"""


def test_a_table_of_toml_and_optimizers_of_tensorflow_are_read():
    tables = tomllib.loads(TOML)["optim"]
    keras = tf.keras.optimizers
    parts = [transforms.Momentum(0.5), transforms.KerasTransform(keras.Adam())]
    expected = tff_optim.build_optimizer(0.05, weight_decay=0.01, transforms=parts)
    assert tff_optim.from_config(tables["client_opt"]) == expected
    part = transforms.KerasTransform(keras.RMSprop(rho=0.5))
    expected = tff_optim.build_optimizer(1.0, transforms=[part])
    assert tff_optim.from_config(tables["server_opt"]) == expected


def test_noise_has_the_distribution_of_declearns():
    config = {"lrate": 1.0, "modules": [["gaussian-noise", {"std": 0.5, "safe_mode": False}]]}
    assert tff_optim.from_config(config) == tff_optim.build_optimizer(
        1.0, transforms=[transforms.GaussianNoise(0.5)]
    )
    seeded = config | {"modules": [["gaussian-noise", {"std": 0.5, "safe_mode": False, "seed": 3}]]}
    assert tff_optim.from_config(seeded).pipeline.transforms == (
        transforms.GaussianNoise(0.5, seed=3),
    )


BASE = {"lrate": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"modules": ["scaffold-client"]},
            "at 'modules/0' must have a counterpart here; found 'scaffold-client'. It exch",
        ),
        (
            {"modules": [["scaffold-server", {}]]},
            "must have .* see `aggregators.build_scaffold`",
        ),
        (
            {"modules": [["torch-optim", {}]]},
            "must have .* give the server `tff_optim.build_torch_optimizer`",
        ),
        (
            {"lrate": ["warmup-rounds", {"base": 0.1, "warmup": 2}]},
            "at 'lrate/0' .* No optimizer of TFF knows the round",
        ),
        (
            {"lrate": ["linear-decay", {"base": 0.1, "rate": 0.1, "step_level": False}]},
            "at 'lrate/1/step_level' must be true; found False. A schedule counts the steps",
        ),
        (
            {"modules": [["momentum", {"round_reset": True}]]},
            "at 'modules/0/1/round_reset' must be false; found True. On clients a state begins anew",
        ),
        ({"modules": ["gaussian-noise"]}, r"at 'modules/0' .* missing \['safe_mode'\]"),
        (
            {"modules": [["gaussian-noise", {"safe_mode": True}]]},
            "at 'modules/0/1/safe_mode' must be false; found True. TensorFlow has no cryptographic",
        ),
        ({"modules": ["adm"]}, r"at 'modules/0' must be .*\(did you mean 'adam'\?\); found 'adm'"),
        ({"modules": [["adam", {"epsilon": 1.0}]]}, r"found unknown \['epsilon'\]"),
        ({"modules": [["adam", {"beta_1": 2.0}]]}, "at 'modules/0' .* `beta_1` of `Adam` must be"),
        ({"modules": "adam"}, "at 'modules' must be a list"),
        ({"regularizers": [["ridge", {"alpha": "x"}]]}, "at 'regularizers/0' cannot be built"),
        ({"lrate": "fast"}, "`learning_rate` of `Pipeline` must be a number"),
        ({"lrate": ["polynomial-decay", {"base": 0.1}]}, r"missing \['power', 'limit'\]"),
        (
            {"lrate": ["cosine-annealing", {"base": 0.1, "max_lr": 0, "duration": 2}]},
            "`max_lr` must",
        ),
        (
            {"lrate": ["warmup", {"base": 0.1, "warmup": 1.5}]},
            "`steps` of `Warmup` must be a whole",
        ),
        ({"lrate": ["warmup", {"base": ["linear-decay", 3], "warmup": 2}]}, "must be a mapping"),
        ({"momentum": 0.9}, r"found unknown \['momentum'\]"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_has_no_counterpart_or_does_not_fit(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tff_optim.from_config(BASE | change)


SCHEDULES = [
    schedules.InverseScaling(0.5, 0.75),
    schedules.CosineRestarts(0.1, 0.5, 3, 0.5),
    schedules.Triangular(0.1, 0.5, 2, 0.5, 0.9),
    schedules.Warmup(0.5, 3, schedules.InverseScaling(0.5, 0.75)),
    schedules.Warmup(0.5, 3),
    schedules.Warmup(3e19, 2**64, schedules.InverseScaling(0.5, 0.75)),  # longer than int64 counts
]


def with_keras(rate):
    return tff_optim.build_keras_optimizer(lambda: tf.keras.optimizers.SGD(rate))


@pytest.mark.parametrize("make", [tff_optim.build_optimizer, with_keras])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_of_this_package_run_in_the_worker_and_are_written(schedule, make):
    optimizer = make(schedule)
    config = json.loads(json.dumps(tff_optim.get_config(optimizer)))
    assert tff_optim.from_config(config) == optimizer
    assert make(schedules.InverseScaling(0.25, 0.75)) != optimizer
    weights_type = tff.types.tensorflow_to_type([tf.TensorSpec([2])])
    initialize, step = tff_optim.build_optimizer_computations(optimizer, weights_type)
    state, weights, expected = initialize(), [np.float32([1.0, 2.0])], 1.0
    for t in range(6):
        state, weights = step(state, weights, [np.ones(2, "float32")])
        expected -= float(schedule(t))
    np.testing.assert_allclose(weights[0][0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.InverseScaling(-1.0, 1.0), "`rate` of `InverseScaling` must be"),
        (lambda: schedules.CosineRestarts(0.0, 1.0, 0), "`period` of `CosineRestarts` must be"),
        (lambda: schedules.Triangular(0.0, "x", 2), "`highest` of `Triangular` must be"),
        (lambda: schedules.Warmup(1.0, 2, 0.5), "`then` of `Warmup` must be a schedule or None"),
    ],
)
def test_arguments_of_schedules_are_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_every_schedule_of_this_package_is_tested():
    base = tf.keras.optimizers.schedules.LearningRateSchedule
    public = {
        name
        for name, value in vars(schedules).items()
        if isinstance(value, type) and issubclass(value, base) and not name.startswith("_")
    }
    assert public == {type(schedule).__name__ for schedule in SCHEDULES}
