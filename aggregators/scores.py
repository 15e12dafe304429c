"""How far a client's layer is from the server's.

A score is a function `score(server_layer, client_layer)` of two sequences of tensors (the tensors
of one layer, in the model's order) that returns one non-negative number. Any such function of
TensorFlow operations can stand where the ones below do.

Half precision is computed in float32; float64 stays float64. A layer of several tensors is read as
one long vector, except by `spectral_distance`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from aggregators.layers import Groups

Score = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor]], tf.Tensor]


def kl_divergence(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Kullback-Leibler divergence of the softmaxed client layer from the softmaxed server layer.

    ```
    d = sum_i p_i log(p_i / q_i),   p = softmax(server),   q = softmax(client)
    ```

    over all `i` elements of the layer. Models that were trained a little apart have `d` of 1e-6
    or less, where the textbook sum is lost in rounding, so it is taken as `log E_p[exp(c)]` with
    `c` the change of the elements, centred under `p`: all terms are then positive and small.

    Blind to a constant added to the whole layer, and always 0 for a layer of one element.

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
    p, _, log_ratio = _softmaxed(server, client)
    # `log_ratio` is log q - log p, so E_p of its expm1 is 0: adding it leaves d itself as a sum of
    # terms that are all positive. Far apart, where exp may overflow, the textbook sum is exact.
    near = tf.reduce_sum(p * _expm1_minus(tf.minimum(log_ratio, 1.0)))
    far = tf.maximum(-tf.reduce_sum(p * log_ratio), 0.0)
    return tf.where(tf.reduce_max(tf.abs(log_ratio)) < 1.0, near, far)


def js_divergence(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Jensen-Shannon divergence between the softmaxed layers.

    ```
    d = KL(p || m) / 2 + KL(q || m) / 2,   m = (p + q) / 2
    ```

    with `p = softmax(server)` and `q = softmax(client)`. Symmetric, and never above log 2.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar between 0 and log 2; not finite when an input is not.

    Example:
      >>> js_divergence([tf.constant([0.0, 0.0])], [tf.constant([0.0, 9.0])]).numpy().round(4)
      0.2155

    Source: Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    p, q, r = _softmaxed(server, client)
    # u = log(m / p); expm1 would overflow for large r, where u is r - log 2.
    small = tf.minimum(r, 20.0)
    u = tf.where(r > 20.0, r - tf.math.log(tf.cast(2.0, r.dtype)), _log_mean_one(small))
    return tf.maximum(0.5 * tf.reduce_sum(q * (r - u) - p * u), 0.0)


def l2_distance(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Euclidean (Frobenius) distance: `d = sqrt(sum_i (server_i - client_i)^2)`.

    Depends on the difference only, so it also works where only the update is known.

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
        tf.reduce_sum(tf.math.squared_difference(_wide(s), _wide(c)))
        for s, c in zip(server, client, strict=True)
    ]
    return tf.sqrt(tf.add_n([tf.cast(square, squares[0].dtype) for square in squares]))


def spectral_distance(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """Largest singular value of the difference.

    ```
    d = max_t sigma_max(server_t - client_t)
    ```

    over the tensors `t` of the layer. A tensor of rank 0 or 1 is a vector (its norm); of rank 3 or
    more, a matrix whose columns are the last axis (a convolution's output channels). The maximum
    is the spectral norm of the block-diagonal matrix of the tensors.

    Depends on the difference only. Costs a matrix product with the smaller side squared and an
    eigenvalue decomposition of that side per tensor and client: dear for layers wider than about
    1000.

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


def cosine_distance(server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]) -> tf.Tensor:
    """One minus the cosine of the angle between the layers.

    ```
    d = 1 - <server, client> / (|server| |client|)
    ```

    The angle to an all-zero layer is not defined: `d` is 1 if one layer is zero and 0 if both are.

    Args:
      server: Tensors of the server's layer, floating.
      client: Tensors of the client's layer, same shapes and dtypes.

    Returns:
      A scalar between 0 and 2.

    Example:
      >>> cosine_distance([tf.constant([1.0, 0.0])], [tf.constant([0.0, 2.0])]).numpy()
      1.0
    """
    s, c = _flat(server), _flat(client)
    # 1 - cos is |s/|s| - c/|c||^2 / 2: exact near 0, where 1 minus a cosine is mostly rounding.
    unit_s = tf.math.divide_no_nan(s, tf.norm(s))
    unit_c = tf.math.divide_no_nan(c, tf.norm(c))
    half = 0.5 * tf.reduce_sum(tf.math.squared_difference(unit_s, unit_c))
    one_is_zero = tf.not_equal(tf.reduce_any(s != 0), tf.reduce_any(c != 0))
    return tf.where(one_is_zero, tf.ones_like(half), half)


# What can be scored from the update alone, without the model it changes: cosine distance too, but
# there it only tells a zero update from the others.
UPDATE_SCORES = (l2_distance, spectral_distance, cosine_distance)
MODEL_SCORES = (kl_divergence, js_divergence)


def score_layers(score: Score, server: Any, client: Any, groups: Groups) -> tf.Tensor:
    """Scores every layer of a client's model.

    Args:
      score: One of this module's functions, or one with their signature.
      server: Structure of tensors: the model the client started from.
      client: Structure of tensors: the model it trained.
      groups: The layers, from `resolve_layers`.

    Returns:
      float32 of shape `[len(groups)]`.

    Raises:
      TypeError: If `score` does not return one number per layer.
    """
    servers, clients = tf.nest.flatten(server), tf.nest.flatten(client)
    found = []
    for group in groups:
        value = tf.convert_to_tensor(
            score([servers[i] for i in group], [clients[i] for i in group])
        )
        if value.shape.rank != 0 or not value.dtype.is_floating:
            raise TypeError(
                "`score` must return one floating number per layer; "
                f"found {value.dtype.name} of shape {value.shape} for layer {group}. "
                "Reduce it to a scalar."
            )
        found.append(tf.cast(value, tf.float32))
    return tf.stack(found)


def check_score(score: Any, argument: str = "score") -> None:
    """Raises `TypeError` for anything that cannot be called as a score."""
    if not callable(score):
        raise TypeError(
            f"`{argument}` must be a function of two sequences of tensors; found {score!r}. "
            "Use one from `aggregators.scores`, such as `scores.kl_divergence`."
        )


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    tensor = tf.convert_to_tensor(tensor)
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def _flat(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    flat = [tf.reshape(_wide(tensor), [-1]) for tensor in tensors]
    if len(flat) == 1:
        return flat[0]
    widest = tf.float64 if any(part.dtype == tf.float64 for part in flat) else tf.float32
    return tf.concat([tf.cast(part, widest) for part in flat], 0)


def _softmaxed(
    server: Sequence[tf.Tensor], client: Sequence[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns p, q and log q - log p, the last without the rounding of two large logarithms."""
    s, c = _flat(server), _flat(client)
    log_p = tf.nn.log_softmax(s)
    p = tf.exp(log_p)
    change = c - s
    change -= tf.reduce_sum(p * change)
    spread = tf.reduce_max(tf.abs(change))
    # log E_p[exp(change)]: by log1p while that is exact, by log_softmax when exp would overflow.
    near = tf.math.log1p(tf.reduce_sum(p * _expm1_minus(tf.minimum(change, 1.0))))
    log_ratio = tf.where(spread < 1.0, change - near, tf.nn.log_softmax(c) - log_p)
    return p, tf.exp(log_p + log_ratio), log_ratio


def _expm1_minus(x: tf.Tensor) -> tf.Tensor:
    """exp(x) - 1 - x, by its series where the difference would cancel."""
    series = 0.5 * x * x * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0)))
    return tf.where(tf.abs(x) < 0.05, series, tf.math.expm1(x) - x)


def _log_mean_one(r: tf.Tensor) -> tf.Tensor:
    """log((1 + exp(r)) / 2), exact near 0."""
    return tf.math.log1p(0.5 * tf.math.expm1(r))


def _spectral_norm(difference: tf.Tensor) -> tf.Tensor:
    if difference.shape.rank < 2:
        return tf.norm(difference)
    matrix = tf.reshape(difference, [-1, difference.shape[-1]])
    rows, columns = matrix.shape
    gram = tf.matmul(matrix, matrix, transpose_a=columns <= rows, transpose_b=columns > rows)
    # The decomposition raises on a non-finite input, which would end the round for all clients.
    finite = tf.reduce_all(tf.math.is_finite(gram))
    largest = tf.reduce_max(tf.linalg.eigvalsh(tf.where(finite, gram, tf.zeros_like(gram))))
    return tf.where(finite, tf.sqrt(tf.maximum(largest, 0.0)), tf.cast(float("nan"), gram.dtype))
