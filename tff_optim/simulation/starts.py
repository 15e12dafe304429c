"""Initial weights of runs: the same for all of them, or a warning if they differ."""

import hashlib
import threading
import warnings
from typing import TypeAlias

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.core.types import Function, Process, State, Value, Weights

ModelWeights: TypeAlias = tff.learning.models.ModelWeights


def initial_weights(given: Value, seed: int) -> ModelWeights | None:
    """The weights that all runs of a seed start from, as arrays; None if each process has its own.

    Args:
      given: Model weights, a Keras model, or a function of the seed that returns one of these.
      seed: The seed of the runs.

    Raises:
      TypeError: If it is none of these.
    """
    if given is None:
        return None
    found = given
    if callable(given) and not isinstance(given, tf.keras.Model):
        found = given(seed)
    if isinstance(found, tf.keras.Model):
        found = ModelWeights.from_model(found)
    if not isinstance(found, tff.learning.models.ModelWeights):
        raise TypeError(
            "`initial_weights` must be a `tff.learning.models.ModelWeights`, a Keras model, or a "
            f"function from a seed to one of these; found {shown(found)}."
        )
    return tf.nest.map_structure(np.array, found)


@attrs.frozen
class Starts:
    """Sets the initial weights of runs, and compares those of several processes.

    Attributes:
      weights: The `initial_weights` by seed.
      compared: Whether several processes are compared.
    """

    weights: dict[int, ModelWeights | None]
    compared: bool
    _seen: dict[Value, Value] = attrs.field(factory=dict, init=False)
    _lock: Value = attrs.field(factory=threading.Lock, init=False)

    def begin(self, process: Process, name: str, seed: int) -> State:
        """The initial state of a process, with the weights that all runs of the seed start from.

        Raises:
          ValueError: If the weights do not match the process.
        """
        state, given = process.initialize(), self.weights[seed]
        read: Function | None = getattr(process, "get_model_weights", None)
        if read is None and given is None:
            return state
        if read is None:
            raise ValueError(
                f"`initial_weights` must be None for a process without model weights; found some "
                f"for {name!r}."
            )
        if given is not None:
            wanted = read(state)
            if _kinds(given) != _kinds(wanted):
                raise ValueError(
                    f"`initial_weights` must be those of the model of {name!r}, {_kinds(wanted)}; "
                    f"found {_kinds(given)}."
                )
            flat = tf.nest.flatten(given)
            return process.set_model_weights(state, tf.nest.pack_sequence_as(wanted, flat))
        if self.compared:
            self._compare(read(state), name, seed)
        return state

    def _compare(self, weights: Weights, name: str, seed: int) -> None:
        """Warns once if two processes of one model start from different weights."""
        digest = hashlib.sha256(b"".join(a.tobytes() for a in _arrays(weights))).hexdigest()
        key = (seed, str(_kinds(weights)))
        with self._lock:
            first, before = self._seen.setdefault(key, (name, digest))
            told = "told" in self._seen
            if digest == before or told:
                return
            self._seen["told"] = True
        warnings.warn(
            f"`initial_weights` should be given where processes are compared; {first!r} and {name!r} "
            "start from different weights, since each process draws its own when it is built. Pass "
            "`initial_weights=lambda seed: build_keras_model()`, or give the layers' initializers a "
            "seed.",
            stacklevel=2,
        )


def _arrays(weights: Weights) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in tf.nest.flatten(weights)]


def _kinds(weights: Weights) -> list[str]:
    return [f"{array.dtype}{list(array.shape)}" for array in _arrays(weights)]
