"""The bar on a real terminal: where each run is, its main metrics, one line for each run at once."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
import tensorflow_federated as tff
from test_simulation import build_process, evaluate, make_clients

from tff_optim import simulation


@pytest.fixture(scope="module")
def process():
    return build_process()


def shown_on_a_terminal(monkeypatch, **options):
    """What a run writes to a pseudo-terminal in the place of stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    written = bytearray()
    reader = threading.Thread(target=read_all, args=(ours, written))
    reader.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as context:
        context.setattr(sys, "stderr", terminal)
        simulation.run(clients=make_clients(), clients_per_round=2, rounds=3, **options)
    reader.join(timeout=30)
    os.close(ours)
    return written.decode()


def read_all(descriptor, written):
    """Reads until the other end is closed, which is an error on a terminal."""
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 4096):
            written += chunk


def test_the_bar_shows_round_time_left_and_main_metrics(process, monkeypatch):
    text = shown_on_a_terminal(monkeypatch, process={"KL": process}, evaluate=evaluate)
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert re.search(r"KL, seed 0: 100%.*3/3 \[\d\d:\d\d<\d\d:\d\d.*size=\d.*loss=\d", last), text


def test_runs_at_once_have_a_line_each(process, monkeypatch):
    text = shown_on_a_terminal(
        monkeypatch, process={"one": process, "other": process}, runs_at_once=2
    )
    for name in ("one", "other"):
        assert f"{name}, seed 0: 100%" in text


def test_without_a_terminal_or_wish_there_is_no_bar(process, monkeypatch, capfd):
    text = shown_on_a_terminal(monkeypatch, process=process, progress=False, managers=[Mark()])
    assert text == "mark\r\n"
    simulation.run(process, make_clients(), rounds=1, clients_per_round=2)
    assert "seed 0" not in capfd.readouterr().err


def test_a_log_file_gets_lines(process, monkeypatch, capfd):
    arguments = {"rounds": 3, "clients_per_round": 2, "evaluate": evaluate}
    simulation.run({"KL": process}, make_clients(), **arguments)
    assert "seed 0" not in capfd.readouterr().err  # of a run that takes no ten seconds
    monkeypatch.setattr("tff_optim.simulation.progress._SECONDS", 0.0)
    simulation.run({"KL": process}, make_clients(), **arguments)
    lines = [one for one in capfd.readouterr().err.splitlines() if "seed 0" in one]
    assert len(lines) == 3
    expected = r"KL, seed 0: round 2 of 3, \S+ s a round, 0:00:\d\d left, size \d.*, loss \d\S*"
    assert re.fullmatch(expected, lines[1]), lines


class Mark(tff.program.ReleaseManager):
    """Writes something, so that there is something to read."""

    async def release(self, value, key):
        if key == 3:
            print("mark", file=sys.stderr)
