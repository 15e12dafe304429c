"""A rule of aggregation as one value.

```
clients:  measure what `rule.needs` says, train, measure  ->  update
          part = rule.client(update, state)
          rule.reduction, in one pass
server:   state, update, measurements, unchanged = rule.server(state, reduced)
```

The same `Rule` is a factory for TFF's own builders (`RuleFactory`), a step of a round of your own
(`federated_rule`), and a whole process (`build_fed_avg`).
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Hparam, comparable
from aggregators.core.layers import ModelLayers
from aggregators.core.needs import Needs
from aggregators.core.reduction import Reduction
from aggregators.core.types import Measurements, Part, Reduced, State, Structure, Tensors
from aggregators.core.update import ClientUpdate

_Arguments = ParamSpec("_Arguments")
_T = TypeVar("_T")


class PerLayer(NamedTuple):
    """A measurement with a number per layer, which is shown by the layers' names.

    Attributes:
      values: A tensor of shape `[..., num_layers]`.

    Example:
      >>> layers = ModelLayers([tf.TensorSpec([2]), tf.TensorSpec([])], {"w": (0,), "b": (1,)})
      >>> shown = layers.named(PerLayer(tf.constant([3.0, 4.0])).values)
      >>> {name: float(number) for name, number in shown.items()}
      {'w': 3.0, 'b': 4.0}
    """

    values: tf.Tensor


class RuleResult(NamedTuple):
    """What a rule's server part returns.

    Attributes:
      state: The rule's own state, of the names and types of `initial_state`.
      update: The tensors of the update, flat.
      measurements: Tensors by name; see `PerLayer` for those of shape `[num_layers]`.
      unchanged: A bool: True if the model is to be left alone, whatever the update is, because no
        client counted. A measurement of this name shows it.

    Example:
      >>> share = OrderedDict(share=tf.constant(0.5))
      >>> RuleResult(OrderedDict(), [tf.zeros([2])], share, unchanged=False).unchanged
      False
    """

    state: State
    update: Tensors
    measurements: Measurements
    unchanged: tf.Tensor | bool


def _no_state(layers: ModelLayers) -> OrderedDict[str, Structure]:
    del layers  # a rule that keeps nothing does not look at them
    return OrderedDict()


def _check_hparams(argument: str, value: object) -> None:
    is_valid = isinstance(value, Mapping) and all(
        isinstance(name, str) and name != "round" and isinstance(number, Hparam)
        for name, number in value.items()
    )
    if not is_valid:
        raise TypeError(
            f"`{argument}` must map names other than round to numbers made by "
            f"`hyperparameters.hparam(name, value, least, most)`; found {value!r}."
        )


@attrs.frozen
class _Call:
    """The call of a function that made a rule.

    Attributes:
      function: The function.
      positional: What it was given, defaults among it, by position.
      named: And by name.
    """

    function: Callable[..., "Rule"]
    positional: Sequence[object] = attrs.field(eq=comparable)
    named: Mapping[str, object] = attrs.field(eq=comparable)

    def __call__(self) -> "Rule":
        return self.function(*self.positional, **self.named)

    def __str__(self) -> str:
        given = inspect.signature(self.function).bind(*self.positional, **self.named).arguments
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in given.items())
        return f"{self.function.__name__}({shown})"


def _shown(value: object) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


@attrs.frozen(eq=False, repr=False)
class Rule:
    """An aggregation rule: pure functions of TensorFlow operations.

    The state that they see is a mapping: `round` (int32, rounds done), the rule's hyperparameters by
    name (float64), and what `initial_state` names. Most rules are a mean by log-weights, which
    `weighted_mean.rule` makes of one function.

    Attributes:
      client: `(update, state) -> part`, on each client. `update` is a `ClientUpdate`.
      reduction: `layers -> Reduction` of the parts; its `lift` runs on the clients too.
      server: `(state, reduced) -> RuleResult`.
      needs: What clients measure.
      initial_state: `layers -> OrderedDict` of the rule's own state.
      hparams: The rule's hyperparameters, by name; see `hparam`.
      name: What it is called where it is printed.

    Two rules are equal if a function under `named_rule` made both of equal arguments, or if they have
    equal parts.

    Example: the sum of the deltas

      >>> def add(a, b):
      ...     return [x + y for x, y in zip(a, b)]
      >>> total = Rule(
      ...     client=lambda update, state: list(update.delta),
      ...     reduction=lambda layers: Reduction(lambda: [tf.zeros(s.shape) for s in layers.specs], add),
      ...     server=lambda state, reduced: RuleResult({}, reduced, {}, unchanged=False),
      ...     name="total",
      ... )
      >>> total
      total()
    """

    client: Callable[[ClientUpdate, State], Part] = attrs.field(
        validator=checks.validated(checks.function, "(update, state)")
    )
    reduction: Callable[[ModelLayers], Reduction] = attrs.field(
        validator=checks.validated(checks.function, "(layers)")
    )
    server: Callable[[State, Reduced], RuleResult] = attrs.field(
        validator=checks.validated(checks.function, "(state, reduced)")
    )
    needs: Needs = attrs.field(default=Needs(), validator=checks.validated(checks.instance, Needs))
    initial_state: Callable[[ModelLayers], State] = attrs.field(
        default=_no_state, validator=checks.validated(checks.function, "(layers)")
    )
    hparams: Mapping[str, Hparam] = attrs.field(
        factory=OrderedDict, validator=checks.validated(_check_hparams)
    )
    name: str = attrs.field(default="rule", validator=checks.validated(checks.instance, str))
    # Not an argument, so that no changed copy takes itself for what the call made.
    _call: _Call | None = attrs.field(default=None, init=False)

    def _parts(self) -> dict[str, object]:
        return {part.name: getattr(self, part.name) for part in attrs.fields(Rule) if part.init}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        if self._call is not None and other._call is not None:
            return self._call == other._call
        return self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash((self.name, self.needs.names, tuple(self.hparams)))

    def __repr__(self) -> str:
        if self._call is not None:
            return str(self._call)
        shown = ", ".join(f"{name}={_shown(number.value)}" for name, number in self.hparams.items())
        return f"{self.name}({shown})"

    def __reduce__(self) -> tuple[Callable[[], "Rule"], tuple[()]]:
        """Copies and pickles the call, whose arguments may be pickled where functions may not."""
        return self._call or functools.partial(Rule, **self._parts()), ()


def named_rule(function: Callable[_Arguments, Rule]) -> Callable[_Arguments, Rule]:
    """Gives the rules that a function makes its name and arguments.

    They print as the call, are equal where the arguments are, and can be pickled if those can and the
    function stands in a module.

    Args:
      function: A function that returns a `Rule`.

    Returns:
      A function of the same arguments.

    Example:
      >>> from aggregators import hparam, weighted_mean
      >>> @named_rule
      ... def power_mean(exponent=0.5):
      ...     return weighted_mean.rule(
      ...         lambda update, state: state["exponent"] * tf.math.log(update.weight),
      ...         hparams={"exponent": hparam("exponent", exponent)},
      ...     )
      >>> power_mean(2), power_mean(2) == power_mean(2.0)
      (power_mean(exponent=2), True)
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Rule:
        rule = attrs.evolve(function(*args, **kwargs), name=function.__name__)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        object.__setattr__(rule, "_call", _Call(make, given.args, given.kwargs))
        return rule

    return make


def call(what: str, function: Callable[..., _T], *given: Structure) -> _T:
    """What a function of a rule's author returns; a `TypeError` in our words where it fails."""
    return checks.called(
        f"{what} must be a function of TensorFlow operations",
        function,
        *given,
        advice="Hyperparameters in the state and `update.weight` are float64: `tf.cast` other tensors "
        "before you combine them. Fields that `needs` does not ask for are None.",
    )


def check_rule(rule: object) -> None:
    """Raises `TypeError` for anything that is not a `Rule`."""
    if not isinstance(rule, Rule):
        raise TypeError(
            f"`rule` must be a `Rule`; found {rule!r}. Call a function of `aggregators.rules`, such "
            "as `rules.adaptive_mean(score, weighting)`."
        )
