"""A score: a function of two layers, and what it depends on."""

import sys
from collections.abc import Callable, Sequence
from typing import Literal, SupportsIndex

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks
from aggregators.core.autograph import with_autograph
from aggregators.core.layers import Groups
from aggregators.core.types import Structure

Layer = Sequence[tf.Tensor]
Function = Callable[[Layer, Layer], tf.Tensor]
OverLayers = Callable[[Sequence[Layer], Sequence[Layer]], list[tf.Tensor]]

_WRITE = (
    "Use one of `aggregators.scores`, or write `def score(server, client)`: a function of two "
    "sequences of tensors, in TensorFlow operations, that returns one number of at least 0."
)


def _check_function(argument: str, value: object) -> None:
    del argument  # users know it as `score`
    if isinstance(value, tff.framework.ConcreteComputation):
        raise TypeError(
            f"`score` must be a function of (server, client); found {value!r}, a computation, which "
            f"takes layers of one shape. {_WRITE}"
        )
    checks.function("score", value, "(server, client)", _WRITE)


def _check_name(argument: str, value: object) -> None:
    if not isinstance(value, str) or not value.isidentifier():
        raise ValueError(f"`{argument}` must be a Python identifier; found {value!r}.")


def _name_of(function: object) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return name if name.isidentifier() else "score"


@attrs.frozen(slots=False, repr=False)
class Score:
    """A score and what it depends on.

    Attributes:
      function: `(server_layer, client_layer) -> number`, of TensorFlow operations.
      needs: `"model"` if it needs the server's model. `"update"` if it depends on the difference of the
        two layers only, so that an update is enough to compute it.
      name: The name under which a client sends it.
      over_layers: A faster form for all layers at once, `(server_layers, client_layers) -> list of
        numbers`; None to call `function` for each layer.

    Example:
      >>> largest = Score(lambda s, c: tf.reduce_max(tf.abs(s[0] - c[0])), needs="update")
      >>> largest([tf.constant([1.0, 5.0])], [tf.constant([2.0, 2.0])]).numpy()
      3.0
    """

    function: Function = attrs.field(validator=checks.validated(_check_function))
    needs: Literal["model", "update"] = attrs.field(
        default="model", validator=checks.validated(checks.word, "model", "update"), kw_only=True
    )
    name: str = attrs.field(kw_only=True, validator=checks.validated(_check_name))
    over_layers: OverLayers | None = attrs.field(
        default=None,
        validator=checks.validated(
            checks.function, "(server_layers, client_layers)", optional=True
        ),
        kw_only=True,
    )

    @name.default
    def _own_name(self) -> str:
        return _name_of(self.function)

    def __attrs_post_init__(self) -> None:
        named = ("__module__", "__name__", "__qualname__", "__doc__")
        found = {
            name: getattr(self.function, name) for name in named if hasattr(self.function, name)
        }
        vars(self).update(found, __wrapped__=self.function)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Pickles a score that a module defines, such as those of `aggregators.scores`, by its name."""
        name = getattr(self.function, "__qualname__", "")
        at_home = getattr(sys.modules.get(self.function.__module__), name, None) is self
        return name if at_home else super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return self.name

    def __call__(self, server: Layer, client: Layer) -> tf.Tensor:
        """Scores one layer."""
        return self.function(server, client)


def score(
    *, needs: Literal["model", "update"], over_layers: OverLayers | None = None
) -> Callable[[Function], Score]:
    """Makes a `Score` of the function below it.

    Args:
      needs: As in `Score`.
      over_layers: As in `Score`.

    Returns:
      A decorator.

    Example:
      >>> @score(needs="update")
      ... def manhattan(server, client):
      ...     return tf.add_n([tf.reduce_sum(tf.abs(s - c)) for s, c in zip(server, client)])
      >>> manhattan.needs
      'update'
    """
    return lambda function: Score(function, needs=needs, over_layers=over_layers)


def as_score(given: Score | Function) -> Score:
    """Makes a `Score` of a bare function, which is assumed to need the server's model."""
    return given if isinstance(given, Score) else Score(given)


def score_layers(score: Score, server: Structure, client: Structure, groups: Groups) -> tf.Tensor:
    """Scores every layer of a client's model.

    Args:
      score: The score.
      server: Structure of tensors: the model the client started from.
      client: Structure of tensors: the model it trained.
      groups: The positions of each layer's tensors.

    Returns:
      float32 of shape `[len(groups)]`.

    Raises:
      TypeError: If `score` fails, or does not return one number per layer.
    """
    servers, clients = (
        [[tf.convert_to_tensor(flat[i]) for i in group] for group in groups]
        for flat in (tf.nest.flatten(server), tf.nest.flatten(client))
    )
    if score.over_layers is not None:
        found = score.over_layers(servers, clients)
    else:
        found = [_one(score, *pair) for pair in zip(servers, clients, strict=True)]
    return tf.stack([tf.cast(number, tf.float32) for number in found])


def _one(score: Score, server: Layer, client: Layer) -> tf.Tensor:
    shapes = ", ".join(f"{tensor.dtype.name}{list(tensor.shape)}" for tensor in server)
    number = checks.called(
        "`score` must be a function of TensorFlow operations",
        lambda: tf.convert_to_tensor(with_autograph(score.function)(server, client)),
        found=f"{score.name}, which failed on a layer of {shapes}",
        advice=_WRITE,
    )
    if number.shape.rank != 0 or not number.dtype.is_floating:
        raise TypeError(
            f"`score` must return one floating number per layer; found {number.dtype.name} of shape "
            f"{number.shape} from {score.name} for a layer of {shapes}. {_WRITE}"
        )
    return number
