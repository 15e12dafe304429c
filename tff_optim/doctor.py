"""Looks whether TFF and this package can work here, and says in plain sentences what cannot.

    python -m tff_optim.doctor [--json] [--timeout SECONDS]

Where the package cannot be imported, `python tff_optim/doctor.py` does the same without it.

The exit status is 1 if something does not work, else 0. Each part that could hang or crash runs in a
process of its own under a time limit. Before it starts, standard error says what is tried and how long
that may take. A part that still computes at its limit is slow: only a warning, since the machine
may be busy. A part that has stopped computing is an error.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import attrs

OK, WARNING, ERROR = "ok", "warning", "error"
_WATCHED = 2.0  # seconds in which a part that gives no answer is looked at: slow, or stuck?

# Name, from which version on (included), before which (excluded), and what to do.
_LOCKED = "Install the locked set: `pip install --no-deps -r requirements.lock`."
_VERSIONS = [
    ("tensorflow", "2.14", "2.15", _LOCKED),
    ("tensorflow-federated", "0.87", "0.88", _LOCKED),
    ("jax", "0.4.13", "0.4.15", _LOCKED),
    ("jaxlib", "0.4.13", "0.4.15", _LOCKED),
    ("protobuf", "3.20.3", "5", _LOCKED),
    ("numpy", "1.23", "2", _LOCKED),
]


@attrs.frozen
class Finding:
    """The result of one check.

    Attributes:
      name: The name of the check.
      status: "ok", "warning" or "error".
      text: The finding, in a sentence, and what to do about it.
    """

    name: str
    status: str
    text: str


@attrs.frozen
class _NoAnswer:
    """Why a check gave no answer, in a sentence; `slow` if it was still running."""

    text: str
    slow: bool = False

    def as_finding(self, name: str, text: str) -> Finding:
        """A finding with this text if the part is broken, and one about time if it is slow."""
        if self.slow:
            return Finding(name, WARNING, self.text)
        return Finding(name, ERROR, text)


def check_python() -> Finding:
    """Whether TFF has a release for this Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] < (3, 12):
        return Finding("Python", OK, f"{found}.")
    text = f"{found}, but TensorFlow Federated 0.87 needs 3.10 or 3.11. Make an environment of one."
    return Finding("Python", ERROR, text)


def check_versions() -> list[Finding]:
    """Whether the versions are among those that are known to work together."""
    findings = []
    for name, first, beyond, cure in _VERSIONS:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, ERROR, f"not installed. {cure}"))
            continue
        if _numbers(first) <= _numbers(found) < _numbers(beyond):
            findings.append(Finding(name, OK, f"{found}."))
        else:
            text = f"{found}, but only versions from {first}, before {beyond}, are known to work. {cure}"
            findings.append(Finding(name, ERROR, text))
    return [*findings, check_typing_extensions()]


def check_typing_extensions() -> Finding:
    """Whether `tf.saved_model.save`, and with it `FileProgramStateManager`, works."""
    name = "typing_extensions"
    found = importlib.metadata.version(name)
    if _numbers(found) < (4, 6):
        return Finding(name, OK, f"{found}.")
    if os.environ.get("WRAPT_DISABLE_EXTENSIONS"):
        text = (
            f"{found}, newer than TensorFlow 2.14 supports, but WRAPT_DISABLE_EXTENSIONS is "
            "set, which cures it."
        )
        return Finding(name, OK, text)
    text = (
        f"{found}, as Jupyter or torch install it. Versions from 4.6 break `tf.saved_model.save` of "
        'TensorFlow 2.14, and with it `tff.program.FileProgramStateManager` ("this __dict__ '
        "descriptor does not support '_DictWrapper' objects\"). `pip install --no-deps "
        "typing_extensions==4.5.0`, or set WRAPT_DISABLE_EXTENSIONS=1 before TensorFlow is imported."
    )
    return Finding(name, ERROR, text)


def check_sigint() -> Finding:
    """Whether TFF can end its worker, which it does with SIGINT."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        return Finding("SIGINT", OK, "handled, so that TFF can end its worker.")
    text = (
        "ignored, as in a background job of a script or under `nohup`. TFF's worker inherits that, "
        "and TFF waits forever for its end. Start Python with `env --default-signal=INT python "
        "...`, or call `signal.signal(signal.SIGINT, signal.default_int_handler)` first."
    )
    return Finding("SIGINT", ERROR, text)


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    """Whether states can be transferred through memory."""
    name, least = "shared memory", 64 << 20
    if not os.access(path, os.W_OK):
        text = f"{path} cannot be written. States go through files on disk, which is slower."
        return Finding(name, WARNING, text)
    free = shutil.disk_usage(path).free
    text = f"{free / 2**30:.1f} GB free in {path}."
    if free < least:
        cure = "States above that go through files on disk (Docker: `--shm-size=2g`)."
        return Finding(name, WARNING, f"{text} {cure}")
    return Finding(name, OK, text)


def check_devices(timeout: float) -> Finding:
    """The devices that TensorFlow sees, and whether it can use them."""
    seen = _child("TensorFlow's devices", 10, _DEVICES, timeout)
    if isinstance(seen, _NoAnswer):
        return seen.as_finding("devices", f"TensorFlow cannot be used: {seen.text}")
    failed = {name: why for name, why in seen.items() if why}
    names = ", ".join(seen)
    if failed:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return Finding("devices", ERROR, f"TensorFlow sees {names}, but fails on {reasons}")
    text = f"TensorFlow can use {names}."
    if os.path.exists("/dev/nvidiactl") and "GPU" not in names:
        text += " There is an NVIDIA driver, but no GPU for TensorFlow, which needs CUDA 11.8."
        return Finding("devices", WARNING, text)
    return Finding("devices", OK, text)


def check_worker(timeout: float) -> Finding:
    """Whether TFF's worker starts, computes and ends."""
    seen = _child("TFF's worker", 10, _WORKER, timeout)
    if isinstance(seen, _NoAnswer):
        text = (
            f"it does not work: {seen.text} It is the program `worker_binary` in the folder "
            "`tensorflow_federated/data`: it must be there, be executable, and be able to listen on a "
            "port of localhost."
        )
        return seen.as_finding("worker", text)
    if not seen["ended"]:
        return Finding("worker", ERROR, "it starts, but does not end when its context is dropped.")
    text = f"starts and computes in {seen['start']:.1f} s, ends in {seen['end']:.1f} s."
    return Finding("worker", OK, text)


def check_rounds(timeout: float) -> list[Finding]:
    """Whether a small round runs in each place, and how long it takes."""
    findings = []
    for place, code in _PLACES.items():
        name = f"a round {place}"
        seen = _child(name, 20, _ROUND.replace("PLACE", code), timeout)
        if isinstance(seen, _NoAnswer):
            findings.append(seen.as_finding(name, f"fails: {seen.text}"))
        else:
            text = f"first round after {seen['first']:.1f} s, a later one {seen['later'] * 1e3:.0f} ms."
            findings.append(Finding(name, OK, text))
    return findings


def examine(timeout: float, report: Callable[[Finding], None]) -> list[Finding]:
    """Runs all checks, and reports each finding at once."""
    findings: list[Finding] = []

    def add(*found: Finding) -> None:
        findings.extend(found)
        for finding in found:
            report(finding)

    add(check_python(), *check_versions(), check_sigint(), check_shared_memory())
    add(check_devices(timeout))
    worker = check_worker(timeout)
    add(worker)
    if worker.status == ERROR:
        add(Finding("rounds", ERROR, "not tried, since the worker does not work."))
    elif worker.status == WARNING:
        add(Finding("rounds", WARNING, "not tried, since the worker is slow."))
    else:
        add(*check_rounds(timeout))
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Prints the findings; returns 1 if there is an error, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tff_optim.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each of 5 parts")
    options = parser.parse_args(arguments)
    if not options.timeout > 0:
        parser.error(f"argument --timeout: must be above 0; found {options.timeout:g}")
    marks = {OK: "  ok   ", WARNING: "warning", ERROR: " ERROR "}

    def report(finding: Finding) -> None:
        if not options.json:
            print(f"[{marks[finding.status]}] {finding.name}: {finding.text}", flush=True)

    findings = examine(options.timeout, report)
    errors, warnings = (sum(f.status == status for f in findings) for status in (ERROR, WARNING))
    if options.json:
        print(json.dumps({"ok": not errors, "findings": [attrs.asdict(f) for f in findings]}))
    elif errors:
        print(f"{errors} of {len(findings)} need mending.")
    else:
        print(f"Nothing is broken; {warnings} to look at." if warnings else "Everything works.")
    return min(errors, 1)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _child(what: str, usual: int, code: str, timeout: float) -> dict | _NoAnswer:
    """Runs code in a Python of its own; returns the object that it prints last, or why there is none.

    Args:
      what: The check, which is first announced on standard error.
      usual: The usual seconds on an idle machine.
      code: The code. It prints its progress in lines that begin with "#", and at last a JSON object.
      timeout: Seconds after which it is ended.
    """
    limit = f"usually below {usual} s, given up after {timeout:g} s"
    print(f"Trying {what} ({limit}) ...", file=sys.stderr, flush=True)
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that its worker ends with it
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    try:
        out, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        steps = [line[1:] for line in (error.stdout or b"").splitlines() if line[:1] == b"#"]
        while_ = f" while{steps[-1].decode()}" if steps else ""
        text = f"no answer within {timeout:g} seconds{while_}"
        if not _is_working(child.pid):
            return _NoAnswer(f"{text}, and nothing is computed any more.")
        cure = f"The machine is slow or busy: try `--timeout {4 * timeout:g}`, or again later."
        return _NoAnswer(f"{text}, but it is still computing. {cure}", slow=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        last = (lines or [f"it ended with code {child.returncode}"])[-1]
        return _NoAnswer(last if last.endswith(".") else last + ".")
    return json.loads(out.splitlines()[-1])


def _is_working(session: int) -> bool:
    """Whether a session's threads compute, wait for a processor or read a disk most of the time."""
    looks = [_wants_to_run(session)]
    until = time.monotonic() + _WATCHED
    while time.monotonic() < until:
        time.sleep(_WATCHED / 40)
        looks.append(_wants_to_run(session))
    return sum(looks) * 2 > len(looks)


def _wants_to_run(session: int) -> bool:
    for file in glob.iglob("/proc/[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(file) as stat:
            state, _, _, of = stat.read().rpartition(")")[2].split()[:4]
            if int(of) == session and state in "RD":
                return True
    return False


_DEVICES = """
print("# TensorFlow is imported", flush=True)
import json
import tensorflow as tf
print("# its devices are used", flush=True)
seen = {}
for device in tf.config.list_logical_devices():
    if device.device_type not in ("CPU", "GPU"):
        continue
    name = device.name.removeprefix("/device:")
    try:
        with tf.device(device.name):
            tf.linalg.matmul(tf.ones([8, 8]), tf.ones([8, 8])).numpy()
        seen[name] = ""
    except Exception as error:
        seen[name] = str(error).splitlines()[0]
print(json.dumps(seen))
"""

_WORKER = """
print("# TFF is imported", flush=True)
import json, os, time
import tensorflow_federated as tff
print("# the worker starts", flush=True)
def children():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return file.read().split()
before = time.monotonic()
tff.backends.native.set_sync_local_cpp_execution_context()
assert tff.tensorflow.computation(lambda: 7)() == 7
started, worker = time.monotonic(), children()
tff.test.set_no_default_context()
def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] == "Z"
    except FileNotFoundError:
        return True
ended = False
while not ended and time.monotonic() < started + 20:
    time.sleep(0.05)
    ended = all(map(gone, worker))
print(json.dumps({"start": started - before, "end": time.monotonic() - started, "ended": ended}))
"""

_PLACES = {
    "of plain TFF": "contextlib.nullcontext(process)",
    "in the Python process": "ResidentProcess(process)",
    "with clients in a worker": "ResidentProcess(process, workers=1)",
}

_ROUND = """
print("# the package is imported", flush=True)
import contextlib, json, time
import tensorflow as tf, tensorflow_federated as tff
from tff_optim import ResidentProcess
tff.backends.native.set_sync_local_cpp_execution_context()
print("# the process is built", flush=True)
model = tff.learning.models.functional_model_from_keras(
    tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
    tf.keras.losses.MeanSquaredError(), (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])))
process = tff.learning.algorithms.build_weighted_fed_avg(
    model, tff.learning.optimizers.build_sgdm(0.1))
clients = [tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))] * 2
print("# rounds run", flush=True)
times = [time.monotonic()]
with PLACE as one:
    state = one.initialize()
    for _ in range(3):
        state, metrics = one.next(state, clients)
        times.append(time.monotonic())
    assert one.get_model_weights(state).trainable[0].shape == (2, 1)
tff.test.set_no_default_context()
print(json.dumps({"first": times[1] - times[0], "later": times[3] - times[2]}))
"""

if __name__ == "__main__":
    code = main()
    if "tensorflow_federated" in sys.modules:  # imported with the package around this file
        # Else TFF complains at the end of Python, as of any program that leaves its context there.
        sys.modules["tensorflow_federated"].test.set_no_default_context()
    sys.exit(code)
