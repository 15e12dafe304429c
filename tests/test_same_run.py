"""A folder's run goes on as itself alone: what changed is refused by name, or taken on in words."""

import collections
import copy
import json
import re
import shutil
import threading
import time

import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from tensorflow.python.eager import context
from test_simulation import SPEC, make_clients, numbers

import aggregators
from aggregators import rules
from tff_optim import ResidentProcess, build_keras_optimizer, simulation
from tff_optim.simulation import same_run
from tff_optim.simulation.client_fingerprints import chosen, of_data

ModelWeights = tff.learning.models.ModelWeights


def build(
    prefer="near",
    activation="linear",
    loss=tf.keras.losses.MeanSquaredError,
    nesterov=True,
    scale=1.0,
    initializer="ones",
):
    def keras_model():
        dense = tf.keras.layers.Dense(
            1, activation, input_shape=(2,), kernel_initializer=initializer
        )
        return tf.keras.Sequential([dense, tf.keras.layers.Lambda(lambda x: scale * x)])

    return aggregators.build_fed_avg(
        tff.learning.models.functional_model_from_keras(keras_model, loss(), SPEC),
        build_keras_optimizer(tf.keras.optimizers.SGD(0.05, 0.9, nesterov=nesterov)),
        tff.learning.optimizers.build_adam(0.1),
        rule=rules.adaptive_mean(
            aggregators.scores.l2_distance, aggregators.weighting.softmax(prefer=prefer, scale=1.0)
        ),
    )


TESTED = {"on": 1.0}


def evaluate(weights):
    return {"size": sum(float(np.abs(w).sum()) for w in weights.trainable) * TESTED["on"]}


def evaluate_more(weights):
    return {"size": sum(float(np.abs(w).sum()) for w in weights.trainable), "one": 1}


def start(value):
    return ModelWeights([np.full([2, 1], value, np.float32), np.zeros([1], np.float32)], [])


PROCESS = {}


def process():
    if not PROCESS:
        PROCESS["built"] = build()
    return PROCESS["built"]


def run(folder, rounds, *, process=process, clients=make_clients, **changes):
    arguments = {"clients_per_round": 2, "seed": 5, "evaluate": evaluate, "progress": False}
    arguments |= {"initial_weights": start(1.0), "directory": folder}
    return simulation.run(process(), clients(), rounds=rounds, **(arguments | changes))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(folder, 1)
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def renamed():
    return {name.replace("5", "9"): data for name, data in make_clients().items()}


def with_other_data(client="client 4"):
    return {
        name: data.map(lambda b: {**b, "x": -b["x"]}) if name == client else data
        for name, data in make_clients().items()
    }


def in_smaller_batches():
    return {name: data.unbatch().batch(2) for name, data in make_clients().items()}


CHANGES = {
    "the rule": ({"process": lambda: build(prefer="far")}, "computations"),
    "the activation": ({"process": lambda: build(activation="tanh")}, "computations"),
    "the loss": (
        {"process": lambda: build(loss=tf.keras.losses.MeanAbsoluteError)},
        "computations",
    ),
    "nesterov": ({"process": lambda: build(nesterov=False)}, "computations"),
    "a constant": ({"process": lambda: build(scale=2.0)}, "computations"),
    "the initial weights": ({"initial_weights": start(2.0)}, "initial_weights"),
    "initial weights of its own": ({"initial_weights": None}, "initial_weights"),
    "an id": ({"clients": renamed}, "ids"),
    "the order of ids": ({"clients": lambda: dict(reversed(make_clients().items()))}, "ids"),
    "a client's data": ({"clients": with_other_data}, "data of client 4"),
    "batches": ({"clients": in_smaller_batches}, "data of client 0"),
    "the seed": ({"seed": 6}, "seed"),
    "the cohort": ({"clients_per_round": 3}, "clients_per_round"),
    "no evaluation": ({"evaluate": None}, "evaluate"),
    "another evaluation": ({"evaluate": evaluate_more}, "evaluate"),
    "how often": ({"rounds_per_evaluation": 2}, "rounds_per_evaluation"),
}


# How computations are told apart is in `test_fingerprints.py`: one that is new here, and a constant.
QUICK = [name for name in CHANGES if name not in ("the activation", "the loss", "nesterov")]


@pytest.mark.parametrize("name", selection.params([*CHANGES], QUICK))
def test_what_changed_is_refused_by_name_or_taken_on_in_words(folder, name):
    change, what = CHANGES[name]
    change = dict(change)
    if "process" in change:
        made = change["process"]()
        change["process"] = lambda: made
    before = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"must hold a run with .*'{what}': .*with .*'{what}': "):
        run(folder, 2, **change)
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    with pytest.warns(UserWarning, match=f"goes on with .*'{what}': .*`resume='changed'` asks"):
        history = run(folder, 2, resume="changed", **change)
    assert history.rounds["round"].tolist() == [0, 1, 2]
    (told,) = json.loads((folder / "arguments.json").read_text())["changes"]
    assert told["after_round"] == 1
    assert told["from"][what] != told["to"][what]
    # From here on it is that run.
    assert run(folder, 2, **change).rounds["round"].tolist() == [0, 1, 2]


def test_the_same_built_again_goes_on_without_a_word(folder, begun, recwarn):
    built = build()
    history = run(folder, 3, process=lambda: built)
    assert not [w for w in recwarn if "directory" in str(w.message)]
    assert "changes" not in json.loads((folder / "arguments.json").read_text())
    undisturbed = run(None, 3)
    assert str(numbers(history)) == str(numbers(undisturbed))


def test_another_kind_of_checkpoints_is_refused_whatever_is_asked(folder, tmp_path):
    with ResidentProcess(process(), device="CPU:0") as resident:
        for resume in (True, "changed"):
            with pytest.raises(ValueError, match=r"'checkpoints': 'resident'.*'plain'.*Name anoth"):
                run(folder, 2, process=lambda: resident, resume=resume)
        run(tmp_path / "new", 1, process=lambda: resident)
        assert run(tmp_path / "new", 2, process=lambda: resident).rounds["round"][-1] == 2
    with pytest.raises(ValueError, match=r"'checkpoints': 'plain'.*'resident'"):
        run(tmp_path / "new", 3)
    assert len((tmp_path / "new" / "rounds.csv").read_text().splitlines()) == 4


def test_the_same_function_on_another_test_set_is_refused(folder, monkeypatch):
    monkeypatch.setitem(TESTED, "on", 2.0)
    with pytest.raises(
        ValueError, match=r"`evaluate` must give what it gave in .*of round 1; found"
    ):
        run(folder, 2)
    assert run(folder, 2, resume="changed").rounds["round"].tolist() == [0, 1, 2]


def test_an_evaluation_that_draws_is_not_held_against_itself(tmp_path):
    rng = np.random.default_rng(0)

    def draw(weights):
        return {"drawn": rng.normal()}

    run(tmp_path, 1, evaluate=draw)
    assert run(tmp_path, 2, evaluate=draw).rounds["round"].tolist() == [0, 1, 2]


def test_other_versions_are_a_warning(folder):
    path = folder / "arguments.json"
    known = json.loads(path.read_text())
    for versions in ({**known["versions"], "tff_optim": "0.0.1"}, None):
        path.write_text(json.dumps({**known, "versions": versions, "computations": "other"}))
        if versions is None:  # as older versions wrote it
            found = json.loads(path.read_text())
            for name in ("versions", "ids", "data", "own_weights", "checkpoints"):
                del found[name]
            path.write_text(json.dumps({**found, "clients": 6}))
        with pytest.warns(
            UserWarning, match=r"begun with .*tff_optim (0\.0\.1|of an unknown vers)"
        ):
            run(folder, 1)
        # Whatever else differs is another run.
        path.write_text(json.dumps({**known, "versions": {}, "seed": 7}))
        with pytest.raises(ValueError, match="'seed': 5"):
            run(folder, 1)


def test_own_initial_weights_that_are_drawn_anew_are_a_warning(tmp_path):
    drawn = [build(initializer="glorot_uniform") for _ in range(2)]
    run(tmp_path, 1, process=lambda: drawn[0], initial_weights=None)
    with pytest.warns(UserWarning, match=r"draws others than the run .* goes on from its own"):
        run(tmp_path, 2, process=lambda: drawn[1], initial_weights=None)


def test_fewer_rounds_than_there_are_is_an_error_with_both_numbers(folder):
    run(folder, 2)
    with pytest.raises(ValueError, match=r"`rounds` must be at least 2, .*; found 1\."):
        run(folder, 1)
    assert run(folder, 2).ended == {("process", 5): "finished"}


def test_data_may_be_left_out(folder):
    history = run(folder, 2, clients=with_other_data, compare_data=False)
    assert history.rounds["round"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"), [(1, "found 1"), ("yes", "found 'yes'"), (None, "found None")]
)
def test_resume_is_one_of_three(given, message):
    with pytest.raises(ValueError, match=f"`resume` must be True, False or 'changed'; {message}"):
        run(None, 1, resume=given)


def test_a_folder_whose_arguments_are_damaged_is_told(folder):
    for text in ("", "{", "[1]"):
        (folder / "arguments.json").write_text(text)
        with pytest.raises(ValueError, match=r"must hold what makes its run the same .* copy"):
            run(folder, 2)


class Failing(tff.program.ReleaseManager):
    def __init__(self, when):
        self.when = when

    async def release(self, value, key):
        if key == self.when:
            raise OSError("the disk of the manager is full")


def test_rounds_before_an_error_are_saved(tmp_path):
    def broken(weights):
        if broken.calls == 4:
            raise RuntimeError("broken")
        broken.calls += 1
        return {"calls": broken.calls}

    broken.calls = 0
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path / "a", 9, evaluate=broken)
    with pytest.raises(OSError, match="of the manager is full"):
        run(tmp_path / "b", 9, managers=[Failing(3)])
    for name in "ab":
        assert (tmp_path / name / "checkpoints" / "program_state_3").exists()
    undisturbed = run(None, 5)
    assert str(numbers(run(tmp_path / "b", 5))) == str(numbers(undisturbed))


def test_states_of_a_process_that_is_closed_are_plain(tmp_path):
    history = run(
        tmp_path, 1, process=lambda: lambda seed: ResidentProcess(process(), device="CPU:0")
    )
    kernel = process().get_model_weights(history.state).trainable[0]
    with ResidentProcess(process(), device="CPU:0") as resident:
        held = run(None, 1, process=lambda: resident)
        again = resident.get_model_weights(held.state).trainable[0]
    np.testing.assert_array_equal(kernel, again)


class Breaking:
    """A process whose third round fails, together with that of another one, which is first."""

    def __init__(self, barrier, seconds):
        self.process, self.barrier, self.seconds, self.rounds = process(), barrier, seconds, 0
        self.initialize = self.process.initialize
        self.get_model_weights = self.process.get_model_weights
        self.set_model_weights = self.process.set_model_weights

    def next(self, state, data):
        self.rounds += 1
        if self.rounds == 3:
            self.barrier.wait(timeout=60)
            time.sleep(self.seconds)
            raise RuntimeError(f"broken after {self.seconds}")
        return self.process.next(state, data)


def test_of_two_runs_that_fail_both_errors_are_told(tmp_path, capsys):
    barrier = threading.Barrier(2)
    two = {"a": Breaking(barrier, 0.0), "b": Breaking(barrier, 0.5)}
    with pytest.raises(RuntimeError, match=r"broken after 0\.0") as raised:
        run(tmp_path, 9, process=lambda: two, seed=[5], runs_at_once=2)
    assert raised.value.__notes__ == [
        "Another run has failed too: RuntimeError('broken after 0.5')"
    ]
    assert "Ctrl-C" not in capsys.readouterr().err
    for name in two:
        assert (tmp_path / name / "seed_5" / "checkpoints" / "program_state_2").exists()


@pytest.mark.parametrize("plain", [False, True])
def test_a_model_that_no_client_changes_is_told_once(plain):
    def without_numbers():
        return {
            name: data.map(lambda b: {**b, "x": b["x"] * np.float32(np.nan)})
            for name, data in make_clients().items()
        }

    built = process()
    if plain:
        built = tff.learning.algorithms.build_weighted_fed_avg(
            tff.learning.models.functional_model_from_keras(
                tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
                tf.keras.losses.MeanSquaredError(),
                SPEC,
            ),
            tff.learning.optimizers.build_sgdm(0.1),
        )
    reason = "update_non_finite" if plain else "'aggregator/non_finite_clients': 2"
    with pytest.warns(
        UserWarning, match=f"'process', seed 5, .* up to round 3: .*{reason}"
    ) as told:
        run(None, 6, process=lambda: built, clients=without_numbers)
    assert len([w for w in told if "has not changed" in str(w.message)]) == 1


def dataset(values=range(8), **shuffle):
    data = tf.data.Dataset.from_tensor_slices(np.array(values, np.float32))
    return (data.shuffle(8, **shuffle) if shuffle else data).batch(2)


@pytest.fixture(params=[None, 5])
def global_seed(request):
    """What `tf.random.set_seed` has set, if anything; given back after the test."""
    before = context.global_seed()
    context.set_global_seed(request.param)
    yield request.param
    context.set_global_seed(before)


def test_shuffled_data_are_the_same_data(global_seed):
    whole = {"seed": None}, {"seed": 1}, {"seed": 1, "reshuffle_each_iteration": False}
    for how in whole:
        assert of_data(dataset(**how)) == of_data(dataset(**how))
        assert of_data(dataset(**how)) != of_data(dataset(range(1, 9), **how))
    if global_seed is None:  # else its own seed looks like that of an operation without one
        assert of_data(dataset(seed=1)) != of_data(dataset(seed=2))
        drawn = tf.data.Dataset.range(4).map(lambda i: tf.random.uniform([]))
        assert "another each time" in of_data(drawn)


def test_looking_at_data_leaves_no_trace(tmp_path):
    one, other = dataset(seed=3), dataset(seed=3)
    of_data(one)
    for _ in range(2):
        np.testing.assert_equal(list(one.as_numpy_iterator()), list(other.as_numpy_iterator()))
    made = []

    def elements():
        made.append(1)
        yield np.float32(1)

    generated = tf.data.Dataset.from_generator(
        elements, output_signature=tf.TensorSpec((), tf.float32)
    )
    assert "not read" in of_data(generated)
    assert made == []
    of_data(dataset().cache(str(tmp_path / "cache")))
    assert list(tmp_path.iterdir()) == []


def test_lists_and_single_values_are_told_apart():
    batches = [collections.OrderedDict(x=np.ones([2, 2]), y=[1.0, 2.0])]
    other = copy.deepcopy(batches)
    other[0]["y"] = [1.0, 3.0]
    found = {of_data(data) for data in (batches, other, batches * 2, np.float32(1), [])}
    assert len(found) == 5
    assert of_data(copy.deepcopy(batches)) == of_data(batches)


def test_of_many_clients_some_are_looked_at():
    assert chosen(list(range(5))) == list(range(5))
    assert len(set(chosen(list(range(250))))) == 100


def test_a_function_is_told_by_its_name_and_code():
    def one(weights, factor=2):
        return {"a": {1, 2}, "b": [w * factor for w in weights]}

    texts = {
        same_run.of_function(f) for f in (one, evaluate, evaluate_more, len, Failing(1).release)
    }
    assert len(texts) == 5
    assert re.fullmatch(r"evaluate [0-9a-f]{8}", same_run.of_function(evaluate))
    assert same_run.of_function(None) is None
