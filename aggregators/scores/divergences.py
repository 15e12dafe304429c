"""Divergences of softmaxed layers that keep their precision for nearly equal layers.

After a little training divergences are 1e-6 or less, where the textbook sums are differences of nearly
equal numbers. The size of a layer decides how it is scored:

* Layers of up to 2^14 elements use formulas whose terms are small, in float64. They are segments of one
  vector, so the number of operations does not grow with the number of layers. Each operation costs time
  when a process is built.
* Larger layers in which no element moved by more than 0.2 use a series in the cumulants `k` of
  `client - server` under `p`. Only `k2` and `4 k3 + k4` are needed.
* Layers of more than 2^19 elements take that series in blocks that stay in a core's cache: one pass
  over memory instead of ten.

For layers too far apart for these formulas, the textbook sum in float64 is exact.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

Layer = Sequence[tf.Tensor]

SMALL, _LARGE, _BLOCK = 2**14, 2**19, 2**15

# Up to this change the terms that the series omits are below 0.2 % of the divergence.
_FARTHEST = 0.2

Over = Callable[[tf.Tensor], tf.Tensor]


class Divergence(NamedTuple):
    """A divergence of `q = softmax(client)` from `p = softmax(server)`, in three forms.

    Attributes:
      near: Function of `(p, change, total, spread)`, where `change = client - server`, centred under
        `p`. `total` sums over a layer; `spread` repeats a layer's number for each of its elements.
      textbook: Function of `(log p, log q, total)`.
      series: Function of `(k2, 4 k3 + k4)`, the cumulants of `client - server` under `p`.
    """

    near: Callable[[tf.Tensor, tf.Tensor, Over, Over], tf.Tensor]
    textbook: Callable[[tf.Tensor, tf.Tensor, Over], tf.Tensor]
    series: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def _kl_near(p: tf.Tensor, change: tf.Tensor, total: Over, spread: Over) -> tf.Tensor:
    del spread  # one sum is enough
    return tf.math.log1p(tf.maximum(total(p * (tf.math.expm1(change) - change)), 0.0))


def _kl_textbook(log_p: tf.Tensor, log_q: tf.Tensor, total: Over) -> tf.Tensor:
    return tf.maximum(total(tf.exp(log_p) * (log_p - log_q)), 0.0)


def _kl_series(k2: tf.Tensor, higher: tf.Tensor) -> tf.Tensor:
    return k2 / 2.0 + higher / 24.0


def _js_near(p: tf.Tensor, change: tf.Tensor, total: Over, spread: Over) -> tf.Tensor:
    # log(q / p), q / p - 1 and log(m / p); then sum of p * ((q / p) log(q / m) - log(m / p)) / 2.
    log_ratio = change - spread(_kl_near(p, change, total, spread))
    excess = tf.math.expm1(log_ratio)
    middle = tf.math.log1p(0.5 * excess)
    terms = p * ((1.0 + excess) * (log_ratio - middle) - middle)
    return tf.maximum(0.5 * total(terms), 0.0)


def _js_textbook(log_p: tf.Tensor, log_q: tf.Tensor, total: Over) -> tf.Tensor:
    largest = tf.maximum(log_p, log_q)
    log_m = largest + tf.math.log(0.5 * (tf.exp(log_p - largest) + tf.exp(log_q - largest)))
    terms = tf.exp(log_p) * (log_p - log_m) + tf.exp(log_q) * (log_q - log_m)
    return tf.maximum(0.5 * total(terms), 0.0)


def _js_series(k2: tf.Tensor, higher: tf.Tensor) -> tf.Tensor:
    return k2 / 8.0 + (higher - k2 * k2) / 64.0


KL = Divergence(_kl_near, _kl_textbook, _kl_series)
JS = Divergence(_js_near, _js_textbook, _js_series)


def of_layers(
    divergence: Divergence, servers: Sequence[Layer], clients: Sequence[Layer]
) -> list[tf.Tensor]:
    """One divergence per layer.

    Args:
      divergence: `KL` or `JS`.
      servers: The tensors of each of the server's layers, floating.
      clients: The tensors of each of the client's layers, same shapes and dtypes.

    Returns:
      A float64 number for each layer, 0 or more; not finite where an input is not.

    Raises:
      ValueError: If a shape is not fully known.
    """
    for layer in servers:
        for tensor in layer:
            if not tensor.shape.is_fully_defined():
                raise ValueError(
                    "A divergence must have tensors of known shape; "
                    f"found {tensor.shape}. Set it with `tf.ensure_shape`."
                )
    found = [tf.zeros([], tf.float64)] * len(servers)  # also that of layers without elements
    sizes = [sum(tensor.shape.num_elements() for tensor in layer) for layer in servers]
    small = []
    for i, (server, client) in enumerate(zip(servers, clients, strict=True)):
        if sizes[i] > SMALL and all(tensor.dtype != tf.float64 for tensor in server):
            way = _of_large if sizes[i] > _LARGE else _of_medium
            found[i] = way(divergence, flat(server), flat(client))
        elif sizes[i]:
            small.append(i)
    if small:
        s, c = (
            tf.cast(flat([tensor for i in small for tensor in layers[i]]), tf.float64)
            for layers in (servers, clients)
        )
        values = _of_small(divergence, s, c, [sizes[i] for i in small])
        for i, value in zip(small, tf.unstack(values, len(small)), strict=True):
            found[i] = value
    return found


def _of_small(divergence: Divergence, s: tf.Tensor, c: tf.Tensor, sizes: list[int]) -> tf.Tensor:
    """One divergence per segment of these sizes."""
    owner = tf.constant(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))

    def total(x: tf.Tensor) -> tf.Tensor:
        return tf.math.segment_sum(x, owner)

    def spread(x: tf.Tensor) -> tf.Tensor:
        return tf.gather(x, owner)

    def log_softmax(x: tf.Tensor) -> tf.Tensor:
        x -= spread(tf.math.segment_max(x, owner))
        return x - spread(tf.math.log(total(tf.exp(x))))

    log_p, log_q = log_softmax(s), log_softmax(c)
    p, change = tf.exp(log_p), c - s
    change -= spread(total(p * change))
    near = divergence.near(p, change, total, spread)
    # exp overflows for layers far apart, for which the textbook is exact.
    return tf.where(tf.math.is_finite(near), near, divergence.textbook(log_p, log_q, total))


def _of_medium(divergence: Divergence, s: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
    p, change = tf.nn.softmax(s), c - s
    change -= tf.reduce_sum(p * change)
    root = tf.sqrt(p) * change
    # The second moment m2, and m4 + 4 m3 + 4 m2: sums of squares, which take no memory.
    m2, moments = (2.0 * tf.nn.l2_loss(x) for x in (root, root * (change + 2.0)))
    found = divergence.series(m2, moments - m2 * (4.0 + 3.0 * m2))
    holds = tf.reduce_max(tf.abs(change)) <= _FARTHEST
    return _or_textbook(holds, tf.cast(found, tf.float64), divergence, s, c)


def _of_large(divergence: Divergence, s: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
    def add_block(start: tf.Tensor, largest: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        size = tf.minimum(s.shape[0] - start, _BLOCK)
        block = tf.slice(s, start, size)
        change = tf.slice(c, start, size) - block
        square = tf.square(change)
        p = tf.exp(block - s[0])  # not normalised
        p_square = p * square
        terms = (p, p * change, p_square, p_square * change, p_square * square)
        found = tf.cast(tf.stack([tf.reduce_sum(term) for term in terms]), tf.float64)
        return start + _BLOCK, tf.maximum(largest, tf.reduce_max(square)), sums + found

    nothing = (tf.constant([0]), tf.constant(0.0), tf.zeros([5], tf.float64))
    _, largest, sums = tf.while_loop(lambda start, *_: start[0] < s.shape[0], add_block, nothing)
    m1, m2, m3, m4 = tf.unstack(sums[1:] / sums[0])
    square = m1 * m1
    k2 = m2 - square
    k3 = m3 - 3.0 * m1 * m2 + 2.0 * m1 * square
    k4 = m4 - 4.0 * m1 * m3 - 3.0 * m2 * m2 + 12.0 * square * m2 - 6.0 * square * square
    # If nearly all of the change is one shift of all elements, its rounding swallows the rest.
    holds = (largest <= _FARTHEST**2) & (m2 <= 100.0 * k2)
    return _or_textbook(holds, divergence.series(k2, 4.0 * k3 + k4), divergence, s, c)


def _or_textbook(
    holds: tf.Tensor, found: tf.Tensor, divergence: Divergence, s: tf.Tensor, c: tf.Tensor
) -> tf.Tensor:
    """What was found if that holds, else the textbook in float64."""

    def textbook() -> tf.Tensor:
        log_p, log_q = (tf.nn.log_softmax(tf.cast(x, tf.float64)) for x in (s, c))
        return divergence.textbook(log_p, log_q, tf.reduce_sum)

    return tf.cond(holds, lambda: found, textbook)


def flat(tensors: Layer) -> tf.Tensor:
    """The tensors as one vector, float32 or wider."""
    double = any(tensor.dtype == tf.float64 for tensor in tensors)
    dtype = tf.float64 if double else tf.float32
    parts = [tensor if tensor.shape.rank == 1 else tf.reshape(tensor, [-1]) for tensor in tensors]
    parts = [tf.cast(part, dtype) for part in parts]
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)
