"""The aggregation rules once more, in NumPy and float64, as their formulas read.

Deliberately naive: whole cohorts in memory, plain exponentials, no streaming.
"""

import numpy as np


def _softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def _flat(tensors):
    return np.concatenate([np.asarray(t, np.float64).ravel() for t in tensors])


def kl(server, client):
    p, q = _softmax(_flat(server)), _softmax(_flat(client))
    return np.sum(p * (np.log(p) - np.log(q)))


def js(server, client):
    p, q = _softmax(_flat(server)), _softmax(_flat(client))
    m = (p + q) / 2
    return np.sum(p * np.log(p / m)) / 2 + np.sum(q * np.log(q / m)) / 2


def l2(server, client):
    return np.linalg.norm(_flat(server) - _flat(client))


def spectral(server, client):
    def norm(d):
        return np.linalg.norm(d.reshape(-1, d.shape[-1]), ord=2) if d.ndim > 1 else abs(d).max()

    differences = [np.float64(s) - np.float64(c) for s, c in zip(server, client, strict=True)]
    vectors = [np.linalg.norm(d) for d in differences if d.ndim < 2]
    return max([norm(d) for d in differences if d.ndim > 1] + vectors)


def cosine(server, client):
    s, c = _flat(server), _flat(client)
    if not s.any() or not c.any():
        return float(s.any() != c.any())
    return 1 - s @ c / np.linalg.norm(s) / np.linalg.norm(c)


def raw_weights(scores, examples, *, rule, scale, typical, bound=None, times_examples=True):
    """Weights `[clients, layers]` before they are normalised; `rule` maps d / scale to a weight.

    `scale` and `typical` are arrays over layers; `typical` is 0 in a first round, where rules that
    look at it let all scores count alike.
    """
    scores, examples = (np.asarray(x, np.float64) for x in (scores, examples))
    unknown = not np.all(typical > 0)
    if unknown and (bound is not None or scale is typical):
        weights = np.ones_like(scores)
    else:
        weights = rule(scores / scale)
        if bound is not None:
            centre = rule(typical / scale)
            weights = np.clip(weights, centre / np.sqrt(bound), centre * np.sqrt(bound))
    weights = weights * (examples > 0)[:, None]
    return weights * examples[:, None] if times_examples else weights


def weighted_mean(tensors_by_client, weights, groups):
    """`tensors_by_client[k][t]` averaged with `weights[k, layer of t]`."""
    owner = {t: layer for layer, group in enumerate(groups) for t in group}
    shares = weights / weights.sum(0)
    return [
        sum(
            shares[k, owner[t]] * np.float64(client[t])
            for k, client in enumerate(tensors_by_client)
        )
        for t in range(len(owner))
    ]


def q_fed_avg(deltas, losses, *, q, learning_rate):
    lipschitz = 1 / learning_rate
    numerator, denominator = [0.0] * len(deltas[0]), 0.0
    for delta, loss in zip(deltas, losses, strict=True):
        step = [lipschitz * np.float64(d) for d in delta]
        square = sum(np.sum(s**2) for s in step)
        numerator = [n + loss**q * s for n, s in zip(numerator, step, strict=True)]
        denominator += q * loss ** (q - 1) * square + lipschitz * loss**q
    return [n / denominator for n in numerator]


def fed_nova(deltas, steps, examples, *, momentum):
    steps, share = np.float64(steps), np.float64(examples) / np.sum(examples)
    a = steps
    if momentum:
        a = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    tau = np.sum(share * a)
    return [
        tau * sum(share[k] * np.float64(delta[t]) / a[k] for k, delta in enumerate(deltas))
        for t in range(len(deltas[0]))
    ]
