"""The Python process in which torch runs, and the memory that both processes share."""

import itertools
import json
import mmap
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.backends.torch import child as torch_child
from tff_optim.core.messages import refusal, shown
from tff_optim.core.types import Json

_SCRIPT = pathlib.Path(torch_child.__file__)
_TIMEOUT = "TFF_OPTIM_TORCH_TIMEOUT"
_LONGEST = 1e6
_DONE = {"open": "started", "step": "taken the step"}
_AFTER = {
    "open": "What it printed is on stderr.",
    "step": "State and weights are as they were before it: take the step again. A new process starts "
    "by itself.",
}


def time_limit() -> float:
    """Seconds that torch may take to start, or for one step.

    Example:
      >>> time_limit()
      300.0

    Raises:
      ValueError: The environment variable TFF_OPTIM_TORCH_TIMEOUT holds something else.
    """
    text = os.environ.get(_TIMEOUT, "300")
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit <= _LONGEST:
        raise ValueError(
            f"`{_TIMEOUT}` in the environment must be a number of seconds above 0 and at most "
            f"{_LONGEST:.0f}; found {shown(text)}."
        )
    return limit


@attrs.frozen
class Slot:
    """A tensor of the optimizer's state: its key, the position of its weight, shape and dtype."""

    key: str
    weight: int
    spec: tf.TensorSpec


@attrs.frozen(eq=False)
class Result:
    """The result of a step."""

    weights: list[np.ndarray]
    slots: list[np.ndarray]
    numbers: Mapping[str, float | int]


class _Child:
    """A Python process that runs `child.py`; it ends with the last reference to this object."""

    def __init__(self, python: str):
        self.python = python
        self.closed: list[int] = []  # sessions to forget
        self._owner = os.getpid()
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                # In a session of its own, so that Ctrl-C and Ctrl-Z do not reach it during a step.
                self._process = subprocess.Popen(
                    [python, str(_SCRIPT), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            self._socket.close()
            raise refusal(
                "python", "be a Python that can be run", f"{shown(python)}: {error}"
            ) from error

    @property
    def is_running(self) -> bool:
        """Whether it runs and this process started it, so that it can be asked."""
        return os.getpid() == self._owner and self._process.poll() is None

    def ask(self, request: Mapping[str, Json]) -> Json:
        """Sends a request and returns the reply to it, within the time limit.

        Any interruption, such as Ctrl-C, ends the process, since its reply must not be taken for the
        reply to the next request.
        """
        doing, limit = request["do"], time_limit()
        closed, self.closed = self.closed, []
        message = json.dumps({**request, "closed": closed}) + "\n"
        try:
            line = self._exchange(message.encode(), time.monotonic() + limit)
        except TimeoutError as error:
            self.end()
            raise RuntimeError(
                f"The Python process of torch, {self.python}, had not {_DONE[doing]} after {limit:g} "
                f"seconds and was ended. It was stopped, hung, or is slow. {_AFTER[doing]} If it is "
                f"slow, set {_TIMEOUT} to more seconds."
            ) from error
        except BaseException:
            self.end()
            raise
        if not line.endswith(b"\n"):
            raise RuntimeError(
                f"The Python process of torch, {self.python}, ended before it had {_DONE[doing]} "
                f"({self._how_it_ended()}). {_AFTER[doing]}"
            )
        reply = json.loads(line)
        if "refused" in reply:
            raise ValueError(reply["refused"])
        if "failed" in reply:
            raise ValueError(
                "`optimizer` must run in the Python process of torch; found that it fails: "
                f"{reply['failed']}"
            )
        return reply

    def _exchange(self, message: bytes, until: float) -> bytes:
        """The line that answers a message, incomplete if the process ends first."""
        line = b""
        try:
            self._wait(until)
            self._socket.sendall(message)
            while not line.endswith(b"\n"):
                self._wait(until)
                piece = self._socket.recv(1 << 16)
                if not piece:
                    break
                line += piece
        except ConnectionError:
            pass
        return line

    def _wait(self, until: float) -> None:
        self._socket.settimeout(max(until - time.monotonic(), 1e-3))

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.end()
            return "it no longer listens"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def end(self) -> None:
        """Ends the process, even if it is stopped; it holds nothing that is needed."""
        self._socket.close()
        if os.getpid() == self._owner:
            self._process.kill()
            self._process.wait()

    def leave(self) -> None:
        """In a fork: closes the socket, so that the process ends with the one that started it."""
        self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.end()


# Importing torch takes seconds: one child serves all optimizers of a Python and its search path.
_children: weakref.WeakValueDictionary[tuple[str, str | None], _Child] = (
    weakref.WeakValueDictionary()
)
_sessions = itertools.count()
# Held from writing into the memory of a child to reading from it.
_lock = threading.Lock()


def _leave_in_a_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it
    for child in list(_children.values()):
        child.leave()


os.register_at_fork(after_in_child=_leave_in_a_fork)


def _child(python: str) -> _Child:
    key = python, os.environ.get("PYTHONPATH")
    child = _children.get(key)
    if child is None or not child.is_running:
        child = _Child(python)
        _children[key] = child
    return child


@attrs.frozen(eq=False)
class _Opened:
    """A session of a child, and its tensors in shared memory."""

    child: _Child
    number: int
    description: Mapping[str, Json]
    views: list[np.ndarray]


class TorchProcess:
    """Steps of one optimizer on weights of given shapes, in a child process.

    The child is started on first use, and again if it has ended or another process started it.

    Attributes:
      slots: The tensors of the optimizer's state.
      numbers: The numbers of its group and scheduler before the first step, by path.
    """

    def __init__(self, python: str, recipe: Mapping[str, Json], specs: Sequence[tf.TensorSpec]):
        self._python = python
        self._recipe = recipe
        self._weights = [[spec.shape.as_list(), spec.dtype.name] for spec in specs]
        with _lock:
            self._opened = self._open()
        description = self._opened.description
        self.slots = [
            Slot(slot["key"], slot["weight"], tf.TensorSpec(*_shape_and_dtype(slot["spec"])))
            for slot in description["slots"]
        ]
        self.numbers: Mapping[str, float | int] = description["numbers"]

    @property
    def num_weights(self) -> int:
        """The number of weights."""
        return len(self._weights)

    def step(
        self,
        weights: Sequence[np.ndarray],
        gradients: Mapping[int, np.ndarray],
        slots: Sequence[np.ndarray],
        started: np.ndarray,
        numbers: Mapping[str, float | int],
    ) -> Result:
        """Takes a step. The arguments are copied, and never changed.

        Args:
          weights: All weights.
          gradients: Gradients by the position of their weight.
          slots: The optimizer's state, in the order of `slots`.
          started: For each weight, whether it has had a gradient before.
          numbers: As `numbers`, changed by the steps before.

        Raises:
          ValueError: If torch or the optimizer fails.
          RuntimeError: If the child ends before it has answered, or does not answer within
            `time_limit`.
        """
        n = self.num_weights
        arrays = dict(enumerate(weights))
        arrays.update((n + i, gradient) for i, gradient in gradients.items())
        arrays.update((2 * n + i, slot) for i, slot in enumerate(slots))
        request = {
            "do": "step",
            "numbers": dict(numbers),
            "given": sorted(gradients),
            "started": [bool(s) for s in started],
        }
        with _lock:
            if not self._opened.child.is_running:
                self._opened = self._open_again()
            opened = self._opened
            for position, array in arrays.items():
                opened.views[position][...] = array
            reply = opened.child.ask({**request, "session": opened.number})
            return Result(
                [view.copy() for view in opened.views[:n]],
                [view.copy() for view in opened.views[2 * n :]],
                reply["numbers"],
            )

    def _open(self) -> _Opened:
        child, number = _child(self._python), next(_sessions)
        memory = os.memfd_create("tff_optim_torch")
        try:
            description = child.ask(
                {
                    **self._recipe,
                    "do": "open",
                    "session": number,
                    "weights": self._weights,
                    "memory": f"/proc/{os.getpid()}/fd/{memory}",
                }
            )
            slots = [slot["spec"] for slot in description["slots"]]
            specs = [*self._weights, *self._weights, *slots]
            starts, size = torch_child.offsets(specs)
            mapped = mmap.mmap(memory, size)
        finally:
            os.close(memory)
        views = [
            np.frombuffer(
                mapped, dtype.as_numpy_dtype, int(np.prod(shape, dtype=int)), start
            ).reshape(shape)
            for start, (shape, dtype) in zip(starts, map(_shape_and_dtype, specs))
        ]
        return _Opened(child, number, description, views)

    def _open_again(self) -> _Opened:
        opened, before = self._open(), self._opened.description["slots"]
        if opened.description["slots"] != before:
            raise RuntimeError(
                f"The Python process of torch, {self._python}, was started again, and the optimizer "
                "now has another state there. Was torch replaced? Restart this program."
            )
        return opened

    def __del__(self) -> None:
        if hasattr(self, "_opened"):
            self._opened.child.closed.append(self._opened.number)


def _shape_and_dtype(spec: Sequence[Json]) -> tuple[list[int], tf.DType]:
    shape, dtype = spec
    return shape, tf.as_dtype(dtype)
