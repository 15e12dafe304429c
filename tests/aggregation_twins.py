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


def adaptive_mean(
    deltas, scores, examples, memory, *, rule, groups, scale="running", keep=0.5, **options
):
    """`scores[k][layer]` of a round; `memory["typical"]` is their running mean over rounds."""
    scores = np.asarray(scores, np.float64)
    typical = memory.setdefault("typical", np.zeros(len(groups)))
    by = typical if scale == "running" else np.full(len(groups), scale)
    raw = raw_weights(scores, examples, rule=rule, scale=by, typical=typical, **options)
    mean = scores[np.array(examples) > 0].mean(0)
    known = np.all(typical > 0)
    memory["typical"] = keep * typical + (1 - keep) * mean if known else mean
    return weighted_mean(deltas, raw, groups)


def fallen(loss, previous):
    """Whether the loss is below that of the round before, as a share of 0 or 1."""
    return float(previous is not None and loss < previous)


def gated(adaptive, plain, losses, examples, memory, gate):
    """`plain + s (adaptive - plain)` with `s = gate(loss, loss of the round before)`."""
    loss = np.dot(np.float64(examples) / np.sum(examples), np.float64(losses))
    share = gate(loss, memory.get("loss"))
    memory["loss"] = loss
    return [p + share * (a - p) for a, p in zip(adaptive, plain, strict=True)]


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


def length(tensors):
    return np.linalg.norm(_flat(tensors))


def next_typical(typical, mean, memory=0.5):
    """The running mean score, which no round raises more than tenfold; NaN is no score."""
    known = memory * typical + (1 - memory) * np.minimum(mean, 10 * typical)
    return np.where(np.isnan(mean), typical, np.where(typical > 0, known, mean))


def shrinking(norms, weights, memory, *, cutoff=2.5, power=3.0, start=1.0, quantile=0.5, rate=0.2):
    """The factors of long updates; moves `memory["norm"]`, which is 0 if `start` is None."""
    norms, has_weight = np.float64(norms), np.float64(weights) > 0
    typical = memory.setdefault("norm", start or 0.0)
    if not typical:
        memory["norm"] = np.exp(np.mean(np.log(norms[has_weight & (norms > 0)])))
        return np.ones(len(norms))
    with np.errstate(divide="ignore"):
        factors = np.minimum(1.0, cutoff * typical / norms) ** power
    if has_weight.any():
        within = np.mean(norms[has_weight] <= typical)
        memory["norm"] = typical * np.exp(-rate * (within - quantile))
    return factors


def redescending(deltas, weights, memory, **numbers):
    is_first = not memory.get("norm", numbers.get("start", 1.0))
    factors = shrinking([length(d) for d in deltas], weights, memory, **numbers)
    shares = np.float64(weights) / np.sum(weights)
    mean = [
        sum(p * f * np.float64(d[t]) for p, f, d in zip(shares, factors, deltas, strict=True))
        for t in range(len(deltas[0]))
    ]
    return shortened(mean, memory) if is_first else mean


def shortened(mean, memory):
    """A first round's mean, no longer than its clients' norms."""
    return [t * min(1.0, memory["norm"] / length(mean)) for t in mean]


def _matrix(deltas):
    return np.array([_flat(delta) for delta in deltas])


def _like(vector, delta):
    cuts = np.cumsum([np.size(x) for x in delta])[:-1]
    parts = zip(np.split(vector, cuts), delta, strict=True)
    return [part.reshape(np.shape(x)) for part, x in parts]


def coordinate_median(deltas, *_):
    return _like(np.median(_matrix(deltas), 0), deltas[0])


def trimmed_mean(deltas, share):
    cut = int(share * len(deltas))
    return _like(np.sort(_matrix(deltas), 0)[cut : len(deltas) - cut].mean(0), deltas[0])


def multi_krum(deltas, num_bad, num_kept):
    rows = _matrix(deltas)
    scores = []
    for k, row in enumerate(rows):
        others = np.sort(np.sum((np.delete(rows, k, 0) - row) ** 2, 1))
        scores.append(np.sum(others[: len(rows) - num_bad - 2]))
    return _like(rows[np.argsort(scores)[:num_kept]].mean(0), deltas[0])


def geometric_median(deltas, weights, iterations, smoothing=1e-6):
    rows, weights = _matrix(deltas), np.asarray(weights, np.float64)
    point = np.median(rows, 0)
    for _ in range(iterations):
        by = weights / np.maximum(np.linalg.norm(rows - point, axis=1), smoothing)
        point = by @ rows / by.sum()
    return _like(point, deltas[0])


def centered_clipping(deltas, memory, radius):
    rows = _matrix(deltas)
    center = memory.setdefault("center", np.zeros(rows.shape[1]))
    apart = rows - center
    factors = np.minimum(1.0, radius / np.linalg.norm(apart, axis=1))
    memory["center"] = center + np.mean(factors[:, None] * apart, 0)
    return _like(memory["center"], deltas[0])


def jury(
    deltas,
    weights,
    candidates,
    vote,
    memory,
    *,
    groups,
    sharpness=20.0,
    margin=0.3,
    vote_decay=0.8,
    gap_decay=0.5,
    limit=6.0,
    floor=1e-3,
    vote_rate=0.5,
    stride_step=None,
    **numbers,
):
    """`candidates`: raw weights `[clients, layers]` each, 0 for no part.

    `vote(k, memory)` gives one for each.

    `memory` has `gap` (a list of tensors for each candidate), `share`, and what else it is given. With a
    `stride_step`, votes and gaps have one more, and there is `memory["stride"]`.
    """
    weights = np.asarray(weights, np.float64)
    voted, kept = len(candidates), np.flatnonzero(weights > 0)
    number = voted + (stride_step is not None)
    memory.setdefault("share", 1 / (np.exp(sharpness * margin) + voted) * np.ones(voted))
    memory.setdefault("stride", 1 / (1 + np.exp(0.5 * sharpness)) if number > voted else 0.0)
    memory.setdefault("gap", [[np.zeros(np.shape(x)) for x in deltas[0]] for _ in range(number)])
    memory.setdefault("norm", numbers.get("start", 1.0) or 0.0)
    is_first = not memory["norm"]
    for name, start in (("agreement", 0.0), ("size", 0.0), ("scale", floor)):
        memory.setdefault(name, np.full(number, start))
    if not len(kept):
        return None
    raw = np.array([vote(k, memory) for k in kept])
    factors = shrinking([length(d) for d in deltas], weights, memory, **numbers)
    plain = weights[:, None] * np.ones((1, len(groups)))

    def mean(by):
        owner = {t: layer for layer, group in enumerate(groups) for t in group}
        return [
            sum(by[k, owner[t]] * factors[k] * np.float64(deltas[k][t]) for k in kept)
            / by[kept, owner[t]].sum()
            for t in range(len(owner))
        ]

    first = mean(plain)
    others = [mean(by) if by[kept].sum() > 0 else first for by in candidates]
    cap = limit * memory["scale"]
    cast, part = np.clip(raw, -cap, cap), weights[kept] / weights[kept].sum()
    memory["agreement"] = vote_decay * memory["agreement"] + part @ cast
    memory["size"] = vote_decay * memory["size"] + part @ np.abs(cast)
    if memory.setdefault("rounds", 0):
        usual = np.mean(np.abs(raw) <= memory["scale"], 0)
        memory["scale"] = np.maximum(memory["scale"] * np.exp(-vote_rate * (usual - 0.5)), floor)
    memory["rounds"] += 1
    trust = memory["agreement"] / np.maximum(memory["size"], floor)
    powers = np.exp(sharpness * (trust[:voted] - margin))
    memory["share"] = powers / (1 + powers.sum())
    apart = [[b - a for a, b in zip(first, other, strict=True)] for other in others]
    mix = [
        a + sum(s * parts[t] for s, parts in zip(memory["share"], apart, strict=True))
        for t, a in enumerate(first)
    ]
    if is_first:
        mix = shortened(mix, memory)
    if number > voted:
        apart.append(mix)
        longer = 1 / (1 + np.exp(-sharpness * (trust[-1] - 0.5)))
        memory["stride"] = min(longer, memory["stride"] + stride_step)
    memory["gap"] = [
        [gap_decay * g + d for g, d in zip(gap, parts, strict=True)]
        for gap, parts in zip(memory["gap"], apart, strict=True)
    ]
    return [(1 + memory["stride"]) * x for x in mix]


def cosine_vote(delta):
    """How far along each gap an update goes."""

    def vote(memory, floor=1e-3):
        least, own = floor * memory["norm"], _flat(delta)
        products = [(own @ _flat(gap), _flat(gap)) for gap in memory["gap"]]
        return [
            p / (np.linalg.norm(own) * max(np.linalg.norm(g), least)) if own.any() else 0.0
            for p, g in products
        ]

    return vote
