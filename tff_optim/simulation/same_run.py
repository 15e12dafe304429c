"""What makes a run the same run: written down in its folder, and compared by whoever goes on."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from tff_optim.simulation import metrics

_FILE = "arguments.json"


def describe(process: Any, state: Any, **arguments: Any) -> dict[str, Any]:
    """What is compared: arguments, hyperparameters at the start, and the type of the state."""
    initialize = getattr(process, "process", process).initialize
    state_type = str(initialize.type_signature.result)
    found = {**arguments, "state_type": hashlib.sha256(state_type.encode()).hexdigest()[:8]}
    if hasattr(process, "get_hparams"):
        hparams = metrics.flatten(process.get_hparams(state))
        found.update({f"hparams/{name}": value for name, value in hparams.items()})
    return found


def check(folder: str, run: dict[str, Any], *, resume: bool, files: Sequence[str]) -> None:
    """Writes down what makes a run the same run, or compares it with what is there.

    Args:
      folder: The run's.
      run: See `describe`.
      resume: Whether a run that is there may go on.
      files: Names that the run will write.

    Raises:
      ValueError: The folder holds another run, or files that no run has written.
    """
    path = os.path.join(folder, _FILE)
    if not os.path.exists(path):
        others = [name for name in files if os.path.exists(os.path.join(folder, name))]
        if others:
            raise ValueError(
                f"`directory` must hold a run, or none of its files; found {others} and no {_FILE} "
                f"in {folder}. Name another."
            )
        os.makedirs(folder, exist_ok=True)
        with open(path + ".unfinished", "w") as file:
            json.dump(run, file)
        os.replace(path + ".unfinished", path)
        return
    if not resume:
        raise ValueError(
            f"`directory` must be a new one, since `resume` is False; found a run in {folder}. "
            "Remove it, or name another."
        )
    with open(path) as file:
        found = json.load(file)
    names = [name for name in {**run, **found} if run.get(name) != found.get(name)]
    if names:
        mine, theirs = ({name: one.get(name) for name in names} for one in (run, found))
        of_types = "state_type" in names
        hint = " Another `state_type` is another model, optimizer or rule." if of_types else ""
        raise ValueError(
            f"`directory` must hold a run with {mine}, or none; found one with {theirs} in "
            f"{folder}.{hint} Name another."
        )
