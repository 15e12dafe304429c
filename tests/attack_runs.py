"""Attacks on runs and their stores: two programs, kills, and damage of every file of a folder.

After each the run must give what an undisturbed one gives, or an error in the package's words.
"""

import contextlib
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import attack_checkpoints
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from attacks import Attack, within
from test_run_folder import files_of, without_times
from test_several_runs import build_scaffold
from test_simulation import build_process, evaluate, make_clients

import aggregators
from tff_optim import ResidentProcess, simulation

ROUNDS = 6
# Where clients train, and whether they keep a state.
KINDS = [(place, states) for place in ("plain TFF", "CPU:0") for states in (False, True)]
# What each refusal says; anything else is an error that a user would have to guess at.
WORDS = re.compile(r"`\w+` must |must be readable|must hold|could not be written")
# What is made anew of the records, which lose those of later rounds, as soon as a run goes on.
VIEWS = r"records|rounds|clients\.|tensorboard"


@functools.cache
def process_of(place, states):
    process = build_scaffold() if states else build_process()
    return process if place == "plain TFF" else ResidentProcess(process, device=place)


def run(kind, directory, rounds=ROUNDS):
    return simulation.run(
        process_of(*kind),
        make_clients(),
        rounds=rounds,
        clients_per_round=3,
        evaluate=evaluate,
        directory=directory,
        rounds_per_checkpoint=2,
        client_states=aggregators.ClientStates if kind[1] else None,
        progress=False,
    )


def run_within(seconds, kind, folder):
    """See `within`; a thread has no context of TFF by itself."""
    context = tff.framework.get_context_stack().current

    def call():
        with tff.framework.get_context_stack().install(context):
            return run(kind, folder)

    return within(seconds, call)


def shown(kind, history, folder):
    """All that a run shows: its numbers, and what it leaves in the folder."""
    process = process_of(*kind)
    state = process.materialize(history.state) if kind[0] != "plain TFF" else history.state
    found = {
        "rounds": [without_times(record) for record in history.rounds],
        "clients": list(history.clients),
        "state": [np.asarray(leaf).tobytes() for leaf in tf.nest.flatten(state)],
        **files_of(folder),
    }
    if kind[1]:
        with aggregators.ClientStates(list(make_clients()), str(folder / "client_states")) as store:
            found |= {f"state of {one}": _state(store, one) for one in store.client_ids}
    return found


def _state(store, client):
    try:
        return str(store.get(client))
    except RuntimeError as error:  # of a client that is not drawn again: whoever reads it is told
        return error if WORDS.search(str(error)) else repr(error)


@functools.cache
def _model(kind, rounds):
    """A folder after so many undisturbed rounds, and what the run has shown."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="attack-runs-")) / "run"
    _DIRECTORIES.append(path.parent)
    return path, shown(kind, run(kind, path, rounds), path)


_DIRECTORIES = []


@contextlib.contextmanager
def models():
    """Undisturbed runs, made when first asked for, and removed in the end."""
    try:
        yield _model
    finally:
        _model.cache_clear()
        while _DIRECTORIES:
            shutil.rmtree(_DIRECTORIES.pop())


def judge(kind, folder, model, *, damaged):
    """Goes on with a run that something has happened to."""
    truth, before = model(kind, ROUNDS)[1], _contents(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history, error, in_time = run_within(40, kind, folder)
        if not in_time:
            return "hung"
        if error is not None and not (damaged and WORDS.search(str(error))):
            return f"unclean: {error!r:.600}"
        if error is not None:
            after = _contents(folder)
            gone = [name for name, content in before.items() if after.get(name) != content]
            gone = [name for name in gone if not re.match(VIEWS, name)]
            return f"lost: changed {gone} before {error!r:.300}" if gone else "right"
        found = shown(kind, history, folder)
    if damaged:  # other rounds may be saved, and whoever reads a client's state may be told
        told = [name for name, value in found.items() if isinstance(value, RuntimeError)]
        left_alone = [
            name for name in {**truth, **found} if re.match("checkpoints|records|arguments", name)
        ]
        for name in (*told, *left_alone):
            found[name] = truth.get(name)
    other = [name for name in {**truth, **found} if found.get(name) != truth.get(name)]
    return f"lost: other {other}" if other else "right"


def _contents(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------ damage


def _of_lines(change):
    """Damage of the lines of a file."""

    def of_file(rng, path):
        with open(path, "r+b") as file:
            lines = file.read().splitlines(keepends=True)
            file.seek(0)
            file.write(b"".join(change(lines, rng.randrange(len(lines) or 1))))
            file.truncate()

    return of_file


OF_FILES = {
    **{way.__name__: way for way in attack_checkpoints.OF_FILES},
    "lines cut off": _of_lines(lambda lines, at: lines[:at]),
    "a line left out": _of_lines(lambda lines, at: lines[:at] + lines[at + 1 :]),
    "emptied": _of_lines(lambda lines, at: []),
    "twice": _of_lines(lambda lines, at: lines * 2),
    "removed": lambda rng, path: os.remove(path),
}


def _newest(folder):
    return max((folder / "checkpoints").glob("*_[0-9]*"), key=lambda p: int(p.name.split("_")[-1]))


def _in_place(make):
    """Something else in the place of the newest state."""

    def of_folder(rng, folder, model):
        newest = _newest(folder)
        shutil.rmtree(newest)
        make(newest)

    return of_folder


def _foreign(rng, folder, model):
    newest = _newest(folder)
    name = newest.name.rpartition("_")[0] + rng.choice(("_100", "_02", "_٣", "_6_temp1234", "_"))
    shutil.copytree(newest, newest.parent / name)


def _exchanged(rng, folder, model):
    newest = _newest(folder)
    older, third = newest.with_name(newest.name[:-1] + "4"), newest.with_name("third")
    for source, target in ((newest, third), (older, newest), (third, older)):
        source.rename(target)


def _of_another_run(name):
    """The file, or the folder, of a run that has gone less far, whose rows have other times."""

    def of_folder(rng, folder, model):
        target, source = folder / name, model(3) / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    return of_folder


def _of_store(change):
    """What befalls the clients' states of a run that keeps some, of another run or of its own."""

    def of_folder(rng, folder, model):
        store = folder / "client_states"
        if store.is_dir():
            change(store, model(3) / "client_states")

    return of_folder


def _older_store(store, other):
    shutil.rmtree(store)
    shutil.copytree(other, store)


def _exchanged_states(store, other):
    for kind in ("index", "data-00000-of-00001"):
        paths = sorted(store.glob(f"[0-9]*.{kind}"))
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
            path.write_bytes(content)


def _emptied_table(store, other):
    with contextlib.closing(sqlite3.connect(store / "states.sqlite")) as table:
        table.executescript("DELETE FROM states")


OF_FOLDERS = {
    "an empty version": _in_place(os.mkdir),
    "a file for a version": _in_place(lambda path: path.write_text("not a folder")),
    "no newest version": _in_place(lambda path: None),
    "a foreign version": _foreign,
    "exchanged versions": _exchanged,
    "no versions": lambda rng, folder, model: shutil.rmtree(folder / "checkpoints"),
    "a file of mine": lambda rng, folder, model: (_newest(folder) / "notes").write_text("mine"),
    **{
        f"another run's {name}": _of_another_run(name)
        for name in ("records.jsonl", "rounds.csv", "checkpoints", "tensorboard")
    },
    "no client states": _of_store(lambda store, other: shutil.rmtree(store)),
    "client states of an older round": _of_store(_older_store),
    "exchanged client states": _of_store(_exchanged_states),
    "an emptied table of client states": _of_store(_emptied_table),
}


def damage(count, seed):
    """Damages one file of a run after five of six rounds, and goes on."""
    rng = random.Random(seed)
    with models() as model, tempfile.TemporaryDirectory() as path:
        for number in range(count):
            kind, folder = KINDS[number % len(KINDS)], pathlib.Path(path) / f"run {number}"
            shutil.copytree(model(kind, 5)[0], folder)
            if number // len(KINDS) % 3 == 0:
                label = list(OF_FOLDERS)[number // len(KINDS) // 3 % len(OF_FOLDERS)]
                OF_FOLDERS[label](rng, folder, lambda rounds, k=kind: model(k, rounds)[0])
            else:
                # Each kind of file as often as the others, however many there are of it.
                files = [file for file in folder.rglob("*") if file.is_file()]
                parts = sorted({file.relative_to(folder).parts[0] for file in files})
                part = folder / rng.choice(parts)
                file = rng.choice(sorted(f for f in files if part in (f, *f.parents)))
                label = rng.choice(list(OF_FILES))
                OF_FILES[label](rng, file)
                label += f" of {file.relative_to(folder)}"
            yield f"{label}, {kind}", judge(kind, folder, model, damaged=True)
            shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------- moments


class Camera:
    """Copies a folder before single file operations in it: what a kill at that moment leaves."""

    def __init__(self, folder, moments):
        self._folder, self._moments = folder, set(moments)
        self.count, self.copies, self._lock = 0, [], threading.Lock()

    def __call__(self, event, arguments):
        if event not in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"):
            return
        is_here = str(arguments[0]).startswith(str(self._folder)) and self._folder.exists()
        if not is_here or (event == "open" and not set(arguments[1] or "") & set("wa+")):
            return
        if self._lock.acquire(blocking=False):  # else it is a copy that is being made
            self.count += 1
            if self.count in self._moments:
                copy = self._folder.with_name(f"at {self.count}")
                shutil.copytree(self._folder, copy)
                self.copies.append((f"{event} of {arguments[0]}", copy))
            self._lock.release()


_CAMERAS = []


@functools.cache
def _hook():
    """Once, for a hook cannot be taken away."""
    sys.addaudithook(lambda *call: [camera(*call) for camera in _CAMERAS])


@contextlib.contextmanager
def watched(folder, moments):
    _hook()
    camera = Camera(folder, moments)
    _CAMERAS.append(camera)
    try:
        yield camera
    finally:
        _CAMERAS.remove(camera)


def moments(count, seed):
    """Goes on from what a kill would have left before single file operations of a run."""
    rng = random.Random(seed)
    with models() as model, tempfile.TemporaryDirectory() as path:
        for kind in KINDS:
            folder = pathlib.Path(path) / "run"
            with watched(folder, ()) as camera:
                run(kind, folder)
            shutil.rmtree(folder)
            chosen = rng.sample(range(1, camera.count + 1), min(count // len(KINDS), camera.count))
            with watched(folder, chosen) as camera:
                run(kind, folder)
            shutil.rmtree(folder)
            for label, copy in camera.copies:
                label = f"before {label.replace(str(folder), '')}, {kind}"
                yield label, judge(kind, copy, model, damaged=False)
                shutil.rmtree(copy)


# --------------------------------------------------------------------------- kills and two programs

_CHILD = """
import sys
import tensorflow_federated as tff
tff.backends.native.set_sync_local_cpp_execution_context()
import attack_runs
kind = (sys.argv[1], sys.argv[2] == "True")
for line in sys.stdin:
    try:
        attack_runs.run(kind, line.strip())
        print("ended", flush=True)
    except Exception as error:
        print(repr(error).replace(chr(10), " "), flush=True)
tff.test.set_no_default_context()
"""


@contextlib.contextmanager
def program(kind, warm):
    """Another program, which runs in each folder that it is told; twice in one that is removed."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, kind[0], str(kind[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        for _ in range(2):  # it is quicker the second time, when its functions are made
            begin = time.monotonic()
            child.stdin.write(f"{warm}\n")
            assert child.stdout.readline() == "ended\n"
            shutil.rmtree(warm)
        yield child, time.monotonic() - begin
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def kills(count, seed):
    """Kills a program while it trains, at a random moment; the run must go on."""
    rng = random.Random(seed)
    with models() as model, tempfile.TemporaryDirectory() as path:
        for number in range(count):
            kind, folder = KINDS[number % len(KINDS)], pathlib.Path(path) / f"run {number}"
            with program(kind, f"{path}/warm") as (child, whole):
                child.stdin.write(f"{folder}\n")
                wait = rng.random() * whole
                time.sleep(wait)
            folder.mkdir(exist_ok=True)
            label = f"kill after {wait:.2f} of {whole:.2f} s, {kind}"
            yield label, judge(kind, folder, model, damaged=False)


def two_programs(count, seed):
    """Two programs that run in one folder at once: one of them trains, the other is told so."""
    rng = random.Random(seed)
    with models() as model, tempfile.TemporaryDirectory() as path:
        for kind in KINDS[:count]:
            model(kind, ROUNDS)
            with program(kind, f"{path}/warm") as (child, whole):
                for number in range(max(count // len(KINDS), 1)):
                    folder = pathlib.Path(path) / f"{kind}, run {number}"
                    child.stdin.write(f"{folder}\n")
                    time.sleep(rng.random() * 0.5 * whole)
                    _, error, in_time = run_within(120, kind, folder)
                    told = [str(error)] * (error is not None) if in_time else ["hung"]
                    told += [line for line in [child.stdout.readline()] if line != "ended\n"]
                    label = f"two programs, {kind}"
                    if len(told) > 1 or any("be of one run at a time" not in t for t in told):
                        yield label, f"unclean: {told}"
                    else:  # of which nothing is left to do
                        yield label, judge(kind, folder, model, damaged=False)


ATTACKS = [
    Attack("two programs in a folder", two_programs, count=80, in_tests=0),
    Attack("damaged folders of runs", damage, count=600, in_tests=32),
    Attack("moments of a run", moments, count=240, in_tests=8),
    Attack("kills of runs", kills, count=80, in_tests=0),
]
