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
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grpc  # type: ignore[import-untyped]
import tensorflow_federated as tff

from tff_optim.resident import forks
from tff_optim.resident.errors import WorkerStartError

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

# A shell waits for the pipe at its input to close, which the kernel does when this Python process ends,
# in whatever way. Then it removes a directory, which may take as much memory as a state. It has a
# session of its own, so Ctrl-C in the terminal does not reach it.
_WATCH = 'read _; rm -rf -- "$1"'
# The shell becomes the worker; its child waits, and kills the worker first. A file that exceeds the
# limit on sizes (XFSZ) is an error of one call and does not end the worker. Only their owner can read
# files that the worker writes, such as states.
_WATCHED = (
    "directory=$1; shift; exec 3<&0 </dev/null; trap '' XFSZ; umask 077; "
    '(read _ <&3; kill -9 $$; rm -rf -- "$directory") >/dev/null 2>&1 & exec "$@" 3<&-'
)

TOKEN_FILE = "token"
SHARED_MEMORY = "/dev/shm"


def worker_binary() -> str:
    """Returns the path of the worker in TFF's wheel."""
    path = os.path.join(os.path.dirname(tff.__file__), "data", "worker_binary")
    if not os.path.isfile(path):
        raise WorkerStartError(
            f"TFF's worker was expected at {path}, but there is no such file. Install TFF from "
            "its wheel, or name running workers with `workers=['host:port']`."
        )
    return path


def shared_directory() -> str:
    """Makes a private directory for transfers, in memory if the machine offers that."""
    errors = []
    for parent in (SHARED_MEMORY, tempfile.gettempdir()):
        if not os.path.isdir(parent):
            continue
        try:
            directory = tempfile.mkdtemp(prefix=f"tff_resident_{os.getpid()}_", dir=parent)
        except OSError as error:
            errors.append(f"{parent}: {error.strerror}")
            continue
        try:
            with open(os.path.join(directory, TOKEN_FILE), "w", encoding="ascii") as f:
                f.write(uuid.uuid4().hex)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            errors.append(f"{parent}: {error.strerror}")
            continue
        if errors:
            warnings.warn(
                f"Values cross to workers in {directory}, which may be on a disk: there is no "
                f"room for a directory in shared memory ({'; '.join(errors)}).",
                stacklevel=2,
            )
        return directory
    raise WorkerStartError(
        "A worker needs a directory in shared memory or among the temporary files, and none can be "
        f"made ({'; '.join(errors)}). Make room, or set TMPDIR to a directory that has some."
    )


def reserve_port() -> tuple[int, socket.socket]:
    """Returns a free port and the socket that reserves it.

    The socket is bound but does not listen. With `SO_REUSEPORT`, which gRPC sets too, the worker can
    bind the same port, while no other program can get it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("", 0))
    return sock.getsockname()[1], sock


class _Watched:
    """A process that notices when this one ends, and then removes a directory.

    Args:
      script: What a shell is to do. It gets the directory, and then the command, as arguments, and the
        reading end of a pipe as its input.
      command: The command.
      streams: The streams for the process's output.

    Attributes:
      directory: The directory, made here.
      owner: The id of this process.
    """

    def __init__(self, script: str, command: Sequence[str] = (), **streams: Any):
        self.owner, self.directory = os.getpid(), shared_directory()
        reading, self._pipe = os.pipe()
        # A forked child must not keep the pipe open after this process has ended.
        forks.keep_here(self._pipe)
        try:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", script, "worker", self.directory, *command],
                stdin=reading,
                cwd=self.directory,
                start_new_session=True,
                **streams,
            )
        except BaseException as error:
            forks.close(self._pipe)
            shutil.rmtree(self.directory, ignore_errors=True)
            if isinstance(error, OSError):
                raise WorkerStartError(f"`/bin/sh` could not be started: {error}.") from error
            raise
        finally:
            os.close(reading)

    def end(self) -> None:
        """Ends the process and removes the directory; does nothing in a forked child."""
        if os.getpid() != self.owner:
            return
        with contextlib.suppress(ProcessLookupError):
            # The waiting shell keeps other processes from getting the group's number.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        forks.close(self._pipe)
        shutil.rmtree(self.directory, ignore_errors=True)


class Worker:
    """A worker that answers.

    Args:
      name: How messages call it.
      target: `'host:port'`.
      watched: The process that ends, at the latest, when Python does.
      start_timeout: Seconds that the worker has to answer.

    Attributes:
      directory: Where values are written for it; `handover` finds out whether it sees them.
      channel: The connection.
      owner: The id of the Python process that uses it.
    """

    def __init__(self, name: str, target: str, watched: _Watched, start_timeout: float):
        self.name, self.target, self._watched = name, target, watched
        self.directory, self.owner = watched.directory, watched.owner
        self._finalizer = weakref.finalize(self, watched.end)
        try:
            self.channel = _connect(target, start_timeout, self._exit_reason)
        except BaseException:
            self.close()
            raise

    def lost_reason(self, timeout: float) -> str | None:
        """Says why this worker is gone; None if it answers."""
        deadline = time.monotonic() + timeout
        while self._finalizer.alive and not self._exit_reason():
            if _answers(self.target, timeout):
                return None
            if time.monotonic() > deadline:
                return f"it did not answer within {timeout:g} seconds"
            # The connection is cut an instant before the kernel reports the end of the process.
            time.sleep(0.05)
        return self._exit_reason() or "it was closed"

    def _exit_reason(self) -> str | None:
        return None

    def close(self) -> None:
        """Ends what was started here and removes the directory; does nothing in a forked child."""
        if os.getpid() != self.owner:
            return
        if hasattr(self, "channel"):
            self.channel.close()
        self._finalizer()


class LocalWorker(Worker):
    """A worker process on this machine, which ends when this object is closed or Python ends.

    Args:
      start_timeout: Seconds that the worker has to start.
      command: The program to start; `--port=N` is appended.
    """

    def __init__(self, start_timeout: float = 60.0, command: tuple[str, ...] = ()):
        # As in TFF, the worker's output goes where Python's own output goes.
        streams = {}
        for name in ("stdout", "stderr"):
            try:
                streams[name] = getattr(sys, name).fileno()
            except (AttributeError, OSError, ValueError):
                streams[name] = None
        command = command or (worker_binary(),)
        port, self._reserved = reserve_port()
        try:
            watched = _Watched(_WATCHED, [*command, f"--port={port}"], **streams)
            target = f"localhost:{port}"
            name = f"local worker (process {watched.process.pid}, {target})"
            super().__init__(name, target, watched, start_timeout)
        except BaseException:
            self._reserved.close()
            raise

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._watched.process.pid

    def _exit_reason(self) -> str | None:
        code = self._watched.process.poll()
        if code is None:
            return None
        if code < 0:
            return f"it was ended by signal {signal.Signals(-code).name}"
        return f"it exited with code {code}"

    def close(self) -> None:
        """Ends the worker and removes its directory; does nothing in a forked child."""
        super().close()
        if os.getpid() == self.owner:
            self._reserved.close()


class RemoteWorker(Worker):
    """The connection to a worker that runs elsewhere; closing it leaves the worker running.

    Args:
      target: `'host:port'` of a running `worker_binary`.
      start_timeout: Seconds that the worker has to answer.
    """

    def __init__(self, target: str, start_timeout: float = 60.0):
        watched = _Watched(_WATCH, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        super().__init__(f"remote worker {target}", target, watched, start_timeout)


def _answers(target: str, timeout: float) -> bool:
    """Whether a worker completes a new HTTP/2 connection, which a hung or cut-off one does not."""
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
    """Opens a new connection to a worker."""
    return grpc.insecure_channel(target, _CHANNEL_OPTIONS)
