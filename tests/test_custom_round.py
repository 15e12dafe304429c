"""The hand-written round runs as a user would run it, and both its ways agree."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_both_ways_of_weighting_agree_and_leave_out_the_odd_client():
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_round.py")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^ +(\d)  (\S+) +(\S+)  (\S+)$", run.stdout, re.M)
    assert [row[0] for row in rows] == list("12345")
    assert all(float(difference) < 1e-5 for *_, difference in rows)
    assert all(1.0 < float(effective) < 5.5 for *_, effective, _ in rows)
    # The server's kernel goes where five of six clients' truth is: 1, -2, 0.5.
    kernel = [float(x) for x in re.search(r"kernel: \[(.*?)\]", run.stdout).group(1).split()]
    assert kernel[0] > 0.3
    assert kernel[1] < -1.0
    assert "Exception ignored" not in run.stderr
