"""As much of torch as its child process uses, in NumPy, with an optimizer that goes wrong when told.

A test puts it on the search path of modules under the name `torch`. What it computes is plain SGD
with momentum.
"""

import contextlib
import os
import pathlib
import signal
import time
import types

import numpy as np

bool = np.dtype("bool")
float32 = np.dtype("float32")
float64 = np.dtype("float64")
int64 = np.dtype("int64")


class Tensor(np.ndarray):
    """An array with a gradient; a key by identity."""

    grad = None
    __hash__ = object.__hash__

    def view(self, shape):
        return self.reshape(shape)

    def data_ptr(self):
        return self.ctypes.data

    def copy_(self, value):
        self[...] = value


def as_tensor(value, dtype=None):
    return np.ndarray.view(np.asarray(value, dtype), Tensor)


def ones(shape, dtype):
    return as_tensor(np.ones(shape, dtype))


def zeros_like(value):
    return as_tensor(np.zeros_like(value))


def frombuffer(memory, dtype, count, offset):
    return as_tensor(np.frombuffer(memory, dtype, count, offset))


no_grad = contextlib.nullcontext


class Optimizer:
    def __init__(self, parameters, **group):
        self.param_groups = [{"params": parameters, **group}]
        self.state = {parameter: {} for parameter in parameters}


class SGD(Optimizer):
    def __init__(self, parameters, lr, momentum=0.0, file="", **group):
        super().__init__(parameters, lr=lr, momentum=momentum, file=file, **group)

    def step(self):
        (group,) = self.param_groups
        if self._told("interrupt"):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.5)
        if self._told("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                trace = state.get("trace", 0) * group["momentum"] + parameter.grad
                state["trace"] = as_tensor(trace)
                parameter -= np.float32(group["lr"]) * trace.astype(np.float32)
        if self._told("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._told("grow"):
            group["count"] = 1e300
        if self._told("overflow"):
            group["count"] = 10**5000
        if self._told("rate"):
            group["lr"] *= 0.5

    def _told(self, what):
        """Whether a line of the file says so, which is taken from it; never for gradients of zero."""
        (group,) = self.param_groups
        file = pathlib.Path(group["file"])
        lines = file.read_text().split() if file.is_file() else []
        if what not in lines or not any(np.any(p.grad) for p in group["params"]):
            return False
        lines.remove(what)
        file.write_text("\n".join(lines))
        return True


class LRScheduler:
    pass


nn = types.SimpleNamespace(Parameter=lambda value: np.ndarray.view(value, Tensor))
optim = types.SimpleNamespace(
    __name__="torch.optim",
    Optimizer=Optimizer,
    SGD=SGD,
    lr_scheduler=types.SimpleNamespace(LRScheduler=LRScheduler),
)
