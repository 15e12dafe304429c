"""The examples run as a user would run them."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run_example(name, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_training_on_digits_prints_a_table_and_draws_a_picture(tmp_path):
    picture = tmp_path / "new" / "digits.png"
    run = run_example(
        "train_digits.py",
        "--rounds",
        "3",
        "--target",
        "0.05",
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


def test_clients_that_differ_print_a_table_and_draw_a_picture(tmp_path):
    picture = tmp_path / "new" / "drifting.png"
    arguments = ["--rounds", "2", "--seeds", "1", "--epochs", "1", "--output", str(picture)]
    run = run_example("drifting_clients.py", *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["FedAvg", "FedProx", "SCAFFOLD", "FedDyn"]
    assert all(0 < float(line[2]) <= float(line[1]) <= float(line[3]) < 1 for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Exception ignored" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "3"], "argument --clients: must be at least 20; found 3"),
        (["--concentration", "0"], "argument --concentration: must be above 0; found 0"),
        (["--rounds", "many"], "argument --rounds: 'many' is not a number"),
        (["--clients-per-round", "30"], "must be at most --clients, 20; found 30"),
        (["--random-labels", "21"], "must be at most --clients, 20; found 21"),
        (["--target", "1.5"], "argument --target: must be below 1; found 1.5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_argument_ends_the_program_with_a_message(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_digits

    with pytest.raises(SystemExit) as stop:
        train_digits.parse_arguments(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_argument_with_its_default(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_digits

    with pytest.raises(SystemExit) as stop:
        train_digits.parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--concentration CONCENTRATION" in text
    assert "(default: 20)" in text
