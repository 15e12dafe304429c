"""The rounds of all tasks but B in plain NumPy, the truth of the check: gradients by hand."""

import numpy as np
from tasks import CLIENT_RATE, SERVER_RATES, main


def gradients(weights, x, y):
    """Of the mean cross-entropy; `weights` are kernels and biases in turn, or one kernel."""
    kernels, biases = weights[::2], weights[1::2]
    inputs = [x]
    for kernel, bias in zip(kernels, biases):  # of the last layer, they are logits
        inputs.append(np.maximum(inputs[-1] @ kernel + bias, 0))
    logits = inputs[-1] @ kernels[-1] if not biases else inputs[-2] @ kernels[-1] + biases[-1]
    error = np.exp(logits - logits.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    found = []
    for layer in reversed(range(len(kernels))):
        found[:0] = [inputs[layer].T @ error] + ([error.sum(0)] if biases else [])
        error = error @ kernels[layer].T * (inputs[layer] > 0)
    return found


def simulate(task, clients, start, server, rounds, round_done):
    central = [weight.astype(float) for weight in start]
    first = [np.zeros_like(weight) for weight in central]
    second = [np.zeros_like(weight) for weight in central]
    for number in range(1, rounds + 1):
        mean = [np.zeros_like(weight) for weight in central]
        for x, y in clients:  # all have as many examples
            local = list(central)
            for begin in range(0, len(y), task.rows):
                found = gradients(local, x[begin : begin + task.rows], y[begin : begin + task.rows])
                local = [w - CLIENT_RATE * g for w, g in zip(local, found, strict=True)]
            for m, c, w in zip(mean, central, local, strict=True):
                m += (c - w) / len(clients)
        if server == "adam":
            first = [0.9 * f + 0.1 * m for f, m in zip(first, mean, strict=True)]
            second = [0.999 * s + 0.001 * m**2 for s, m in zip(second, mean, strict=True)]
            mean = [
                f / (1 - 0.9**number) / (np.sqrt(s / (1 - 0.999**number)) + 1e-8)
                for f, s in zip(first, second, strict=True)
            ]
        central = [c - SERVER_RATES[server] * m for c, m in zip(central, mean, strict=True)]
        round_done()
    return central


if __name__ == "__main__":
    main("NumPy", np.__version__, simulate, tasks="ACLK")
