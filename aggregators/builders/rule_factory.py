"""A rule as a factory for TFF's own builders."""

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks
from aggregators.core.bound_rule import BoundRule
from aggregators.core.rule import Rule, check_rule
from aggregators.core.types import Part, State, Structure
from aggregators.core.update import ClientUpdate, client_update, is_measured_update


class RuleFactory(tff.aggregators.WeightedAggregationFactory):
    """A rule as a factory for TFF's builders.

    The created process has type `<S@SERVER, {V}@CLIENTS, {W}@CLIENTS> -> <S@SERVER, R@SERVER,
    M@SERVER>`. `W` is a number. For rules that need at most a score of the update alone, `V` is a
    structure of floating tensors, and `R` is `V`. For others, `V` is the `MeasuredUpdate` that
    `build_client_work(model_fn, optimizer, rule.needs)` sends, and `R` is the type of its `delta`.

    It takes one pass over clients, so it spreads over workers and sub-rounds. A secure sum cannot
    compute it, since weights are normalised while summing. Sensitivity: one client can move the mean as
    far as its weight allows. Updates are not clipped: wrap the factory in
    `tff.aggregators.clipping_factory` for that.

    A client of weight 0 does not count, nor does one whose update, weight or loss is not finite; the
    measurements say how many these were. If no client counts, the result is NaN and `unchanged` is 1.
    NaN makes TFF's finalizers keep model and optimizer, whereas zeros would be a step of momentum, Adam
    or weight decay. TFF's own client work sends a non-finite update as zeros with weight 0, so
    `build_weighted_fed_avg` shows such clients among `zero_weight_clients`.

    Example:
      >>> import numpy as np
      >>> from aggregators import rules, scores, weighting
      >>> rule = rules.adaptive_mean(scores.l2_distance, weighting.softmax())
      >>> update, weight = tff.to_type((np.float32, [3])), tff.to_type(np.float32)
      >>> process = RuleFactory(rule).create(update, weight)
      >>> list(process.initialize.type_signature.result.member._asdict())
      ['round', 'temperature', 'decay', 'typical_score']
    """

    def __init__(self, rule: Rule, *, sample_size: int = 0) -> None:
        """Makes the factory.

        Args:
          rule: The rule.
          sample_size: How many clients the measurements list one by one.

        Raises:
          TypeError: If `rule` is no `Rule`.
          ValueError: If `sample_size` is no whole number of at least 0.
        """
        check_rule(rule)
        self._rule = rule
        self._sample_size = checks.whole("sample_size", sample_size, 0)

    def create(
        self, value_type: tff.Type, weight_type: tff.Type
    ) -> tff.templates.AggregationProcess:
        """Builds the process for these types; see the class.

        Args:
          value_type: TFF type of an update or of a `MeasuredUpdate`.
          weight_type: TFF type of a number.

        Returns:
          A `tff.templates.AggregationProcess`.

        Raises:
          TypeError: If a type is not of this kind.
          ValueError: If a measurement that the rule needs is missing.
        """
        if not isinstance(weight_type, tff.types.TensorType) or weight_type.shape:
            raise TypeError(f"`weight_type` must be the type of one number; found {weight_type}.")
        measured = is_measured_update(value_type)
        delta_type = value_type.delta if measured else value_type
        bound = BoundRule(self._rule, delta_type, sample_size=self._sample_size)
        _check_needs(bound, value_type.measured if measured else None)
        needs = self._rule.needs

        @tff.tensorflow.computation(value_type, weight_type, bound.state_type)
        def on_client(value: Structure, weight: tf.Tensor, state: State) -> Part:
            if measured:
                update = ClientUpdate(
                    tuple(tf.nest.flatten(value.delta)),
                    tf.maximum(tf.cast(weight, tf.float64), 0.0),
                    value.non_finite,
                    **{field: value.measured[name] for field, name in needs.fields.items()},
                )
            else:
                delta = [tf.convert_to_tensor(tensor) for tensor in tf.nest.flatten(value)]
                scores = None
                if needs.score is not None:
                    scores = bound.scores(delta, [tf.zeros_like(tensor) for tensor in delta])
                update = client_update(delta, weight, scores=scores)
            return bound.client(update, state)

        @tff.federated_computation
        def initialize() -> tff.Value:
            return tff.federated_eval(bound.initial_state, tff.SERVER)

        @tff.federated_computation(
            tff.FederatedType(bound.state_type, tff.SERVER),
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        def next_fn(state: tff.Value, value: tff.Value, weight: tff.Value) -> tff.Value:
            parts = tff.federated_map(on_client, (value, weight, tff.federated_broadcast(state)))
            new_state, result, measured = bound.federated_server(state, parts)
            return tff.templates.MeasuredProcessOutput(new_state, result, measured)

        return tff.templates.AggregationProcess(initialize, next_fn)


def _check_needs(bound: BoundRule, measured: tff.Type | None) -> None:
    """Raises `ValueError` unless the update brings what the rule needs, or is enough to compute it."""
    needs = bound.rule.needs
    if measured is None:
        more = [name for name in needs.names if needs.score is None or name != needs.score.name]
        if needs.score is not None and needs.score.needs == "model":
            more.append(f"{needs.score.name} (which needs the server's model)")
        if more:
            raise ValueError(
                f"`rule` must need the update alone where clients send nothing else; found that it "
                f"needs {', '.join(more)}. Build the process with `build_fed_avg(..., rule=rule)`, or "
                "give it updates of `build_client_work(model_fn, optimizer, rule.needs)`. If your "
                'own score depends on the difference alone, give `Score(f, needs="update")`.'
            )
        return
    types = measured._asdict()
    missing = [name for name in needs.names if name not in types]
    if missing:
        raise ValueError(
            f"`value_type` must hold what the rule needs, {', '.join(needs.names)}; found "
            f"{', '.join(types) or 'nothing'}. Build the client work with "
            "`build_client_work(model_fn, optimizer, rule.needs)`."
        )
    lengths = {}
    if needs.score is not None:
        lengths[needs.score.name] = len(bound.layers.names)
    if needs.candidates is not None:
        lengths["candidate_errors"] = needs.candidates.number
    for name, length in lengths.items():
        if tuple(types[name].shape) != (length,):
            raise ValueError(
                f"`value_type` must hold {length} numbers in `{name}`, one for each layer or candidate; "
                f"found shape {types[name].shape}. Use the rule's `needs` for the client work."
            )
