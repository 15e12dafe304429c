"""TFF worker processes: started here or elsewhere, watched, and never left behind."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable

import grpc  # type: ignore[import-untyped]
import tensorflow_federated as tff

from tff_optim.resident.errors import WorkerLostError, WorkerStartError

_MAX_MESSAGE = 2**31 - 1  # TFF's own channels stop at 2e9 bytes; this is protobuf's limit.
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # A new channel must not inherit the broken connection, and the waiting, of an old one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

_HTTP2_SETTINGS = 4
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)

# The shell becomes the worker. Its child waits for the pipe at its input to close, which the
# kernel does when this Python process ends, however it ends; then it kills the worker and
# removes its directory, which may hold a state's worth of memory. Both are in a session of
# their own: Ctrl-C in the terminal does not reach them.
_WATCHED = (
    "directory=$1; shift; exec 3<&0 </dev/null; "
    '(read _ <&3; kill -9 $$; rm -rf -- "$directory") >/dev/null 2>&1 & exec "$@" 3<&-'
)

TOKEN_FILE = "token"


def worker_binary() -> str:
    """Returns the path of the worker that TFF's wheel brings."""
    path = os.path.join(os.path.dirname(tff.__file__), "data", "worker_binary")
    if not os.path.isfile(path):
        raise WorkerStartError(
            f"TFF's worker was expected at {path}, but there is no such file. Install TFF from "
            "its wheel, or name running workers with `workers=['host:port']`."
        )
    return path


def shared_directory() -> str:
    """Makes a private directory for hand-overs, in memory where the machine offers that."""
    for parent in ("/dev/shm", tempfile.gettempdir()):
        if os.path.isdir(parent) and os.access(parent, os.W_OK):
            directory = tempfile.mkdtemp(prefix="tff_resident_", dir=parent)
            with open(os.path.join(directory, TOKEN_FILE), "w", encoding="ascii") as f:
                f.write(uuid.uuid4().hex)
            return directory
    raise OSError("Neither /dev/shm nor the temporary directory can be written to.")


def reserve_port() -> tuple[int, socket.socket]:
    """Returns a free port and the socket that keeps others from it.

    The socket is bound but does not listen: with `SO_REUSEPORT`, which gRPC sets too, the
    worker can bind the same port while no other program can be given it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("", 0))
    return sock.getsockname()[1], sock


def _end(process: subprocess.Popen[bytes], directory: str, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of this object must not end its parent's worker
    with contextlib.suppress(ProcessLookupError):
        # The watcher keeps the group's number from being given to another process.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    shutil.rmtree(directory, ignore_errors=True)


class LocalWorker:
    """A worker process on this machine that ends when this object is closed, or Python is.

    Args:
        start_timeout: Seconds until a worker that is not ready is given up.
        command: The program to start; `--port=N` is appended.
    """

    def __init__(self, start_timeout: float = 60.0, command: tuple[str, ...] = ()):
        self._command = command or (worker_binary(),)
        self.directory = shared_directory()
        self._reserved: socket.socket | None = None
        try:
            port, self._reserved = reserve_port()
            self.target = f"localhost:{port}"
            self._process = self._start(port)
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        self._finalizer = weakref.finalize(self, _end, self._process, self.directory, os.getpid())
        try:
            self.channel = _connect(self.target, start_timeout, self._exit_reason)
        except BaseException:
            self.close()
            raise

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        # As TFF does: what the worker prints goes where Python's own output goes.
        streams = {}
        for name in ("stdout", "stderr"):
            try:
                streams[name] = getattr(sys, name).fileno()
            except (AttributeError, OSError, ValueError):
                streams[name] = None
        try:
            watched = ["/bin/sh", "-c", _WATCHED, "worker", self.directory]
            return subprocess.Popen(
                [*watched, *self._command, f"--port={port}"],
                stdin=subprocess.PIPE,
                cwd=self.directory,
                start_new_session=True,
                **streams,
            )
        except OSError as e:
            raise WorkerStartError(f"A worker process could not be started: {e}.") from e

    @property
    def name(self) -> str:
        """How messages call this worker."""
        return f"local worker (process {self._process.pid}, {self.target})"

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def _exit_reason(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        if code < 0:
            return f"it was ended by signal {signal.Signals(-code).name}"
        return f"it exited with code {code}"

    def lost_reason(self, timeout: float) -> str | None:
        """Says why this worker is gone, or returns None where it answers."""
        # The connection is cut an instant before the kernel reports the end of the process.
        for _ in range(5):
            reason = self._exit_reason()
            if reason or not self._finalizer.alive:
                return reason or "it was closed"
            if _answers(self.target, min(timeout, 0.25)):
                return None
            time.sleep(0.05)
        if _answers(self.target, timeout):
            return None
        return self._exit_reason() or f"it did not answer within {timeout:g} seconds"

    def close(self) -> None:
        """Ends the worker and removes its directory."""
        if hasattr(self, "channel"):
            self.channel.close()
        self._finalizer()
        if self._reserved is not None:
            self._reserved.close()


class RemoteWorker:
    """The connection to a worker that runs elsewhere; closing it leaves the worker running.

    Args:
        target: `'host:port'` of a running `worker_binary`.
        start_timeout: Seconds until a worker that does not answer is given up.
    """

    def __init__(self, target: str, start_timeout: float = 60.0):
        self.target = target
        # Whether the worker sees this directory is found out by `handover`.
        self.directory = shared_directory()
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        try:
            self.channel = _connect(target, start_timeout, lambda: None)
        except BaseException:
            self._finalizer()
            raise

    @property
    def name(self) -> str:
        """How messages call this worker."""
        return f"remote worker {self.target}"

    def lost_reason(self, timeout: float) -> str | None:
        """Says why this worker is gone, or returns None where it answers."""
        if not self._finalizer.alive:
            return "the connection to it was closed"
        deadline = time.monotonic() + timeout
        while not _answers(self.target, timeout):
            if time.monotonic() > deadline:
                return f"it did not answer within {timeout:g} seconds"
            time.sleep(0.1)
        return None

    def close(self) -> None:
        """Closes the connection."""
        if hasattr(self, "channel"):
            self.channel.close()
        self._finalizer()


Worker = LocalWorker | RemoteWorker


def _answers(target: str, timeout: float) -> bool:
    """Whether a worker completes a new HTTP/2 connection: a hung or cut-off one does not."""
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as sock:
            sock.sendall(_HTTP2_GREETING)
            # Type and length fields of the frame that a server must send first.
            answer = sock.recv(9)
            return len(answer) > 3 and answer[3] == _HTTP2_SETTINGS
    except OSError:
        return False


def _connect(target: str, timeout: float, exit_reason: Callable[[], str | None]) -> grpc.Channel:
    deadline = time.monotonic() + timeout
    while not _answers(target, min(1.0, timeout)):
        reason = exit_reason()
        if reason is None and time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        reason = reason or f"it was not ready within {timeout:g} seconds"
        raise WorkerStartError(
            f"The TFF worker at {target} cannot be used: {reason}. What it printed is on its "
            "standard error stream; `workers` names where it is expected."
        )
    return open_channel(target)


def open_channel(target: str) -> grpc.Channel:
    """Opens a connection of its own to a worker."""
    return grpc.insecure_channel(target, _CHANNEL_OPTIONS)


def lost(worker: Worker, reason: str) -> WorkerLostError:
    """Builds the error for a worker that is gone."""
    next_call = "starts another one" if isinstance(worker, LocalWorker) else "connects again"
    return WorkerLostError(
        f"The {worker.name} is gone: {reason}. The server states that lived in it are lost. "
        f"The next call {next_call}: continue from the last checkpoint "
        "(`ResidentCheckpoints.resume`) or from a plain state (`restore`), or start again with "
        "`initialize`."
    )
