"""Attacks on checkpoints: two writers, damage, kills, and files that cannot grow."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import tensorflow as tf
from attacks import Attack, within
from resident_cases import plain_run, process

from tff_optim import ResidentProcess
from tff_optim.resident import CheckpointError, ResidentCheckpoints
from tff_optim.resident.versions import VersionDirectory

REASONS = ("Another run has saved", "is saving to")


def equal(one, other):
    return all(
        (a == b).all() if hasattr(a == b, "all") else a == b
        for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True)
    )


# ------------------------------------------------------------------------------------- two writers


def _write(path, count, seed, report):
    """A run of its own, which now and then takes over from the other."""
    rng = random.Random(seed)
    directory = VersionDirectory(path, keep=None)
    for _ in range(count):
        if rng.random() < 0.3:
            directory.look()
        version = max(directory.versions(), default=0) + 1
        text = f"{os.getpid()} {version}"
        try:
            with directory.new(version) as place:
                with open(os.path.join(place, "state"), "w") as f:
                    f.write(text)
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 0.003)
            verdict = "saved"
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
        print(json.dumps([version, text, verdict]), file=report, flush=True)


def two_writers(count, seed):
    """Processes that save to one directory at the same time, each its own numbers."""
    with tempfile.TemporaryDirectory() as path:
        children = []
        for number in range(2):
            child = os.fork()
            if child == 0:
                try:
                    with open(f"{path}/report_{number}", "w") as report:
                        _write(f"{path}/run", count // 2, seed * 2 + number, report)
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        for number in range(2):
            with open(f"{path}/report_{number}") as f:
                lines = [json.loads(line) for line in f]
            for version, text, verdict in lines:
                yield f"save of version {version}", _judge_save(path, version, text, verdict)
        left = [e for e in os.listdir(f"{path}/run") if e.startswith("unfinished_")]
        if left:
            yield "two writers", f"left behind: {left}"


def _judge_save(path, version, text, verdict):
    if verdict == "saved":
        try:
            with open(f"{path}/run/version_{version}/state") as f:
                found = f.read()
        except OSError as error:
            return f"lost: {error}"
        return "right" if found == text else f"lost: {found} instead of {text}"
    if verdict.startswith("CheckpointError") and any(r in verdict for r in REASONS):
        return "right"
    return f"unclean: {verdict}"


# ------------------------------------------------------------------------------------------ damage


def _flip(rng, path):
    with open(path, "r+b") as f:
        data = bytearray(f.read() or b"\0")
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        f.seek(0)
        f.write(data)


def _truncate(rng, path):
    os.truncate(path, rng.randrange(os.path.getsize(path) or 1))


def _dangle(rng, path):
    os.remove(path)
    os.symlink("/no/such/file", path)


def _directory(rng, path):
    os.remove(path)
    os.mkdir(path)


def _pipe(rng, path):
    os.remove(path)
    os.mkfifo(path)


def _junk(rng, path):
    with open(path, "wb") as f:
        f.write(rng.randbytes(rng.randrange(2000)))


OF_FILES = (_flip, _flip, _flip, _truncate, _truncate, _dangle, _directory, _pipe, _junk)


def _empty(version):
    shutil.rmtree(version)
    os.mkdir(version)


def _file(version):
    shutil.rmtree(version)
    with open(version, "w") as f:
        f.write("not a directory")


def _dangling(version):
    shutil.rmtree(version)
    os.symlink("/no/such/directory", version)


def _odd(name):
    def rename(version):
        os.rename(version, os.path.join(os.path.dirname(version), name))

    return rename


OF_VERSIONS = (
    *(_empty, _file, _dangling),
    *map(_odd, ("version_٢", "version_02", "version_2x", "version_-2", "version_", "version_ 2")),
    *map(_odd, ("version_2.0", "version_" + "9" * 100, "version_2\n")),
)


def damage(count, seed):
    """Damages the newest version; the one before it must be resumed, and the newer one named."""
    rng = random.Random(seed)
    with (
        tempfile.TemporaryDirectory() as path,
        ResidentProcess(process(), workers=1) as in_worker,
        ResidentProcess(process(), device="CPU:0") as here,
    ):
        good, newer = plain_run()[1][0], plain_run()[2][0]
        kept = ResidentCheckpoints(in_worker, f"{path}/kept")
        kept.save_now(good, 1)
        kept.save_now(newer, 2)
        for number in range(count):
            run = f"{path}/run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(f"{path}/kept", run)
            version = f"{run}/version_2"
            if number < len(OF_VERSIONS):
                OF_VERSIONS[number](version)
                label = f"damage of a version, kind {number}"
            else:
                name = rng.choice(os.listdir(version))
                way = rng.choice(OF_FILES)
                way(rng, os.path.join(version, name))
                label = f"{way.__name__} of {name}"
            resident = rng.choice((in_worker, here))
            yield f"{label}, {resident}", _judge_damage(resident, run, good, newer)


def _judge_damage(resident, run, good, newer):
    checkpoints = ResidentCheckpoints(resident, run)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result, error, in_time = within(30, checkpoints.resume)
    if not in_time:
        return "hung"
    if error is not None:
        return f"unclean: {error!r}"
    state, version = result
    plain = resident.materialize(state)
    if version == 2:
        return "right" if equal(plain, newer) else "lost: other numbers, in silence"
    if version != 1 or not equal(plain, good):
        return f"lost: resumed {version}"
    named = [w for w in said if "Left out" in str(w.message) and "ersion" in str(w.message)]
    if not named:
        return "unclean: a version was left out in silence"
    checkpoints.save_now(newer, 2)  # and the run goes on
    return "right" if equal(resident.materialize(checkpoints.resume()[0]), newer) else "lost"


# ------------------------------------------------------------------------------------------- kills

_SAVING = """
import sys
import tensorflow_federated as tff
tff.test.set_no_default_context()
from resident_cases import process
from tff_optim import ResidentProcess
from tff_optim.resident import ResidentCheckpoints
with ResidentProcess(process()) as resident:
    checkpoints = ResidentCheckpoints(resident, sys.argv[1])
    state, last = checkpoints.resume()
    print("resumed", last, flush=True)
    hparams = resident.get_hparams(state)
    for version in range(last + 1, last + 100000):
        hparams["finalizer"]["learning_rate"] = float(version)
        state = resident.set_hparams(state, hparams)
        checkpoints.save_now(state, version)
        print("saved", version, flush=True)
"""


def kills(count, seed):
    """Kills a run while it saves all the time; it must go on from the last version it reported."""
    from worker_faults import directories_of

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as path:
        last = 0
        with ResidentProcess(process()) as resident:
            for number in range(count):
                run = subprocess.Popen(
                    [sys.executable, "-c", _SAVING, f"{path}/run"],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
                try:
                    resumed = int(run.stdout.readline().split()[1])
                    saved, enough = resumed, resumed + rng.randrange(1, 6)
                    while saved < enough:
                        saved = int(run.stdout.readline().split()[1])
                    time.sleep(rng.random() * 0.05)
                finally:
                    run.send_signal(signal.SIGKILL)
                    rest = run.stdout.read().split()
                    run.wait()
                saved = int(rest[-1]) if rest else saved
                state, found = ResidentCheckpoints(resident, f"{path}/run").resume()
                rate = resident.get_hparams(state)["finalizer"]["learning_rate"]
                deadline = time.monotonic() + 20
                while directories_of(run.pid) and time.monotonic() < deadline:
                    time.sleep(0.1)
                label = f"kill {number} after version {saved}"
                if resumed < last or found < saved:
                    yield label, f"lost: {found} instead of {saved}"
                elif found and rate != found:
                    yield label, f"lost: the numbers of version {rate}"
                elif directories_of(run.pid):
                    yield label, f"left behind: {directories_of(run.pid)}"
                else:
                    yield label, "right"
                last = found


# -------------------------------------------------------------------------- files that cannot grow


@contextlib.contextmanager
def small_file_system(options):
    """A file system of 256 kB in memory; None where that needs more rights."""
    with tempfile.TemporaryDirectory() as path:
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        if subprocess.run(mount, capture_output=True).returncode:
            yield None
            return
        try:
            yield path
        finally:
            subprocess.run(["umount", path], check=True)


def fill(path):
    """Writes until the disk is full; removing the file makes room again."""
    with open(path, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"x" * 256)


def use_up_inodes(path):
    os.makedirs(path)
    with contextlib.suppress(OSError):
        for number in range(1000):
            open(f"{path}/{number}", "w").close()


@contextlib.contextmanager
def file_limit(pid, size):
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def limits(count, seed):
    """No room, no inodes, no file above a size: told, and the state can still be used and saved."""
    rng = random.Random(seed)
    with ResidentProcess(process()) as resident:
        plain = plain_run()[1][0]
        for _ in range(count):
            way = rng.choice(("room", "inodes", "size"))
            options = "size=256k" if way != "inodes" else "size=1m,nr_inodes=20"
            with small_file_system(options) as path:
                if path is None:
                    continue
                checkpoints = ResidentCheckpoints(resident, f"{path}/run")
                state = resident.restore(plain)
                checkpoints.save_now(state, 1)
                with contextlib.ExitStack() as stack:
                    if way == "room":
                        fill(f"{path}/filler")
                        stack.callback(os.remove, f"{path}/filler")
                    elif way == "inodes":
                        use_up_inodes(f"{path}/filler")
                        stack.callback(shutil.rmtree, f"{path}/filler")
                    else:
                        stack.enter_context(file_limit(os.getpid(), rng.randrange(1, 60)))
                    _, error, in_time = within(30, lambda c=checkpoints, s=state: c.save_now(s, 2))
                yield (
                    f"no {way}, {resident}",
                    _judge_limit(checkpoints, resident, state, plain, error, in_time, path),
                )


def _judge_limit(checkpoints, resident, state, plain, error, in_time, path):
    if not in_time:
        return "hung"
    if not isinstance(error, CheckpointError) or "make room" not in str(error):
        return f"unclean: {error!r}"
    left = [e for e in os.listdir(f"{path}/run") if e not in (".lock", "version_1")]
    if left:
        return f"left behind: {left}"
    try:
        checkpoints.save_now(state, 2)
    except Exception as again:
        return f"lost: {again!r}"
    return "right" if equal(resident.materialize(checkpoints.load_now(2)), plain) else "lost"


ATTACKS = [
    Attack("saves by two writers", two_writers, count=900, in_tests=200),
    Attack("damaged versions", damage, count=300, in_tests=40),
    Attack("files that cannot grow", limits, count=60, in_tests=6),
    Attack("kills while saving", kills, count=32, in_tests=0),
]
