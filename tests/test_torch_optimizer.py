"""Every torch optimizer and scheduler against plain torch, and what is said of what cannot run.

Those that need torch run under `make test-torch`, which sets TORCH_PYTHON.
"""

import asyncio
import copy
import functools
import gc
import json
import os
import pathlib
import pickle
import subprocess
import sys

import contracts
import numpy as np
import problems
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from tff_optim import build_torch_optimizer
from tff_optim.backends.torch import arguments as torch_arguments
from tff_optim.resident.graphs import fingerprints

TORCH = os.environ.get("TORCH_PYTHON")
needs_torch = pytest.mark.skipif(TORCH is None, reason="needs torch's environment: make test-torch")
# A scheduler that sets the rate, with arguments that change it within five steps.
SGD = ("SGD", {"lr": 0.1, "momentum": 0.9})

OPTIMIZERS = {
    "ASGD": {"lr": 0.1, "lambd": 0.01, "t0": 2.0},
    "Adadelta": {"lr": 0.5, "rho": 0.8},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3},
    "Adam": {"lr": 0.1, "betas": (0.8, 0.97), "amsgrad": True},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
    "Adamax": {"lr": 0.1, "betas": (0.8, 0.97)},
    "NAdam": {"lr": 0.1, "momentum_decay": 0.01},
    "RAdam": {"lr": 0.1, "betas": (0.8, 0.9)},
    "RMSprop": {"lr": 0.1, "alpha": 0.8, "centered": True, "momentum": 0.5},
    "Rprop": {"lr": 0.1, "etas": (0.4, 1.5)},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Muon": {"lr": 0.1, "weight_decay": 0.1},
}
MATRICES_ONLY = {"Muon"}
SCHEDULERS = {
    "ConstantLR": {"factor": 0.3, "total_iters": 2},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.7},
    "LinearLR": {"start_factor": 0.3, "total_iters": 3},
    "MultiStepLR": {"milestones": [1, 3], "gamma": 0.5},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 8},
    "PolynomialLR": {"total_iters": 4, "power": 2.0},
    "StepLR": {"step_size": 2, "gamma": 0.5},
}


def describe(optimizer, arguments, scheduler=None, dtype="float32", steps=5, **more):
    weights, gradients = contracts.make_problem(steps=steps, dtype=dtype)
    if optimizer in MATRICES_ONLY:
        weights, gradients = weights[:1], [row[:1] for row in gradients]
    return {
        "optimizer": optimizer,
        "arguments": arguments,
        "scheduler": scheduler,
        "dtype": dtype,
        "weights": weights,
        "steps": gradients,
        **more,
    }


CASES = {
    **{name: describe(name, arguments) for name, arguments in OPTIMIZERS.items()},
    **{name: describe(*SGD, (name, given)) for name, given in SCHEDULERS.items()},
    "64 bits": describe("Adam", OPTIMIZERS["Adam"], dtype="float64"),
    "16 bits": describe("SGD", OPTIMIZERS["SGD"], dtype="float16"),
}
every_case = pytest.mark.parametrize("name", CASES)

# Server optimizers of a whole process, and what torch needs to train it by itself.
FEDERATED = ("Adam", "Rprop", "StepLR")
ROUNDS = 5
CLIENTS = problems.make_clients(2)


def federated(name):
    model = problems.make_keras_model()
    batches = [[[batch["x"].numpy(), batch["y"].numpy()] for batch in data] for data in CLIENTS]
    return {
        **CASES[name],
        "weights": model.get_weights(),
        "clients": batches,
        "client_rate": 0.1,
        "rounds": ROUNDS,
    }


@pytest.fixture(scope="module")
def plain():
    """torch's own lists of public names, and what plain torch makes of every case and process."""

    def as_lists(value):
        return value.tolist() if isinstance(value, np.ndarray) else value

    run = subprocess.run(
        [TORCH, str(pathlib.Path(__file__).with_name("torch_plain.py"))],
        input=json.dumps([*CASES.values(), *map(federated, FEDERATED)], default=as_lists),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    weights = found["weights"]
    return found["lists"], dict(zip(CASES, weights)), dict(zip(FEDERATED, weights[len(CASES) :]))


def make(name):
    case = CASES[name]
    return build_torch_optimizer(
        case["optimizer"], python=TORCH, lr_scheduler=case["scheduler"], **case["arguments"]
    )


def assert_plain(found, expected, case):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b, case["dtype"]))


@needs_torch
@every_case
def test_it_equals_torch_bit_for_bit_and_resumes_from_a_file(name, plain, tmp_path):
    case, expected = CASES[name], plain[1][name]
    weights, steps = case["weights"], case["steps"]
    optimizer = make(name)
    state = optimizer.initialize(contracts.specs_of(weights))
    _, eager = contracts.run(optimizer.next, state, weights, steps)
    assert_plain(eager, expected, case)

    step = tf.function(optimizer.next)
    middle = contracts.run(step, contracts.tensors(state), contracts.tensors(weights), steps[:2])
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    asyncio.run(manager.save(middle, 1))
    fresh = make(name)
    like = (fresh.initialize(contracts.specs_of(weights)), weights)
    loaded = contracts.tensors(asyncio.run(manager.load(1, like)))
    _, resumed = contracts.run(tf.function(fresh.next), *loaded, steps[2:])
    assert_plain(resumed, expected, case)


@needs_torch
def test_every_public_name_of_torch_is_run_or_refused(plain):
    names = plain[0]
    assert set(names["optimizers"]) == {*OPTIMIZERS, *torch_arguments.REFUSED}
    # `LRScheduler` itself, and names that torch keeps for older code, are not schedulers to name.
    assert set(names["schedulers"]) == {*SCHEDULERS, *torch_arguments.REFUSED_SCHEDULERS}


def table():
    """What runs and what does not, and why: `docs/pages/guides/torch.md` holds it."""
    rows = ["| torch | runs |", "| --- | --- |"]
    refused = {**torch_arguments.REFUSED, **torch_arguments.REFUSED_SCHEDULERS}
    runs = {name: "yes" for name in (*OPTIMIZERS, *SCHEDULERS)}
    runs |= {name: "yes, for matrices" for name in MATRICES_ONLY}
    runs |= {name: f"no: {reason}" for name, reason in refused.items()}
    for names in (
        {*OPTIMIZERS, *torch_arguments.REFUSED},
        {*SCHEDULERS, *refused} - {*torch_arguments.REFUSED},
    ):
        rows += [f"| `{name}` | {runs[name]} |" for name in sorted(names)]
    return "\n".join(rows)


def test_the_table_of_what_runs_is_true():
    page = pathlib.Path(__file__).parent.parent / "docs/pages/guides/torch.md"
    assert table() in page.read_text()


@needs_torch
def test_a_weight_without_gradient_and_its_state_stay():
    weights, steps = contracts.make_problem(steps=3)
    optimizer = make("Adam")
    state = optimizer.initialize(contracts.specs_of(weights))
    state, found = optimizer.next(state, weights, [steps[0][0], None])
    np.testing.assert_array_equal(state["started"], [True, False])
    np.testing.assert_array_equal(found[1], weights[1])
    before, found = optimizer.next(state, found, steps[1])
    after, last = optimizer.next(before, found, [steps[2][0], None])
    np.testing.assert_array_equal(last[1], found[1])
    for path in (path for path in before["slots"] if path.endswith("/1")):
        np.testing.assert_array_equal(after["slots"][path], before["slots"][path])
    # The second weight has had one step: torch counts the steps of each.
    alone = optimizer.initialize(contracts.specs_of(weights[1:]))
    _, (expected,) = optimizer.next(alone, weights[1:], steps[1][1:])
    np.testing.assert_array_equal(last[1], expected)


@needs_torch
def test_the_graph_of_a_step_says_which_optimizer_takes_it():
    def of(name, **arguments):
        optimizer = build_torch_optimizer(name, python=TORCH, lr=0.1, **arguments)
        vector = tff.TensorType(np.float32, [2])
        return fingerprints.of_computation(
            tff_optim.build_optimizer_computations(optimizer, vector).next
        )

    found = [of("Adam"), of("Adam", betas=(0.8, 0.99)), of("NAdam", momentum_decay=0.1)]
    assert len(set(found)) == 3
    assert of("Adam") == found[0]


@needs_torch
def test_the_learning_rate_is_a_number_that_can_be_set():
    weights, steps = contracts.make_problem(steps=3)
    optimizer = build_torch_optimizer("Adam", lr=0.1, python=TORCH)
    state = optimizer.initialize(contracts.specs_of(weights))
    assert optimizer.get_hparams(state) == {"learning_rate": 0.1}
    changed = optimizer.set_hparams(state, {"learning_rate": 0.3})
    rebuilt = build_torch_optimizer("Adam", lr=0.3, python=TORCH)
    contracts.assert_equal(
        contracts.run(optimizer.next, changed, weights, steps)[1],
        contracts.run(
            rebuilt.next, rebuilt.initialize(contracts.specs_of(weights)), weights, steps
        )[1],
    )
    with pytest.raises(ValueError, match="at least 0"):
        optimizer.set_hparams(state, {"learning_rate": -0.3})
    scheduled = make("StepLR")
    assert not scheduled.get_hparams(scheduled.initialize(contracts.specs_of(weights)))


@needs_torch
def test_bad_input_is_named_and_torchs_own_errors_are_passed_on():
    weights, steps = contracts.make_problem(steps=1)
    specs = contracts.specs_of(weights)
    optimizer = make("SGD")
    state = optimizer.initialize(specs)
    with pytest.raises(ValueError, match="`state`"):
        optimizer.next((), weights, steps[0])
    with pytest.raises(ValueError, match="`slots` of `state`"):
        optimizer.next(make("Adam").initialize(specs), weights, steps[0])
    with pytest.raises(ValueError, match=r"TypeError.*beta_1"):
        build_torch_optimizer("Adam", lr=0.1, beta_1=0.5, python=TORCH).initialize(specs)
    with pytest.raises(ValueError, match="subclass of Optimizer; found 'Adams'"):
        build_torch_optimizer("Adams", lr=0.1, python=TORCH).initialize(specs)
    with pytest.raises(ValueError, match=r"Muon only supports 2D"):
        build_torch_optimizer("Muon", lr=0.1, python=TORCH).initialize(specs)
    assert state["slots"]


OWN = '''
import os
import signal

import torch


class Fragile(torch.optim.SGD):
    """SGD that ends its process if a file is there."""

    def __init__(self, params, lr, file):
        super().__init__(params, lr, momentum=0.5)
        self.param_groups[0]["file"] = file

    def step(self, closure=None):
        super().step()
        if os.path.exists(self.param_groups[0]["file"]):
            os.kill(os.getpid(), signal.SIGKILL)


class Forgetful(torch.optim.SGD):
    """SGD that counts its steps where no state is."""

    steps = 0

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1
        super().step()


class Halving(torch.optim.SGD):
    """SGD that counts its steps as a whole number, by halves."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.param_groups[0]["count"] = 0

    def step(self, closure=None):
        self.param_groups[0]["count"] += 0.5
        super().step()
'''


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    (tmp_path / "own_torch.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@needs_torch
def test_a_process_killed_in_mid_step_leaves_the_old_state_usable(own_package):
    weights, steps = contracts.make_problem(steps=2)
    file = own_package / "end"
    optimizer = build_torch_optimizer(
        "own_torch.Fragile",
        python=TORCH,
        trusted_packages=["own_torch"],
        lr=0.1,
        file=str(file),
    )
    state, found = optimizer.next(
        optimizer.initialize(contracts.specs_of(weights)), weights, steps[0]
    )
    kept = [np.array(w) for w in found]
    file.touch()
    with pytest.raises(RuntimeError, match=r"it had taken the step \(killed by SIGKILL\)"):
        optimizer.next(state, found, steps[1])
    with pytest.raises(tf.errors.OpError, match="The Python process of torch"):
        tf.function(optimizer.next)(state, found, steps[1])
    contracts.assert_equal(kept, [np.array(w) for w in found])
    file.unlink()
    _, last = optimizer.next(state, found, steps[1])
    usual = build_torch_optimizer("SGD", python=TORCH, lr=0.1, momentum=0.5)
    expected = contracts.run(
        usual.next, usual.initialize(contracts.specs_of(weights)), weights, steps
    )[1]
    contracts.assert_equal(list(last), list(expected))


@needs_torch
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "graph"])
def test_what_a_step_returned_stays_when_the_next_is_taken(traced):
    weights, steps = contracts.make_problem(steps=2)
    optimizer = make("Adam")
    step = tf.function(optimizer.next) if traced else optimizer.next
    state = contracts.tensors(optimizer.initialize(contracts.specs_of(weights)))
    first = step(state, contracts.tensors(weights), contracts.tensors(steps[0]))
    kept = tf.nest.map_structure(np.array, first)
    step(*first, contracts.tensors(steps[1]))
    contracts.assert_equal(first, kept)


@needs_torch
def test_state_in_an_attribute_is_refused(own_package):
    optimizer = build_torch_optimizer(
        "own_torch.Forgetful", python=TORCH, trusted_packages=["own_torch"], lr=0.1
    )
    with pytest.raises(ValueError, match="changes the attribute 'steps'"):
        optimizer.initialize([tf.TensorSpec([2])])


@needs_torch
def test_a_whole_number_that_becomes_a_fraction_is_refused(own_package):
    weights, steps = contracts.make_problem(steps=1)
    optimizer = build_torch_optimizer(
        "own_torch.Halving", python=TORCH, trusted_packages=["own_torch"], lr=0.1
    )
    state = optimizer.initialize(contracts.specs_of(weights))
    with pytest.raises(ValueError, match=r"whole; found 0\.5 for 'group/count' of int64"):
        optimizer.next(state, weights, steps[0])


def fed_avg(server):
    clients = tff.learning.optimizers.build_sgdm(0.1)
    return tff.learning.algorithms.build_weighted_fed_avg(problems.model_fn, clients, server)


@needs_torch
@pytest.mark.parametrize("place", [{}, {"workers": 1}])
@pytest.mark.parametrize("name", FEDERATED)
def test_it_steps_on_the_server_of_a_resident_process_as_plain_torch_does(name, place, plain):
    with tff_optim.ResidentProcess(fed_avg(make(name)), device="CPU:0", **place) as process:
        state = process.initialize()
        for _ in range(ROUNDS):
            state = process.next(state, CLIENTS).state
        found = process.get_model_weights(state).trainable
    for a, b in zip(found, plain[2][name], strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=2e-5)


def defined(optimizer, weight):
    """A step as TFF keeps it: the definition of a graph, with the names of its inputs and outputs."""
    state = optimizer.initialize(contracts.specs_of([weight]))
    with tf.Graph().as_default() as graph:
        inputs = tf.nest.map_structure(
            lambda leaf: tf.compat.v1.placeholder(tf.as_dtype(leaf.dtype), np.shape(leaf)),
            (state, [weight], [weight]),
        )
        outputs = optimizer.next(*inputs)
    names = [[tensor.name for tensor in tf.nest.flatten(x)] for x in (inputs, outputs)]
    return state, graph.as_graph_def(), *names


def run_defined(definition, inputs, outputs, *values):
    return tf.import_graph_def(definition, dict(zip(inputs, values)), return_elements=outputs)


@needs_torch
def test_a_step_outlives_the_optimizer_and_the_graph_that_it_was_traced_in():
    weight, gradient = np.float32([1.0, -2.0]), np.float32([0.5, 0.25])
    optimizer = make("Adam")
    expected = optimizer.next(
        optimizer.initialize(contracts.specs_of([weight])), [weight], [gradient]
    )
    steps = [defined(optimizer, weight) for _ in range(2)]
    del optimizer
    gc.collect()
    for state, definition, inputs, outputs in steps:
        values = [tf.constant(value) for value in tf.nest.flatten((state, [weight], [gradient]))]
        found = tf.function(functools.partial(run_defined, definition, inputs, outputs))(*values)
        contracts.assert_equal(list(found), tf.nest.flatten(expected))


@needs_torch
def test_in_the_worker_the_error_names_the_way_out():
    optimizer = make("SGD")
    _, step = tff_optim.build_optimizer_computations(optimizer, tff.TensorType(np.float32, [2]))
    state = optimizer.initialize(tf.TensorSpec([2]))
    with pytest.raises(Exception, match="use_a_Keras_or_optax_optimizer_in_the_TFF_worker"):
        step(state, np.ones(2, "float32"), np.ones(2, "float32"))


def test_on_clients_it_names_the_way_out():
    optimizer = build_torch_optimizer("SGD", lr=0.1, python=sys.executable)
    with pytest.raises(ValueError, match=r"`build_keras_optimizer` or `build_optax_optimizer`"):
        tff.learning.algorithms.build_weighted_fed_avg(problems.model_fn, optimizer)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (["LBFGS"], {"lr": 0.1}, ValueError, "alone; found LBFGS: it calls the loss several times"),
        (["SparseAdam"], {"lr": 0.1}, ValueError, "takes sparse gradients"),
        (
            ["SGD"],
            {"lr": 0.1, "lr_scheduler": ("ReduceLROnPlateau", {})},
            ValueError,
            "follows a metric",
        ),
        (["SGD"], {"lr": 0.1, "lr_scheduler": "StepLR"}, TypeError, "a pair of a name"),
        (["os.system"], {}, ValueError, r"`trusted_packages` \[\], not of 'os'; found 'os.system'"),
        ([dict], {}, TypeError, "name of a class of torch.optim"),
        (["SGD"], {"lr": -1.0}, ValueError, "`lr`.*at least 0; found -1.0"),
        (["SGD"], {"lr": "fast"}, TypeError, "`lr`"),
        (["SGD"], {"lr": 0.1, "maximize": object()}, TypeError, "`maximize` of `kwargs`"),
        (["SGD"], {"lr": 0.1, "trusted_packages": "own"}, TypeError, "a collection of names"),
        (["SGD"], {"lr": 0.1, "python": "no/such/python"}, ValueError, "`python`.*no/such/python"),
    ],
)
def test_an_error_names_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        build_torch_optimizer(*arguments, **{"python": sys.executable, **options})


def test_without_torch_an_error_says_how_to_get_it():
    with pytest.raises(ValueError, match="pip install torch"):
        build_torch_optimizer("SGD", lr=0.1)
    optimizer = build_torch_optimizer("SGD", lr=0.1, python=sys.executable)
    with pytest.raises(ValueError, match="No module named 'torch'"):
        optimizer.initialize([tf.TensorSpec([2])])


def test_two_weights_of_one_path_are_refused_without_torch():
    optimizer = tff_optim.build_torch_optimizer("Adam", lr=0.1, python=sys.executable)
    spec = tf.TensorSpec([2])
    with pytest.raises(ValueError, match=r"`specs` must have paths .* found 'a/b' twice"):
        optimizer.initialize({"a/b": spec, "a": {"b": spec}})


def test_equal_optimizers_are_equal_and_can_be_copied():
    optimizer = build_torch_optimizer("Adam", lr=0.1, python=sys.executable)
    assert optimizer == build_torch_optimizer("Adam", lr=0.1, python=sys.executable)
    assert optimizer != build_torch_optimizer("Adam", lr=0.2, python=sys.executable)
    assert copy.deepcopy(optimizer) == optimizer
    assert pickle.loads(pickle.dumps(optimizer)) == optimizer
    assert "0.1" in repr(optimizer)
