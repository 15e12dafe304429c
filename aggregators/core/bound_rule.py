"""A rule for updates of one type, as factories, federated computations and processes call it."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks, hyperparameters
from aggregators.core.layers import layers_of_type
from aggregators.core.reduction import Reduction, federated_reduce
from aggregators.core.rule import PerLayer, Rule, RuleResult, call, check_rule
from aggregators.core.score import score_layers
from aggregators.core.types import (
    Measurements,
    Part,
    Reduced,
    Specs,
    State,
    Structure,
    Tensors,
    Weights,
)
from aggregators.core.update import ClientUpdate

Finish: TypeAlias = Callable[[Tensors, tf.Tensor, Weights | None], Tensors]

_T = TypeVar("_T")


class BoundRule:
    """A rule, and its parts that depend on the type of the updates."""

    def __init__(
        self,
        rule: Rule,
        update_type: tff.Type,
        names: Sequence[str] | None = None,
        sample_size: int = 0,
    ) -> None:
        """Builds the layers, the reduction and the initial state.

        Args:
          rule: The rule.
          update_type: TFF type of an update.
          names: The tensors' names; their paths in the type if None.
          sample_size: How many clients the measurements list one by one.
        """
        check_rule(rule)
        self.rule = rule
        layers = layers_of_type(rule.needs.layers, update_type, names)
        sample_size = checks.whole("sample_size", sample_size, 0)
        self.layers = attrs.evolve(layers, sample_size=sample_size)
        self.reduction = rule.reduction(self.layers)
        checks.returned("reduction", self.reduction, Reduction)
        self.initial_state = tff.tensorflow.computation(lambda: self._initial_state())
        self.state_type = self.initial_state.type_signature.result

    def _initial_state(self) -> OrderedDict[str, Structure]:
        start = tf.constant(0)
        first = OrderedDict(round=start, **hyperparameters.values(self.rule.hparams, start))
        return checks.joined("initial_state", first, self.rule.initial_state(self.layers))

    def scores(self, server: Structure, client: Structure) -> tf.Tensor:
        """The rule's scores of a model that a client trained."""
        return score_layers(self.rule.needs.score, server, client, self.layers.groups)  # type: ignore[arg-type]

    def client(self, update: ClientUpdate, state: State) -> Part:
        """One client's part, lifted to an accumulator."""
        part = self._call("client", self.rule.client, update, state)
        return self._call("lift", self.reduction.lift, part)

    def server(self, state: State, reduced: Reduced) -> RuleResult:
        """The checked result of the rule: its whole state, a flat update and named measurements."""
        state = hyperparameters.check_schedules(self.rule.hparams, state)
        found = self._call("server", self.rule.server, state, reduced)
        checks.returned("server", found, RuleResult)
        following = state["round"] + 1
        hparams = hyperparameters.values(self.rule.hparams, following)
        hparams.update(hyperparameters.read(self.rule.hparams, state))
        new = OrderedDict(round=following, **hparams, **self._own_state(found.state, len(hparams)))
        unchanged = tf.cast(found.unchanged, tf.bool)
        shown = checks.joined(
            "server", found.measurements, OrderedDict(unchanged=tf.cast(unchanged, tf.int32))
        )
        if self.layers.sample_size and "sample_clients" not in shown:
            raise ValueError(
                f"`sample_size` must be 0 for {self.rule}, which lists no clients; found "
                f"{self.layers.sample_size}."
            )
        named = OrderedDict(
            (name, self.layers.named(x.values) if isinstance(x, PerLayer) else x)
            for name, x in shown.items()
        )
        update = list(found.update)
        _check_tensors("update", update, self.layers.specs)
        return RuleResult(new, update, named, unchanged)

    def _call(self, argument: str, function: Callable[..., _T], *given: Structure) -> _T:
        return call(f"`{argument}` of {self.rule}", function, *given)

    def _own_state(self, own: State, num_hparams: int) -> OrderedDict[str, Structure]:
        """The rule's own part of its new state, checked to have the initial one's names and types."""
        kinds = OrderedDict(list(self.state_type._asdict().items())[1 + num_hparams :])
        if set(own) != set(kinds):
            raise ValueError(
                f"`server` must return a state with the names of `initial_state`, {list(kinds)}; found "
                f"{list(own)}."
            )
        for name, kind in kinds.items():
            specs = tf.nest.flatten(tff.types.type_to_tf_tensor_specs(kind))
            _check_tensors(f"state {name}", tf.nest.flatten(own[name]), specs)
        return OrderedDict((name, own[name]) for name in kinds)

    def federated_server(
        self,
        state: tff.Value,
        parts: tff.Value,
        model: tff.Value | None = None,
        finish: Finish | None = None,
    ) -> tff.Value:
        """Reduces the parts and ends the round: `<S@SERVER, {A}@CLIENTS> -> <S, R, M>@SERVER`.

        Args:
          state: The rule's state.
          parts: The clients' lifted parts.
          model: The server's model, if `finish` needs it.
          finish: `(flat update, unchanged, flat model) -> flat result`. None gives the update, or NaN
            if the model is to stay unchanged: TFF's finalizers reject a round of NaN, but take a step
            of momentum, Adam or weight decay with zeros.

        Returns:
          The new state, the structured result, and the measurements.
        """
        reduced = federated_reduce(parts, self.reduction.of_lifted)
        inputs = [state, reduced, *([] if model is None else [model])]

        def on_server(inputs: Structure) -> tuple[State, Structure, Measurements]:
            found = self.server(inputs[0], inputs[1])
            flat_model = None if model is None else tf.nest.flatten(inputs[2])
            result = (finish or _nan_if_unchanged)(found.update, found.unchanged, flat_model)
            return found.state, self.layers.pack(result), found.measurements

        types = tff.to_type([value.type_signature.member for value in inputs])
        return tff.federated_map(
            tff.tensorflow.computation(on_server, types), tff.federated_zip(inputs)
        )


def _check_tensors(what: str, given: Tensors, specs: Specs) -> None:
    tensors = list(map(tf.convert_to_tensor, given))
    fits = len(tensors) == len(specs) and all(
        x.dtype == spec.dtype and spec.shape.is_compatible_with(x.shape)
        for x, spec in zip(tensors, specs, strict=True)
    )
    if not fits:
        expected, found = (
            ", ".join(f"{x.dtype.name}{list(x.shape)}" for x in part)
            for part in (list(specs), tensors)
        )
        raise ValueError(f"`server` must return its {what} as {expected}; found {found or 'none'}.")


def _nan_if_unchanged(update: Tensors, unchanged: tf.Tensor, model: Weights | None) -> Tensors:
    del model  # the update is the result
    nothing = tf.where(unchanged, math.nan, 0.0)
    return [x + tf.cast(nothing, x.dtype) for x in update]
