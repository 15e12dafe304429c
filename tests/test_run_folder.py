"""A run's folder: one owner, one round that all follows, records that keep what was written."""

import ast
import csv
import json
import math
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf
from test_simulation import build_process, evaluate, make_clients, numbers, start, wait_for

from tff_optim import ResidentProcess, simulation
from tff_optim.resident import locks
from tff_optim.simulation.board import Board
from tff_optim.simulation.records import CsvView, RecordFile

ODD = [
    *("007", "1e3", "True", "", "NaN", "null", "a,b", 'say "so"', "\r", "a\r\nb", "\n", "\u2028"),
    *("\ud800", "é\udc80", "\0", "=1+1", " x ", "client 0"),
]


# --------------------------------------------------------------------------------- the file itself


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


@pytest.fixture
def file(path):
    records = RecordFile(str(path))
    records.start()
    return records


def again(path):
    """The file as another program reads it, and what is wrong with it."""
    other = RecordFile(str(path))
    wrong = other.read()
    return other, wrong


@pytest.mark.parametrize(
    "value",
    [
        *(7, 7.0, True, False, None, 0, -0.0, 0.1, 1e300, 2**64 - 1, 10**40, -1e-320),
        *(math.inf, -math.inf, math.nan, float(np.float32(0.1))),
        *ODD,
    ],
    ids=ascii,
)
def test_a_value_comes_back_as_it_was(file, path, value):
    file.append({"a": value, "b": {value: [value]} if isinstance(value, str) else [value]})
    other, wrong = again(path)
    assert not wrong
    found = other.values[0]["a"]
    assert type(found) is type(value)
    assert repr(found) == repr(value)
    assert repr(other.values) == repr(file.values)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


DAMAGE = {
    "a digit": lambda lines: [*lines[:2], lines[2].replace(b"2", b"3", 1), *lines[3:]],
    "a digest": lambda lines: [*lines[:2], lines[2][:-4] + b"x" + lines[2][-3:], *lines[3:]],
    "one is missing": lambda lines: [*lines[:2], *lines[3:]],
    "one is there twice": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "exchanged": lambda lines: [*lines[:2], lines[3], lines[2]],
    "no end of line": lambda lines: [*lines[:2], lines[2].strip(), *lines[3:]],
    "no text": lambda lines: [*lines[:2], b"\xff\0\n", *lines[3:]],
    "an empty line": lambda lines: [*lines[:2], b"\n", *lines[2:]],
    "valid JSON": lambda lines: [*lines[:2], b'{"n": 2}\n', *lines[3:]],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_line_that_was_changed_is_named(file, path, damage):
    for number in (1, 2, 3):
        file.append({"n": number})
    path.write_bytes(b"".join(damage(lines_of(path))))
    other, wrong = again(path)
    assert wrong.startswith("line 3: it must be as it was written; found")
    assert other.values == [{"n": 1}]


def test_what_a_kill_cuts_off_is_dropped(file, path):
    file.append({"n": 1})
    whole = path.read_bytes()
    file.append({"n": 2})
    longer = path.read_bytes()
    for end in range(len(whole), len(longer)):
        path.write_bytes(longer[:end])
        other, wrong = again(path)
        assert (other.values, wrong) == ([{"n": 1}], "")
        other.append({"n": 2})
        assert path.read_bytes() == longer
    other.cut(1)
    assert path.read_bytes() == whole
    for content, message in ((b"", "it is empty"), (whole[:9], "line 1 is cut off")):
        path.write_bytes(content)
        assert again(path)[1] == message


def test_a_file_of_another_format_is_told(file, path, monkeypatch):
    monkeypatch.setattr("tff_optim.simulation.records._FORMAT", {"format": 2})
    assert again(path)[1] == (
        "line 1: it must be {'format': 2}; found {'format': 1}, which another version has written"
    )


def test_csv_files_hold_every_character(tmp_path):
    path = str(tmp_path / "rows.csv")
    records = [{"round": i, "client": one} for i, one in enumerate(ODD)]
    view = CsvView(path, records[:3])
    view.append(records[3:])
    view.append([{"round": 99, "new": 0.5}])
    with open(path, newline="", encoding="utf-8") as rows:
        found = list(csv.DictReader(rows))
    plain = [one.encode(errors="backslashreplace").decode() for one in ODD]
    assert [row["client"] for row in found] == [*plain, ""]
    assert found[-1] == {"round": "99", "client": "", "new": "0.5"}


# ------------------------------------------------------------------------------------ TensorBoard


def curves(folder):
    """All steps and values of each curve, in the order of the files."""
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*tfevents*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                number = float(tf.make_ndarray(value.tensor))
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_a_board_shows_each_round_once(tmp_path):
    first = Board(str(tmp_path))
    first.publish()
    for number in (1, 2, 3):
        first.add(number, {"loss": 1.0}, 0.0)
    first.flush()
    (name,) = os.listdir(tmp_path)
    with open(tmp_path / name, "ab") as file:
        file.write(b"half an event")
    (tmp_path / "events.out.tfevents.1.mine").write_bytes(b"")
    board = Board(str(tmp_path))
    odd = {"text": "so", "big": 10**400, "e": 1e300, "yes": True, "\ud800": math.nan, "none": None}
    board.add(1, {"loss": 0.5, **odd}, 7.0)
    board.publish()
    board.add(2, {"loss": 0.25}, 8.0)
    board.close()
    (tmp_path / "events.out.tfevents.1.mine").unlink()
    found = curves(tmp_path)
    assert found.pop("loss") == [(1, 0.5), (2, 0.25)]
    assert repr(found) == repr(
        {
            "big": [(1, math.inf)],
            "e": [(1, math.inf)],
            "yes": [(1, 1.0)],
            "\\ud800": [(1, math.nan)],
        }
    )
    assert len(os.listdir(tmp_path)) == 1


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def process():
    return build_process()


def run(process, directory, rounds=6, **arguments):
    return simulation.run(
        process,
        arguments.pop("clients", None) or make_clients(),
        rounds=rounds,
        clients_per_round=3,
        evaluate=evaluate,
        directory=directory,
        rounds_per_checkpoint=2,
        **arguments,
    )


@pytest.fixture(scope="module")
def undisturbed(process):
    return run(process, None)


@pytest.fixture(scope="module")
def plain(process, tmp_path_factory):
    """A folder after five rounds of six: with checkpoints of rounds 4 and 5."""
    path = tmp_path_factory.mktemp("plain") / "run"
    run(process, path, rounds=5)
    return path


@pytest.fixture
def folder(plain, tmp_path):
    return pathlib.Path(shutil.copytree(plain, tmp_path / "run"))


def without_times(record):
    return {name: value for name, value in record.items() if "time_in_seconds" not in name}


def files_of(folder):
    """What each file holds, without times; of curves and CSV files what they show.

    TFF writes the same state as another graph each time: what it computes is in `variables`.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in (".lock", "lock", "saved_model.pb", "fingerprint.pb"):
            continue
        if "tfevents" in name:
            found["curves"] = without_times(curves(path.parent))
        elif path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                found[name] = [without_times(row) for row in csv.DictReader(file)]
        elif path.name == "records.jsonl":
            plain = any(folder.glob("checkpoints/program_state_*"))
            unlike = ("written", "check", "files") if plain else ("written", "check")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {k: without_times(v) if k == "record" else v for k, v in line.items()}
                for line in [{k: v for k, v in line.items() if k not in unlike} for line in lines]
            ]
        elif "client_states" not in name:
            found[name] = path.read_bytes()
    return {name: str(content) for name, content in found.items()}


@pytest.mark.slow  # as in `test_loop_doors.py`, with less that a caller decides
@pytest.mark.parametrize("device", ["", "CPU:0"], ids=["plain TFF", "CPU:0"])
def test_a_killed_run_leaves_the_folder_of_an_undisturbed_one(process, tmp_path, device):
    child = start(tmp_path / "killed", 1000, device)
    try:
        wait_for(child, "round 3")  # shown, and not yet saved
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    with open(tmp_path / "killed" / "rounds.csv", "a") as file:
        file.write("9,0.12")  # a row that was cut off
    one = ResidentProcess(process, device=device) if device else process
    run(one, tmp_path / "killed")
    run(one, tmp_path / "undisturbed")
    killed, undisturbed = (files_of(tmp_path / name) for name in ("killed", "undisturbed"))
    assert killed == undisturbed
    states = [name for name in killed if name.startswith("checkpoints/")]
    assert {name.split("/")[1].rpartition("_")[2] for name in states} == {"4", "6"}


def newest(folder):
    return folder / "checkpoints" / "program_state_5"


def other(path, make):
    shutil.rmtree(path)
    make(path)


def exchange(folder):
    older = newest(folder).with_name("program_state_4")
    newest(folder).rename(folder / "third")
    older.rename(newest(folder))
    (folder / "third").rename(older)


def change(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def records_of(folder, edit):
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(edit(lines)))


VARIABLES = "variables/variables.data-00000-of-00001"
GONE_ON = {  # what is damaged, and the warning
    "a byte": (lambda f: change(newest(f) / VARIABLES), "after 4: program_state_5 is not as it"),
    "empty": (
        lambda f: other(newest(f), os.mkdir),
        "after 4: program_state_5 is not as it was sav",
    ),
    "a file": (
        lambda f: other(newest(f), lambda p: p.write_text("")),
        r"after 4: program_state_5 cannot be read \(Not a directory\)$",
    ),
    "missing": (lambda f: shutil.rmtree(newest(f)), "after 4: program_state_5 is missing"),
    "foreign": (
        lambda f: shutil.copytree(newest(f), newest(f).with_name("program_state_100")),
        "after 5: program_state_100 was not saved by this run",
    ),
    "a line": (
        lambda f: records_of(
            f, lambda lines: [*lines[:-2], lines[-2].replace(b"5", b"6"), lines[-1]]
        ),
        "after 4: records.jsonl: line 10: .* after the record of round 4; program_state_5 was not",
    ),
    "cut": (
        lambda f: records_of(f, lambda lines: lines[:-1]),  # as a kill leaves it
        None,
    ),
    "CSV files": (lambda f: [change(f / name) for name in ("rounds.csv", "clients.csv")], None),
    "no curves": (lambda f: shutil.rmtree(f / "tensorboard"), None),
}


@pytest.mark.parametrize(("damage", "said"), GONE_ON.values(), ids=GONE_ON)
def test_all_follows_the_state_that_is_loaded(process, undisturbed, folder, recwarn, damage, said):
    damage(folder)
    history = run(process, folder)
    warned = [str(w.message) for w in recwarn if "Left out" in str(w.message)]
    assert len(warned) == (said is not None)
    assert said is None or re.search(f"going on {said}", warned[0])
    assert str(numbers(history)) == str(numbers(undisturbed))
    assert str(list(history.clients)) == str(list(undisturbed.clients))
    found = files_of(folder)
    rounds = range(7)
    assert [row["round"] for row in ast.literal_eval(found["rounds.csv"])] == [*map(str, rounds)]
    curve = ast.literal_eval(found["curves"])["evaluation/size"]
    assert [step for step, _ in curve] == [*rounds]


REFUSED = {
    "exchanged": (exchange, "program_state_5 is not as it was saved; program_state_4 is not"),
    "a line": (
        lambda f: records_of(f, lambda lines: [*lines[:4], *lines[5:]]),
        "records.jsonl: line 5: .*missing, after the record of round 1",
    ),
    "emptied": (lambda f: records_of(f, lambda lines: []), "records.jsonl: it is empty"),
    "foreign": (
        lambda f: records_of(f, lambda lines: [b"round,loss\n", b"1,0.5\n"]),
        "records.jsonl: line 1: it must be as it was written",
    ),
    "removed": (lambda f: (f / "records.jsonl").unlink(), "records.jsonl is missing"),
    "no states": (lambda f: other(f / "checkpoints", os.mkdir), "program_state_5 is missing"),
    "a pipe": (
        lambda f: ((f / "arguments.json").unlink(), os.mkfifo(f / "arguments.json")),
        "have a file or nothing at .*arguments.json",
    ),
    "a folder": (
        lambda f: ((f / "rounds.csv").unlink(), (f / "rounds.csv").mkdir()),
        "have a file or nothing at .*rounds.csv",
    ),
}


def contents(folder):
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_damage_that_leaves_no_state_is_refused_and_nothing_changed(
    process, folder, damage, message
):
    damage(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=f"`directory` must .*{message}"):
        run(process, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("fresh", [True, False])
def test_a_second_program_changes_nothing(process, folder, fresh):
    if fresh:
        other(folder, os.mkdir)
    before = contents(folder)
    told = pytest.raises(RuntimeError, match=f"found that Process {os.getpid()} on .* has ")
    with locks.locked(str(folder / ".lock")), told:
        run(process, folder)
    assert contents(folder) == before


def test_values_and_ids_come_back_as_they_were(process, tmp_path):
    data = list(make_clients().values())
    ids = ["007", "1e3", "True", "NaN", "", "a\rb", "x\ny", "\ud800"]
    values = {
        **{f"text {i}": one for i, one in enumerate(ids)},
        **{"nan": math.nan, "inf": -math.inf, "zero": -0.0, "big": 2**70, "huge": 10**400},
        **{"float32": np.float32(0.1), "int64": np.int64(7), "bool": np.bool_(True)},
        "tensor": tf.constant(2.5),
    }
    histories = [
        simulation.run(
            process,
            {one: data[i % len(data)] for i, one in enumerate(ids)},
            rounds=rounds,
            clients_per_round=len(ids),
            evaluate=lambda weights: values,
            directory=tmp_path,
        )
        for rounds in (1, 2, 2)
    ]
    made, read = histories[1:]
    assert repr(list(made.rounds)) == repr(list(read.rounds))
    assert repr(list(made.clients)) == repr(list(read.clients))
    assert sorted(read.clients["client"][: len(ids)]) == sorted(ids)
    for name, value in values.items():
        plain = np.asarray(value).item()
        found = read.rounds[-1][f"evaluation/{name}"]
        assert (type(found), repr(found)) == (type(plain), repr(plain))
