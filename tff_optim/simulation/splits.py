"""Splits of one data set into different clients, drawn from a seed."""

import collections
from collections.abc import Callable, Mapping

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core.checks import check_number, check_whole, whole
from tff_optim.core.leaves import named_leaves
from tff_optim.core.messages import at, refusal, shown
from tff_optim.core.numbers import POSITIVE
from tff_optim.core.types import Value

__all__ = ["Split", "by_label", "by_size", "dirichlet"]

_TRIES = 1000


@attrs.frozen(eq=False)
class Split:
    """The examples of each client; each example belongs to at most one client.

    Example:
      >>> labels = np.array([0, 0, 0, 1, 1, 1])
      >>> split = by_label(labels, clients=3, labels_per_client=1, seed=0)
      >>> split.counts(labels)
      array([[0, 3],
             [2, 0],
             [1, 0]])
      >>> list(split.datasets({"y": labels}, batch_size=2))
      ['client 0', 'client 1', 'client 2']

    Attributes:
      indices: The positions of each client's examples, in random order.
      drawn: The draw; see the function that made the split.
    """

    indices: tuple[np.ndarray, ...]
    drawn: np.ndarray

    def counts(self, labels: Value) -> np.ndarray:
        """The number of examples per client and label (0, 1, ...), `[clients, labels]`."""
        labels = _labels(labels)
        self._check_length("labels", labels)
        return np.stack([np.bincount(labels[i], minlength=labels.max() + 1) for i in self.indices])

    def hold_out(self, share: float) -> tuple["Split", "Split"]:
        """Two splits with the same clients: their training examples, and a share that they hold out.

        Each client holds out `share` of its examples, rounded, but at least one, and keeps at least one.

        Args:
          share: Above 0, below 1.

        Raises:
          ValueError: If the share is out of range, or a client has fewer than two examples.
        """
        if not isinstance(share, float) or not 0 < share < 1:
            raise ValueError(f"`share` must be above 0 and below 1; found {shown(share)}.")
        least = min(map(len, self.indices))
        if least < 2:
            raise ValueError(
                f"`share` must leave each client an example to train on; found one with {least}. Split "
                "with `least=2`."
            )
        counts = [min(max(round(share * len(i)), 1), len(i) - 1) for i in self.indices]
        kept = tuple(its[count:] for its, count in zip(self.indices, counts, strict=True))
        held = tuple(its[:count] for its, count in zip(self.indices, counts, strict=True))
        return Split(kept, self.drawn), Split(held, self.drawn)

    def datasets(self, columns: Value, batch_size: int) -> dict[str, tf.data.Dataset]:
        """The data of each client in batches, by ids `client 0`, `client 1`, ...: for `run`.

        Args:
          columns: Arrays of all examples, as a mapping, a tuple or one array.
          batch_size: The size of all batches but a client's last one.

        Raises:
          ValueError: If a column has too few rows, or the size is out of range.
        """
        check_whole("batch_size", whole(batch_size), 1)
        width = len(str(len(self.indices) - 1))
        if isinstance(columns, Mapping):
            columns = collections.OrderedDict(columns)  # TFF keeps the order of names
        columns = tf.nest.map_structure(np.asarray, columns)
        for path, array in named_leaves(columns):
            self._check_length(at("columns", path), array)
        return {
            f"client {i:0{width}d}": tf.data.Dataset.from_tensor_slices(
                tf.nest.map_structure(lambda array, its=its: array[its], columns)
            ).batch(batch_size)
            for i, its in enumerate(self.indices)
        }

    def _check_length(self, name: str, array: np.ndarray) -> None:
        least = 1 + max(int(its.max(initial=-1)) for its in self.indices)
        if not array.ndim or len(array) < least:
            raise refusal(
                name, f"have a row for each of at least {least} examples", list(array.shape)
            )


def dirichlet(
    labels: Value, clients: int, concentration: float, *, seed: int, least: int = 1
) -> Split:
    """Splits the examples of each label by shares of a symmetric Dirichlet distribution.

    ```
    q_k ~ Dirichlet(concentration, ..., concentration)    of `clients` shares, for each label k
    client c has the share q_k[c] of the examples with label k
    ```

    Small concentrations give clients with few labels and unequal sizes; at 100, clients are nearly
    alike. `drawn` holds the shares, `[labels, clients]`. Everything is drawn again if a client would
    have too few examples.

    Example:
      >>> labels = np.repeat(np.arange(3), 100)
      >>> split = dirichlet(labels, clients=4, concentration=0.3, seed=1)
      >>> split.counts(labels).sum(axis=0).tolist()
      [100, 100, 100]
      >>> split.drawn.shape, np.allclose(split.drawn.sum(axis=1), 1.0)
      ((3, 4), True)

    Args:
      labels: The labels of all examples, whole numbers from 0.
      clients: The number of clients.
      concentration: Above 0.
      seed: The seed of the draws.
      least: The smallest number of examples of a client.

    Raises:
      ValueError: If an argument is out of range, or a thousand draws leave a client too few examples.

    Source: Yurochkin et al., ICML 2019; Li et al., ICDE 2022.
    """
    labels = _labels(labels)
    clients = _clients(clients, len(labels))
    check_number("concentration", concentration, POSITIVE)
    check_whole("least", whole(least), 0)
    rng = _rng(seed)
    kinds = labels.max() + 1
    own = [rng.permutation(np.flatnonzero(labels == kind)) for kind in range(kinds)]

    def draw() -> tuple[list[np.ndarray], np.ndarray]:
        shares = rng.dirichlet(np.full(clients, float(concentration)), size=kinds)
        parts = [_cut(its, share) for its, share in zip(own, shares)]
        return [rng.permutation(np.concatenate(its)) for its in zip(*parts)], shares

    return _enough(draw, least, "concentration", concentration)


def by_label(labels: Value, clients: int, labels_per_client: int, *, seed: int) -> Split:
    """Gives each client the same number of labels, and splits each label's examples evenly.

    The numbers of clients that have a label differ by at most one. `drawn` holds the labels of each
    client, `[clients, labels_per_client]`. Examples of labels that no client has are left out, which
    cannot happen if `clients * labels_per_client >= labels`.

    Example:
      >>> split = by_label(np.repeat(np.arange(4), 10), clients=4, labels_per_client=2, seed=0)
      >>> np.unique(split.drawn, return_counts=True)[1].tolist()
      [2, 2, 2, 2]
      >>> [len(its) for its in split.indices]
      [10, 10, 10, 10]

    Args:
      labels: The labels of all examples, whole numbers from 0.
      clients: The number of clients.
      labels_per_client: From 1 to the number of labels.
      seed: The seed of the draws.

    Raises:
      ValueError: If an argument is out of range, or a label has fewer examples than clients.

    Source: Li et al., ICDE 2022, after McMahan et al., AISTATS 2017.
    """
    labels = _labels(labels)
    clients = _clients(clients, len(labels))
    kinds = labels.max() + 1
    count = whole(labels_per_client)
    check_whole("labels_per_client", count, 1)
    if count > kinds:
        raise ValueError(
            f"`labels_per_client` must be at most the number of labels, {kinds}; found {count}."
        )
    rng, used = _rng(seed), np.zeros(kinds, int)
    drawn = np.empty([clients, count], int)
    for one in range(clients):
        drawn[one] = np.sort(np.lexsort((rng.random(kinds), used))[:count])  # the least used
        used[drawn[one]] += 1
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for kind in range(kinds):
        holders = np.flatnonzero((drawn == kind).any(axis=1))
        its = rng.permutation(np.flatnonzero(labels == kind))
        if len(its) < len(holders):
            raise ValueError(
                f"`labels` must have an example for each client that holds a label; found {len(its)} of "
                f"label {kind} for {len(holders)} clients. Take fewer clients, or fewer labels for each."
            )
        for holder, part in zip(holders, np.array_split(its, max(len(holders), 1))):
            parts[holder].append(part)
    return Split(tuple(rng.permutation(np.concatenate(its)) for its in parts), drawn)


def by_size(
    examples: int, clients: int, concentration: float, *, seed: int, least: int = 1
) -> Split:
    """Splits examples at random into parts of unequal sizes: shares of one Dirichlet draw.

    ```
    q ~ Dirichlet(concentration, ..., concentration)    of `clients` shares
    ```

    `drawn` holds the shares, `[clients]`. Everything is drawn again if a client would have too few
    examples.

    Example:
      >>> split = by_size(100, clients=4, concentration=0.5, seed=0)
      >>> sorted(len(its) for its in split.indices)
      [12, 16, 25, 47]

    Args:
      examples: The number of examples.
      clients: The number of clients.
      concentration: Above 0; at 100, sizes are nearly equal.
      seed: The seed of the draws.
      least: The smallest number of examples of a client.

    Raises:
      ValueError: If an argument is out of range, or a thousand draws leave a client too few examples.

    Source: Li et al., ICDE 2022.
    """
    examples = whole(examples)
    check_whole("examples", examples, 1)
    clients = _clients(clients, examples)
    check_number("concentration", concentration, POSITIVE)
    check_whole("least", whole(least), 0)
    rng = _rng(seed)

    def draw() -> tuple[list[np.ndarray], np.ndarray]:
        share = rng.dirichlet(np.full(clients, float(concentration)))
        return _cut(rng.permutation(examples), share), share

    return _enough(draw, least, "concentration", concentration)


def _cut(its: np.ndarray, share: np.ndarray) -> list[np.ndarray]:
    ends = np.round(np.cumsum(share)[:-1] * len(its)).astype(int)
    return np.split(its, ends)


def _enough(
    draw: Callable[[], tuple[list[np.ndarray], np.ndarray]], least: int, name: str, value: Value
) -> Split:
    for _ in range(_TRIES):
        parts, drawn = draw()
        if min(map(len, parts)) >= least:
            return Split(tuple(parts), drawn)
    raise ValueError(
        f"`{name}` must leave each client at least {least} examples; found {shown(value)}, which did "
        f"not in {_TRIES} draws. Raise it, take fewer clients, or a smaller `least`."
    )


def _labels(labels: Value) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or found.dtype.kind not in "iu" or not found.size or found.min() < 0:
        raise ValueError(
            "`labels` must be whole numbers from 0 on, one for each example; found "
            f"{found.dtype} of shape {list(found.shape)}."
        )
    return found


def _clients(clients: Value, examples: int) -> int:
    found = whole(clients)
    check_whole("clients", found, 1)
    if found > examples:
        raise ValueError(
            f"`clients` must be at most the number of examples, {examples}; found {found}."
        )
    return int(found)


def _rng(seed: Value) -> np.random.Generator:
    check_whole("seed", whole(seed), 0)
    return np.random.default_rng(whole(seed))
