"""Named rules as whole learning processes, by `build_fed_avg`.

All raise `TypeError` for an argument of the wrong kind, and `ValueError` for one out of range.
"""

from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import rules
from aggregators.builders.fed_avg import LearningProcess, build_fed_avg
from aggregators.client.training import check_optimizer
from aggregators.core.hyperparameters import Number
from aggregators.core.layers import Layers
from aggregators.core.needs import LossAt
from aggregators.core.rule import Rule
from aggregators.core.types import ModelFn, Optimizer
from aggregators.rules.adaptive_mean import ScoreLike
from aggregators.rules.loss_gated import Gate
from aggregators.scores import js_divergence, kl_divergence
from aggregators.weighting import Weighting, softmax


def build_fed_kl(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    server_optimizer_fn: Optimizer | None = None,
    *,
    temperature: Number = 1.0,
    prefer: Literal["near", "far"] = "near",
    bound: Number | None = None,
    times_examples: bool = True,
    layers: Layers = "tensor",
    **options: Any,
) -> LearningProcess:
    """Builds federated averaging with weights by the KL divergence of each layer.

    `rules.adaptive_mean` with `scores.kl_divergence` and a `softmax` weighting over clients of
    `d / (temperature * running mean of d)`. The first round is plain averaging. Preferring near clients
    protects against bad clients if clients are alike, and costs accuracy if they differ much:
    `adaptive_mean` says how much, and how to get the gain without the loss.

    Args:
      model_fn: As for `build_fed_avg`.
      client_optimizer_fn: The clients' optimizer.
      server_optimizer_fn: The server's; SGD with learning rate 1 if None.
      temperature: At least 1e-4. Small: the nearest client takes all. Large: all are alike.
      prefer: `"near"` gives more weight to clients near the server's model, `"far"` the reverse.
      bound: The largest ratio between two clients' weights, number of examples aside; None for none.
      times_examples: Whether weights are multiplied by the number of examples.
      layers: The tensors that are weighed together: `"tensor"`, `"layer"`, `"model"` or groups of
        positions.
      **options: The further arguments of `build_fed_avg`.

    Returns:
      A `LearningProcess`; see `build_fed_avg`.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> process = build_fed_kl(model, sgd, temperature=0.5, bound=20.0)
      >>> list(process.initialize.type_signature.result.member.aggregator._asdict())
      ['round', 'temperature', 'bound', 'decay', 'typical_score']
    """
    weighting = softmax(temperature, prefer=prefer, bound=bound, times_examples=times_examples)
    rule = rules.adaptive_mean(kl_divergence, weighting, layers=layers)
    return build_fed_avg(model_fn, client_optimizer_fn, server_optimizer_fn, rule=rule, **options)


def build_fed_att(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    *,
    step_size: Number = 1.2,
    norm: Literal["frobenius", "spectral"] = "frobenius",
    layers: Layers = "tensor",
    **options: Any,
) -> LearningProcess:
    """Builds FedAtt: attentive aggregation; see `rules.fed_att`.

    Args:
      model_fn: As for `build_fed_avg`.
      client_optimizer_fn: The clients' optimizer.
      step_size: Above 0; 1.2 in the authors' later version, 1.0 in the first.
      norm: The norm of a tensor's movement: `"spectral"` as in the authors' code, or `"frobenius"`.
      layers: The tensors that are weighed together: `"tensor"`, `"layer"`, `"model"` or groups of
        positions.
      **options: The further arguments of `build_fed_avg`.

    Returns:
      A `LearningProcess`; see `build_fed_avg`.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> process = build_fed_att(model, sgd, norm="spectral")
      >>> process.get_hparams(process.initialize())["aggregator"]["step_size"]
      1.2
    """
    rule = rules.fed_att(step_size, norm=norm, layers=layers)
    return build_fed_avg(model_fn, client_optimizer_fn, rule=rule, **options)


def build_fed_med(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    server_optimizer_fn: Optimizer | None = None,
    *,
    score: ScoreLike = js_divergence,
    weighting: Weighting | None = None,
    gate: Literal["not_fallen", "fallen"] | Gate = "not_fallen",
    min_decrease: Number = 0.0,
    layers: Layers = "tensor",
    loss_at: LossAt = "training",
    **options: Any,
) -> LearningProcess:
    """Builds FedMed-style training: adaptive or plain averaging, depending on the clients' loss.

    See `rules.loss_gated`, which also tells the source's choices from this package's.

    Args:
      model_fn: As for `build_fed_avg`.
      client_optimizer_fn: The clients' optimizer.
      server_optimizer_fn: The server's; SGD with learning rate 1 if None.
      score: How far a client's model is from the server's: one of `aggregators.scores`, `"loss"`, or
        your own function.
      weighting: The weighting of the adaptive mean; a softmax that prefers near clients if None.
      gate: When the mean is adaptive: if the loss has `"not_fallen"` or has `"fallen"`, or a function
        of a `Round` that returns a share or a bool.
      min_decrease: Relative decrease of the loss that counts as a fall, at least 0 and below 1.
      layers: The tensors that are weighed together: `"tensor"`, `"layer"`, `"model"` or groups of
        positions.
      loss_at: The loss that clients report: in `"training"`, or `"initial"`, at the server's model.
      **options: The further arguments of `build_fed_avg`.

    Returns:
      A `LearningProcess`; `metrics["aggregator"]["adaptive"]` says which branch was taken.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> process = build_fed_med(model, sgd, min_decrease=0.01)
      >>> "adaptive" in process.next.type_signature.result.metrics.member.aggregator._asdict()
      True
    """
    rule = rules.loss_gated(
        weighting,
        score=score,
        layers=layers,
        loss_at=loss_at,
        gate=gate,
        min_decrease=min_decrease,
    )
    return build_fed_avg(model_fn, client_optimizer_fn, server_optimizer_fn, rule=rule, **options)


def build_q_fed_avg(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    server_optimizer_fn: Optimizer | None = None,
    *,
    learning_rate: float,
    q: Number = 0.1,
    **options: Any,
) -> LearningProcess:
    """Builds q-FedAvg: fairer losses across clients; see `rules.q_fed_avg`.

    Clients also measure their loss at the server's weights, which takes one more forward pass over
    their data. Numbers of examples do not matter.

    Args:
      model_fn: As for `build_fed_avg`.
      client_optimizer_fn: The clients' optimizer.
      server_optimizer_fn: The server's; SGD with learning rate 1, as published, if None.
      learning_rate: The learning rate of `client_optimizer_fn`, above 0. If you change one between
        rounds, change the other too.
      q: At least 0.
      **options: The further arguments of `build_fed_avg`.

    Returns:
      A `LearningProcess`; see `build_fed_avg`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of range, or the optimizer has another learning rate.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> process = build_q_fed_avg(model, sgd, learning_rate=0.1, q=1.0)
      >>> "step" in process.next.type_signature.result.metrics.member.aggregator._asdict()
      True
    """
    rule = rules.q_fed_avg(q, learning_rate)
    _check_hparam(client_optimizer_fn, "learning_rate", learning_rate)
    return build_fed_avg(model_fn, client_optimizer_fn, server_optimizer_fn, rule=rule, **options)


def build_fed_nova(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    server_optimizer_fn: Optimizer | None = None,
    *,
    momentum: float = 0.0,
    **options: Any,
) -> LearningProcess:
    """Builds FedNova: averaging normalised by steps; see `rules.fed_nova`.

    Args:
      model_fn: As for `build_fed_avg`.
      client_optimizer_fn: The clients' optimizer: SGD, with or without momentum.
      server_optimizer_fn: The server's; SGD with learning rate 1 if None.
      momentum: The momentum of `client_optimizer_fn`, at least 0 and below 1. If you change one
        between rounds, change the other too.
      **options: The further arguments of `build_fed_avg`.

    Returns:
      A `LearningProcess`; see `build_fed_avg`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of range, or the optimizer has another momentum. An optimizer
        with a state but no hyperparameter `momentum` cannot be checked.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> process = build_fed_nova(model, sgd)
      >>> isinstance(process, tff.learning.templates.LearningProcess)
      True
    """
    rule = rules.fed_nova(momentum)
    _check_hparam(client_optimizer_fn, "momentum", momentum)
    return build_fed_avg(model_fn, client_optimizer_fn, server_optimizer_fn, rule=rule, **options)


def build_scaffold(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    server_optimizer_fn: Optimizer | None = None,
    *,
    num_clients: int,
    option: Literal["I", "II"] = "II",
    rule: Rule | None = None,
    client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.UNIFORM,
    **options: Any,
) -> LearningProcess:
    """Builds SCAFFOLD: client gradients corrected by control variates; see `rules.scaffold`.

    Args:
      model_fn: As for `build_fed_avg`.
      client_optimizer_fn: Any optimizer for the clients; it gets the corrected gradients.
      server_optimizer_fn: The server's; SGD with learning rate 1 if None.
      num_clients: How many clients there are, in all rounds together.
      option: As for `rules.scaffold`.
      rule: The rule that aggregates the clients' deltas; their mean if None.
      client_weighting: Uniform, as in the paper, if not given.
      **options: The further arguments of `build_fed_avg`.

    Returns:
      A `LearningProcess` whose client data come from `ClientStates.cohort`; see `build_fed_avg`.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> from aggregators import ClientStates
      >>> process = build_scaffold(model, tff.learning.optimizers.build_sgdm(0.1), num_clients=2)
      >>> data = tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))
      >>> state = process.initialize()
      >>> with ClientStates(["ann", "bob"]) as states:
      ...     for _ in range(2):
      ...         with states.cohort(["bob"], [data]) as cohort:
      ...             state, metrics = process.next(state, cohort)
      ...     print([tensor.shape for tensor in states.get("bob").values()])
      [(2, 1), (1,)]
    """
    return build_fed_avg(
        model_fn,
        client_optimizer_fn,
        server_optimizer_fn,
        rule=rules.scaffold(num_clients, option=option, rule=rule),
        client_weighting=client_weighting,
        **options,
    )


def _check_hparam(optimizer: Optimizer, name: str, value: float) -> None:
    """Raises `ValueError` if the optimizer is known to have another value."""
    check_optimizer("client_optimizer_fn", optimizer)
    state = optimizer.initialize(tf.TensorSpec((), tf.float32))
    hparams = optimizer.get_hparams(state)
    if callable(value):  # a schedule
        value = float(value(0))
    if name in hparams:
        found = np.asarray(hparams[name])
    elif name == "momentum" and len(tf.nest.flatten(state)) == len(tf.nest.flatten(hparams)):
        found = np.asarray(0.0)  # an optimizer without a state has no momentum
    else:
        return
    if found.dtype.kind in "fiu" and not np.allclose(found, value, rtol=1e-5, atol=0.0):
        raise ValueError(
            f"`{name}` must be that of `client_optimizer_fn`; found {value!r}, and {found} in the "
            "optimizer. Use the same value for both."
        )
