"""The doctor finds a good environment good, and says what is wrong with others."""

import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import selection

from tff_optim import doctor

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_a_good_environment_is_good():
    run = subprocess.run(
        [sys.executable, "-m", "tff_optim.doctor", "--json", "--timeout", "280"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Exception ignored" not in run.stderr
    found = json.loads(run.stdout)
    assert found["ok"] is True
    names = [finding["name"] for finding in found["findings"]]
    assert {"Python", "tensorflow", "typing_extensions", "SIGINT", "worker"} <= set(names)
    assert sum(name.startswith("a round ") for name in names) == 3
    assert all(finding["status"] != "error" for finding in found["findings"])


def test_a_newer_typing_extensions_is_named_with_its_cure(monkeypatch):
    monkeypatch.delenv("WRAPT_DISABLE_EXTENSIONS", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.12.2")
    finding = doctor.check_typing_extensions()
    assert finding.status == "error"
    assert "FileProgramStateManager" in finding.text
    assert "set WRAPT_DISABLE_EXTENSIONS=1 before TensorFlow is imported" in finding.text
    monkeypatch.setenv("WRAPT_DISABLE_EXTENSIONS", "1")
    assert doctor.check_typing_extensions().status == "ok"


@pytest.mark.parametrize(
    ("found", "status"),
    [("4.5.0", "ok"), ("4.6", "error"), ("5.0.0", "error"), ("4.10.1", "error")],
)
def test_versions_are_numbers_and_not_texts(found, status, monkeypatch):
    monkeypatch.delenv("WRAPT_DISABLE_EXTENSIONS", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    assert doctor.check_typing_extensions().status == status


def test_other_versions_and_missing_packages_are_errors(monkeypatch):
    def version(name):
        if name == "jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"tensorflow": "2.15.0", "typing_extensions": "4.5.0"}.get(name, "0.87.0")

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.name: finding for finding in doctor.check_versions()}
    assert found["jax"].text.startswith("not installed. Install the locked set")
    assert found["tensorflow"].text.startswith("2.15.0, but only versions from 2.14, before 2.15")
    assert found["tensorflow-federated"].status == "ok"


def test_ignored_sigint_is_an_error_with_its_cure():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        finding = doctor.check_sigint()
    finally:
        signal.signal(signal.SIGINT, before)
    assert finding.status == "error"
    assert "env --default-signal=INT" in finding.text
    assert doctor.check_sigint().status == "ok"


def test_shared_memory_that_is_missing_or_small_is_a_warning(tmp_path, monkeypatch):
    assert doctor.check_shared_memory(str(tmp_path / "none")).status == "warning"
    usage = doctor.shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "--shm-size" in doctor.check_shared_memory(str(tmp_path)).text


def in_a_part(code, timeout, monkeypatch):
    """What the doctor finds where TensorFlow's devices would be tried."""
    monkeypatch.setattr(doctor, "_DEVICES", code)
    return doctor.check_devices(timeout)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise ValueError('so')", "TensorFlow cannot be used: ValueError: so."),
        ("import os; os.abort()", "TensorFlow cannot be used: it ended with code -6."),
    ],
)
def test_a_part_that_fails_is_an_error(code, text, monkeypatch):
    assert in_a_part(code, 100, monkeypatch) == doctor.Finding("devices", "error", text)


_STEP = "print('# it waits', flush=True); import subprocess, sys, time; "
_LOOP = "n = 0\nwhile True: n += 1"


SLOW_OR_HANGING = {
    "waits": (f"{_STEP}time.sleep(600)", "error", False),
    "computes": (f"{_STEP}exec({_LOOP!r})", "warning", False),
    # As TFF waits for its worker: it looks again and again.
    "looks again": (f"{_STEP}[time.sleep(0.1) for _ in range(6000)]", "error", True),
    "computes among others": (f"{_STEP}exec({_LOOP!r})", "warning", True),
    # In a child, as TFF's worker is one.
    "a child computes": (
        f"{_STEP}subprocess.run([sys.executable, '-c', {_LOOP!r}])",
        "warning",
        True,
    ),
}


@pytest.mark.parametrize(
    ("code", "status", "busy"),
    selection.params(SLOW_OR_HANGING, ["waits"], unpack=True),
)
def test_a_part_that_is_slow_is_told_from_one_that_hangs(code, status, busy, monkeypatch, capfd):
    # With every processor taken by others, if `busy`.
    number = os.cpu_count() * 2 if busy else 0
    others = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(number)]
    try:
        finding = in_a_part(code, 3, monkeypatch)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert finding.status == status
    assert "no answer within 3 seconds while it waits" in finding.text
    assert ("try `--timeout 12`" in finding.text) is (status == "warning")
    told = "Trying TensorFlow's devices (usually below 10 s, given up after 3 s) ..."
    assert told in capfd.readouterr().err


def test_a_slow_part_is_no_fault(monkeypatch, capsys):
    slow = doctor.Finding("worker", "warning", "no answer within 3 seconds")
    fine = doctor.Finding("devices", "ok", "")
    monkeypatch.setattr(doctor, "check_versions", lambda: [])
    monkeypatch.setattr(doctor, "check_worker", lambda timeout: slow)
    monkeypatch.setattr(doctor, "check_devices", lambda timeout: fine)
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "[warning] rounds: not tried, since the worker is slow." in shown
    assert "Nothing is broken; 2 to look at." in shown


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_an_error_with_exit_code_1(tmp_path, monkeypatch, capsys):
    # A package that puts a program in the worker's place which ends at once.
    (tmp_path / "sitecustomize.py").write_text(
        "import subprocess\n"
        "_popen = subprocess.Popen\n"
        "class Popen(_popen):\n"
        "    def __init__(self, args, *a, **k):\n"
        "        if 'worker_binary' in str(args): args = ['/bin/false']\n"
        "        super().__init__(args, *a, **k)\n"
        "subprocess.Popen = Popen\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    finding = doctor.check_worker(25)
    if finding.status == "warning":  # still importing
        finding = doctor.check_worker(250)
    assert finding.status == "error"
    assert finding.text.startswith("it does not work: no answer within 25")
    assert "while the worker starts, and nothing is computed any more." in finding.text
    monkeypatch.setattr(doctor, "check_worker", lambda timeout: finding)
    monkeypatch.setattr(
        doctor, "check_devices", lambda timeout: doctor.Finding("devices", "ok", "")
    )
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "[ ERROR ] worker: it does not work" in shown
    assert "not tried, since the worker does not work." in shown


def test_a_bad_time_limit_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--timeout", "0"])
    assert stop.value.code == 2
    assert "argument --timeout: must be above 0; found 0" in capsys.readouterr().err
