"""The harness itself: a test run leaves no worker process behind."""

import os
import pathlib
import shutil
import subprocess
import sys

import psutil
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_a_test_run_ends_its_worker_process(tmp_path):
    for name in ("conftest.py", "processor_time.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    (tmp_path / "test_inner.py").write_text(
        "import pathlib, numpy as np, psutil, tensorflow_federated as tff\n"
        "def test_inner():\n"
        "    assert tff.federated_computation(lambda: tff.federated_value(1, tff.SERVER))() == 1\n"
        "    workers = [c.pid for c in psutil.Process().children() if 'worker' in c.name()]\n"
        "    pathlib.Path(__file__).with_name('pid').write_text(str(workers[0]))\n"
    )
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Exception ignored" not in run.stderr
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
