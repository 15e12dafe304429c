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

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks, hyperparameters
from aggregators.core.candidates import Candidates
from aggregators.core.client_memory import ClientMemory
from aggregators.core.hyperparameters import Hparam
from aggregators.core.layers import Layers, ModelLayers, check_layers, layers_of_type
from aggregators.core.reduction import Reduction, federated_reduce
from aggregators.core.update import ClientUpdate
from aggregators.scores import Score, as_score, score_layers
from aggregators.weighted_mean.statistics import PerLayer

LossAt = Literal["training", "initial"]

State = Mapping[str, Any]
Part = Any
Reduced = Any


def _optional_score(value: Any) -> Score | None:
    return None if value is None else as_score(value)


@attrs.frozen
class Needs:
    """What clients measure for a rule, besides their updates.

    Attributes:
      score: How far each layer moved, found under the score's name; None if not needed.
      layers: What is scored, and weighed, at a time; see `aggregators.core.layers.resolve_layers`.
      loss: `"training"`: mean over examples of the loss before each batch's own step, found under
        `training_loss`. `"initial"`: the loss of the weights that training starts from, one forward
        pass over the data more, found under `initial_loss`.
      steps: Whether the number of optimizer steps is needed, found under `steps`.
      candidates: Models that clients score on their data, one forward pass for each, found under
        `candidate_errors`, float32 of shape `[number]`, and `errors_are_losses`, a bool: whether the
        client fell back to the loss. None if there are none. They are made of the rule's state, so
        only `build_fed_avg` has them.
      memory: What clients keep from round to round, and do with it in training; what they then send is
        found under `sent`. Only `build_fed_avg` has clients that keep something.

    Example:
      >>> from aggregators import scores
      >>> Needs(score=scores.kl_divergence, loss="training").names
      ('kl_divergence', 'training_loss')
    """

    score: Score | None = attrs.field(default=None, converter=_optional_score)
    layers: Layers = attrs.field(
        default="tensor", validator=checks.validated(lambda name, value: check_layers(value))
    )
    loss: LossAt | None = attrs.field(
        default=None, validator=checks.validated(checks.word, "training", "initial", optional=True)
    )
    steps: bool = attrs.field(default=False, validator=checks.validated(checks.flag))
    candidates: Candidates | None = attrs.field(
        default=None, validator=checks.validated(checks.instance, Candidates, optional=True)
    )
    memory: ClientMemory | None = attrs.field(
        default=None, validator=checks.validated(checks.instance, ClientMemory, optional=True)
    )

    def __attrs_post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                "`score` must have a name that nothing else measured has; found "
                f"{self.score.name!r}. Give it another: `Score(f, name=...)`."  # type: ignore[union-attr]
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names in `ClientUpdate.measured`."""
        score = (self.score.name,) if self.score else ()
        loss = (f"{self.loss}_loss",) if self.loss else ()
        steps = ("steps",) if self.steps else ()
        candidates = ("candidate_errors", "errors_are_losses") if self.candidates else ()
        return score + loss + steps + candidates + (("sent",) if self.memory else ())


class RuleResult(NamedTuple):
    """What a rule's server part returns.

    Attributes:
      state: The rule's own state, of the names and types of `initial_state`.
      update: The tensors of the update, flat.
      measurements: An `OrderedDict` of tensors; see `PerLayer` for those of shape `[num_layers]`. An
        `unchanged` (int32) of 1 tells that the model is to be left alone, whatever the update is.

    Example:
      >>> RuleResult(OrderedDict(), [tf.zeros([2])], OrderedDict(share=tf.constant(0.5))).state
      OrderedDict()
    """

    state: State
    update: Sequence[tf.Tensor]
    measurements: OrderedDict[str, Any]


def _no_state(layers: ModelLayers) -> OrderedDict[str, Any]:
    del layers  # a rule that keeps nothing does not look at them
    return OrderedDict()


def _check_hparams(argument: str, value: Any) -> None:
    items = value.items() if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(n, str) and isinstance(x, Hparam) for n, x in items) or "round" in value:
        raise TypeError(
            f"`{argument}` must map names other than round to numbers made by "
            f"`hyperparameters.hparam(name, value, least, most)`; found {value!r}."
        )


@attrs.frozen
class Rule:
    """An aggregation rule: pure functions of TensorFlow operations.

    The state that they see, `S`, is a mapping: `round` (int32, rounds done), the rule's hyperparameters
    by name (float64), and what `initial_state` names.

    Attributes:
      client: `(update, weight, state) -> part`, on each client. `update` is a `ClientUpdate`, its
        delta flat; `weight` a float64 scalar, 0 if the client must not count.
      reduction: `layers -> Reduction` of the parts; its `lift` runs on the clients too.
      server: `(state, reduced) -> RuleResult`.
      needs: What clients measure.
      initial_state: `layers -> OrderedDict` of the rule's own state.
      hparams: The rule's numbers, by name; see `hyperparameters.hparam`.
      is_mean: Whether the update is a mean of the deltas, with weights that sum to 1 and do not look
        at them: then `federated_rule` averages models as they are, a pass over memory less.

    Example:
      >>> from aggregators import RuleFactory, weighted_mean
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

    client: Callable[[ClientUpdate, tf.Tensor, State], Part] = attrs.field(
        validator=checks.validated(checks.function, "(update, weight, state)")
    )
    reduction: Callable[[ModelLayers], Reduction] = attrs.field(
        validator=checks.validated(checks.function, "(layers)")
    )
    server: Callable[[State, Reduced], RuleResult] = attrs.field(
        validator=checks.validated(checks.function, "(state, reduced)")
    )
    needs: Needs = attrs.field(default=Needs(), validator=checks.validated(checks.instance, Needs))
    initial_state: Callable[[ModelLayers], OrderedDict[str, Any]] = attrs.field(
        default=_no_state, validator=checks.validated(checks.function, "(layers)")
    )
    hparams: Mapping[str, Hparam] = attrs.field(
        factory=OrderedDict, validator=checks.validated(_check_hparams)
    )
    is_mean: bool = attrs.field(default=False, validator=checks.validated(checks.flag))


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
        if not isinstance(self.reduction, Reduction):
            raise TypeError(f"`reduction` must return a `Reduction`; found {self.reduction!r}.")
        self.initial_state = tff.tensorflow.computation(lambda: self._initial_state())
        self.state_type = self.initial_state.type_signature.result

    def _initial_state(self) -> OrderedDict[str, Any]:
        start = tf.constant(0)
        numbers = OrderedDict(round=start, **hyperparameters.values(self.rule.hparams, start))
        return checks.joined("initial_state", numbers, self.rule.initial_state(self.layers))

    def measured_scores(self, server: Any, client: Any) -> tf.Tensor:
        """The scores that the rule needs, of a model that a client trained."""
        return score_layers(self.rule.needs.score, server, client, self.layers.groups)  # type: ignore[arg-type]

    def client(self, update: ClientUpdate, weight: tf.Tensor, state: State) -> Any:
        """One client's part, lifted to an accumulator."""
        part = self.rule.client(update, weight, state)
        return self.reduction.lift(part)

    def server(self, state: State, reduced: Any) -> tuple[Any, Any, Any]:
        """The new state, the flat update, and the named measurements."""
        state = hyperparameters.check_schedules(self.rule.hparams, state)
        own, update, measured = self.rule.server(state, reduced)
        following = state["round"] + 1
        numbers = hyperparameters.values(self.rule.hparams, following)
        numbers.update(hyperparameters.read(self.rule.hparams, state))
        names = list(self.state_type._asdict())
        wanted = names[1 + len(numbers) :]
        if set(own) != set(wanted):
            raise ValueError(
                f"`server` must return the state that `initial_state` names, {wanted}; found "
                f"{list(own)}."
            )
        new = OrderedDict(round=following, **numbers, **{name: own[name] for name in wanted})
        named = OrderedDict(
            (name, self.layers.named(found.numbers) if isinstance(found, PerLayer) else found)
            for name, found in measured.items()
        )
        return new, list(update), named

    def federated_server(
        self, state: Any, parts: Any, model: Any = None, finish: "Finish | None" = None
    ) -> Any:
        """Reduces and ends a round: `<S@SERVER, {A}@CLIENTS> -> <S, R, M>@SERVER`.

        Args:
          state: The rule's state.
          parts: The clients' lifted parts.
          model: The server's model, if `finish` needs it.
          finish: `(flat update, unchanged, flat model) -> flat result`; the update, or NaN if the
            model is to be left alone, if None: TFF's finalizers take NaN for a rejected round, and
            zeros for a step of momentum, Adam or weight decay.

        Returns:
          The new state, the result in its structure, and the measurements.
        """
        reduced = federated_reduce(parts, self.reduction.of_lifted)
        inputs = [state, reduced, *([] if model is None else [model])]

        def on_server(inputs: Any) -> Any:
            new, update, measured = self.server(inputs[0], inputs[1])
            flat_model = None if model is None else tf.nest.flatten(inputs[2])
            unchanged = tf.cast(measured.get("unchanged", 0), tf.bool)
            result = (finish or _nan_if_unchanged)(update, unchanged, flat_model)
            return new, self.layers.pack(result), measured

        types = tff.to_type([value.type_signature.member for value in inputs])
        return tff.federated_map(
            tff.tensorflow.computation(on_server, types), tff.federated_zip(inputs)
        )


Finish = Callable[[list[tf.Tensor], tf.Tensor, list[tf.Tensor] | None], list[tf.Tensor]]


def _nan_if_unchanged(
    update: list[tf.Tensor], unchanged: tf.Tensor, model: list[tf.Tensor] | None
) -> list[tf.Tensor]:
    del model  # an update stands for itself
    nothing = tf.where(unchanged, math.nan, 0.0)
    return [x + tf.cast(nothing, x.dtype) for x in update]
