"""Privacy guarantees of noise, by `dp_accounting`: for clipped examples, and for clipped clients.

A thin layer: one event, one accountant, checked arguments. The guarantees cover noisy sums only, and
nothing else that leaves a client: not exact metrics, weights by number of examples, or hyperparameters
that were tuned on the data.
"""

import math

import dp_accounting

from aggregators.core import checks

__all__ = ["epsilon", "noise_multiplier_for"]


def epsilon(
    noise_multiplier: float,
    *,
    sampling_probability: float,
    steps: int,
    delta: float,
    accountant: str = "rdp",
) -> float:
    """The epsilon of repeated, noisy, Poisson-sampled sums.

    ```
    (epsilon, delta)-DP of `steps` Gaussian mechanisms, each on a Poisson sample
    ```

    Neighbouring data differ by adding or removing one record (`ADD_OR_REMOVE_ONE`). A record enters each
    sum with `sampling_probability`, independently of all others. TFF samples differently: batches follow
    the order of the dataset, and cohorts have a fixed size. As usual in practice, epsilon then describes
    the intended mechanism rather than the one that runs. With `sampling_probability=1`, where a record
    enters each of `steps` sums, it holds without any assumption about sampling.

    If a record is an example of one client (`ExampleClipping`), a step is one batch,
    `sampling_probability` is expected batch size / examples of that client, and `steps` counts the
    batches that the client trains on in all rounds. `noise_multiplier` is that of `ExampleClipping`. The
    guarantee holds against anyone who sees the client's updates. The client with the largest epsilon has
    the weakest guarantee.

    If a record is a client (`tff.learning.dp_aggregator`), a step is one round, `sampling_probability`
    is clients per round / clients, and `noise_multiplier` is that of `dp_aggregator`, whose default
    adaptive clipping already spends some of it on the norm. The guarantee holds against anyone who sees
    the server's models.

    Args:
      noise_multiplier: Standard deviation of the noise over the sensitivity to one record; at least 0.
      sampling_probability: Above 0, at most 1.
      steps: A whole number, at least 0.
      delta: Above 0, below 1; choose less than one over the number of records.
      accountant: `"rdp"`, Renyi DP, or `"pld"`, privacy loss distributions: tighter but slower.

    Returns:
      Epsilon; infinity without noise.

    Raises:
      ValueError: If an argument is out of range.

    Example: the MNIST classifier of TensorFlow Privacy's tutorial, 15 epochs of batches of 150

      >>> round(epsilon(1.3, sampling_probability=150 / 60000, steps=6000, delta=1e-5), 2)
      0.72

    Source: Abadi et al., CCS 2016; Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled
    Gaussian Mechanism, 2019; `dp_accounting`, which does the counting.
    """
    checks.number("noise_multiplier", noise_multiplier, checks.Range(0.0))
    _check_event(sampling_probability, steps, delta, accountant)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    event = _event(noise_multiplier, sampling_probability, steps)
    return float(_accountant(accountant).compose(event).get_epsilon(delta))


def noise_multiplier_for(
    target_epsilon: float,
    *,
    sampling_probability: float,
    steps: int,
    delta: float,
    accountant: str = "rdp",
) -> float:
    """The smallest noise multiplier whose `epsilon` is at most `target_epsilon`.

    Neighbours and sampling are those of `epsilon`; `dp_accounting.calibrate_dp_mechanism` finds it.

    Args:
      target_epsilon: Above 0.
      sampling_probability: As for `epsilon`.
      steps: As for `epsilon`, at least 1.
      delta: As for `epsilon`.
      accountant: As for `epsilon`.

    Returns:
      The multiplier, to 1e-6.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> z = noise_multiplier_for(2.0, sampling_probability=0.01, steps=1000, delta=1e-5)
      >>> epsilon(z, sampling_probability=0.01, steps=1000, delta=1e-5) <= 2.0
      True
    """
    checks.number("target_epsilon", target_epsilon, checks.Range(0.0, above=True))
    _check_event(sampling_probability, steps, delta, accountant)
    if steps == 0:
        raise ValueError("`steps` must be at least 1 for noise to be needed; found 0.")
    return float(
        dp_accounting.calibrate_dp_mechanism(
            lambda: _accountant(accountant),
            lambda z: _event(z, sampling_probability, steps),
            target_epsilon,
            delta,
            dp_accounting.LowerEndpointAndGuess(0.0, 1.0),
            tol=1e-6,
        )
    )


def _event(noise_multiplier: float, probability: float, steps: int) -> dp_accounting.DpEvent:
    once = dp_accounting.GaussianDpEvent(noise_multiplier)
    if probability < 1:
        once = dp_accounting.PoissonSampledDpEvent(probability, once)
    return dp_accounting.SelfComposedDpEvent(once, int(steps))


def _accountant(kind: str) -> dp_accounting.PrivacyAccountant:
    neighbours = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if kind == "pld":
        return dp_accounting.pld.PLDAccountant(neighbours)
    return dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)


def _check_event(probability: object, steps: object, delta: object, accountant: object) -> None:
    checks.word("accountant", accountant, "rdp", "pld")
    checks.number("delta", delta, checks.Range(0.0, 1.0, above=True, below=True))
    checks.number("sampling_probability", probability, checks.Range(0.0, 1.0, above=True))
    checks.whole("steps", steps, 0)
