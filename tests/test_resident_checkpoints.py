"""Checkpoints: the same states, and never half of one."""

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import (
    assert_close,
    assert_equal,
    cohorts,
    functional_model,
    model_fn,
    plain_run,
    process,
)

from tff_optim import ResidentProcess
from tff_optim.resident import CheckpointError, ResidentCheckpoints, leaves, maker
from tff_optim.resident.versions import VersionDirectory


@pytest.fixture(scope="module")
def resident():
    with ResidentProcess(process()) as r:
        yield r


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 kB, really full when it is full."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(path):
    """Writes until the disk is full."""
    with open(path, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"x" * 1024)


def test_a_checkpoint_is_tensorflows_and_holds_the_state(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path / "new")
    plain = plain_run()[2][0]
    checkpoints.save_now(resident.restore(plain), 2)
    reader = tf.train.load_checkpoint(str(tmp_path / "new" / "version_2" / "state"))
    for i, weights in enumerate(plain.global_model_weights.trainable):
        np.testing.assert_array_equal(
            reader.get_tensor(f"global_model_weights/trainable/{i}"), weights
        )
    assert len(reader.get_variable_to_shape_map()) == len(tf.nest.flatten(plain)) + 1
    assert_equal(resident.materialize(checkpoints.load_now(2)), plain)


@pytest.mark.parametrize("home", ["of_a_worker", "of_a_device"])
def test_what_the_first_version_of_the_package_saved_is_read_and_its_run_goes_on(home, tmp_path):
    """States that lived in a worker, and on a device, after three rounds."""
    shutil.copytree(pathlib.Path(__file__).parent / "old_checkpoints" / home, tmp_path / "run")
    with ResidentProcess(process(), workers=1) as r:
        checkpoints = ResidentCheckpoints(r, tmp_path / "run")
        with pytest.warns(UserWarning, match="was saved with"):
            state, last = checkpoints.resume()
        assert last == 3
        assert_close(r.materialize(state), plain_run()[3][0])
        for number in (4, 5):
            state, _ = r.next(state, list(cohorts()[number - 1]))
            checkpoints.save_now(state, number)
        assert_close(r.materialize(checkpoints.load_now(5)), plain_run()[5][0])


def test_the_newest_are_kept_and_versions_are_not_overwritten(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path, keep=2)
    state = resident.initialize()
    assert asyncio.run(checkpoints.get_versions()) is None
    for version in (1, 2, 9, 10):
        checkpoints.save_now(state, version)
    assert checkpoints.versions() == [9, 10]
    assert sorted(os.listdir(tmp_path)) == [".lock", "version_10", "version_9"]
    with pytest.raises(tff.program.ProgramStateExistsError):
        checkpoints.save_now(state, 10)
    with pytest.raises(tff.program.ProgramStateNotFoundError):
        checkpoints.load_now(2)
    asyncio.run(checkpoints.remove_all())
    assert checkpoints.versions() == []
    assert os.listdir(tmp_path) == [".lock"]
    keep_all = ResidentCheckpoints(resident, tmp_path, keep=None)
    for version in range(7):
        keep_all.save_now(state, version)
    assert keep_all.versions() == list(range(7))


def test_resume_ends_with_the_numbers_of_an_undisturbed_run(tmp_path):
    with ResidentProcess(process(), workers=1) as r:
        checkpoints = ResidentCheckpoints(r, tmp_path)
        state, last = checkpoints.resume()
        assert last == 0
        for i in (1, 2, 3):
            state, _ = r.next(state, list(cohorts()[i - 1]))
            checkpoints.save_now(state, i)
    with ResidentProcess(process(), workers=1) as r:
        state, last = ResidentCheckpoints(r, tmp_path).resume()
        assert last == 3
        for i in (4, 5):
            state, _ = r.next(state, list(cohorts()[i - 1]))
        assert_equal(r.materialize(state), plain_run()[5][0])


def test_tffs_loop_resumes_by_itself(resident, tmp_path):
    def run(rounds):
        return tff.simulation.run_training_process(
            resident,
            lambda r: list(cohorts()[r - 1]),
            rounds,
            program_state_manager=ResidentCheckpoints(resident, tmp_path),
        )

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        run(2)
        assert_close(resident.materialize(run(3)), plain_run()[3][0])
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_a_full_disk_is_an_error_and_leaves_the_last_version(resident, tiny_disk):
    checkpoints = ResidentCheckpoints(resident, tiny_disk / "run")
    state = resident.restore(plain_run()[2][0])
    checkpoints.save_now(state, 1)
    filler = tiny_disk / "filler"
    fill(filler)
    with pytest.raises(
        CheckpointError, match=r"(?s)Version 2 could not .*versions before it, \[1\]"
    ):
        checkpoints.save_now(state, 2)
    assert checkpoints.versions() == [1]
    os.remove(filler)
    checkpoints.save_now(state, 2)  # the state is still there
    assert_equal(resident.materialize(checkpoints.load_now(2)), plain_run()[2][0])


def test_a_disk_that_becomes_full_in_a_save_is_reported_too(resident, tiny_disk, monkeypatch):
    # The directory can be made, and there is no room for what is written into it.
    checkpoints = ResidentCheckpoints(resident, tiny_disk / "run")
    state = resident.initialize()
    real = leaves.write_checkpoint

    def fill_first(*args):
        fill(tiny_disk / "filler")
        return real(*args)

    monkeypatch.setattr(leaves, "write_checkpoint", fill_first)
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.save_now(state, 1)
    assert checkpoints.versions() == []


def test_a_killed_save_leaves_the_last_good_version(tmp_path):
    with ResidentProcess(process(), workers=1) as r:
        checkpoints = ResidentCheckpoints(r, tmp_path)
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        checkpoints.save_now(state, 1)
        child = os.fork()
        if child == 0:  # a process that is killed between the two files of a version
            with VersionDirectory(str(tmp_path), keep=None).new(2) as path:
                pathlib.Path(path, "state.index").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert [name for name in os.listdir(tmp_path) if name.startswith("unfinished_")]
        assert checkpoints.versions() == [1]
        state, last = checkpoints.resume()
        assert last == 1
        assert_equal(r.materialize(state), plain_run()[1][0])
        checkpoints.save_now(state, 2)
        assert sorted(os.listdir(tmp_path)) == [".lock", "version_1", "version_2"]


def test_broken_and_foreign_checkpoints(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path)
    (tmp_path / "version_1").mkdir()
    with pytest.raises(CheckpointError, match=r"No version in .* is whole. Version 1 .* lacks"):
        checkpoints.resume()
    other = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, tff.learning.optimizers.build_sgdm(0.1)
    )
    with ResidentProcess(other) as r:
        ResidentCheckpoints(r, tmp_path / "other").save_now(r.initialize(), 1)
    with pytest.raises(CheckpointError, match=r"saved by another process: it lacks \['finalizer"):
        ResidentCheckpoints(resident, tmp_path / "other").resume()


@functools.cache
def with_server_optimizer(kind, rate, **numbers):
    build = getattr(tff.learning.optimizers, f"build_{kind}")
    return tff.learning.algorithms.build_weighted_fed_avg(
        functional_model(),
        tff.learning.optimizers.build_sgdm(0.05),
        server_optimizer_fn=build(rate, **numbers),
    )


def test_the_state_of_another_optimizer_with_the_same_names_is_refused(resident, tmp_path):
    yogi, adam = with_server_optimizer("yogi", 0.1), with_server_optimizer("adam", 0.1)
    with ResidentProcess(yogi) as r, ResidentProcess(adam, device="CPU:0") as other:
        state = r.restore(yogi.initialize())
        ResidentCheckpoints(r, tmp_path).save_now(state, 1)
        # The same with other numbers, in another place, is the same optimizer.
        again = with_server_optimizer("yogi", 0.3, beta_1=0.5)
        with ResidentProcess(again, device="CPU:0") as third:
            assert ResidentCheckpoints(third, tmp_path).resume()[1] == 1
        assert r.state_type.is_equivalent_to(other.state_type)
        with pytest.raises(CheckpointError, match="computes a new state with other operations"):
            ResidentCheckpoints(other, tmp_path).resume()
        accepting = ResidentCheckpoints(other, tmp_path, accept_changes=True)
        with pytest.warns(UserWarning, match="It is loaded, as `accept_changes` asks"):
            assert accepting.resume()[1] == 1
        # What another version has written may count other operations, or name fewer versions.
        for change in ({"format": 1, "tff_optim": None}, {"tff_optim": "0.0.9"}):
            rewrite_made_by(tmp_path / "version_1" / "made_by.json", change)
            with pytest.warns(UserWarning, match="saved with .* by the same optimizer cannot be"):
                assert ResidentCheckpoints(other, tmp_path).resume()[1] == 1


def rewrite_made_by(path, change):
    """Makes what made a version another one, None to leave a name out, with a checksum that fits."""
    found = {**json.loads(path.read_text()), **change}
    del found["checksum"]
    found = {name: value for name, value in found.items() if value is not None}
    checksum = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    path.write_text(json.dumps({**found, "checksum": checksum}))


def test_what_made_a_state_is_its_servers_step():
    def made_by(*arguments, **numbers):
        return maker.fingerprint(with_server_optimizer(*arguments, **numbers).next)

    adam = made_by("adam", 0.1)
    assert adam == made_by("adam", 1.0, beta_1=0.2)
    elsewhere = tff.learning.algorithms.build_weighted_fed_avg(
        functional_model(),
        tff.learning.optimizers.build_sgdm(0.05),
        server_optimizer_fn=tff.learning.optimizers.build_adam(0.1),
        metrics_aggregator=tff.learning.metrics.sum_then_finalize,
    )
    assert adam == maker.fingerprint(elsewhere.next)
    others = {made_by("yogi", 0.1), made_by("sgdm", 1.0, momentum=0.9), made_by("rmsprop", 0.1)}
    assert len(others | {adam}) == 4


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        (3.0, TypeError, "`version` must be a whole number"),
        ("3", TypeError, "`version` must be a whole number"),
        (True, TypeError, "`version` must be a whole number"),
        (None, TypeError, "`version` must be a whole number"),
        (-1, ValueError, "`version` must be from 0 to"),
        (2**63, ValueError, "`version` must be from 0 to"),
        (4, ValueError, "`version` must be above the newest .*, 5; found 4"),
        (5, tff.program.ProgramStateExistsError, ""),
    ],
)
def test_versions_are_whole_numbers_above_the_newest(resident, tmp_path, version, error, message):
    checkpoints = ResidentCheckpoints(resident, tmp_path)
    state = resident.initialize()
    checkpoints.save_now(state, np.int64(5))
    with pytest.raises(error, match=message):
        checkpoints.save_now(state, version)
    assert sorted(os.listdir(tmp_path)) == [".lock", "version_5"]
    if not isinstance(version, int) or isinstance(version, bool):
        with pytest.raises(error, match=message):
            checkpoints.load_now(version)


def test_of_two_runs_in_one_directory_the_first_goes_on(resident, tmp_path):
    first, second = (ResidentCheckpoints(resident, tmp_path) for _ in range(2))
    state = resident.restore(plain_run()[1][0])
    first.save_now(state, 1)
    with pytest.raises(CheckpointError, match=r"has saved version 1 .* newest was none. The other"):
        second.save_now(state, 2)
    first.save_now(state, 2)
    with pytest.raises(CheckpointError, match="Another run has saved version 2"):
        second.save_now(state, 3)
    # Taking over is asked for in words; then the other one is told.
    second.resume()
    second.save_now(state, 3)
    with pytest.raises(CheckpointError, match=r"has saved version 3 .* newest was 2"):
        first.save_now(state, 4)
    assert first.versions() == [1, 2, 3]


def test_a_version_that_somebody_is_saving_is_left_alone(tmp_path):
    first, second = (VersionDirectory(str(tmp_path), keep=None) for _ in range(2))
    with first.new(1) as path:
        with (
            pytest.raises(CheckpointError, match=f"Process {os.getpid()} on .* is saving to"),
            second.new(1),
        ):
            pass
        assert os.path.isdir(path)
        # A forked child does not keep the lock when its parent has ended.
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
    second.look()
    with second.new(2):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_resume_goes_back_to_a_whole_version_and_on_from_there(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path, keep=None)
    for version in (1, 2, 3):
        checkpoints.save_now(resident.restore(plain_run()[version][0]), version)
    os.truncate(tmp_path / "version_3" / "state.data-00000-of-00001", 3)
    os.remove(tmp_path / "version_2" / "state.index")
    (tmp_path / "version_x").mkdir()
    again = ResidentCheckpoints(resident, tmp_path, keep=None)
    with pytest.raises(CheckpointError, match=r"Version 3 in .* cannot be read"):
        again.resume(go_back=False)
    with pytest.raises(CheckpointError, match=r"Version 2 in .* lacks the file state.index"):
        again.load_now(2)
    with pytest.warns(
        UserWarning,
        match=r"(?s)resuming from version 1: Version 3 .* Version 2 .* version_x is not",
    ):
        state, version = again.resume()
    assert version == 1
    assert_equal(resident.materialize(state), plain_run()[1][0])
    again.save_now(resident.restore(plain_run()[2][0]), 2)
    assert again.versions() == [1, 2]
    aside = [name.rpartition("_")[0] for name in os.listdir(tmp_path) if "damaged" in name]
    assert sorted(aside) == ["damaged_version_2", "damaged_version_3"]
    asyncio.run(again.remove_all())
    assert sorted(os.listdir(tmp_path)) == [".lock", "version_x"]


def test_no_bit_of_an_index_ends_in_an_error_of_another_kind(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path)
    checkpoints.save_now(resident.restore(plain_run()[1][0]), 1)
    path = tmp_path / "version_1" / "state.index"
    whole, kinds = path.read_bytes(), {}
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            tf.train.load_checkpoint(str(path.with_suffix("")))
        except Exception as error:
            kinds.setdefault(type(error), []).append(bytes(flipped))
    assert len(kinds) > 1  # TensorFlow has several for it
    for damaged in kinds.values():
        path.write_bytes(damaged[0])
        with pytest.raises(CheckpointError, match=r"Version 1 in .* cannot be read"):
            checkpoints.load_now(1)


def test_tffs_loop_goes_back_too(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path)
    assert asyncio.run(checkpoints.load_latest(None)) == (None, 0)
    for version in (1, 2):
        checkpoints.save_now(resident.restore(plain_run()[version][0]), version)
    (tmp_path / "version_2" / "made_by.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"Version 2 .* its checksum does not match"):
        state, version = asyncio.run(checkpoints.load_latest(None))
    assert version == 1
    assert_equal(resident.materialize(state), plain_run()[1][0])


def test_states_are_for_their_owner_alone(resident, tmp_path):
    checkpoints = ResidentCheckpoints(resident, tmp_path / "run")
    checkpoints.save_now(resident.initialize(), 1)
    for folder, _, files in os.walk(tmp_path / "run"):
        assert os.stat(folder).st_mode & 0o077 == 0
        for name in files:
            assert os.stat(os.path.join(folder, name)).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": 0}, ValueError, "`keep` must be a whole number of at least 1"),
        ({"directory": ""}, ValueError, "`directory` must be a path"),
        ({"process": 1}, TypeError, "`process` must be a `ResidentProcess`; found int"),
    ],
)
def test_bad_arguments(resident, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        ResidentCheckpoints(**{"process": resident, "directory": tmp_path, **arguments})
