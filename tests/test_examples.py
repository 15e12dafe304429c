"""The examples run as a user would run them."""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def run_example(name, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_training_on_digits_prints_a_table_and_draws_a_picture(tmp_path):
    picture = tmp_path / "new" / "digits.png"
    run = run_example(
        "train_digits.py",
        "--rounds",
        "3",
        "--target",
        "0.05",
        "--seeds",
        "2",
        "--output",
        str(picture),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    lines = {line[:12].strip(): line.split() for line in run.stdout.splitlines()}
    for rule in ("FedAvg", "KL, near", "redescending", "jury"):
        accuracy, reached, seconds = lines[rule][-3:]
        assert 0.05 < float(accuracy) < 1
        assert reached == "1"
        assert float(seconds) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Exception ignored" not in run.stderr


@pytest.mark.slow
def test_clients_that_differ_print_a_table_and_draw_a_picture(tmp_path):
    picture = tmp_path / "new" / "drifting.png"
    arguments = ["--rounds", "2", "--seeds", "1", "--epochs", "1", "--output", str(picture)]
    run = run_example("drifting_clients.py", *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = [line.strip("| ").split(" | ") for line in run.stdout.splitlines()[3:-1]]
    assert [line[0] for line in lines] == ["FedAvg", "FedProx", "SCAFFOLD", "FedDyn"]
    assert all(0 < float(line[2]) <= float(line[1]) <= float(line[3]) < 1 for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Exception ignored" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "0"], "argument --clients: must be from 1 to 1000; found 0"),
        (["--concentration", "0"], "argument --concentration: must be from 0.001 to 1000; found 0"),
        (["--client-rate", "nan"], "argument --client-rate: must be from 1e-09 to 1000; found nan"),
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--clients-per-round", "30"], "--clients-per-round: must be from 1 to 20; found 30"),
        (["--random-labels", "21"], "argument --random-labels: must be from 0 to 20; found 21"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_argument_ends_the_program_with_a_message(arguments, message, example, capsys):
    with pytest.raises(SystemExit) as stop:
        example("train_digits").main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_digits", "drifting_clients"])
def test_help_names_every_argument_with_its_default(name, example, capsys):
    module = example(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option, default, _, words in module.OPTIONS:
        assert f"--{option} " in text
        assert f"{words} (default: {default})" in text


def test_digits_are_dealt_to_clients_by_seed(example):
    digits = example("digits")
    options = argparse.Namespace(clients=30, random_labels=4, concentration=0.02, epochs=2)
    clients = digits.make_clients(options, 0)
    again, others = digits.make_clients(options, 0), digits.make_clients(options, 1)
    assert list(again) == list(clients) != list(others)
    assert sum(name.startswith("random ") for name in clients) == 4
    rows, right = [], {"client": [], "random": []}
    for name, data in clients.items():
        x, y = (
            np.concatenate(column)
            for column in zip(*[b.values() for b in data.as_numpy_iterator()])
        )
        assert len(x) >= 2  # each has one example, twice
        np.testing.assert_array_equal(x[: len(x) // 2], x[len(x) // 2 :])
        x, y = x[: len(x) // 2], y[: len(x) // 2]
        found = [np.flatnonzero((row == digits.TRAIN_X).all(1)) for row in x]
        rows += [row[0] for row in found]
        right[name.split()[0]] += [digits.TRAIN_Y[row[0]] == label for row, label in zip(found, y)]
    assert len(set(rows)) == len(rows) == len(digits.TRAIN_X)
    assert np.mean(right["client"]) == 1
    assert np.mean(right["random"]) < 0.5
