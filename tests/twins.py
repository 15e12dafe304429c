"""NumPy twins: the same rules written down once more, in float64.

Each twin keeps its own state and steps with `twin(weights, gradients)`, both lists of arrays, to the
new gradients. Where a gradient is `None` nothing happens, but steps are counted all the same.
"""

import numpy as np


def leafwise(rule, slot, *columns):
    """`rule(slot or 0, *leaves)` for each leaf whose last column, the gradient, is not `None`."""
    slot = slot or [0.0 if g is None else np.zeros_like(g) for g in columns[-1]]
    return [s if row[-1] is None else rule(s, *row) for s, *row in zip(slot, *columns, strict=True)]


def present(rule, *columns):
    return [None if row[-1] is None else rule(*row) for row in zip(*columns, strict=True)]


class Momentum:
    def __init__(self, beta=0.9, nesterov=False):
        self.beta, self.nesterov, self.v = beta, nesterov, None

    def __call__(self, weights, gradients):
        self.v = leafwise(lambda v, g: self.beta * v + g, self.v, gradients)
        if self.nesterov:
            return present(lambda v, g: self.beta * v + g, self.v, gradients)
        return present(lambda v, g: v, self.v, gradients)


class EWMA:
    def __init__(self, beta=0.9):
        self.beta, self.s = beta, None

    def __call__(self, weights, gradients):
        self.s = leafwise(lambda s, g: self.beta * s + (1 - self.beta) * g, self.s, gradients)
        return present(lambda s, g: s, self.s, gradients)


class YogiMomentum:
    def __init__(self, beta=0.9):
        self.beta, self.s = beta, None

    def __call__(self, weights, gradients):
        rule = lambda s, g: s - np.sign(s - g) * (1 - self.beta) * g  # noqa: E731
        self.s = leafwise(rule, self.s, gradients)
        return present(lambda s, g: s, self.s, gradients)


class Adagrad:
    def __init__(self, epsilon=1e-7):
        self.epsilon, self.s = epsilon, None

    def __call__(self, weights, gradients):
        self.s = leafwise(lambda s, g: s + g**2, self.s, gradients)
        return present(lambda s, g: g / (np.sqrt(s) + self.epsilon), self.s, gradients)


class RMSProp:
    def __init__(self, beta=0.9, epsilon=1e-7):
        self.average, self.epsilon = EWMA(beta), epsilon

    def __call__(self, weights, gradients):
        s = self.average(weights, present(np.square, gradients))
        return present(lambda s, g: g / (np.sqrt(s) + self.epsilon), s, gradients)


class Adam:
    average_of_squares = EWMA

    def __init__(self, beta_1=0.9, beta_2=0.99, epsilon=1e-7, amsgrad=False):
        self.m, self.v = EWMA(beta_1), self.average_of_squares(beta_2)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.amsgrad, self.maximum, self.t = amsgrad, None, 0

    def __call__(self, weights, gradients):
        self.t += 1
        m = self.m(weights, gradients)
        v = self.v(weights, present(np.square, gradients))
        m = present(lambda m: m / (1 - self.beta_1**self.t), m)
        v = present(lambda v: v / (1 - self.beta_2**self.t), v)
        if self.amsgrad:
            self.maximum = leafwise(np.maximum, self.maximum, v)
            v = present(lambda a, g: a, self.maximum, gradients)
        return present(lambda m, v: m / (np.sqrt(v) + self.epsilon), m, v)


class Yogi(Adam):
    average_of_squares = YogiMomentum


class ClipByNorm:
    def __init__(self, max_norm=1.0):
        self.max_norm = max_norm

    def __call__(self, weights, gradients):
        return present(lambda g: g / max(1.0, np.sqrt(np.sum(g**2)) / self.max_norm), gradients)


class ClipByGlobalNorm:
    def __init__(self, max_norm=1.0):
        self.max_norm = max_norm

    def __call__(self, weights, gradients):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients if g is not None))
        return present(lambda g: g / max(1.0, norm / self.max_norm), gradients)


class FedProx:
    def __init__(self, alpha=0.01):
        self.alpha, self.reference = alpha, None

    def __call__(self, weights, gradients):
        if self.reference is None:
            self.reference = [w.copy() for w in weights]
        return present(lambda w, r, g: g + self.alpha * (w - r), weights, self.reference, gradients)


class L1L2:
    def __init__(self, l1=0.0, l2=0.0):
        self.l1, self.l2 = l1, l2

    def __call__(self, weights, gradients):
        return present(lambda w, g: g + self.l1 * np.sign(w) + 2 * self.l2 * w, weights, gradients)


class Inner:
    """A pipeline in a pipeline: what it would take from the weights; `scale` is one in it."""

    def __init__(self, rate, scale, decay):
        self.rate, self.scale, self.decay, self.t = rate, scale, decay, -1

    def __call__(self, weights, gradients):
        self.t += 1
        rate = self.rate(self.t) * self.scale
        return present(lambda w, g: rate * g + self.decay * w, weights, gradients)


class Pipeline:
    """The whole step, to new weights; `rate` and `decay` are functions of the steps taken before."""

    def __init__(self, rate, parts=(), decay=lambda t: 0.0, projection=lambda w: w):
        self.rate, self.parts, self.decay, self.projection = rate, parts, decay, projection
        self.t = 0

    def __call__(self, weights, gradients):
        for part in self.parts:
            gradients = part(weights, gradients)
        rate, decay = self.rate(self.t), self.decay(self.t)
        self.t += 1
        return [
            w if g is None else self.projection(w - (rate * g + decay * w))
            for w, g in zip(weights, gradients, strict=True)
        ]
