"""An aggregation rule as one value.

```
clients:  train and measure `rule.needs`  ->  update
          part = rule.client(update, state)
          rule.reduction, in one pass
server:   state, update, measurements, unchanged = rule.server(state, reduced)
```

The same `Rule` is a factory for TFF's own builders (`RuleFactory`), a step in your own federated
computation (`federated_rule`), and a whole process (`build_fed_avg`).
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
    """A measurement with one number per layer, shown under the layers' names.

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
    """The result of a rule's server part.

    Attributes:
      state: The rule's own state, with the names and types of `initial_state`.
      update: The flat tensors of the update.
      measurements: Tensors by name; see `PerLayer` for those of shape `[num_layers]`.
      unchanged: A bool: True if no client counted, so the model must stay as it is, whatever the update
        says. A measurement of this name shows it.

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
    del layers  # there is nothing to keep
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
      positional: Its positional arguments, defaults included.
      named: Its keyword arguments.
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

    The functions get the state as a mapping: `round` (int32, finished rounds), the rule's
    hyperparameters by name (float64), and the entries of `initial_state`. Most rules are means by
    log-weights, which `weighted_mean.rule` builds from one function.

    Attributes:
      client: `(update, state) -> part`, on each client. `update` is a `ClientUpdate`.
      reduction: `layers -> Reduction` of the parts; its `lift` runs on the clients too.
      server: `(state, reduced) -> RuleResult`.
      needs: The measurements that clients take.
      initial_state: `layers -> OrderedDict` of the rule's own state.
      hparams: The rule's hyperparameters, by name; see `hparam`.
      name: The rule's name in its representation.

    Two rules are equal if one `named_rule` function made both from equal arguments, or if their parts
    are equal.

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
    # Not an argument: a copy that `attrs.evolve` changes is no longer the result of the call.
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
        """Copies and pickles the call: its arguments can often be pickled where the parts cannot."""
        return self._call or functools.partial(Rule, **self._parts()), ()


def named_rule(function: Callable[_Arguments, Rule]) -> Callable[_Arguments, Rule]:
    """Names the rules that a function makes after the call.

    The rules print as the call and are equal if the arguments are. They can be pickled if the arguments
    can and the function is defined in a module.

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
    """Calls a function of a rule's author; an error becomes a `TypeError` that explains it."""
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
