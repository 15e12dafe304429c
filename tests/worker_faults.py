"""Ways to disturb workers and connections, and to see what is left of them."""

import contextlib
import glob
import socket
import subprocess
import tempfile
import threading

import tensorflow as tf
from resident_cases import children_of, cohorts, wait_until

from tff_optim.resident.clients.in_workers import worker as worker_lib


def slowed(data, seconds):
    """The same data, of which each batch takes its time, in which no processor works."""
    variant = tf.raw_ops.SleepDataset(
        input_dataset=tf.data.experimental.to_variant(data),
        sleep_microseconds=round(seconds * 1e6),
        output_types=[spec.dtype for spec in tf.nest.flatten(data.element_spec)],
        output_shapes=[spec.shape for spec in tf.nest.flatten(data.element_spec)],
    )
    return tf.data.experimental.from_variant(variant, data.element_spec)


def endless():
    """A cohort whose round never ends by itself."""
    return [slowed(client.repeat(), 0.01) for client in cohorts()[0]]


def after(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def directories_of(pid):
    """The directories that a Python process made for hand-overs, wherever they are."""
    places = {"/dev/shm", tempfile.gettempdir()}
    return [d for place in places for d in glob.glob(f"{place}/tff_resident_{pid}_*")]


def workers_of(pid):
    """The worker processes among a process's children."""
    return [child for child in children_of(pid) if b"worker_binary" in _command(child)]


def _command(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as f:
        return f.read()
    return b""


class Proxy:
    """A TCP connection that can be cut, frozen and mended."""

    def __init__(self, port):
        self._to = port
        self._listener = socket.create_server(("localhost", 0))
        self.target = f"localhost:{self._listener.getsockname()[1]}"
        self._sockets = []
        self.connections = 0
        self.refuse = False
        self._flowing = threading.Event()
        self._flowing.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.refuse:
                    near.close()
                    continue
                self.connections += 1
                far = socket.create_connection(("localhost", self._to))
                self._sockets += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def freeze(self):
        self._flowing.clear()

    def mend(self):
        self.refuse = False
        self._flowing.set()

    def cut(self):
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._sockets = []

    def close(self):
        self._flowing.set()
        self._listener.close()
        self.cut()


@contextlib.contextmanager
def running_worker():
    """A worker as somebody would start it on another machine."""
    port, sock = worker_lib.reserve_port()
    server = subprocess.Popen([worker_lib.worker_binary(), f"--port={port}"])
    try:
        wait_until(lambda: worker_lib._answers(f"localhost:{port}", 1), 20)
        yield port, server
    finally:
        server.kill()
        server.wait()
        sock.close()
