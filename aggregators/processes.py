"""Whole learning processes: `build_adaptive_fed_avg`, and the named rules on top of it.

All take what `tff.learning.algorithms.build_weighted_fed_avg` takes, but for `model_aggregator`,
which is theirs, and return a `tff.learning.templates.LearningProcess` of the same layout.
"""

import math
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.adaptive_mean import AdaptiveMeanFactory
from aggregators.client_work import build_scored_client_work
from aggregators.layers import Layers
from aggregators.local_training import Loop, LossAt, check_model_fn, check_optimizer
from aggregators.loss_rules import FedNovaFactory, LossGatedMeanFactory, QFedAvgFactory
from aggregators.scores import (
    Score,
    js_divergence,
    kl_divergence,
    l2_distance,
    spectral_distance,
)
from aggregators.weighting import Weighting, softmax

_NUM_EXAMPLES = tff.learning.ClientWeighting.NUM_EXAMPLES


def build_adaptive_fed_avg(
    model_fn: Any,
    client_optimizer_fn: tff.learning.optimizers.Optimizer,
    server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
    *,
    score: Score | Literal["loss"],
    weighting: Weighting,
    layers: Layers = "tensor",
    loss_at: LossAt = "training",
    sample_size: int = 0,
    client_weighting: tff.learning.ClientWeighting = _NUM_EXAMPLES,
    model_distributor: tff.learning.templates.DistributionProcess | None = None,
    metrics_aggregator: Any = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.LearningProcess:
    """Builds federated averaging that weighs clients, layer by layer, by what their models score.

    ```
    w <- server optimizer(w, sum_k a[k, l] (w[l] - w_k[l]))
    a[k, l] = softmax, power or other weighting over clients k of score(w[l], w_k[l])
    ```

    for every layer `l`. One pass over clients; spreads over workers and sub-rounds. Not for a
    secure sum: for that see `build_score_weighted_client_work`. What a client can do to the result
    is limited by `weighting`'s `bound`; see `AdaptiveMeanFactory`.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      client_optimizer_fn: The clients' optimizer.
      server_optimizer_fn: The server's; SGD with learning rate 1 if None.
      score: How far a client's layer is from the server's, from `aggregators.scores` or your own;
        or `"loss"`: the client's loss, in all layers.
      weighting: How scores become weights, from `aggregators.weighting`. With the default running
        scale, the first round is plain averaging.
      layers: Which tensors are weighed together: `"tensor"`, `"model"` or groups of positions.
      loss_at: Where the loss is taken; see `build_scored_client_work`. For `score="loss"`.
      sample_size: How many clients the measurements list one by one.
      client_weighting: The weight that `times_examples` multiplies with.
      model_distributor: As for `build_weighted_fed_avg`.
      metrics_aggregator: As there.
      loop_implementation: As for `build_scored_client_work`.

    Returns:
      A `tff.learning.templates.LearningProcess`. `state.aggregator` holds the running mean score;
      `metrics["aggregator"]` is described in `aggregators.measurements.measure`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range.

    Example:
      >>> from aggregators import scores, weighting
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> process = build_adaptive_fed_avg(
      ...     model,
      ...     tff.learning.optimizers.build_sgdm(0.1),
      ...     score=scores.kl_divergence,
      ...     weighting=weighting.softmax(temperature=0.5),
      ... )
      >>> isinstance(process, tff.learning.templates.LearningProcess)
      True
    """
    check_optimizer("client_optimizer_fn", client_optimizer_fn)
    factory = AdaptiveMeanFactory(weighting, layers=layers, sample_size=sample_size)
    client_work = build_scored_client_work(
        model_fn,
        client_optimizer_fn,
        score=score,
        layers=layers,
        loss_at=loss_at,
        client_weighting=client_weighting,
        metrics_aggregator=metrics_aggregator,
        loop_implementation=loop_implementation,
    )
    return compose_fed_avg(
        model_fn, client_work, factory, server_optimizer_fn, model_distributor=model_distributor
    )


def build_fed_kl(
    model_fn: Any,
    client_optimizer_fn: tff.learning.optimizers.Optimizer,
    server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
    *,
    temperature: float = 1.0,
    prefer: Literal["near", "far"] = "near",
    bound: float | None = None,
    times_examples: bool = True,
    **options: Any,
) -> tff.learning.templates.LearningProcess:
    """Builds federated averaging weighed by the KL divergence of each layer.

    `build_adaptive_fed_avg` with `score=kl_divergence` and a `softmax` weighting over clients of
    `d / (temperature * running mean of d)`. The first round is plain averaging.

    Which way to prefer is a matter of the data: near protects against bad clients where clients
    are alike, and costs accuracy where they differ much.

    Args:
      model_fn: As for `build_adaptive_fed_avg`.
      client_optimizer_fn: As there.
      server_optimizer_fn: As there.
      temperature: As for `weighting.softmax`.
      prefer: As there.
      bound: As there.
      times_examples: As there.
      **options: Any further argument of `build_adaptive_fed_avg`.

    Returns:
      A `tff.learning.templates.LearningProcess`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range.

    Example:
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> process = build_fed_kl(model, sgd, temperature=0.5, bound=20.0)
      >>> str(process.initialize.type_signature.result.member.aggregator)
      '<typical_score=float32[2]>'
    """
    weighting = softmax(temperature, prefer=prefer, bound=bound, times_examples=times_examples)
    return build_adaptive_fed_avg(
        model_fn,
        client_optimizer_fn,
        server_optimizer_fn,
        score=kl_divergence,
        weighting=weighting,
        **options,
    )


def build_fed_att(
    model_fn: Any,
    client_optimizer_fn: tff.learning.optimizers.Optimizer,
    *,
    step_size: float = 1.2,
    norm: Literal["frobenius", "spectral"] = "frobenius",
    **options: Any,
) -> tff.learning.templates.LearningProcess:
    """Builds FedAtt: attentive aggregation, per tensor, where farther clients count more.

    ```
    a[k, l] = softmax over k of |w[l] - w_k[l]|
    w[l] <- w[l] - step_size sum_k a[k, l] (w[l] - w_k[l])
    ```

    Numbers of examples do not enter. One pass.

    Args:
      model_fn: As for `build_adaptive_fed_avg`.
      client_optimizer_fn: As there.
      step_size: Above 0; 1.2 in the authors' later version, 1.0 in the first.
      norm: `"spectral"` as in the authors' code, whose norm of a matrix is its largest singular
        value, or `"frobenius"` as in the ports of it. The same for vectors.
      **options: Any further argument of `build_adaptive_fed_avg` but `score` and `weighting`.

    Returns:
      A `tff.learning.templates.LearningProcess`.

    Raises:
      ValueError: If `norm` or `step_size` is out of its range.

    Example:
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> process = build_fed_att(model, sgd, norm="spectral")
      >>> isinstance(process, tff.learning.templates.LearningProcess)
      True

    Source: Ji, Pan, Long, Li, Jiang, Huang, Learning Private Neural Language Modeling with
    Attentive Aggregation, 2019.
    """
    norms = {"frobenius": l2_distance, "spectral": spectral_distance}
    if norm not in norms:
        raise ValueError(f'`norm` must be "frobenius" or "spectral"; found {norm!r}.')
    is_number = isinstance(step_size, int | float) and not isinstance(step_size, bool)
    if not is_number or not 0 < step_size < math.inf:
        raise ValueError(f"`step_size` must be a finite number above 0; found {step_size!r}.")
    return build_adaptive_fed_avg(
        model_fn,
        client_optimizer_fn,
        tff.learning.optimizers.build_sgdm(step_size),
        score=norms[norm],
        weighting=softmax(prefer="far", scale=None, times_examples=False),
        **options,
    )


def build_fed_med(
    model_fn: Any,
    client_optimizer_fn: tff.learning.optimizers.Optimizer,
    server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
    *,
    score: Score | Literal["loss"] = js_divergence,
    weighting: Weighting | None = None,
    adaptive_when: Literal["not_fallen", "fallen"] = "not_fallen",
    min_decrease: float = 0.0,
    layers: Layers = "tensor",
    loss_at: LossAt = "training",
    sample_size: int = 0,
    client_weighting: tff.learning.ClientWeighting = _NUM_EXAMPLES,
    model_distributor: tff.learning.templates.DistributionProcess | None = None,
    metrics_aggregator: Any = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.LearningProcess:
    """Builds FedMed-style training: adaptive or plain averaging, as the clients' loss says.

    The gate is that of `LossGatedMeanFactory`, both means accumulated in one pass. It follows
    Algorithm 1 of the source; what the algorithm leaves open is an argument here, and the defaults
    are this package's choice: no claim is made to reproduce the source's numbers.

    Args:
      model_fn: As for `build_adaptive_fed_avg`.
      client_optimizer_fn: As there.
      server_optimizer_fn: As there.
      score: The divergence of a layer in the adaptive mean.
      weighting: Of the adaptive mean; a softmax that prefers near clients and counts examples if
        None.
      adaptive_when: Whether the adaptive mean is taken when the loss did not fall, or when it did.
      min_decrease: Relative decrease of the loss that counts as a fall, in [0, 1).
      layers: As for `build_adaptive_fed_avg`.
      loss_at: Where the clients' loss is taken: over training, or at the server's weights.
      sample_size: As for `build_adaptive_fed_avg`.
      client_weighting: As there.
      model_distributor: As there.
      metrics_aggregator: As there.
      loop_implementation: As for `build_scored_client_work`.

    Returns:
      A `tff.learning.templates.LearningProcess`; `metrics["aggregator"]["adaptive"]` is the branch.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range.

    Example:
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> process = build_fed_med(model, sgd, min_decrease=0.01)
      >>> "adaptive" in process.next.type_signature.result.metrics.member.aggregator._asdict()
      True

    Source: Wu, Liang, Wang, FedMed: A Federated Learning Framework for Language Modeling, 2020.
    """
    check_optimizer("client_optimizer_fn", client_optimizer_fn)
    factory = LossGatedMeanFactory(
        softmax() if weighting is None else weighting,
        layers=layers,
        adaptive_when=adaptive_when,
        min_decrease=min_decrease,
        sample_size=sample_size,
    )
    client_work = build_scored_client_work(
        model_fn,
        client_optimizer_fn,
        score=score,
        layers=layers,
        loss_at=loss_at,
        client_weighting=client_weighting,
        metrics_aggregator=metrics_aggregator,
        loop_implementation=loop_implementation,
    )
    return compose_fed_avg(
        model_fn, client_work, factory, server_optimizer_fn, model_distributor=model_distributor
    )


def build_q_fed_avg(
    model_fn: Any,
    client_optimizer_fn: tff.learning.optimizers.Optimizer,
    server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
    *,
    learning_rate: float,
    q: float = 0.1,
    sample_size: int = 0,
    model_distributor: tff.learning.templates.DistributionProcess | None = None,
    metrics_aggregator: Any = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.LearningProcess:
    """Builds q-FedAvg: fairer losses across clients; see `QFedAvgFactory`.

    Clients measure their loss at the server's weights, which is one forward pass over their data
    more than training. Numbers of examples do not enter.

    Args:
      model_fn: As for `build_adaptive_fed_avg`.
      client_optimizer_fn: As there.
      server_optimizer_fn: As there; the default gives the rule as published.
      learning_rate: The learning rate of `client_optimizer_fn`, above 0; `L` is one over it, also
        after `set_hparams` has changed the optimizer's.
      q: At least 0.
      sample_size: As for `build_adaptive_fed_avg`.
      model_distributor: As there.
      metrics_aggregator: As there.
      loop_implementation: As for `build_scored_client_work`.

    Returns:
      A `tff.learning.templates.LearningProcess`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range, or the optimizer has another learning rate.

    Example:
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> process = build_q_fed_avg(model, sgd, learning_rate=0.1, q=1.0)
      >>> "step" in process.next.type_signature.result.metrics.member.aggregator._asdict()
      True
    """
    check_optimizer("client_optimizer_fn", client_optimizer_fn)
    factory = QFedAvgFactory(q, learning_rate, sample_size=sample_size)
    client_work = build_scored_client_work(
        model_fn,
        client_optimizer_fn,
        layers="model",
        loss_at="initial",
        metrics_aggregator=metrics_aggregator,
        loop_implementation=loop_implementation,
    )
    _check_hparam(client_optimizer_fn, "learning_rate", learning_rate)
    return compose_fed_avg(
        model_fn, client_work, factory, server_optimizer_fn, model_distributor=model_distributor
    )


def build_fed_nova(
    model_fn: Any,
    client_optimizer_fn: tff.learning.optimizers.Optimizer,
    server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
    *,
    momentum: float = 0.0,
    sample_size: int = 0,
    client_weighting: tff.learning.ClientWeighting = _NUM_EXAMPLES,
    model_distributor: tff.learning.templates.DistributionProcess | None = None,
    metrics_aggregator: Any = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.LearningProcess:
    """Builds FedNova: averaging normalised by steps; see `FedNovaFactory`.

    Args:
      model_fn: As for `build_adaptive_fed_avg`.
      client_optimizer_fn: As there: SGD, with or without momentum.
      server_optimizer_fn: As there.
      momentum: The momentum of `client_optimizer_fn`, in [0, 1); the rule keeps it after
        `set_hparams` has changed the optimizer's.
      sample_size: As for `build_adaptive_fed_avg`.
      client_weighting: As there.
      model_distributor: As there.
      metrics_aggregator: As there.
      loop_implementation: As for `build_scored_client_work`.

    Returns:
      A `tff.learning.templates.LearningProcess`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range, or the optimizer has another momentum, or
        none where one is given. An optimizer that keeps a state but does not name its momentum
        among its hyperparameters cannot be checked.

    Example:
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> process = build_fed_nova(model, sgd)
      >>> isinstance(process, tff.learning.templates.LearningProcess)
      True
    """
    check_optimizer("client_optimizer_fn", client_optimizer_fn)
    factory = FedNovaFactory(momentum, sample_size=sample_size)
    client_work = build_scored_client_work(
        model_fn,
        client_optimizer_fn,
        layers="model",
        client_weighting=client_weighting,
        metrics_aggregator=metrics_aggregator,
        loop_implementation=loop_implementation,
    )
    _check_hparam(client_optimizer_fn, "momentum", momentum)
    return compose_fed_avg(
        model_fn, client_work, factory, server_optimizer_fn, model_distributor=model_distributor
    )


def compose_fed_avg(
    model_fn: Any,
    client_work: tff.learning.templates.ClientWorkProcess,
    model_aggregator: tff.aggregators.WeightedAggregationFactory | None = None,
    server_optimizer_fn: tff.learning.optimizers.Optimizer | None = None,
    *,
    model_distributor: tff.learning.templates.DistributionProcess | None = None,
) -> tff.learning.templates.LearningProcess:
    """Builds federated averaging around any client work and any weighted aggregator.

    What `tff.learning.algorithms.build_weighted_fed_avg` does, with the client work as an argument.

    Args:
      model_fn: The model that `client_work` trains: a function of nothing that makes a
        `tff.learning.models.VariableModel`, or a `tff.learning.models.FunctionalModel`.
      client_work: For example from `build_score_weighted_client_work`.
      model_aggregator: `tff.aggregators.MeanFactory()` if None. Its result must have the type of
        the trainable weights.
      server_optimizer_fn: The server's optimizer; SGD with learning rate 1 if None.
      model_distributor: As for `build_weighted_fed_avg`.

    Returns:
      A `tff.learning.templates.LearningProcess`.

    Raises:
      TypeError: If an argument is of the wrong kind or the parts do not fit each other.

    Example:
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> from aggregators import build_score_weighted_client_work, scores
      >>> work = tff.learning.templates.build_functional_model_delta_client_work(
      ...     model=model,
      ...     optimizer=sgd,
      ...     client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
      ... )
      >>> work = build_score_weighted_client_work(work, scores.l2_distance, softmax())
      >>> process = compose_fed_avg(model, work, tff.learning.robust_aggregator())
      >>> isinstance(process, tff.learning.templates.LearningProcess)
      True
    """
    check_model_fn(model_fn)
    if model_aggregator is None:
        model_aggregator = tff.aggregators.MeanFactory()
    if not isinstance(model_aggregator, tff.aggregators.WeightedAggregationFactory):
        raise TypeError(
            "`model_aggregator` must be a tff.aggregators.WeightedAggregationFactory; "
            f"found {model_aggregator!r}."
        )
    if server_optimizer_fn is None:
        server_optimizer_fn = tff.learning.optimizers.build_sgdm(1.0)
    check_optimizer("server_optimizer_fn", server_optimizer_fn)

    @tff.tensorflow.computation
    def initial_weights() -> Any:
        if isinstance(model_fn, tff.learning.models.FunctionalModel):
            parts = (tuple(tf.convert_to_tensor(w) for w in p) for p in model_fn.initial_weights)
            return tff.learning.models.ModelWeights(*parts)
        return tff.learning.models.ModelWeights.from_model(model_fn())

    weights_type = initial_weights.type_signature.result
    if model_distributor is None:
        model_distributor = tff.learning.templates.build_broadcast_process(weights_type)
    result_type = client_work.next.type_signature.result.result.member
    return tff.learning.templates.compose_learning_process(
        initial_weights,
        model_distributor,
        client_work,
        model_aggregator.create(result_type.update, result_type.update_weight),
        tff.learning.templates.build_apply_optimizer_finalizer(server_optimizer_fn, weights_type),
    )


def _check_hparam(optimizer: tff.learning.optimizers.Optimizer, name: str, value: float) -> None:
    """Raises `ValueError` if the optimizer is known to have another number of this name."""
    state = optimizer.initialize(tf.TensorSpec((), tf.float32))
    hparams = optimizer.get_hparams(state)
    if name in hparams:
        found = np.asarray(hparams[name])
    elif name == "momentum" and len(tf.nest.flatten(state)) == len(tf.nest.flatten(hparams)):
        found = np.asarray(0.0)  # it keeps nothing from step to step
    else:
        return
    if found.dtype.kind in "fiu" and not np.allclose(found, value, rtol=1e-5, atol=0.0):
        raise ValueError(
            f"`{name}` must be that of `client_optimizer_fn`; found {value!r}, and {found} in the "
            "optimizer. Give both the same."
        )
