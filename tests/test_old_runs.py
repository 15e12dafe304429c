"""Runs that the first version of the packages began: `old_runs/study.py` made their folders."""

import functools
import hashlib
import json
import pathlib
import shutil
import warnings

import numpy as np
import pytest
import tensorflow_federated as tff
from old_runs import study

from tff_optim import ResidentProcess
from tff_optim.resident import CheckpointError, ResidentCheckpoints
from tff_optim.simulation import same_run

HERE = pathlib.Path(__file__).parent / "old_runs"


@functools.cache
def process():
    return study.process()


@pytest.fixture(scope="module")
def resident():
    with ResidentProcess(process(), device="CPU:0") as made:
        yield made


@pytest.fixture
def folder(tmp_path):
    """Copies a folder."""

    def copied(kind):
        shutil.copytree(HERE / kind, tmp_path / kind)
        return tmp_path / kind

    return copied


def undisturbed():
    """What the run has shown in the first version, without times."""
    table = np.genfromtxt(HERE / "undisturbed.csv", delimiter=",", names=True, deletechars="")
    return {name: table[name] for name in table.dtype.names if "time" not in name}


def digests(folder):
    """The files of a folder, but for the lock's."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("kind", ["resident", "plain"])
def test_a_run_that_was_killed_goes_on_with_the_numbers_of_an_undisturbed_one(
    kind, folder, resident
):
    path, made = folder(kind), resident if kind == "resident" else process()
    before = json.loads((path / "arguments.json").read_text())
    with pytest.warns(UserWarning, match="begun with tensorflow of an unknown version"):
        history = study.run(made, path)
    assert history.ended == {("process", 1): "finished"}
    truth = undisturbed()
    assert len(truth) > 30
    for name, column in truth.items():
        np.testing.assert_allclose(
            np.asarray(history.rounds[name], float), column, rtol=1e-5, atol=1e-8, err_msg=name
        )
    assert len(history.clients) == 8 * 3
    # From now on it is a run of today.
    after = json.loads((path / "arguments.json").read_text())
    assert after["changes"][0]["after_round"] == 4
    assert after["changes"][0]["from"]["versions"] is None
    assert before["seed"] == after["seed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert study.run(made, path, rounds=9).rounds["round"][-1] == 9


CHANGES = {
    "seed": ({"seed": 2}, "'seed': 2.*'seed': 1"),
    "clients a round": ({"clients_per_round": 2}, "'clients_per_round': 2"),
    "number of clients": ({"clients": study.clients(7)}, "found one with {'ids': '6 clients'}"),
    "order of clients": (
        {"clients": dict(reversed(study.clients().items()))},
        "`clients_per_round` must give what it gave in .* for round 1; found",
    ),
    "place": ({}, "'checkpoints': 'plain'.*'checkpoints': 'resident'"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*unknown version")
def test_another_run_is_refused_by_name_and_nothing_is_changed(name, folder, resident):
    changed, message = CHANGES[name]
    path = folder("resident")
    before = digests(path)
    with pytest.raises(ValueError, match=message):
        study.run(process() if name == "place" else resident, path, **changed)
    assert digests(path) == before


@pytest.mark.filterwarnings("ignore:.*unknown version")
def test_a_state_of_another_model_is_refused(folder):
    other = study.process(units=3)
    with pytest.raises(TypeError, match=r"`state` must hold float32\[3,3\] .*float32\[3, 2\]"):
        study.run(other, folder("plain"))
    with (
        ResidentProcess(other) as resident,
        pytest.raises(CheckpointError, match=r"saved by another process: .* at .*trainable/0"),
    ):
        study.run(resident, folder("resident"))


def without_rows(path):
    rows = (path / "rounds.csv").read_text().splitlines(keepends=True)
    (path / "rounds.csv").write_text("".join(rows[:3]))


def no_number(path):
    rows = (path / "rounds.csv").read_text()
    (path / "rounds.csv").write_text(rows.replace("\n3,", "\nthree,"))


def no_clients(path):
    (path / "clients.csv").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_rows, r"checkpoints of rounds \[2, 4\] without records"),
        (no_number, "rounds.csv or clients.csv cannot be read .*'three'"),
        (no_clients, "rounds.csv or clients.csv cannot be read .*clients.csv"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*unknown version")
def test_damage_is_refused_and_nothing_is_changed(damage, message, folder, resident):
    path = folder("resident")
    damage(path)
    before = digests(path)
    with pytest.raises(ValueError, match=message):
        study.run(resident, path)
    assert digests(path) == before


@pytest.mark.filterwarnings("ignore:.*unknown version")
def test_a_kill_while_it_is_taken_over_loses_nothing(folder, resident, monkeypatch):
    path = folder("resident")

    def killed(*unused):
        raise KeyboardInterrupt

    for place in ("take_over", "_write"):
        with monkeypatch.context() as patched:
            patched.setattr(same_run, place, killed)
            with pytest.raises(KeyboardInterrupt):
                study.run(resident, path)
    history = study.run(resident, path)
    np.testing.assert_allclose(
        history.rounds["client_work/train/loss"][1:],
        undisturbed()["client_work/train/loss"][1:],
        rtol=1e-5,
    )


def test_a_loop_over_its_checkpoints_goes_on(folder, resident):
    """The state's server optimizer and rule called two of its numbers otherwise then."""
    checkpoints = ResidentCheckpoints(resident, folder("resident") / "checkpoints")
    with pytest.warns(UserWarning, match="was saved with"):
        state, last = checkpoints.resume()
    assert last == 4
    sample = tff.simulation.build_uniform_sampling_fn(range(6), random_seed=1)
    data = list(study.clients().values())
    for number in (5, 6, 7, 8):
        state, metrics = resident.next(state, [data[i] for i in sample(number, 3)])
        np.testing.assert_allclose(
            metrics["client_work"]["train"]["loss"],
            undisturbed()["client_work/train/loss"][number],
            rtol=1e-5,
        )
        checkpoints.save_now(state, number)
    state = resident.materialize(checkpoints.load_now(8))
    assert state.finalizer["step"] == 8
    assert state.aggregator["decay"] == 0.5
