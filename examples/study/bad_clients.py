"""What bad clients do: to their labels, to their updates, and to what they tell the rule.

The attackers know the rule. Those who send an update of their own know what the honest clients of the
round are going to send (`payloads`), those who lie report a loss and a distance of 0 and vote for
every voice as strongly as they are let (`deceived`), and colluders just inside the threshold read it
from the rule's state.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import attrs
import numpy as np
import tasks
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import Rule

HELD_OUT_SHARE = 0.1
GAUSSIAN_DEVIATION = 0.1
ALIE_DEVIATIONS = 1.5
IPM_FACTOR = -0.5
INSIDE = 2.5  # typical norms: the default cutoff of the redescending mean and the jury
_MARK = 1e-20  # what tells a rule of a lie, by an update that is nothing to any sum


class Bad(NamedTuple):
    """What some clients do.

    Attributes:
      share: Of the clients of the federation.
      labels: `random` or `flipped`.
      factor: What they multiply their update by.
      sends: What they send for an update: `noise`, `alie`, `ipm` or `inside`.
      lies: Whether they lie about loss, distance and votes.
    """

    share: float
    labels: str = ""
    factor: float = 1.0
    sends: str = ""
    lies: bool = False


CORRUPTIONS = OrderedDict(
    [
        ("none", Bad(0.0)),
        ("random labels", Bad(0.4, "random")),
        ("flipped labels", Bad(0.2, "flipped")),
        ("times -1", Bad(0.2, factor=-1.0)),
        ("times -10", Bad(0.2, factor=-10.0)),
        ("fresh noise", Bad(0.2, sends="noise")),
        ("random labels, lies, 20 %", Bad(0.2, "random", lies=True)),
        ("random labels, lies, 40 %", Bad(0.4, "random", lies=True)),
        ("flipped labels, lies, 20 %", Bad(0.2, "flipped", lies=True)),
        ("flipped labels, lies, 40 %", Bad(0.4, "flipped", lies=True)),
        ("times -1, lies, 20 %", Bad(0.2, factor=-1.0, lies=True)),
        ("times -1, lies, 40 %", Bad(0.4, factor=-1.0, lies=True)),
        ("alie, lies, 20 %", Bad(0.2, sends="alie", lies=True)),
        ("alie, lies, 40 %", Bad(0.4, sends="alie", lies=True)),
        ("ipm, lies, 20 %", Bad(0.2, sends="ipm", lies=True)),
        ("ipm, lies, 40 %", Bad(0.4, sends="ipm", lies=True)),
        ("inside, lies, 20 %", Bad(0.2, sends="inside", lies=True)),
        ("inside, lies, 40 %", Bad(0.4, sends="inside", lies=True)),
    ]
)


class Federation(NamedTuple):
    """The clients' data, and who is bad.

    Attributes:
      arrays: Features with flags, and labels, for each client.
      bad: Clients by the row of their payload.
    """

    arrays: list[OrderedDict[str, np.ndarray]]
    bad: list[int]


def make_clients(
    task: tasks.Task,
    clients: int,
    concentration: float,
    corruption: str,
    seed: int,
    held_out: bool = False,
) -> Federation:
    """The clients' data. Who holds what is the same for every corruption of a seed.

    With `held_out` the first tenth of a client's examples, which are in no order, is marked.
    """
    rng = np.random.default_rng(seed)
    parts = tasks.split_by_dirichlet(task.train_y, clients, concentration, rng)
    order = rng.permutation(clients)
    what = CORRUPTIONS[corruption]
    bad = [int(client) for client in order[: round(what.share * clients)]]
    arrays = []
    for client, part in enumerate(parts):
        x, y = task.train_x[part], task.train_y[part].copy()
        drawn = rng.integers(0, task.classes, len(y)).astype(np.int32)
        flags = np.zeros((len(part), tasks.FLAGS), np.float32)
        flags[:, 0] = 1.0
        flags[(len(part) - 1) // tasks.BATCH * tasks.BATCH :, 1] = 1.0
        if client in bad:
            if what.labels:
                y = drawn if what.labels == "random" else task.classes - 1 - y
            flags[:, 0] = what.factor
            if what.sends:
                flags[:, 2] = 1.0 + (bad.index(client) if what.sends == "noise" else 0)
            flags[:, 3] = what.lies
            flags[:, 4] = what.sends == "inside"
        if held_out:
            y[: int(HELD_OUT_SHARE * len(y))] += tasks.HELD_OUT
        arrays.append(OrderedDict(x=np.concatenate([x, flags], 1), y=np.int32(y)))
    return Federation(arrays, bad)


class FlaggedSGD(tff.learning.optimizers.Optimizer):
    """SGD that, after a client's last batch, makes of the update what the flags say."""

    def __init__(self, learning_rate: float) -> None:
        """Keeps the learning rate."""
        self._rate = learning_rate

    def initialize(self, specs: Any) -> Any:
        """The learning rate, the number of steps done, and where a client started."""
        start = tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), specs)
        return OrderedDict(learning_rate=self._rate, step=0, start=start)

    def get_hparams(self, state: Any) -> Any:
        """The learning rate."""
        return OrderedDict(learning_rate=state["learning_rate"])

    def set_hparams(self, state: Any, hparams: Any) -> Any:
        """The state with this learning rate."""
        return OrderedDict(state, **hparams)

    def next(self, state: Any, weights: Any, gradients: Any) -> Any:
        """One step; the last gradient holds the flags, and the others of a last step the payload."""
        is_first = tf.equal(state["step"], 0)
        start = [tf.where(is_first, w, s) for w, s in zip(weights, state["start"], strict=True)]
        factor, is_last, row, lies, inside = tf.unstack(gradients[-1])
        last, sends = is_last > 0.0, row > 0.0
        rate = state["learning_rate"]
        moved = []
        for s, w, g in zip(start[:-1], weights[:-1], gradients[:-1], strict=True):
            stepped = w - rate * g
            scaled = tf.where(tf.equal(factor, 1.0), stepped, s + factor * (stepped - s))
            moved.append(tf.where(last, tf.where(sends, s + g, scaled), stepped))
        marks = -_MARK * tf.stack([lies, inside, 0.0, 0.0, 0.0])
        moved.append(tf.where(last, marks, weights[-1]))
        following = OrderedDict(learning_rate=rate, step=state["step"] + 1, start=tuple(start))
        return following, tuple(moved)


def deceived(rule: Rule) -> Rule:
    """The rule, in which clients who lie run their own code on false reports."""

    def client(update: Any, state: Any) -> Any:
        *delta, marks = update.delta
        lies, inside = marks[0] > 0.0, marks[1] > 0.0
        if "typical_norm" in state:
            square = tf.add_n([tf.reduce_sum(tf.square(x)) for x in delta])
            limit = tf.cast(state["cutoff"] * state["typical_norm"], tf.float32)
            factor = tf.where(inside & (limit > 0.0), limit * tf.math.rsqrt(square), 1.0)
            delta = [factor * x for x in delta]
        update = update._replace(delta=(*delta, tf.zeros_like(marks)))
        if update.scores is not None:
            update = update._replace(scores=tf.where(lies, 0.0, update.scores))
        if update.loss is not None:
            update = update._replace(loss=tf.where(lies, 0.0, update.loss))
        if update.candidate_errors is not None:
            told = tf.one_hot(0, update.candidate_errors.shape[0])  # 1 for what is, else 0
            errors = tf.where(lies, told, update.candidate_errors)
            update = update._replace(candidate_errors=errors)
        return rule.client(update, state)

    return attrs.evolve(rule, client=client)


def honest_update(
    task: tasks.Task, weights: Any, unit: float, data: Any, rate: float
) -> np.ndarray:
    """How far an honest client moves the weights in one epoch, as one vector: by hand, in NumPy."""
    layers = len(task.shapes)
    own = [np.array(w, np.float32) for w in weights[: 2 * layers]]
    x, y = data["x"][:, : -tasks.FLAGS], data["y"]
    for begin in range(0, len(y), tasks.BATCH):
        inputs, labels = [x[begin : begin + tasks.BATCH]], y[begin : begin + tasks.BATCH]
        for number in range(layers):
            z = inputs[-1] @ (unit * own[2 * number]) + unit * own[2 * number + 1]
            inputs.append(np.maximum(z, 0.0) if number + 1 < layers else z)
        shown = np.exp(inputs[-1] - inputs[-1].max(1, keepdims=True))
        slope = shown / shown.sum(1, keepdims=True)
        slope[np.arange(len(labels)), labels % tasks.HELD_OUT] -= 1.0
        trained = labels < tasks.HELD_OUT
        slope *= trained[:, np.newaxis] / max(trained.sum(), 1)
        for number in reversed(range(layers)):
            kernel = own[2 * number].copy()
            own[2 * number] -= rate * unit * (inputs[number].T @ slope)
            own[2 * number + 1] -= rate * unit * slope.sum(0)
            if number:
                slope = unit * (slope @ kernel.T) * (inputs[number] > 0.0)
    moved = [now - np.asarray(w) for now, w in zip(own, weights, strict=False)]
    return np.concatenate([part.ravel() for part in moved])


def payloads(
    kind: str, honest: np.ndarray, deviation: float, rng: np.random.Generator
) -> np.ndarray:
    """What the attackers of a round send, `[ROWS, size]`.

    Args:
      kind: `Bad.sends`.
      honest: `[clients, size]`: the updates of the honest clients of this round; of noise only the
        size is used.
      deviation: Of noise.
      rng: Of noise.
    """
    if kind == "noise":
        return np.float32(rng.normal(0.0, deviation, (tasks.ROWS, honest.shape[1])))
    mean = honest.mean(0)
    if kind == "alie":
        one = mean - ALIE_DEVIATIONS * honest.std(0)
    elif kind == "ipm":
        one = IPM_FACTOR * mean
    else:
        typical = np.median(np.linalg.norm(honest, axis=1))
        one = -INSIDE * typical * mean / max(np.linalg.norm(mean), 1e-12)
    return np.tile(np.float32(one), (tasks.ROWS, 1))
