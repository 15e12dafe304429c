"""Scores: how far a client's layer is from the server's.

A score is a function `score(server_layer, client_layer)` of two sequences of tensors (the tensors
of one layer, in the model's order) that returns one non-negative number. A `Score` wraps it and says
what it depends on. Your own function of TensorFlow operations can replace any of the scores below.

The result is float64 for float64 layers, and else float32; half precision is computed in float32. All
scores but `spectral_distance` read a layer of several tensors as one long vector.
"""

import functools
from collections.abc import Sequence

import tensorflow as tf

from aggregators.core.score import Score, score
from aggregators.scores import divergences

__all__ = [
    "Score",
    "cosine_distance",
    "js_divergence",
    "kl_divergence",
    "l2_distance",
    "score",
    "spectral_distance",
]


@score(needs="model", over_layers=functools.partial(divergences.of_layers, divergences.KL))
def kl_divergence(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Kullback-Leibler divergence of the softmaxed client layer from the softmaxed server layer.

    ```
    d = sum_i p_i log(p_i / q_i),   p = softmax(server),   q = softmax(client)
    ```

    over all `i` elements of the layer. After a little training `d` is 1e-6 or less, and rounding
    swallows the textbook sum. The divergence is therefore computed as

    ```
    d = log(1 + E_p[exp(c) - 1 - c]),   c = (client - server) - E_p[client - server]
    ```

    whose terms are all positive and small, in float64 for layers of up to 2^14 elements. Larger layers
    in which no element changed by more than 0.2 use the first three terms of

    ```
    d = k2 / 2 + k3 / 6 + k4 / 24 + ...
    ```

    where `kj` is the j-th cumulant of `client - server` under `p`: a few sums instead of an exponential
    per element. The omitted terms are below 0.2 % of `d`, and below 1e-6 of it for bell-shaped changes.

    Adding a constant to the whole layer does not change `d`. A layer of one element always has `d` = 0.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar, 0 or more; not finite when an input is not.

    Example:
      >>> kl_divergence([tf.constant([0.0, 0.0])], [tf.math.log([0.25, 0.75])]).numpy().round(4)
      0.1438

    Source: Kullback and Leibler, 1951.
    """
    return _one_layer(divergences.KL, server, client)


@score(needs="model", over_layers=functools.partial(divergences.of_layers, divergences.JS))
def js_divergence(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Jensen-Shannon divergence between the softmaxed layers.

    ```
    d = KL(p || m) / 2 + KL(q || m) / 2,   m = (p + q) / 2
    ```

    with `p = softmax(server)` and `q = softmax(client)`. Symmetric, and at most log 2. Large layers
    that changed little use `k2 / 8 + k3 / 16 + (k4 - k2^2) / 64`; see `kl_divergence`.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar between 0 and log 2; not finite when an input is not.

    Example:
      >>> js_divergence([tf.constant([0.0, 0.0])], [tf.constant([0.0, 9.0])]).numpy().round(4)
      0.2152

    Source: Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    return _one_layer(divergences.JS, server, client)


@score(needs="update")
def l2_distance(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Euclidean (Frobenius) distance: `d = sqrt(sum_i (server_i - client_i)^2)`.

    Depends on the difference only, so the update is enough to compute it.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar, 0 or more.

    Example:
      >>> l2_distance([tf.constant([3.0, 4.0])], [tf.zeros(2)]).numpy()
      5.0
    """
    squares = [
        2.0 * tf.nn.l2_loss(_wide(s) - _wide(c)) for s, c in zip(server, client, strict=True)
    ]
    return tf.sqrt(tf.add_n([tf.cast(square, squares[0].dtype) for square in squares]))


@score(needs="update")
def spectral_distance(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Largest singular value of the difference.

    ```
    d = max_t sigma_max(server_t - client_t)
    ```

    over the tensors `t` of the layer. A tensor of rank 0 or 1 counts as a vector, so its norm is taken.
    A tensor of rank 3 or more counts as a matrix whose columns are the last axis (a convolution's
    output channels). The maximum is the spectral norm of the block-diagonal matrix of the tensors.

    Depends on the difference only. For each tensor and client it computes a Gram matrix of the smaller
    side and its eigenvalues, which is slow for layers wider than about 1000.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar, 0 or more.

    Example:
      >>> spectral_distance([tf.linalg.diag([3.0, -4.0])], [tf.zeros([2, 2])]).numpy().round(4)
      4.0
    """
    norms = [_spectral_norm(_wide(s) - _wide(c)) for s, c in zip(server, client, strict=True)]
    return tf.reduce_max(tf.stack([tf.cast(norm, norms[0].dtype) for norm in norms]))


@score(needs="update")
def cosine_distance(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """One minus the cosine of the angle between the layers.

    ```
    d = 1 - <server, client> / (|server| |client|)
    ```

    The angle to an all-zero layer is undefined: `d` is 1 if one layer is zero, and 0 if both are.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar between 0 and 2.

    Example:
      >>> cosine_distance([tf.constant([1.0, 0.0])], [tf.constant([0.0, 2.0])]).numpy()
      1.0
    """
    # Divide by the largest elements first: squares of large or small ones leave float32.
    s, c = _unit_peak(_flat(server)), _unit_peak(_flat(client))
    # 1 - cos is |s/|s| - c/|c||^2 / 2, which is exact near 0. There 1 minus a cosine is mostly rounding.
    unit_s = tf.math.divide_no_nan(s, tf.norm(s))
    unit_c = tf.math.divide_no_nan(c, tf.norm(c))
    half = 0.5 * tf.reduce_sum(tf.math.squared_difference(unit_s, unit_c))
    one_is_zero = tf.not_equal(tf.reduce_any(s != 0), tf.reduce_any(c != 0))
    return _as_wide_as(server, tf.where(one_is_zero, tf.ones_like(half), half))


ALL = (kl_divergence, js_divergence, l2_distance, spectral_distance, cosine_distance)


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    tensor = tf.convert_to_tensor(tensor)
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def _as_wide_as(tensors: Sequence[tf.Tensor], found: tf.Tensor) -> tf.Tensor:
    """Casts a score to the precision of its layer, float32 or float64."""
    double = any(tf.convert_to_tensor(tensor).dtype == tf.float64 for tensor in tensors)
    return tf.cast(found, tf.float64 if double else tf.float32)


def _one_layer(
    divergence: divergences.Divergence, server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]
) -> tf.Tensor:
    server, client = ([tf.convert_to_tensor(x) for x in layer] for layer in (server, client))
    (found,) = divergences.of_layers(divergence, [server], [client])
    return _as_wide_as(server, found)


def _flat(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The layer as one vector; a small one in float64."""
    vector = divergences.flat([tf.convert_to_tensor(tensor) for tensor in tensors])
    return tf.cast(vector, tf.float64) if vector.shape[0] <= divergences.SMALL else vector


def _unit_peak(vector: tf.Tensor) -> tf.Tensor:
    """The vector divided by its largest absolute value; itself if that is 0."""
    return tf.math.divide_no_nan(vector, tf.reduce_max(tf.abs(vector)))


def _spectral_norm(difference: tf.Tensor) -> tf.Tensor:
    if difference.shape.rank < 2:
        return tf.norm(difference)
    matrix = tf.reshape(difference, [-1, difference.shape[-1]])
    rows, columns = matrix.shape
    gram = tf.matmul(matrix, matrix, transpose_a=columns <= rows, transpose_b=columns > rows)
    # Eigenvalues of a non-finite matrix raise, which would end the round for all clients.
    finite = tf.reduce_all(tf.math.is_finite(gram))
    largest = tf.reduce_max(tf.linalg.eigvalsh(tf.where(finite, gram, tf.zeros_like(gram))))
    return tf.where(finite, tf.sqrt(tf.maximum(largest, 0.0)), tf.cast(float("nan"), gram.dtype))
