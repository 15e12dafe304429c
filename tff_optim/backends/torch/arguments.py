"""The description of a torch optimizer: names, plain arguments, and the Python that runs it."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping

import numpy as np

from tff_optim.core.entries import check_trusted
from tff_optim.core.messages import refusal, shown
from tff_optim.core.types import Json

# Public names of torch that cannot run from gradients alone, and why.
REFUSED = {
    "LBFGS": "it calls the loss several times in a step, and a server has no loss",
    "SparseAdam": "it takes sparse gradients, and the update of a server is dense",
}
REFUSED_SCHEDULERS = {
    "ReduceLROnPlateau": "it follows a metric, which no TFF optimizer is given",
    "LambdaLR": "it is made of a function, which cannot be handed to another process",
    "MultiplicativeLR": "it is made of a function, which cannot be handed to another process",
    "SequentialLR": "it is made of other schedulers",
    "ChainedScheduler": "it is made of other schedulers",
}


def find_python(python: str | os.PathLike | None) -> str:
    """The Python that runs torch, checked as far as possible without starting it."""
    if python is not None:
        found = shutil.which(os.fspath(python))
        if found is None:
            raise ValueError(
                f"`python` must be a Python that can be run; found {shown(os.fspath(python))}. Give the "
                "path of `bin/python` in an environment with torch."
            )
        return found
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "`python` must be the Python of an environment with torch; found None, and no torch "
            "beside TensorFlow Federated. Make one: `python3 -m venv torch-env`, "
            "`torch-env/bin/pip install torch`; then give `python='torch-env/bin/python'`."
        )
    version = importlib.metadata.version("typing_extensions")
    newer = tuple(int(part) for part in version.split(".")[:2]) >= (4, 6)
    if newer and os.environ.get("WRAPT_DISABLE_EXTENSIONS") not in ("1", "true"):
        raise ValueError(
            "`python` must be given where torch has brought typing_extensions 4.6 or newer; found "
            f"None and {version}. With it, TensorFlow 2.14 cannot write a SavedModel, nor "
            "`tff.program.FileProgramStateManager` a state. Give torch an environment of its own, or "
            "set WRAPT_DISABLE_EXTENSIONS=1 before TensorFlow is imported."
        )
    return sys.executable


def check_name(
    argument: str, name: object, where: str, trusted: Collection[str], refused: Mapping[str, str]
) -> None:
    """Raises unless `name` may be a class of torch or of a trusted package."""
    if not isinstance(name, str):
        raise TypeError(
            f"`{argument}` must be the name of a class of {where}, or its full name in a trusted "
            f"package; found {shown(name)}. Give its name, since torch runs in another process."
        )
    if not all(part.isidentifier() and part[0] != "_" for part in name.split(".")):
        raise refusal(argument, "be a public name, with dots between", shown(name))
    if name.rpartition(".")[2] in refused:
        short = name.rpartition(".")[2]
        raise ValueError(
            f"`{argument}` must be an optimizer or scheduler that runs from gradients alone; found "
            f"{short}: {refused[short]}."
        )
    if "." in name:
        check_trusted(argument, name, name.partition(".")[0], trusted, where)


def check_arguments(argument: str, given: object) -> dict[str, Json]:
    """Arguments in JSON's types: NumPy numbers become Python numbers, tuples become lists."""
    if not isinstance(given, Mapping):
        raise refusal(argument, "be a mapping of arguments", shown(given), error=TypeError)
    arguments = {}
    for name, value in given.items():
        value = value.item() if isinstance(value, np.generic) else value
        try:
            arguments[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`{name}` of `{argument}` must be a number, a text, True, False, None or a list of "
                f"these, since it is sent to another process; found {shown(value)}."
            ) from error
    return arguments
