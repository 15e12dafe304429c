"""The Python process in which torch runs, and the memory that both processes see."""

import contextlib
import itertools
import json
import mmap
import os
import pathlib
import signal
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim import torch_child

_SCRIPT = pathlib.Path(torch_child.__file__)


@attrs.frozen
class Slot:
    """A tensor of the optimizer's state: its key, the position of its weight, shape and dtype."""

    key: str
    weight: int
    spec: tf.TensorSpec


@attrs.frozen(eq=False)
class Result:
    """What a step returns."""

    weights: list[np.ndarray]
    slots: list[np.ndarray]
    numbers: Mapping[str, float | int]


class _Child:
    """A Python process that runs `torch_child.py`; it ends with the last reference to this object."""

    def __init__(self, python: str):
        self.python = python
        self.lock = threading.RLock()
        self.closed: list[int] = []  # sessions that are to be forgotten
        try:
            self._process = subprocess.Popen(
                [python, str(_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(
                f"`python` must be a Python that can be run; found {python!r}: {error}."
            ) from error

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Sends a request and returns the reply to it."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        closed, self.closed = self.closed, []
        try:
            process.stdin.write(json.dumps({**request, "closed": closed}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(_ended(process.wait(), self.python, request["do"]))
        reply = json.loads(line)
        if "refused" in reply:
            raise ValueError(reply["refused"])
        if "failed" in reply:
            raise ValueError(
                "`optimizer` must run in the Python process of torch; found that it fails: "
                f"{reply['failed']}"
            )
        return reply

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # the end of its requests
            process.stdout.close()
            process.wait()


# Importing torch takes seconds: one child serves all optimizers of a Python and its search path.
_children: weakref.WeakValueDictionary[tuple[str, str | None], _Child] = (
    weakref.WeakValueDictionary()
)
_sessions = itertools.count()


def _child(python: str) -> _Child:
    key = python, os.environ.get("PYTHONPATH")
    child = _children.get(key)
    if child is None or not child.is_running:
        child = _Child(python)
        _children[key] = child
    return child


class TorchProcess:
    """Steps of one optimizer on weights of given shapes, in a child process.

    The child is started when it is first needed, and again if it has ended.

    Attributes:
      slots: The tensors of the optimizer's state.
      numbers: The numbers of its group and scheduler before the first step, by path.
    """

    def __init__(self, python: str, recipe: Mapping[str, Any], specs: Sequence[tf.TensorSpec]):
        self._python = python
        self._recipe = recipe
        self._weights = [[spec.shape.as_list(), spec.dtype.name] for spec in specs]
        description = self._open()
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
        """Takes a step. What is handed over is copied, and stays as it is whatever happens.

        Args:
          weights: All weights.
          gradients: Gradients by the position of their weight.
          slots: The optimizer's state, in the order of `slots`.
          started: For each weight, whether it has had a gradient before.
          numbers: As `numbers`, changed by the steps before.

        Raises:
          ValueError: If torch or the optimizer fails.
          RuntimeError: If the child ends in the middle of the step.
        """
        n = self.num_weights
        if not self._child.is_running:
            self._open()
        with self._child.lock:
            arrays = dict(enumerate(weights))
            arrays.update((n + i, gradient) for i, gradient in gradients.items())
            arrays.update((2 * n + i, slot) for i, slot in enumerate(slots))
            for position, array in arrays.items():
                self._views[position][...] = array
            request = {"do": "step", "session": self._session, "numbers": dict(numbers)}
            reply = self._child.ask(
                {**request, "given": sorted(gradients), "started": [bool(s) for s in started]}
            )
            return Result(
                [view.copy() for view in self._views[:n]],
                [view.copy() for view in self._views[2 * n :]],
                reply["numbers"],
            )

    def _open(self) -> Any:
        self._child, self._session = _child(self._python), next(_sessions)
        memory = os.memfd_create("tff_optim_torch")
        try:
            with self._child.lock:
                description = self._child.ask(
                    {
                        **self._recipe,
                        "do": "open",
                        "session": self._session,
                        "weights": self._weights,
                        "memory": f"/proc/{os.getpid()}/fd/{memory}",
                    }
                )
            slots = [slot["spec"] for slot in description["slots"]]
            specs = [*self._weights, *self._weights, *slots]
            places, size = torch_child.offsets(specs)
            mapped = mmap.mmap(memory, size)
        finally:
            os.close(memory)
        self._views = [
            np.frombuffer(
                mapped, dtype.as_numpy_dtype, int(np.prod(shape, dtype=int)), place
            ).reshape(shape)
            for place, (shape, dtype) in zip(places, map(_shape_and_dtype, specs))
        ]
        return description

    def __del__(self) -> None:
        if hasattr(self, "_session"):
            self._child.closed.append(self._session)


def _shape_and_dtype(spec: Sequence[Any]) -> tuple[list[int], tf.DType]:
    shape, dtype = spec
    return shape, tf.as_dtype(dtype)


def _ended(code: int, python: str, doing: str) -> str:
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if doing == "open":
        return f"The Python process of torch, {python}, ended before its first step ({how})."
    return (
        f"The Python process of torch ended in the middle of a step ({how}). State and weights are as "
        "they were before it: take the step again. A new process starts by itself."
    )
