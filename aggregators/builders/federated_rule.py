"""A rule inside your own federated computation."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, NamedTuple

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks
from aggregators.core.bound_rule import BoundRule
from aggregators.core.needs import check_no_process
from aggregators.core.rule import Rule, check_rule
from aggregators.core.types import Part, Structure, Tensors, Weights
from aggregators.core.update import client_update

# A mean of ones may exceed 1 by this much.
_ROUNDING = 1e-6


class FederatedRule(NamedTuple):
    """The values that `federated_rule` returns, all at the server.

    Attributes:
      result: The new model for `value_is="model"`, the update for `"delta"`.
      state: The rule's state for the next round.
      measurements: The rule's measurements.

    Example:
      >>> model, state, shown = FederatedRule("model", "state", "measurements")  # it unpacks
      >>> shown
      'measurements'
    """

    result: tff.Value
    state: tff.Value
    measurements: tff.Value


def rule_state(rule: Rule, value_type: tff.Type) -> tff.Computation:
    """The initial state of a rule, for `federated_rule`.

    Args:
      rule: The rule.
      value_type: TFF type of the model, or of the update.

    Returns:
      A computation of no arguments: call it, or pass it to `tff.federated_eval`.

    Example:
      >>> import numpy as np
      >>> from aggregators import rules
      >>> list(rule_state(rules.q_fed_avg(0.5, 0.1), tff.to_type((np.float32, [3])))())
      ['round', 'q', 'learning_rate']
    """
    return BoundRule(rule, value_type).initial_state


def federated_rule(
    rule: Rule,
    value: tff.Value,
    state: tff.Value,
    *,
    server_model: tff.Value | None = None,
    weight: tff.Value | None = None,
    scores: tff.Value | None = None,
    scores_are: Literal["distances", "accuracies"] | None = None,
    loss: tff.Value | None = None,
    steps: tff.Value | None = None,
    value_is: Literal["model", "delta"] = "model",
    sample_size: int = 0,
) -> FederatedRule:
    """Runs a rule inside a `tff.federated_computation`, in place of `tff.federated_mean`.

    To run on several workers or in sub-rounds, the last argument of your computation must be placed
    at clients; otherwise TFF 0.87 silently gives the first clients to every sub-round. If no client
    counts, the result is the server's model, or zeros for deltas, and `unchanged` is 1.

    Args:
      rule: The rule.
      value: Structure of floating tensors at `tff.CLIENTS`: trained models or deltas.
      state: The rule's state at `tff.SERVER`: first that of `rule_state`, then the one returned before.
      server_model: The model that clients started from, same type, at `tff.SERVER`. Needed for
        `value_is="model"`, and if the score needs it.
      weight: A number per client at `tff.CLIENTS` (number of examples); None for 1 each.
      scores: Scores that clients computed themselves (validation loss, accuracy, ...), in place of the
        rule's score: at `tff.CLIENTS`, one floating number, or one per layer.
      scores_are: Required with `scores`. `"distances"`: 0 is best, as for a loss or an error.
        `"accuracies"`: from 0 to 1, and 1 is best. The rule gets, and measurements show, `1 - score`, so
        a weighting that prefers near clients prefers good ones. A client with a score out of range is
        one of the `bad_score_clients`.
      loss: The clients' losses at `tff.CLIENTS`, if the rule needs them.
      steps: The clients' steps at `tff.CLIENTS`, if the rule needs them.
      value_is: `"model"` for trained models; `"delta"` for the server's model minus the trained
        one, as TFF's client work sends it.
      sample_size: How many clients the measurements list one by one.

    Returns:
      A `FederatedRule`.

    Raises:
      TypeError: If a value has the wrong placement or type.
      ValueError: If a value that the rule needs is missing, or one is given that it does not need.

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
    checks.word("value_is", value_is, "model", "delta")
    needs = rule.needs
    check_no_process("rule", needs)
    value, value_type = checks.placed("value", value, tff.CLIENTS)
    bound = BoundRule(rule, value_type, sample_size=sample_size)
    state, found = checks.placed("state", state, tff.SERVER)
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
            "`server_model` must be given for models, and for scores that look at it; found None."
        )
    given = OrderedDict(value=value, state=tff.federated_broadcast(state))
    if server_model is not None:
        server_model, found = checks.placed("server_model", server_model, tff.SERVER)
        if not value_type.is_assignable_from(found):
            raise TypeError(
                f"`value` and `server_model` must have one type; found {value_type} at clients and "
                f"{found} at the server."
            )
        given["server"] = tff.federated_broadcast(server_model)
    if weight is not None:
        given["weight"] = checks.placed("weight", weight, tff.CLIENTS)[0]
    if scores is None and scores_are is not None:
        raise ValueError(f"`scores_are` must be None without `scores`; found {scores_are!r}.")
    if scores is not None and scores_are not in ("distances", "accuracies"):
        raise ValueError(
            '`scores_are` must be "distances", of which 0 is best, or "accuracies", of which 1 is; '
            f"found {scores_are!r}. Turn scores of another kind into distances first."
        )
    wanted = {"scores": needs.score is not None, "loss": needs.loss, "steps": needs.steps}
    for name, argument in (("scores", scores), ("loss", loss), ("steps", steps)):
        if argument is not None and not wanted[name]:
            raise ValueError(
                f"`{name}` must be None for a rule whose `needs` leave it out; found {argument!r}."
            )
        if argument is None and wanted[name] and name != "scores":
            raise ValueError(
                f"`{name}` must be given to this rule, at tff.CLIENTS; found {argument!r}."
            )
        if argument is not None:
            given[name], found = checks.placed(name, argument, tff.CLIENTS)
            shapes = [(), (len(bound.layers.names),)] if name == "scores" else [()]
            if not isinstance(found, tff.types.TensorType) or tuple(found.shape) not in shapes:
                raise TypeError(
                    f"`{name}` must be one number per client"
                    f"{', or one per layer' if name == 'scores' else ''}; found {found}."
                )

    @tff.tensorflow.computation
    def on_client(given: Mapping[str, Structure]) -> Part:
        tensors = [tf.convert_to_tensor(tensor) for tensor in tf.nest.flatten(given["value"])]
        server = tf.nest.flatten(given["server"]) if "server" in given else None
        delta, trained = tensors, tensors
        if server is not None:
            other = [old - new for old, new in zip(server, tensors, strict=True)]
            delta, trained = (other, tensors) if value_is == "model" else (tensors, other)
        measured: dict[str, tf.Tensor] = {}
        if scored_here:
            if server is None:
                server, trained = delta, [tf.zeros_like(tensor) for tensor in tensors]
            measured["scores"] = bound.scores(server, trained)
        elif scores is not None:
            distances = tf.cast(given["scores"], tf.float32)
            if scores_are == "accuracies":
                beyond = (distances < 0.0) | (distances > 1.0 + _ROUNDING)
                distances = tf.where(beyond, math.nan, tf.maximum(1.0 - distances, 0.0))
            measured["scores"] = tf.ones([len(bound.layers.names)]) * distances
        if loss is not None:
            measured["loss"] = tf.cast(given["loss"], tf.float32)
        if steps is not None:
            measured["steps"] = tf.cast(given["steps"], tf.int32)
        update = client_update(delta, given.get("weight", tf.constant(1.0)), **measured)
        return bound.client(update, given["state"])

    parts = tff.federated_map(on_client, tff.federated_zip(given))

    def finish(update: Tensors, unchanged: tf.Tensor, model: Weights | None) -> Tensors:
        if model is None:
            return [tf.where(unchanged, tf.zeros_like(x), x) for x in update]
        return [
            tf.where(unchanged, old, old - change)
            for old, change in zip(model, update, strict=True)
        ]

    model = server_model if value_is == "model" else None
    new_state, result, measured = bound.federated_server(state, parts, model, finish)
    return FederatedRule(result, new_state, measured)
