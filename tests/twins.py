"""NumPy twins: the same rules written down once more, in float64, one tensor at a time.

Each twin keeps its own state and steps with `twin(weights, gradients)`, both lists of arrays.
"""

import numpy as np


class Momentum:
    def __init__(self, beta=0.9, nesterov=False):
        self.beta, self.nesterov, self.v = beta, nesterov, None

    def __call__(self, weights, gradients):
        v = self.v or [np.zeros_like(g) for g in gradients]
        self.v = [self.beta * a + g for a, g in zip(v, gradients, strict=True)]
        if self.nesterov:
            return [self.beta * a + g for a, g in zip(self.v, gradients, strict=True)]
        return self.v


class EWMA:
    def __init__(self, beta=0.9):
        self.beta, self.s = beta, None

    def __call__(self, weights, gradients):
        s = self.s or [np.zeros_like(g) for g in gradients]
        self.s = [self.beta * a + (1 - self.beta) * g for a, g in zip(s, gradients, strict=True)]
        return self.s


class YogiMomentum:
    def __init__(self, beta=0.9):
        self.beta, self.s = beta, None

    def __call__(self, weights, gradients):
        s = self.s or [np.zeros_like(g) for g in gradients]
        self.s = [
            a - np.sign(a - g) * (1 - self.beta) * g for a, g in zip(s, gradients, strict=True)
        ]
        return self.s


class Adagrad:
    def __init__(self, epsilon=1e-7):
        self.epsilon, self.s = epsilon, None

    def __call__(self, weights, gradients):
        s = self.s or [np.zeros_like(g) for g in gradients]
        self.s = [a + g**2 for a, g in zip(s, gradients, strict=True)]
        return [g / (np.sqrt(a) + self.epsilon) for a, g in zip(self.s, gradients, strict=True)]


class RMSProp:
    def __init__(self, beta=0.9, epsilon=1e-7):
        self.average, self.epsilon = EWMA(beta), epsilon

    def __call__(self, weights, gradients):
        s = self.average(weights, [g**2 for g in gradients])
        return [g / (np.sqrt(a) + self.epsilon) for a, g in zip(s, gradients, strict=True)]


class Adam:
    average_of_squares = EWMA

    def __init__(self, beta_1=0.9, beta_2=0.99, epsilon=1e-7, amsgrad=False):
        self.m, self.v = EWMA(beta_1), self.average_of_squares(beta_2)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.amsgrad, self.maximum, self.t = amsgrad, None, 0

    def __call__(self, weights, gradients):
        self.t += 1
        m = self.m(weights, gradients)
        v = self.v(weights, [g**2 for g in gradients])
        m = [a / (1 - self.beta_1**self.t) for a in m]
        v = [a / (1 - self.beta_2**self.t) for a in v]
        if self.amsgrad:
            if self.maximum is not None:
                v = [np.maximum(a, b) for a, b in zip(v, self.maximum, strict=True)]
            self.maximum = v
        return [a / (np.sqrt(b) + self.epsilon) for a, b in zip(m, v, strict=True)]


class Yogi(Adam):
    average_of_squares = YogiMomentum


class ClipByNorm:
    def __init__(self, max_norm=1.0):
        self.max_norm = max_norm

    def __call__(self, weights, gradients):
        norms = [np.sqrt(np.sum(g**2)) for g in gradients]
        return [
            g if n <= self.max_norm else g * self.max_norm / n
            for g, n in zip(gradients, norms, strict=True)
        ]


class ClipByGlobalNorm:
    def __init__(self, max_norm=1.0):
        self.max_norm = max_norm

    def __call__(self, weights, gradients):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
        return [g if norm <= self.max_norm else g * self.max_norm / norm for g in gradients]


class FedProx:
    def __init__(self, alpha=0.01):
        self.alpha, self.reference = alpha, None

    def __call__(self, weights, gradients):
        if self.reference is None:
            self.reference = [w.copy() for w in weights]
        return [
            g + self.alpha * (w - r)
            for g, w, r in zip(gradients, weights, self.reference, strict=True)
        ]


class L1L2:
    def __init__(self, l1=0.0, l2=0.0):
        self.l1, self.l2 = l1, l2

    def __call__(self, weights, gradients):
        return [
            g + self.l1 * np.sign(w) + 2 * self.l2 * w
            for g, w in zip(gradients, weights, strict=True)
        ]


class Pipeline:
    """`rate` and `decay` are functions of the number of steps taken before."""

    def __init__(self, rate, parts=(), decay=lambda t: 0.0, projection=lambda w: w):
        self.rate, self.parts, self.decay, self.projection = rate, parts, decay, projection
        self.t = 0

    def __call__(self, weights, gradients):
        for part in self.parts:
            gradients = part(weights, gradients)
        rate, decay = self.rate(self.t), self.decay(self.t)
        self.t += 1
        return [
            self.projection(w - (rate * g + decay * w))
            for w, g in zip(weights, gradients, strict=True)
        ]
