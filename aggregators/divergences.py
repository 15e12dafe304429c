"""Divergences of softmaxed layers, without the rounding that swallows those of nearly equal ones.

Models that were trained a little apart have divergences of 1e-6 or less, where the textbook sums
are differences of nearly equal numbers. The forms used here have terms that are positive and small;
where layers are so far apart that these forms end, the textbook is exact.

Three ways, by size, give the same number:

* all layers of up to 2^14 elements together, in float64, as segments of one vector: the number of
  operations, each of which costs time wherever a process is built, does not grow with the layers;
* layers of up to 2^19 elements in float32;
* larger ones in blocks that stay in a core's cache: one pass over memory for a series in the
  cumulants of `client - server`, where none changed by more than 0.2.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

Layer = Sequence[tf.Tensor]

SMALL, _LARGE, _BLOCK = 2**14, 2**19, 2**15


class Over(NamedTuple):
    """What is summed over: a vector, or each segment of one.

    Attributes:
      total: Sum of the elements.
      largest: Largest of the elements.
      spread: The reverse: a number for each element.
    """

    total: Callable[[tf.Tensor], tf.Tensor]
    largest: Callable[[tf.Tensor], tf.Tensor]
    spread: Callable[[tf.Tensor], tf.Tensor]


class Divergence(NamedTuple):
    """A divergence of `q = softmax(client)` from `p = softmax(server)`, in three forms.

    Attributes:
      near: `(p, change, over)`, of `change = client - server`, centred under `p`.
      textbook: `(log p, log q, over)`.
      series: `(k2, k3, k4)`, of the cumulants of `client - server` under `p`.
    """

    near: Callable[[tf.Tensor, tf.Tensor, Over], tf.Tensor]
    textbook: Callable[[tf.Tensor, tf.Tensor, Over], tf.Tensor]
    series: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def _kl_near(p: tf.Tensor, change: tf.Tensor, over: Over) -> tf.Tensor:
    return tf.math.log1p(tf.maximum(over.total(p * (_expm1(change) - change)), 0.0))


def _kl_textbook(log_p: tf.Tensor, log_q: tf.Tensor, over: Over) -> tf.Tensor:
    return tf.maximum(over.total(tf.exp(log_p) * (log_p - log_q)), 0.0)


def _kl_series(k2: tf.Tensor, k3: tf.Tensor, k4: tf.Tensor) -> tf.Tensor:
    return k2 / 2.0 + k3 / 6.0 + k4 / 24.0


def _js_near(p: tf.Tensor, change: tf.Tensor, over: Over) -> tf.Tensor:
    # log(q / p), q / p - 1 and log(m / p); then sum of p * ((q / p) log(q / m) - log(m / p)) / 2.
    log_ratio = change - over.spread(_kl_near(p, change, over))
    excess = _expm1(log_ratio)
    middle = tf.math.log1p(0.5 * excess)
    terms = p * ((1.0 + excess) * (log_ratio - middle) - middle)
    return tf.maximum(0.5 * over.total(terms), 0.0)


def _js_textbook(log_p: tf.Tensor, log_q: tf.Tensor, over: Over) -> tf.Tensor:
    largest = tf.maximum(log_p, log_q)
    log_m = largest + tf.math.log(0.5 * (tf.exp(log_p - largest) + tf.exp(log_q - largest)))
    terms = tf.exp(log_p) * (log_p - log_m) + tf.exp(log_q) * (log_q - log_m)
    return tf.maximum(0.5 * over.total(terms), 0.0)


def _js_series(k2: tf.Tensor, k3: tf.Tensor, k4: tf.Tensor) -> tf.Tensor:
    return k2 / 8.0 + k3 / 16.0 + (k4 - k2 * k2) / 64.0


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
    """
    found: list[tf.Tensor] = [None] * len(servers)
    sizes = [sum(tensor.shape.num_elements() for tensor in layer) for layer in servers]
    small = []
    for i, (server, client) in enumerate(zip(servers, clients, strict=True)):
        if sizes[i] <= SMALL or any(tensor.dtype == tf.float64 for tensor in server):
            small.append(i)
        else:
            way = _of_large if sizes[i] > _LARGE else _of_medium
            found[i] = way(divergence, flat(server), flat(client))
    if small:
        s, c = (
            tf.cast(flat([tensor for i in small for tensor in layers[i]]), tf.float64)
            for layers in (servers, clients)
        )
        numbers = _of_small(divergence, s, c, [sizes[i] for i in small])
        for i, number in zip(small, tf.unstack(numbers, len(small)), strict=True):
            found[i] = number
    return found


def _of_small(divergence: Divergence, s: tf.Tensor, c: tf.Tensor, sizes: list[int]) -> tf.Tensor:
    """One divergence per segment of these sizes."""
    owner = tf.constant(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    over = Over(
        total=lambda x: tf.math.segment_sum(x, owner),
        largest=lambda x: tf.math.segment_max(x, owner),
        spread=lambda x: tf.gather(x, owner),
    )
    log_p, log_q = _log_softmax(s, over), _log_softmax(c, over)
    p, change = tf.exp(log_p), c - s
    change -= over.spread(over.total(p * change))
    near = divergence.near(p, change, over)
    # exp overflows: layers so far apart that the textbook is exact.
    return tf.where(tf.math.is_finite(near), near, divergence.textbook(log_p, log_q, over))


def _of_medium(divergence: Divergence, s: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
    p, change = tf.nn.softmax(s), c - s
    change -= tf.reduce_sum(p * change)
    near = divergence.near(p, change, _VECTOR)
    return _or_textbook(tf.reduce_max(change) < _LARGEST_EXPM1, near, divergence, s, c)


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
    # If nearly all of the change is one shift of all elements, the rest drowns in its rounding.
    holds = (largest <= 0.2**2) & (m2 <= 100.0 * k2)
    return _or_textbook(holds, divergence.series(k2, k3, k4), divergence, s, c)


def _or_textbook(
    holds: tf.Tensor, found: tf.Tensor, divergence: Divergence, s: tf.Tensor, c: tf.Tensor
) -> tf.Tensor:
    """What was found, or in float64 the textbook, which layers so far apart do not drown in."""

    def textbook() -> tf.Tensor:
        log_p, log_q = (tf.nn.log_softmax(tf.cast(x, tf.float64)) for x in (s, c))
        return divergence.textbook(log_p, log_q, _VECTOR)

    return tf.cond(holds, lambda: tf.cast(found, tf.float64), textbook)


_VECTOR = Over(total=tf.reduce_sum, largest=tf.reduce_max, spread=lambda x: x)

# Up to here the quotient in `_expm1` keeps six digits.
_LARGEST_EXPM1 = 3.0


def _expm1(x: tf.Tensor) -> tf.Tensor:
    """exp(x) - 1, to the last digits of small x as well."""
    if x.dtype == tf.float64:
        return tf.math.expm1(x)
    # A third of the time of TensorFlow's, which has no vector instructions.
    t = tf.tanh(0.5 * x)
    return t / (0.5 - 0.5 * t)


def _log_softmax(x: tf.Tensor, over: Over) -> tf.Tensor:
    x -= over.spread(over.largest(x))
    return x - over.spread(tf.math.log(over.total(tf.exp(x))))


def flat(tensors: Layer) -> tf.Tensor:
    """The tensors as one vector, of at least float32."""
    double = any(tensor.dtype == tf.float64 for tensor in tensors)
    dtype = tf.float64 if double else tf.float32
    parts = [tensor if tensor.shape.rank == 1 else tf.reshape(tensor, [-1]) for tensor in tensors]
    parts = [tf.cast(part, dtype) for part in parts]
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)
