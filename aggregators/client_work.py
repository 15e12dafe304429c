"""Client work that tells what a client's model is worth: as its weight, or beside its update."""

from collections import OrderedDict
from typing import Any, Literal

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.adaptive_mean import finite_tensors, tensor_specs, typical_state
from aggregators.layers import Layers, check_groups, resolve_layers
from aggregators.local_training import (
    Loop,
    LossAt,
    build_training,
    check_model_fn,
    check_optimizer,
)
from aggregators.measurements import (
    ClientStatistics,
    check_sample_size,
    measure,
    statistics_reduction,
)
from aggregators.one_pass import ScoredUpdate
from aggregators.reduction import federated_reduction, of_lifted
from aggregators.scores import Score, check_score, score_layers
from aggregators.weighting import (
    Weighting,
    all_finite,
    check_weighting,
    log_weights,
    relative_scale,
)

# exp(60) is 1e26: two clients may differ by 52 orders of magnitude, and no weight leaves float32.
_LARGEST_EXPONENT = 60.0

# Aggregators multiply updates by weights and add them up in float32, which ends at 3e38.
_LARGEST_WEIGHTED_UPDATE = 1e35


def build_score_weighted_client_work(
    client_work: tff.learning.templates.ClientWorkProcess,
    score: Score,
    weighting: Weighting,
    *,
    layers: Layers = "model",
    sample_size: int = 0,
) -> tff.learning.templates.ClientWorkProcess:
    """Makes every client weigh itself by how far its model moved.

    ```
    weight[k] = n[k] exp(clip(rule(d[k] / scale) - rule(typical / scale)))
    d[k] = mean over layers of score
    ```

    with `n` the weight that `client_work` gave (number of examples), or 1 where that is above 0 and
    `weighting` does not count examples, and `typical` the mean score of earlier rounds: a client
    with that score has weight `n` (nothing is subtracted while it is not known). What is sent is an
    update and one positive number, so any weighted TFF aggregator takes it from here: mean,
    clipping, zeroing, compression, and secure sum.

    Weights must fit in float32, so the exponent is clipped to [-60, 60]. Two clients beyond the
    same end weigh alike: with a temperature so low that many scores are more than 60 temperatures
    from the typical one, this is no longer the softmax that `AdaptiveMeanFactory` computes.

    Under a secure sum give `weighting` a `bound`: `tff.learning.secure_aggregator` clips weights
    above `2**20 - 1` and rounds all to steps of about `2**-12`, without a word. With a bound `b`
    weights lie from `n / sqrt(b)` to `n sqrt(b)`.

    An update that is not finite (of a norm above 2.6e19, too: see `AdaptiveMeanFactory`) is sent as
    zeros with weight 0, as is one without a finite score or weight, and one that would overflow
    once multiplied by its weight (1e35). TFF's own client work does the first by itself without a
    trace; a client of weight 0 that has data is counted as non-finite here. A client without data
    has weight 0 whatever `client_work` gave: it did not move, and would pass for the nearest of
    all.

    Args:
      client_work: Any client work whose update has the trainable weights' structure and is the
        initial weights minus the trained ones, and whose weight is one number.
      score: How far a layer is from the server's; one from `aggregators.scores` or your own.
      weighting: How scores become weights; from `aggregators.weighting`.
      layers: What is scored at a time: `"model"`, `"tensor"` or groups of positions. A client has
        one weight for all layers; for a weight per layer use `build_scored_client_work`.
      sample_size: How many clients the measurements list one by one.

    Returns:
      A `tff.learning.templates.ClientWorkProcess` with `client_work`'s hyperparameters. Its state
      is an `OrderedDict` of `client_work` (that process' state) and `typical_score` (float32 of
      shape `[1]`). `client_work`'s measurements get one more entry, `weighting`: see
      `aggregators.measurements.measure`.

    Raises:
      TypeError: If an argument is of the wrong kind or the client work does not fit.
      ValueError: If `layers` does not fit the model, or `sample_size` is out of its range.

    Example:
      >>> from aggregators import scores, weighting
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> plain = tff.learning.templates.build_functional_model_delta_client_work(
      ...     model=model,
      ...     optimizer=tff.learning.optimizers.build_sgdm(0.1),
      ...     client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
      ... )
      >>> work = build_score_weighted_client_work(plain, scores.kl_divergence, weighting.softmax())
      >>> list(work.initialize.type_signature.result.member._asdict())
      ['client_work', 'typical_score']
    """
    if not isinstance(client_work, tff.learning.templates.ClientWorkProcess):
        raise TypeError(
            "`client_work` must be a tff.learning.templates.ClientWorkProcess; "
            f"found {client_work!r}."
        )
    check_score(score)
    check_weighting(weighting)
    check_sample_size(sample_size)
    signature = client_work.next.type_signature
    state_type, weights_type, data_type = signature.parameter
    result_type = signature.result.result.member
    specs = tensor_specs(_trainable(weights_type.member))
    found = tensor_specs(result_type.update)
    if [(s.shape, s.dtype) for s in specs] != [(s.shape, s.dtype) for s in found]:
        raise TypeError(
            "`client_work` must send an update with the shapes and dtypes of the trainable "
            f"weights, {_trainable(weights_type.member)}; found {result_type.update}."
        )
    if not isinstance(result_type.update_weight, tff.types.TensorType) or (
        result_type.update_weight.shape
    ):
        raise TypeError(
            f"`client_work` must send one number as its weight; found {result_type.update_weight}."
        )
    groups = resolve_layers(layers, len(specs))
    reduction = statistics_reduction(1, sample_size)
    inner_type = state_type.member

    @tff.tensorflow.computation(inner_type)
    def initial_state(inner: Any) -> Any:
        return OrderedDict(client_work=inner, typical_score=tf.zeros([1]))

    outer_type = initial_state.type_signature.result

    @tff.tensorflow.computation(
        result_type, weights_type.member, data_type.member, outer_type.typical_score
    )
    @tf.function
    def weigh_client(result: Any, weights: Any, data: Any, typical: Any) -> Any:
        server = tf.nest.flatten(_trainable(weights))
        update = tf.nest.flatten(result.update)
        trained = [old - moved for old, moved in zip(server, update, strict=True)]
        by_layer = score_layers(score, server, trained, groups)
        mean = tf.reduce_mean(by_layer, keepdims=True)
        own = tf.cast(result.update_weight, tf.float64)
        bad = ~finite_tensors(update)
        largest = tf.reduce_max([tf.cast(_largest(tensor), tf.float64) for tensor in update])
        if (own <= 0.0) | (largest <= 0.0):
            # TFF sends a non-finite update as zeros with weight 0; only its data tells it from a
            # client that had none. The look is taken at clients that did not move only.
            has_data = _has_data(data)
            bad = bad | ((own <= 0.0) & has_data)
            own = tf.where(has_data, own, tf.zeros_like(own))
        logs, sound = log_weights(weighting, mean, own, typical)
        bad = bad | ~sound
        counted = (own > 0.0) & ~bad
        examples = own if weighting.times_examples else tf.ones_like(own)
        exponent = tf.where(counted, logs[0] - tf.math.log(tf.where(counted, examples, 1.0)), 0.0)
        exponent = tf.clip_by_value(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        new = tf.where(counted, examples * tf.exp(exponent), tf.zeros_like(own))
        bad = bad | (new * largest > _LARGEST_WEIGHTED_UPDATE)
        new = tf.where(bad, tf.zeros_like(new), new)
        update = [tf.where(bad, tf.zeros_like(tensor), tensor) for tensor in update]
        weighted = tff.learning.templates.ClientResult(
            update=tf.nest.pack_sequence_as(result.update, update),
            update_weight=tf.cast(new, tf.float32),
        )
        # The logarithms of the weights that are sent, clipped as those are.
        logs = tf.math.log(new)[tf.newaxis]
        return weighted, reduction.lift(ClientStatistics(mean, logs, bad))  # type: ignore[misc]

    inner_measured = signature.result.measurements.member

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_map(initial_state, client_work.initialize())

    @tff.federated_computation(tff.FederatedType(outer_type, tff.SERVER), weights_type, data_type)
    def next_fn(state: Any, weights: Any, data: Any) -> Any:
        output = client_work.next(state["client_work"], weights, data)
        typical = tff.federated_broadcast(state["typical_score"])
        weighted, parts = tff.federated_map(weigh_client, (output.result, weights, data, typical))
        totals = federated_reduction(parts, of_lifted(reduction))

        @tff.tensorflow.computation
        def on_server(state: Any, inner: Any, measured: Any, totals: Any) -> Any:
            old = state["typical_score"]
            seen = measure(totals, relative_scale(weighting, old))
            new = OrderedDict(client_work=inner, **typical_state(weighting, old, seen))
            return new, _with(measured, "weighting", seen, inner_measured)

        new_state, measured = tff.federated_map(
            on_server, (state, output.state, output.measurements, totals)
        )
        return tff.templates.MeasuredProcessOutput(new_state, weighted, measured)

    @tff.tensorflow.computation(outer_type)
    def get_hparams(state: Any) -> Any:
        return client_work.get_hparams(state["client_work"])

    @tff.tensorflow.computation(outer_type, client_work.get_hparams.type_signature.result)
    def set_hparams(state: Any, hparams: Any) -> Any:
        inner = client_work.set_hparams(state["client_work"], hparams)
        return OrderedDict(client_work=inner, typical_score=state["typical_score"])

    return tff.learning.templates.ClientWorkProcess(
        initialize, next_fn, get_hparams_fn=get_hparams, set_hparams_fn=set_hparams
    )


def build_scored_client_work(
    model_fn: Any,
    optimizer: tff.learning.optimizers.Optimizer,
    *,
    score: Score | Literal["loss"] | None = None,
    layers: Layers = "tensor",
    loss_at: LossAt = "training",
    client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
    metrics_aggregator: Any = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.ClientWorkProcess:
    """Trains as TFF's client work does, and sends scores, loss and steps with the update.

    Training, metrics and weights are those of
    `tff.learning.templates.build_model_delta_client_work` (or of its functional twin), number for
    number, but for one: a client without examples has weight 0 under uniform weighting too, since
    its score and its loss would be 0, the best of all. Scores are taken in the same computation,
    from the weights at hand.

    The update is a `ScoredUpdate`, for `AdaptiveMeanFactory` and the factories in
    `aggregators.loss_rules`. A client whose update, scores or loss are not finite sends zeros with
    weight 0, and says so in `non_finite`. An update counts as finite up to a norm of 2.6e19.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      optimizer: The client's optimizer.
      score: How far a layer is from the server's, one from `aggregators.scores` or your own;
        `"loss"` for the client's loss in all layers; None for zeros.
      layers: What is scored at a time: `"tensor"`, `"model"` or groups of positions.
      loss_at: `"training"`: mean over examples of the loss before each batch's own step: no second
        pass over the data. `"initial"`: the loss of the server's weights, as q-FedAvg defines it:
        one forward pass over the data before training, the model not in training mode.
      client_weighting: By number of examples, or uniform.
      metrics_aggregator: As for `tff.learning.algorithms.build_weighted_fed_avg`.
      loop_implementation: As there; but a loop over the dataset's iterator if not given. For a
        `dataset.reduce`, TensorFlow prepares the step anew for every client, which takes longer
        than the training of a small model.

    Returns:
      A `tff.learning.templates.ClientWorkProcess`. Its state is the optimizer's hyperparameters,
      for both kinds of model, and is what `get_hparams` gives; its measurements are `train`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If `layers` or `loss_at` is.

    Example:
      >>> from aggregators import scores
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> work = build_scored_client_work(
      ...     model, tff.learning.optimizers.build_sgdm(0.1), score=scores.l2_distance
      ... )
      >>> str(work.next.type_signature.result.result.member.update.scores)
      'float32[2]'
    """
    check_model_fn(model_fn)
    check_optimizer("optimizer", optimizer)
    if score is not None and score != "loss":
        check_score(score)
    if loss_at not in ("training", "initial"):
        raise ValueError(f'`loss_at` must be "training" or "initial"; found {loss_at!r}.')
    if not isinstance(client_weighting, tff.learning.ClientWeighting):
        raise TypeError(
            "`client_weighting` must be a member of tff.learning.ClientWeighting; "
            f"found {client_weighting!r}."
        )
    if not isinstance(loop_implementation, tff.learning.LoopImplementation):
        raise TypeError(
            "`loop_implementation` must be a member of tff.learning.LoopImplementation; "
            f"found {loop_implementation!r}."
        )
    check_groups(layers)
    if metrics_aggregator is None:
        metrics_aggregator = tff.learning.metrics.sum_then_finalize
    weights_type, data_type, aggregate_metrics = _model_types(model_fn, metrics_aggregator)
    groups = resolve_layers(layers, len(tensor_specs(weights_type.trainable)))
    hparams = optimizer.get_hparams(optimizer.initialize(tf.TensorSpec((), tf.float32)))

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_value(hparams, tff.SERVER)

    state_type = initialize.type_signature.result.member

    @tff.tensorflow.computation(state_type, weights_type, data_type)
    def work(state: Any, weights: Any, dataset: Any) -> Any:
        # The model is made here, in the graph that trains it.
        train = build_training(model_fn, optimizer, loss_at, loop_implementation)
        done = train(weights, dataset, state)
        if score is None:
            scores = tf.zeros([len(groups)])
        elif score == "loss":
            scores = tf.fill([len(groups)], done.loss)
        else:
            scores = score_layers(score, done.initial, done.trained, groups)
        delta = [old - new for old, new in zip(done.initial, done.trained, strict=True)]
        sound = finite_tensors(delta) & all_finite(scores) & tf.math.is_finite(done.loss)

        keep = {x.dtype: tf.cast(sound, x.dtype) for x in [scores, *delta]}

        def zeros_if_bad(tensor: tf.Tensor) -> tf.Tensor:
            # 0 times NaN is 0 here.
            return tf.math.multiply_no_nan(tensor, keep[tensor.dtype])

        if client_weighting is tff.learning.ClientWeighting.NUM_EXAMPLES:
            weight = tf.cast(done.examples, tf.float32)
        else:
            # Without examples there is neither score nor loss, and zeros look like the best.
            weight = tf.cast(done.examples > 0, tf.float32)
        update = ScoredUpdate(
            delta=tf.nest.pack_sequence_as(weights.trainable, [zeros_if_bad(x) for x in delta]),
            scores=zeros_if_bad(scores),
            loss=zeros_if_bad(done.loss),
            steps=done.steps,
            non_finite=~sound,
        )
        metrics = tf.nest.map_structure(
            lambda new, fresh: tf.where(sound, new, fresh), done.metrics, done.fresh_metrics
        )
        result = tff.learning.templates.ClientResult(
            update=update, update_weight=zeros_if_bad(weight)
        )
        return result, metrics

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def next_fn(state: Any, weights: Any, data: Any) -> Any:
        result, metrics = tff.federated_map(work, (tff.federated_broadcast(state), weights, data))
        measured = tff.federated_zip(OrderedDict(train=aggregate_metrics(metrics)))
        return tff.templates.MeasuredProcessOutput(state, result, measured)

    @tff.tensorflow.computation(state_type)
    def get_hparams(state: Any) -> Any:
        return state

    @tff.tensorflow.computation(state_type, state_type)
    def set_hparams(state: Any, new: Any) -> Any:
        del state  # it is nothing but the hyperparameters
        return new

    return tff.learning.templates.ClientWorkProcess(
        initialize, next_fn, get_hparams_fn=get_hparams, set_hparams_fn=set_hparams
    )


def _model_types(model_fn: Any, metrics_aggregator: Any) -> tuple[Any, Any, Any]:
    """Returns the types of weights and data, and the aggregation of metrics."""
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        model = model_fn
        weights = tff.learning.models.ModelWeights(
            *(
                tuple(tf.TensorSpec(w.shape, tf.as_dtype(w.dtype)) for w in part)
                for part in model.initial_weights
            )
        )
        weights_type = tff.types.tensorflow_to_type(weights)
        finalizers = model.finalize_metrics
    else:
        with tf.Graph().as_default():  # its variables must not outlive this look at it
            model = model_fn()
            if not isinstance(model, tff.learning.models.VariableModel):
                raise TypeError(
                    "`model_fn` must make a tff.learning.models.VariableModel; "
                    f"found {type(model)}."
                )
            finalizers = model.metric_finalizers()
            weights_type = tff.learning.models.weights_type_from_model(model)
    with tf.Graph().as_default():
        aggregate = metrics_aggregator(finalizers)
    data_type = tff.types.SequenceType(tff.types.tensorflow_to_type(model.input_spec))
    return weights_type, data_type, aggregate


def _trainable(weights: Any) -> Any:
    """The trainable part of model weights, of their type, or of anything else all of it."""
    if isinstance(weights, tff.types.StructWithPythonType):
        is_model = weights.python_container is tff.learning.models.ModelWeights
        return weights.trainable if is_model else weights
    if isinstance(weights, tff.learning.models.ModelWeights):
        return weights.trainable
    return weights


def _largest(tensor: tf.Tensor) -> tf.Tensor:
    """The largest absolute value; 0 of no elements."""
    if tensor.shape.num_elements() == 0:
        return tf.zeros([], tensor.dtype)
    return tf.reduce_max(tf.abs(tensor))


def _has_data(data: Any) -> tf.Tensor:
    """Whether the first of a client's datasets has an element."""
    dataset = tf.nest.flatten(data)[0]
    return dataset.take(1).reduce(False, lambda found, batch: True)


def _with(measured: Any, name: str, value: Any, measured_type: Any) -> Any:
    """Adds an entry to measurements; wraps them if they are not a dictionary."""
    if isinstance(measured_type, tff.types.StructWithPythonType) and issubclass(
        measured_type.python_container, dict
    ):
        return OrderedDict([*measured.items(), (name, value)])
    return OrderedDict([("client_work", measured), (name, value)])
