"""Takes steps of a torch optimizer in a Python of its own; run as a script by `process.py`.

Imports torch and nothing of this package. Requests and replies are lines of JSON on a socket. Tensors
lie in shared memory one after the other, at the positions of `offsets`.
"""

import importlib
import json
import math
import mmap
import os
import socket
import sys
import warnings
from typing import Any, TypeAlias

Json: TypeAlias = Any
# An object of torch, which is not imported here, since this package imports this file too.
Torch: TypeAlias = Any

_ALIGNMENT = 64  # torch aborts the process on views that are not aligned


def offsets(specs: Json) -> tuple[list[int], int]:
    """The positions of tensors with these `[shape, dtype]`, and their total size in bytes."""
    found, end = [], 0
    for shape, dtype in specs:
        found.append(end)
        size = math.prod(shape) * _SIZES[dtype]
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return found, max(end, _ALIGNMENT)


_SIZES = {
    "bool": 1,
    "uint8": 1,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flatten(value: Json, path: str) -> list[tuple[str, Json]]:
    """The numbers in a nest of dictionaries, lists and tuples, with their paths."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return [(path, value)] if _is_number(value) else []
    return [pair for key, item in items for pair in _flatten(item, f"{path}/{key}")]


def _replace(value: Json, path: str, leaves: dict[str, Json]) -> Json:
    """A copy of a nest with the leaves at the paths in `leaves` replaced."""
    if isinstance(value, dict):
        new = {key: _replace(item, f"{path}/{key}", leaves) for key, item in value.items()}
        return new if type(value) is dict else type(value)(new)
    if isinstance(value, list | tuple):
        return type(value)(_replace(item, f"{path}/{i}", leaves) for i, item in enumerate(value))
    return leaves.get(path, value)


class RefusedError(Exception):
    """A refusal, in words for the user."""


def _find(name: str, module: Torch, base: type, argument: str) -> type:
    """A class of torch by its name, or of another package by its full name."""
    path, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(path) if path else module, attribute, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise RefusedError(f"`{argument}` must name a subclass of {base.__name__}; found {name!r}.")
    return found


class Recipe:
    """Makes a new optimizer, and its scheduler, for each step."""

    def __init__(self, request: dict[str, Json]):
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        import torch

        self.torch: Torch = torch
        self.weights = [(tuple(shape), dtype) for shape, dtype in request["weights"]]
        self.arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in request["arguments"].items()
        }
        self.optimizer = _find(
            request["optimizer"], torch.optim, torch.optim.Optimizer, "optimizer"
        )
        self.scheduler = request["scheduler"]
        if self.scheduler is not None:
            name, self.scheduler_arguments = self.scheduler
            base = torch.optim.lr_scheduler.LRScheduler
            self.scheduler = _find(name, torch.optim.lr_scheduler, base, "lr_scheduler")

    def make(self, parameters: list[Torch]) -> tuple[Torch, Torch]:
        """A fresh optimizer, and its scheduler or None."""
        optimizer = self.optimizer(parameters, **self.arguments)
        scheduler = self.scheduler and self.scheduler(optimizer, **self.scheduler_arguments)
        return optimizer, scheduler

    def numbers(self, optimizer: Torch, scheduler: Torch) -> dict[str, Json]:
        """The numbers of the parameter group and of the scheduler, by path."""
        (group,) = optimizer.param_groups
        rest = {key: value for key, value in group.items() if key != "params"}
        found = _flatten(rest, "group")
        if scheduler:
            found += _flatten(scheduler.state_dict(), "scheduler")
        for path, value in found:
            if isinstance(value, int) and value.bit_length() > 63:
                raise RefusedError(
                    "`optimizer` must keep whole numbers of at most 64 bits; found one of "
                    f"{value.bit_length() + 1} bits at {path!r}. Give it as a float."
                )
        return dict(found)

    def set_numbers(self, optimizer: Torch, scheduler: Torch, numbers: dict[str, Json]) -> None:
        """Sets the numbers that `numbers` returned."""
        (group,) = optimizer.param_groups
        if scheduler:
            scheduler.load_state_dict(_replace(scheduler.state_dict(), "scheduler", numbers))
        for key in [key for key in group if key != "params"]:
            group[key] = _replace(group[key], f"group/{key}", numbers)

    def slots(self, optimizer: Torch, parameters: list[Torch]) -> list[tuple[str, int, Torch]]:
        """The state of the optimizer: key, position of the weight, and value."""
        found = [
            (str(key), i, value)
            for i, parameter in enumerate(parameters)
            for key, value in optimizer.state.get(parameter, {}).items()
        ]
        for key, _, value in found:
            if not (value is None or _is_number(value) or isinstance(value, self.torch.Tensor)):
                raise RefusedError(
                    "`optimizer` must keep tensors and numbers in its state; found "
                    f"{type(value).__name__} at {key!r}."
                )
        return found

    def describe(self) -> dict[str, Json]:
        """Tensors and numbers of the state, found by a step on weights of 1 with zero gradients."""
        torch = self.torch
        parameters = [
            torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype)))
            for shape, dtype in self.weights
        ]
        optimizer, scheduler = self.make(parameters)
        numbers = self.numbers(optimizer, scheduler)
        attributes = {k: v for k, v in vars(optimizer).items() if _is_number(v)}
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for key, value in attributes.items():
            if not key.startswith("_") and getattr(optimizer, key) != value:
                raise RefusedError(
                    f"`optimizer` must keep changing values in its `state` or its groups; found that "
                    f"a step changes the attribute {key!r}."
                )
        specs = []
        for key, i, value in self.slots(optimizer, parameters):
            kind = "tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            value = torch.as_tensor(
                0 if value is None else value,
                dtype={"int": torch.int64, "float": torch.float64}.get(kind),
            )
            dtype = str(value.dtype).removeprefix("torch.")
            specs.append(
                {"key": key, "weight": i, "kind": kind, "spec": [list(value.shape), dtype]}
            )
        return {"slots": specs, "numbers": numbers}


class Session:
    """A recipe, and the shared memory of its weights, gradients and slots."""

    def __init__(self, request: dict[str, Json]):
        self.recipe = Recipe(request)
        self.description = self.recipe.describe()
        self.slots = self.description["slots"]
        specs = [*self.recipe.weights, *self.recipe.weights, *(slot["spec"] for slot in self.slots)]
        starts, size = offsets(specs)
        with open(request["memory"], "r+b") as file:
            file.truncate(size)
            self.memory = mmap.mmap(file.fileno(), size)
        self.views = [self._view(start, *spec) for start, spec in zip(starts, specs)]

    def _view(self, start: int, shape: list[int], dtype: str) -> Torch:
        torch = self.recipe.torch
        dtype, count = getattr(torch, dtype), math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=start).view(shape)

    def step(self, request: dict[str, Json]) -> dict[str, Json]:
        """Takes a step on the weights and the state in shared memory."""
        torch, recipe = self.recipe.torch, self.recipe
        n = len(recipe.weights)
        parameters = [torch.nn.Parameter(view) for view in self.views[:n]]
        for i in request["given"]:
            parameters[i].grad = self.views[n + i]
        optimizer, scheduler = recipe.make(parameters)
        kept = {}
        for slot, view in zip(self.slots, self.views[2 * n :]):
            kept[slot["key"], slot["weight"]] = view
            if request["started"][slot["weight"]]:
                value = {"tensor": view, "NoneType": None}.get(slot["kind"], _MISSING)
                state = optimizer.state[parameters[slot["weight"]]]
                state[slot["key"]] = view.item() if value is _MISSING else value
        recipe.set_numbers(optimizer, scheduler, request["numbers"])
        optimizer.step()
        if scheduler:
            scheduler.step()
        with torch.no_grad():
            for key, i, value in recipe.slots(optimizer, parameters):
                view = kept.get((key, i))
                value = torch.as_tensor(0 if value is None else value)
                if view is None or view.shape != value.shape:
                    raise RefusedError(
                        "`optimizer` must keep its state in tensors of the same shapes; found that "
                        f"a step changes {key!r}."
                    )
                if value.data_ptr() != view.data_ptr():
                    view.copy_(value)
        return {"numbers": recipe.numbers(optimizer, scheduler)}


_MISSING = object()


def main(fd: int) -> None:
    """Answers the requests on a socket until it is closed."""
    here = os.path.dirname(os.path.realpath(__file__))
    if sys.path and os.path.realpath(sys.path[0]) == here:
        del sys.path[0]  # its modules must not stand in for others'
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    sessions: dict[int, Session] = {}
    with socket.socket(fileno=fd) as connection, connection.makefile("rw") as stream:
        for line in stream:
            stream.write(_answer(json.loads(line), sessions) + "\n")
            stream.flush()


def _answer(request: dict[str, Json], sessions: dict[int, Session]) -> str:
    for number in request["closed"]:
        sessions.pop(number, None)
    number = request["session"]
    try:
        if request["do"] == "open":
            sessions[number] = Session(request)
            return json.dumps(sessions[number].description)
        return json.dumps(sessions[number].step(request))
    except RefusedError as error:
        return json.dumps({"refused": str(error)})
    except Exception as error:  # of torch, or of the optimizer itself
        return json.dumps({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(int(sys.argv[1]))
