"""A rule of aggregation as one value, and the doors it goes through.

```
clients:  measure what `rule.needs` says, train, measure  ->  update, weight
          part = rule.client(update, weight, state)
          rule.reduction, in one pass
server:   state, update, measurements = rule.server(state, reduced)
```

The same `Rule` is a factory for TFF's own builders (`RuleFactory`), a step of a round of your own
(`federated_rule`), and a whole process (`build_fed_avg`). All three go through `BoundRule`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import hyperparameters
from aggregators.hyperparameters import Hparam
from aggregators.layers import Layers, ModelLayers, check_layers, layers_of_type
from aggregators.measurements import PerLayer
from aggregators.reduction import Reduction, federated_reduce, of_lifted
from aggregators.scores import Score, as_score, score_layers
from aggregators.update import ClientUpdate, client_update, is_client_update

LossAt = Literal["training", "initial"]

State = Mapping[str, Any]
Part = Any
Reduced = Any


def _optional_score(value: Any) -> Score | None:
    return None if value is None else as_score(value)


def _check_layers(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute  # attrs passes them to every validator
    check_layers(value)


def _check_loss(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute
    if value not in (None, "training", "initial"):
        raise ValueError(f'`loss_at` must be "training" or "initial"; found {value!r}.')


@attrs.frozen
class Needs:
    """What clients measure for a rule, besides their updates.

    Attributes:
      score: How far each layer moved, found under the score's name; None if not needed.
      layers: What is scored, and weighed, at a time; see `aggregators.layers.resolve_layers`.
      loss: `"training"`: mean over examples of the loss before each batch's own step, found under
        `training_loss`. `"initial"`: the loss of the weights that training starts from, one forward
        pass over the data more, found under `initial_loss`.
      steps: Whether the number of optimizer steps is needed, found under `steps`.

    Example:
      >>> from aggregators import scores
      >>> Needs(score=scores.kl_divergence, loss="training").names
      ('kl_divergence', 'training_loss')
    """

    score: Score | None = attrs.field(default=None, converter=_optional_score)
    layers: Layers = attrs.field(default="tensor", validator=_check_layers)
    loss: LossAt | None = attrs.field(default=None, validator=_check_loss)
    steps: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names in `ClientUpdate.measured`."""
        score = (self.score.name,) if self.score else ()
        loss = (f"{self.loss}_loss",) if self.loss else ()
        return score + loss + (("steps",) if self.steps else ())


class RuleResult(NamedTuple):
    """What a rule's server part returns.

    Attributes:
      state: The rule's own state, of the names and types of `initial_state`.
      update: The tensors of the update, flat; NaN in all of them for "leave the model alone".
      measurements: An `OrderedDict` of tensors; see `PerLayer` for those of shape `[num_layers]`.
    """

    state: State
    update: Sequence[tf.Tensor]
    measurements: OrderedDict[str, Any]


def _no_state(layers: ModelLayers) -> OrderedDict[str, Any]:
    del layers  # a rule that keeps nothing does not look at them
    return OrderedDict()


def _check_hparams(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute
    if not all(isinstance(number, Hparam) for number in value.values()) or "round" in value:
        raise TypeError(
            "`hparams` must map names other than round to numbers made by "
            f"`hyperparameters.hparam(name, value, least, most)`; found {dict(value)!r}."
        )


@attrs.frozen
class Rule:
    """An aggregation rule: pure functions of TensorFlow operations.

    The state that they see, `S`, is a mapping: `round` (int32, rounds done), the rule's hyperparameters
    by name (float64), and what `initial_state` names.

    Attributes:
      client: `(update, weight, state) -> part`, on each client. `update` is a `ClientUpdate`, its
        delta flat; `weight` a float64 scalar, 0 if the client must not count.
      reduction: `layers -> Reduction` of the parts; with a `lift`, which runs on the clients too, and
        a `merge`, which joins workers and sub-rounds.
      server: `(state, reduced) -> RuleResult`.
      needs: What clients measure.
      initial_state: `layers -> OrderedDict` of the rule's own state.
      hparams: The rule's numbers, by name; see `hyperparameters.hparam`.

    Example:
      >>> from aggregators import weighted_mean
      >>> def by_step(update, weight, state):
      ...     steps = tf.cast(update.measured["steps"], tf.float64)
      ...     return weighted_mean.weigh(update, tf.math.log(weight * steps)[tf.newaxis])
      >>> rule = Rule(
      ...     by_step,
      ...     lambda layers: weighted_mean.reduction(layers),
      ...     lambda state, reduced: RuleResult(OrderedDict(), *weighted_mean.report(reduced)),
      ...     needs=Needs(steps=True, layers="model"),
      ... )
      >>> isinstance(RuleFactory(rule), tff.aggregators.WeightedAggregationFactory)
      True
    """

    client: Callable[[ClientUpdate, tf.Tensor, State], Part]
    reduction: Callable[[ModelLayers], Reduction]
    server: Callable[[State, Reduced], RuleResult]
    needs: Needs = Needs()
    initial_state: Callable[[ModelLayers], OrderedDict[str, Any]] = _no_state
    hparams: Mapping[str, Hparam] = attrs.field(factory=OrderedDict, validator=_check_hparams)


def check_rule(rule: Any) -> None:
    """Raises `TypeError` for anything that is not a `Rule`."""
    if not isinstance(rule, Rule):
        raise TypeError(
            f"`rule` must be a `Rule`; found {rule!r}. Call a function of `aggregators.rules`, such "
            "as `rules.adaptive_mean(score, weighting)`."
        )


class BoundRule:
    """A rule for updates of one type: what every door calls."""

    def __init__(self, rule: Rule, update_type: Any, names: Sequence[str] | None = None) -> None:
        """Builds what depends on the type; see `Rule` for the parts."""
        check_rule(rule)
        self.rule = rule
        self.layers = layers_of_type(rule.needs.layers, update_type, names)
        self.reduction = rule.reduction(self.layers)
        self.initial_state = tff.tensorflow.computation(lambda: self._initial_state())
        self.state_type = self.initial_state.type_signature.result

    def _initial_state(self) -> OrderedDict[str, Any]:
        start = tf.constant(0)
        numbers = hyperparameters.values(self.rule.hparams, start)
        return OrderedDict(round=start, **numbers, **self.rule.initial_state(self.layers))

    def measured_scores(self, server: Any, client: Any) -> tf.Tensor:
        """The scores that the rule needs, of a model that a client trained."""
        return score_layers(self.rule.needs.score, server, client, self.layers.groups)  # type: ignore[arg-type]

    def client(self, update: ClientUpdate, weight: tf.Tensor, state: State) -> Any:
        """One client's part, lifted to an accumulator."""
        part = self.rule.client(update, weight, state)
        return self.reduction.lift(part)  # type: ignore[misc]

    def reduce(self, parts: Any) -> Any:
        """Reduces the clients' lifted parts: `{A}@CLIENTS -> R@SERVER`."""
        return federated_reduce(parts, of_lifted(self.reduction))

    def server(self, state: State, reduced: Any) -> tuple[Any, Any, Any]:
        """The new state, the update in its structure, and the named measurements."""
        own, update, measured = self.rule.server(state, reduced)
        following = state["round"] + 1
        numbers = hyperparameters.values(self.rule.hparams, following)
        numbers.update(hyperparameters.read(self.rule.hparams, state))
        new = OrderedDict(round=following, **numbers, **own)
        if list(new) != list(self.state_type._asdict()):
            raise ValueError(
                f"`server` must return the state that `initial_state` names; found {list(own)}."
            )
        named = OrderedDict(
            (name, self.layers.named(found.numbers) if isinstance(found, PerLayer) else found)
            for name, found in measured.items()
        )
        return new, self.layers.pack(update), named

    def federated_server(self, state: Any, parts: Any) -> Any:
        """`<S@SERVER, {A}@CLIENTS> -> <S, update, measurements>@SERVER`: reduces and ends a round."""
        reduced = self.reduce(parts)
        on_server = tff.tensorflow.computation(
            self.server, [self.state_type, reduced.type_signature.member]
        )
        return tff.federated_map(on_server, (state, reduced))


class RuleFactory(tff.aggregators.WeightedAggregationFactory):
    """A rule as a factory for TFF's builders.

    The created process has type `<S@SERVER, {V}@CLIENTS, {W}@CLIENTS> -> <S@SERVER, R@SERVER,
    M@SERVER>`: `W` is a number; `V` either a structure of floating tensors (`R` is `V`), for rules
    that need no more than a score of the update alone, or a `ClientUpdate` with what the rule needs,
    as `build_client_work(model_fn, optimizer, rule.needs)` sends it (`R` is the type of its `delta`).

    One pass over clients, so it spreads over workers and sub-rounds. Not for a secure sum, since
    weights are normalised while summing. Sensitivity: one client can move the mean as far as its weight
    allows; its update is not clipped: wrap the factory in `tff.aggregators.clipping_factory` for that.

    A client with an update, weight or loss that is not finite counts for nothing and is counted in
    the measurements; one of weight 0 counts for nothing. If no client counts, the result is NaN and
    `unchanged` is 1: that is how TFF's finalizers are told to leave model and optimizer as they were
    (zeros would still be a step of momentum, Adam or weight decay). TFF's own client work sends a
    non-finite update as zeros with weight 0, so in `build_weighted_fed_avg` such clients are seen as
    `zero_weight_clients` only.

    Example:
      >>> import numpy as np
      >>> from aggregators import rules, scores, weighting
      >>> rule = rules.adaptive_mean(scores.l2_distance, weighting.softmax())
      >>> update, weight = tff.to_type((np.float32, [3])), tff.to_type(np.float32)
      >>> process = RuleFactory(rule).create(update, weight)
      >>> list(process.initialize.type_signature.result.member._asdict())
      ['round', 'temperature', 'memory', 'typical_score']
    """

    def __init__(self, rule: Rule) -> None:
        """Keeps the rule.

        Args:
          rule: The rule.

        Raises:
          TypeError: If it is none.
        """
        check_rule(rule)
        self._rule = rule

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Builds the process for these types; see the class.

        Args:
          value_type: TFF type of an update or of a `ClientUpdate`.
          weight_type: TFF type of a number.

        Returns:
          A `tff.templates.AggregationProcess`.

        Raises:
          TypeError: If a type is not of this kind.
          ValueError: If what the rule needs is not there.
        """
        if not isinstance(weight_type, tff.types.TensorType) or weight_type.shape:
            raise TypeError(f"`weight_type` must be the type of one number; found {weight_type}.")
        measured = is_client_update(value_type)
        bound = BoundRule(self._rule, value_type.delta if measured else value_type)
        _check_needs(bound, value_type.measured if measured else None)
        score = self._rule.needs.score

        @tff.tensorflow.computation(value_type, weight_type, bound.state_type)
        def on_client(value: Any, weight: Any, state: Any) -> Any:
            if measured:
                update = value._replace(delta=tuple(tf.nest.flatten(value.delta)))
                weight = tf.maximum(tf.cast(weight, tf.float64), 0.0)
            else:
                tensors = [tf.convert_to_tensor(tensor) for tensor in tf.nest.flatten(value)]
                found = OrderedDict()
                if score is not None:
                    zeros = [tf.zeros_like(tensor) for tensor in tensors]
                    found[score.name] = bound.measured_scores(tensors, zeros)
                update, weight = client_update(tensors, weight, found)
            return bound.client(update, weight, state)

        @tff.federated_computation
        def initialize() -> Any:
            return tff.federated_eval(bound.initial_state, tff.SERVER)

        @tff.federated_computation(
            tff.FederatedType(bound.state_type, tff.SERVER),
            tff.FederatedType(value_type, tff.CLIENTS),
            tff.FederatedType(weight_type, tff.CLIENTS),
        )
        def next_fn(state: Any, value: Any, weight: Any) -> Any:
            parts = tff.federated_map(on_client, (value, weight, tff.federated_broadcast(state)))
            new_state, result, measured = bound.federated_server(state, parts)
            return tff.templates.MeasuredProcessOutput(new_state, result, measured)

        return tff.templates.AggregationProcess(initialize, next_fn)


def _check_needs(bound: BoundRule, measured: Any) -> None:
    """Raises `ValueError` unless what the rule needs comes with the update, or can be had from it."""
    needs = bound.rule.needs
    if measured is None:
        more = [name for name in needs.names if needs.score is None or name != needs.score.name]
        if needs.score is not None and needs.score.needs == "model":
            more.append(f"{needs.score.name} (which needs the server's model)")
        if more:
            raise ValueError(
                f"`rule` must need the update alone where clients send nothing else; found that it "
                f"needs {', '.join(more)}. Build the process with `build_fed_avg(..., rule=rule)`, or "
                "give it updates of `build_client_work(model_fn, optimizer, rule.needs)`. A score of "
                'your own that looks at the difference only says so: `Score(f, needs="update")`.'
            )
        return
    types = measured._asdict()
    missing = [name for name in needs.names if name not in types]
    if missing:
        raise ValueError(
            f"`rule` needs {', '.join(missing)}, but the updates come with {', '.join(types) or None}"
            ". Build the client work with `build_client_work(model_fn, optimizer, rule.needs)`."
        )
    if needs.score is not None:
        found = tuple(types[needs.score.name].shape)
        if found != (len(bound.layers.names),):
            raise ValueError(
                f"`rule` has {len(bound.layers.names)} layers, but the updates hold scores of shape "
                f"{found}. Use the rule's `needs` for the client work."
            )


class FederatedRule(NamedTuple):
    """What `federated_rule` returns, all at the server.

    Attributes:
      result: The new model, or the update, as `value_is` says.
      state: The rule's state for the next round.
      measurements: The rule's measurements.
    """

    result: Any
    state: Any
    measurements: Any


def rule_state(rule: Rule, value_type: Any) -> tff.Computation:
    """The state that a rule starts from, for a round of your own.

    Args:
      rule: The rule.
      value_type: TFF type of the model, or of the update.

    Returns:
      A computation of no arguments: call it, or hand it to `tff.federated_eval`.

    Example:
      >>> import numpy as np
      >>> from aggregators import rules
      >>> list(rule_state(rules.q_fed_avg(0.5, 0.1), tff.to_type((np.float32, [3])))())
      ['round', 'q', 'learning_rate']
    """
    return BoundRule(rule, value_type).initial_state


def federated_rule(
    rule: Rule,
    value: Any,
    state: Any,
    *,
    server_model: Any = None,
    weight: Any = None,
    scores: Any = None,
    loss: Any = None,
    steps: Any = None,
    value_is: Literal["model", "delta"] = "model",
) -> FederatedRule:
    """Runs a rule inside a `tff.federated_computation`, where `tff.federated_mean` would stand.

    To run on several workers or in sub-rounds, the last argument of your computation must be placed
    at clients: where it is not, TFF 0.87 hands the first clients to every piece, in silence. If no
    client counts, the result is the server's model, or zeros for deltas, and `unchanged` is 1.

    Args:
      rule: The rule.
      value: Structure of floating tensors at `tff.CLIENTS`: trained models or deltas.
      state: The rule's state at `tff.SERVER`: of `rule_state`, then the one returned before.
      server_model: The model that clients started from, same type, at `tff.SERVER`. Needed for
        `value_is="model"` and for scores that look at it.
      weight: A number per client at `tff.CLIENTS` (number of examples); None for 1 each.
      scores: Scores that clients computed themselves (validation loss, accuracy, ...), which then
        stand in place of the rule's score: at `tff.CLIENTS`, a floating number, or one per layer.
      loss: The clients' losses at `tff.CLIENTS`, where the rule needs them.
      steps: The clients' steps at `tff.CLIENTS`, where the rule needs them.
      value_is: `"model"` for trained models; `"delta"` for the server's model minus the trained
        one, which is what TFF's client work sends.

    Returns:
      A `FederatedRule`.

    Raises:
      TypeError: If a value has the wrong placement or type.
      ValueError: If something that the rule needs is missing, or something is given that it does not.

    Example:
      >>> import numpy as np
      >>> from aggregators import rules, scores, weighting
      >>> rule = rules.adaptive_mean(scores.kl_divergence, weighting.softmax())
      >>> model = tff.to_type((np.float32, [3]))
      >>> start = rule_state(rule, model)
      >>> @tff.federated_computation(
      ...     tff.FederatedType(start.type_signature.result, tff.SERVER),
      ...     tff.FederatedType(model, tff.SERVER),
      ...     tff.FederatedType(model, tff.CLIENTS),
      ... )
      ... def average(state, server_model, trained):
      ...     return federated_rule(rule, trained, state, server_model=server_model)
      >>> str(average.type_signature.result.result)
      'float32[3]@SERVER'
    """
    check_rule(rule)
    if value_is not in ("model", "delta"):
        raise ValueError(f'`value_is` must be "model" or "delta"; found {value_is!r}.')
    needs = rule.needs
    value, value_type = placed(value, "value", tff.CLIENTS)
    bound = BoundRule(rule, value_type)
    state, found = placed(state, "state", tff.SERVER)
    if not bound.state_type.is_equivalent_to(found):
        raise TypeError(
            f"`state` must be that of the rule, {bound.state_type}; found {found}. Start from "
            "`rule_state(rule, value_type)`, and go on with the state that was returned."
        )
    scored_here = scores is None and needs.score is not None
    if server_model is None and (
        value_is == "model" or (scored_here and needs.score.needs == "model")  # type: ignore[union-attr]
    ):
        raise ValueError(
            "`server_model` is needed for models, and for scores that look at it; found None."
        )
    given = OrderedDict(value=value, state=tff.federated_broadcast(state))
    if server_model is not None:
        server_model, found = placed(server_model, "server_model", tff.SERVER)
        if not value_type.is_assignable_from(found):
            raise TypeError(
                f"`value` and `server_model` must have one type; found {value_type} at clients and "
                f"{found} at the server."
            )
        given["server"] = tff.federated_broadcast(server_model)
    if weight is not None:
        given["weight"] = placed(weight, "weight", tff.CLIENTS)[0]
    wanted = {"scores": needs.score is not None, "loss": needs.loss, "steps": needs.steps}
    for name, argument in (("scores", scores), ("loss", loss), ("steps", steps)):
        if argument is not None and not wanted[name]:
            raise ValueError(f"`{name}` must be None for a rule that does not look at it.")
        if argument is None and wanted[name] and name != "scores":
            raise ValueError(f"`{name}` is needed by this rule, at tff.CLIENTS; found None.")
        if argument is not None:
            given[name], found = placed(argument, name, tff.CLIENTS)
            shapes = [(), (len(bound.layers.names),)] if name == "scores" else [()]
            if not isinstance(found, tff.types.TensorType) or tuple(found.shape) not in shapes:
                raise TypeError(
                    f"`{name}` must be one number per client"
                    f"{', or one per layer' if name == 'scores' else ''}; found {found}."
                )

    @tff.tensorflow.computation
    def on_client(given: Any) -> Any:
        tensors = [tf.convert_to_tensor(tensor) for tensor in tf.nest.flatten(given["value"])]
        server = tf.nest.flatten(given["server"]) if "server" in given else None
        other = None
        if server is not None:
            other = [old - new for old, new in zip(server, tensors, strict=True)]
        delta: Any = other if value_is == "model" else tensors
        trained = tensors if value_is == "model" else other
        measured: OrderedDict[str, Any] = OrderedDict()
        if scored_here:
            if server is None:
                server, trained = delta, [tf.zeros_like(tensor) for tensor in tensors]
            measured[needs.score.name] = bound.measured_scores(server, trained)  # type: ignore[union-attr]
        elif scores is not None:
            by_layer = tf.ones([len(bound.layers.names)]) * tf.cast(given["scores"], tf.float32)
            measured[needs.score.name] = by_layer  # type: ignore[union-attr]
        if loss is not None:
            measured[f"{needs.loss}_loss"] = tf.cast(given["loss"], tf.float32)
        if steps is not None:
            measured["steps"] = tf.cast(given["steps"], tf.int32)
        update, weight = client_update(delta, given.get("weight", tf.constant(1.0)), measured)
        return bound.client(update, weight, given["state"])

    parts = tff.federated_map(on_client, tff.federated_zip(given))
    new_state, result, measured = bound.federated_server(state, parts)

    @tff.tensorflow.computation
    def on_server(update: Any, server: Any) -> Any:
        def change(new: Any, old: Any) -> Any:
            nothing = tf.reduce_all(tf.math.is_nan(new))
            kept = old if value_is == "model" else tf.zeros_like(new)
            return tf.where(nothing, kept, old - new if value_is == "model" else new)

        return tf.nest.map_structure(change, update, server)

    against = server_model if value_is == "model" else result
    return FederatedRule(tff.federated_map(on_server, (result, against)), new_state, measured)


def placed(value: Any, argument: str, placement: Any) -> tuple[Any, Any]:
    """The value as TFF's, and the type of a member; `TypeError` unless it is placed there."""
    value = tff.to_value(value, None)
    signature = value.type_signature
    if not isinstance(signature, tff.FederatedType) or signature.placement is not placement:
        raise TypeError(f"`{argument}` must be placed at tff.{placement.name}; found {signature}.")
    return value, signature.member
