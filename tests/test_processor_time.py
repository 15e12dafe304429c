"""What a run of tests says of the processor seconds that they took."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
CONFTEST = """
import processor_time

processor_time.LIMIT = 0.25

def pytest_addoption(parser):
    parser.addini("durations_json", "a file")
    parser.addoption("--strict-durations", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long")
    config.pluginmanager.register(processor_time.ProcessorTime(config))
"""
INNER = """
import subprocess, sys, time
import pytest

def use(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def built():
    use(0.4)

def test_waits():
    time.sleep(0.4)

@pytest.mark.slow
def test_marked():
    use(0.4)

def test_builds(built):
    pass

def test_shares(built):
    pass

def test_in_a_child():
    code = "import time\\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def run(folder, *arguments):
    for name, text in {"conftest.py": CONFTEST, "test_inner.py": INNER}.items():
        (folder / name).write_text(text)
    shutil.copy(TESTS / "processor_time.py", folder)
    command = [sys.executable, "-m", "pytest", "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return subprocess.run(
        [*command, "-o", f"durations_json={folder / 'found.json'}", *arguments, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )


def test_a_test_that_takes_too_long_fails_the_run_unless_it_is_marked(tmp_path):
    done = run(tmp_path, "-n", "1", "--strict-durations")
    assert done.returncode == 1, done.stdout
    assert "5 passed" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    long = {name.partition("::")[2] for name, seconds in found.items() if seconds > 0.3}
    # What is shared counts for the first that uses it; who waits takes nothing.
    assert long == {"test_marked", "test_builds", "test_in_a_child"}
    told = [line for line in done.stdout.splitlines() if line.startswith("ERROR: a test")]
    named = {line.partition("::")[2].partition(".")[0] for line in told}
    assert named == {"test_builds", "test_in_a_child"}
    assert run(tmp_path, "-k", "waits or marked", "--strict-durations").returncode == 0


@pytest.mark.slow  # a program of its own that imports TFF, for an option that hardly changes
def test_a_file_that_exists_elsewhere_does_not_move_the_root_directory(tmp_path):
    report = tmp_path / "found.json"
    report.write_text("{}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-o",
        f"durations_json={report}",
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "tests/test_messages.py", "-rN"],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "\ntests/test_messages.py::" in f"\n{done.stdout}"
