"""The optimizer pipeline: the only place that decides order, state layout and hparams."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import devices, hyperparameters, leaves, projections
from tff_optim.regularizers import Penalty
from tff_optim.transforms.interface import GradientTransform

_RATES = (tff.learning.optimizers.LEARNING_RATE_KEY, "weight_decay")
_GROUPS = ("regularizers", "transforms")


def _as_parts(name: str, given: Any) -> tuple[GradientTransform, ...]:
    if not isinstance(given, list | tuple):
        raise TypeError(f"`{name}` must be a list or tuple; found {given!r}. Put it in a list.")
    parts = []
    for part in given:
        if name == "regularizers" and isinstance(part, tf.keras.regularizers.Regularizer):
            part = Penalty(part)
        if not isinstance(part, GradientTransform):
            also = ", tf.keras.regularizers.Regularizer" if name == "regularizers" else ""
            raise TypeError(
                f"`{name}` must hold instances of tff_optim.transforms.GradientTransform{also}; "
                f"found {part!r}. `tff_optim.from_config` reads names and configurations; "
                "`tff_optim.transforms.KerasTransform` wraps a Keras optimizer."
            )
        parts.append(part)
    return tuple(parts)


def _names(parts: Sequence[GradientTransform]) -> list[str]:
    """State keys: the class, numbered from its second use on (`Momentum`, `Momentum_2`)."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for part in parts:
        name = type(part).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


@attrs.frozen(slots=False)
class Pipeline(tff.learning.optimizers.Optimizer):
    """An optimizer made of parts; `tff_optim.build_optimizer` makes and describes it."""

    learning_rate: Any = hyperparameters.non_negative()
    regularizers: tuple[GradientTransform, ...] = ()
    transforms: tuple[GradientTransform, ...] = ()
    weight_decay: Any = hyperparameters.non_negative(0.0)
    projection: tuple[projections.Projection, ...] = ()
    device: str | None = None
    jit_compile: bool = hyperparameters.flag(False)
    # Made once: a function made in every call would be traced and compiled in every call.
    _compiled: Any = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        compiled = tf.function(self._step, jit_compile=True, autograph=False)
        object.__setattr__(self, "_compiled", compiled)

    def initialize(self, specs: Any) -> Any:
        """Returns the state before the first step: see `build_optimizer`."""
        for path, spec in leaves.named_leaves(specs):
            if not spec.dtype.is_floating or not spec.shape.is_fully_defined():
                raise ValueError(
                    f"`specs` at '{path}' must be of a floating dtype and a known shape; "
                    f"found {spec}."
                )
        projections.check_used(self.projection, specs)
        specs = leaves.compute_specs(specs)
        with devices.device_scope(self.device):
            state = hyperparameters.initialize(self, counts_steps=True)
            if not self._decays():
                del state["weight_decay"]
            for group, parts in self._groups():
                state[group] = collections.OrderedDict(
                    (name, part.initialize(specs)) for name, part in parts.items()
                )
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """Takes one step: see `build_optimizer`."""
        self._check_state(state)
        leaves.check_same_structure(gradients, weights, "gradients", "`weights`")
        with devices.device_scope(self.device):
            # Variables are read, and sparse gradients added up, before anything is computed.
            weights = tf.nest.map_structure(tf.convert_to_tensor, weights)
            gradients = tf.nest.map_structure(leaves.dense, gradients)
            _check_gradients(gradients, weights)
            step = self._compiled if self.jit_compile else self._step
            return step(state, weights, gradients)

    def _step(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        rates = self._rates(state)
        new_state = self._advance_rates(state)
        wide = tf.nest.map_structure(leaves.widen, weights)
        direction = tf.nest.map_structure(leaves.widen, gradients)
        for group, parts in self._groups():
            new_state[group] = collections.OrderedDict()
            for name, part in parts.items():
                old = state[group][name]
                new, changed = part.next(old, wide, direction)
                _check_result(name, changed, direction, new, old)
                new_state[group][name], direction = new, changed
        updated = [
            self._update(path, w, d, rates)
            for (path, w), d in zip(
                leaves.named_leaves(wide), tf.nest.flatten(direction), strict=True
            )
        ]
        # A weight without a gradient is handed back as it came, untouched by decay or projection.
        narrowed = [
            old if d is None else tf.cast(new, old.dtype)
            for old, new, d in zip(
                tf.nest.flatten(weights), updated, tf.nest.flatten(gradients), strict=True
            )
        ]
        return new_state, tf.nest.pack_sequence_as(weights, narrowed)

    def _update(
        self, path: str, w: tf.Tensor, direction: tf.Tensor | None, rates: Mapping[str, Any]
    ) -> tf.Tensor:
        if direction is None:
            return w
        step = leaves.number(rates["learning_rate"], w.dtype) * direction
        if self._decays():
            step += leaves.number(rates["weight_decay"], w.dtype) * w
        w -= step
        for projection in self.projection:
            w = projection(path, w)
        return w

    def get_hparams(self, state: Any) -> hyperparameters.Hparams:
        """The numbers that can be changed between rounds: rates, then those of each part.

        Args:
          state: A state of this optimizer.

        Returns:
          `learning_rate` and `weight_decay` where they are numbers, and `regularizers` and
          `transforms` with the hparams of each part by its name in the state. Parts without any
          are left out.
        """
        hparams = collections.OrderedDict((name, state[name]) for name in self._rate_names())
        for group, parts in self._groups():
            of_parts = collections.OrderedDict()
            for name, part in parts.items():
                if found := part.get_hparams(state[group][name]):
                    of_parts[name] = found
            if of_parts:
                hparams[group] = of_parts
        return hparams

    def set_hparams(self, state: Any, hparams: Mapping[str, Any]) -> Any:
        """Returns `state` with other numbers, for the steps from the next one on.

        Args:
          state: A state of this optimizer.
          hparams: As `get_hparams` returns them; nothing left out.

        Raises:
          ValueError: If a name is missing or unknown, or a plain number is out of range.
          TypeError: If a value is neither a number nor a tensor.
        """
        known = self.get_hparams(state)
        leaves.check_keys(hparams, list(known), "hparams")
        new_state = collections.OrderedDict(state)
        for name in self._rate_names():
            new_state[name] = hyperparameters.checked(self, name, hparams[name])
        for group, parts in self._groups():
            if group not in known:
                continue
            leaves.check_keys(hparams[group], list(known[group]), f"hparams of {group}")
            new_state[group] = collections.OrderedDict(state[group])
            for name, values in hparams[group].items():
                new_state[group][name] = parts[name].set_hparams(state[group][name], values)
        return new_state

    def _decays(self) -> bool:
        # Exactly 0 means that there is no such term, rather than one multiplied by 0.
        return self.weight_decay != 0.0

    def _groups(self) -> list[tuple[str, dict[str, GradientTransform]]]:
        groups = [(group, getattr(self, group)) for group in _GROUPS]
        return [(g, dict(zip(_names(p), p, strict=True))) for g, p in groups if p]

    def _rate_names(self) -> list[str]:
        names = hyperparameters.numbers(self)
        return names if self._decays() else [n for n in names if n != "weight_decay"]

    def _rates(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return hyperparameters.current(self, {"weight_decay": 0.0} | dict(state))

    def _advance_rates(self, state: Mapping[str, Any]) -> Any:
        new_state = collections.OrderedDict((name, state[name]) for name in self._rate_names())
        new_state[hyperparameters.STEP] = leaves.number(state[hyperparameters.STEP], tf.int64) + 1
        return new_state

    def _check_state(self, state: Any) -> None:
        groups = self._groups()
        expected = [*self._rate_names(), hyperparameters.STEP, *(group for group, _ in groups)]
        leaves.check_keys(state, expected, "state")
        for group, parts in groups:
            leaves.check_keys(state[group], list(parts), f"state of {group}")


def _check_gradients(gradients: Any, weights: Any) -> None:
    named = leaves.named_leaves(gradients)
    present = [(path, g) for path, g in named if g is not None]
    if named and not present:
        raise ValueError(
            "`gradients` must not all be None; found only None. "
            "Does the loss depend on these weights?"
        )
    filled = tf.nest.map_structure(lambda g, w: w if g is None else g, gradients, weights)
    leaves.check_like(filled, weights, "gradients", "`weights`")


def _check_result(name: str, changed: Any, given: Any, new_state: Any, old_state: Any) -> None:
    leaves.check_like(changed, given, f"gradients returned by {name}", "those it was given")
    new, old = (
        tf.nest.map_structure(tf.convert_to_tensor, state) for state in (new_state, old_state)
    )
    leaves.check_like(new, old, f"state returned by {name}", "the state it was given")


def build_optimizer(
    learning_rate: Any,
    *,
    regularizers: Sequence[Any] = (),
    transforms: Sequence[GradientTransform] = (),
    weight_decay: Any = 0.0,
    projection: Any = None,
    device: str | devices.DevicePolicy | None = None,
    jit_compile: bool = False,
) -> Pipeline:
    """Builds an optimizer from regularizers, gradient transforms, rates and a projection.

    One step, with `g` the gradients and `w` the weights before it:

        g <- r(w, g)     for each regularizer r, in order
        g <- t(w, g)     for each transform t, in order
        w <- p(w - (learning_rate g + weight_decay w))     with p the projection

    Weight decay is not multiplied by the learning rate, as in declearn; Keras' AdamW multiplies.

    Weights and gradients are structures of floating tensors, nested in any way, of any mix of
    dtypes; float16 and bfloat16 are computed in float32. A weight whose gradient is `None` stays
    as it is, and so do its slots. `tf.IndexedSlices` are made dense, repeated rows added up.

    The state is an `OrderedDict` of `learning_rate` and `weight_decay` (where they are numbers;
    no decay if it is exactly 0), `step` (int64), and the states of the parts under `regularizers`
    and `transforms`. It holds everything: saved and loaded, training goes on as if it had not
    stopped. The numbers in it, those of the parts included, are the hparams: set them between
    rounds and nothing is traced again. A schedule is evaluated at the number of steps taken
    before: the first step uses its first value.

    Args:
      learning_rate: A number of at least 0 or a Keras schedule.
      regularizers: `tff_optim.regularizers.FedProx`, Keras regularizers, and any
        `GradientTransform` that is to come first.
      transforms: Instances of `GradientTransform`.
      weight_decay: A number of at least 0 or a Keras schedule.
      projection: A Keras constraint, a function from a tensor to a tensor, a
        `tff_optim.projections.Projection`, which also selects tensors, or a list of these, used
        in order on each tensor of weights after the step.
      device: A device's name, a `DevicePolicy`, or `None` for the policy in force. TFF's worker
        has no GPU code: a GPU is used only where the optimizer runs in the Python process.
      jit_compile: Whether to fuse the step with XLA. Several times as fast from some ten thousand
        parameters on, after a compilation of about a second for each shape of the weights. It
        changes results by rounding only, but every part must be of operations that XLA knows.

    Returns:
      A `tff.learning.optimizers.Optimizer`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a number is out of range, or there is no such device.

    Example:
      >>> optimizer = build_optimizer(0.5, weight_decay=0.1)
      >>> state = optimizer.initialize(tf.TensorSpec([]))
      >>> state, weights = optimizer.next(state, tf.constant(2.0), tf.constant(1.0))
      >>> round(float(weights), 4)
      1.3

    After declearn's `Optimizer` (https://gitlab.inria.fr/magnet/declearn).
    """
    return Pipeline(
        learning_rate=learning_rate,
        regularizers=_as_parts("regularizers", regularizers),
        transforms=_as_parts("transforms", transforms),
        weight_decay=weight_decay,
        projection=projections.as_projections(projection),
        device=devices.select_device(device),
        jit_compile=jit_compile,
    )
