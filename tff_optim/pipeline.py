"""The optimizer pipeline: the only place that decides order, state layout and hparams."""

import collections
from collections.abc import Mapping, Sequence

import attrs
import tensorflow as tf

from tff_optim import hyperparameters, projections
from tff_optim.backends.common import PureOptimizer, check_weight_names
from tff_optim.core import devices, leaves, selection, tracing
from tff_optim.core.messages import refusal, shown
from tff_optim.core.numbers import STEP
from tff_optim.core.tracing import call_traced, converted
from tff_optim.core.types import (
    Gradients,
    Hparams,
    Leaves,
    Number,
    Rate,
    Specs,
    State,
    Stepped,
    Structure,
    Value,
    Weights,
)
from tff_optim.regularizers import Penalty
from tff_optim.transforms.interface import GradientTransform

_PARTS = "parts"


def as_parts(name: str, given: object) -> tuple[GradientTransform, ...]:
    """Reads the argument `name`, a sequence of transforms; pipelines and Keras regularizers among it.

    Raises:
      TypeError: If it is something else.
      ValueError: If a pipeline in it has something that only the outermost one can have.
    """
    if not isinstance(given, list | tuple):
        raise refusal(
            name, "be a list or tuple", shown(given), "Put it in a list.", error=TypeError
        )
    parts = []
    for part in given:
        if name == "regularizers" and isinstance(part, tf.keras.regularizers.Regularizer):
            part = Penalty(part)
        if isinstance(part, PipelineOptimizer):
            part = _nested(name, part.pipeline)
        if not isinstance(part, GradientTransform):
            also = ", tf.keras.regularizers.Regularizer" if name == "regularizers" else ""
            raise TypeError(
                f"`{name}` must hold instances of tff_optim.transforms.GradientTransform{also}, or "
                f"what tff_optim.build_optimizer returns; found {shown(part)}. `tff_optim.from_config` "
                "reads names and configurations; `tff_optim.transforms.KerasTransform` and "
                "`OptaxTransform` wrap optimizers of Keras and optax."
            )
        parts.append(part)
    return tuple(parts)


@attrs.frozen
class Pipeline(GradientTransform):
    """A pipeline: the checked arguments of `build_optimizer`.

    It is a gradient transform itself, whose result its optimizer subtracts from the weights:
    `learning_rate g + weight_decay w`.
    """

    learning_rate: Rate = hyperparameters.non_negative(traceable=True)
    regularizers: tuple[GradientTransform, ...] = ()
    transforms: tuple[GradientTransform, ...] = ()
    weight_decay: Rate = hyperparameters.non_negative(0.0, traceable=True)
    exclude_from_weight_decay: selection.Where = attrs.field(default=None)
    projection: tuple[projections.Projection, ...] = ()
    weight_names: tuple[str, ...] | None = attrs.field(default=None)
    device: str | None = None
    jit_compile: bool = hyperparameters.flag(False)

    @exclude_from_weight_decay.validator
    def _check_excluded(self, attribute: attrs.Attribute, value: object) -> None:
        selection.check(attribute.name, value)
        if value is not None and not self.decays:
            raise refusal(
                attribute.name, "be left out where `weight_decay` is 0", shown(value), "Give both."
            )

    @weight_names.validator
    def _check_weight_names(self, attribute: attrs.Attribute, value: Sequence[str] | None) -> None:
        if value is not None and (
            len(set(value)) < len(value) or not all(isinstance(name, str) for name in value)
        ):
            raise refusal(attribute.name, "name every weight differently", shown(value))

    @property
    def decays(self) -> bool:
        """Whether there is a decay term: none if it is exactly 0, rather than one times 0."""
        # A tensor or a schedule may come to another value than 0.
        return not (isinstance(self.weight_decay, float) and self.weight_decay == 0.0)

    @property
    def rate_names(self) -> list[str]:
        """Those of learning rate and weight decay that are numbers in the state."""
        names = list(hyperparameters.intervals(self))
        return names if self.decays else [name for name in names if name != "weight_decay"]

    @property
    def parts(self) -> dict[str, GradientTransform]:
        """All parts in order, by class, numbered from its second use on: `Adam`, `Adam_2`."""
        parts: dict[str, GradientTransform] = {}
        last: dict[str, int] = {}
        for part in (*self.regularizers, *self.transforms):
            name = cls = type(part).__name__
            while name in parts:  # also by a class that is called `Adam_2`
                last[cls] = last.get(cls, 1) + 1
                name = f"{cls}_{last[cls]}"
            parts[name] = part
        return parts

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        specs = leaves.compute_specs(specs)
        selection.check_used(
            "exclude_from_weight_decay",
            self.exclude_from_weight_decay,
            specs,
            "Give `weight_names=[v.name for v in model.trainable_variables]`, or a rank: 1 excludes "
            "biases and the weights of norms.",
            not_all=True,
        )
        state = hyperparameters.initialize(self, counts_steps=True)
        if not self.decays:
            del state["weight_decay"]
        state[_PARTS] = collections.OrderedDict(
            (name, converted(part.initialize)(specs)) for name, part in self.parts.items()
        )
        return state

    def next(self, state: State, weights: Weights, gradients: Gradients) -> tuple[State, Gradients]:
        """See base class."""
        self._check_state(state)
        rates = hyperparameters.current(self, {"weight_decay": 0.0} | dict(state))
        new_state = collections.OrderedDict((name, state[name]) for name in self.rate_names)
        new_state[STEP] = leaves.number(state[STEP], tf.int64) + 1
        new_state[_PARTS] = collections.OrderedDict()
        for name, part in self.parts.items():
            old = state[_PARTS][name]
            new, changed = converted(part.next)(old, weights, gradients)
            _check_result(name, changed, gradients, new, old)
            new_state[_PARTS][name], gradients = new, changed

        def taken(path: str, w: tf.Tensor, g: tf.Tensor | None) -> tf.Tensor | None:
            if g is None:
                return None
            step = leaves.number(rates["learning_rate"], w.dtype) * g
            excluded = self.exclude_from_weight_decay is not None and selection.selects(
                self.exclude_from_weight_decay, path, leaves.spec_of(w)
            )
            if self.decays and not excluded:
                step += leaves.number(rates["weight_decay"], w.dtype) * w
            return step

        flat = [
            taken(path, w, g)
            for (path, w), g in zip(
                leaves.named_leaves(weights), tf.nest.flatten(gradients), strict=True
            )
        ]
        return new_state, tf.nest.pack_sequence_as(weights, flat)

    def get_hparams(self, state: State) -> Hparams:
        """The rates, and the hyper-parameters of parts by path: `Adam.beta_1`, say."""
        hparams = collections.OrderedDict((name, state[name]) for name in self.rate_names)
        for part_name, part in self.parts.items():
            for name, value in part.get_hparams(state[_PARTS][part_name]).items():
                hparams[f"{part_name}.{name}"] = value
        return hparams

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """See base class."""
        hyperparameters.check_names(hparams, self.get_hparams(state), "Pipeline")
        rates = {name: hparams[name] for name in self.rate_names if name in hparams}
        new_state = hyperparameters.set_hparams(self, state, rates)
        new_state[_PARTS] = collections.OrderedDict(state[_PARTS])
        for part_name, part in self.parts.items():
            old = state[_PARTS][part_name]
            own = {
                name: hparams[f"{part_name}.{name}"]
                for name in part.get_hparams(old)
                if f"{part_name}.{name}" in hparams
            }
            if own:
                new_state[_PARTS][part_name] = part.set_hparams(old, own)
        return new_state

    def _check_state(self, state: State) -> None:
        leaves.check_keys(state, [*self.rate_names, STEP, _PARTS], "state")
        leaves.check_keys(state[_PARTS], list(self.parts), "parts` of `state")


def _nested(name: str, pipeline: Pipeline) -> Pipeline:
    """A pipeline as a part of another one, which alone has and moves the weights."""
    for argument in ("projection", "weight_names", "device", "jit_compile"):
        if value := getattr(pipeline, argument):
            raise refusal(
                f"{name}` with a pipeline in it",
                f"leave `{argument}` to the outermost pipeline",
                shown(value),
                "Give it there.",
            )
    return pipeline


class PipelineOptimizer(PureOptimizer):
    """Runs a `Pipeline`; `tff_optim.build_optimizer` makes and describes it.

    Attributes:
      pipeline: The parts.
    """

    _owner = "Pipeline"

    def __init__(self, pipeline: Pipeline):
        super().__init__(pipeline, pipeline.device, pipeline.weight_names)
        self.pipeline = pipeline
        # Made once: a function made in every call would be traced and compiled in every call.
        self._compiled = tracing.function(self._update_all, jit_compile=True, autograph=False)

    def __reduce__(self) -> tuple:
        return PipelineOptimizer, (self.pipeline,)

    def __repr__(self) -> str:
        return f"PipelineOptimizer({self.pipeline!r})"

    def _initial_state(self, specs: Specs) -> State:
        flat = tf.nest.flatten(specs)
        # A lone scalar is what TFF initializes an optimizer with when it only wants its hparams.
        if len(flat) != 1 or flat[0].shape.rank or len(self.weight_names or ()) == 1:
            specs = self._by_name(specs, flat)
        projections.check_used(self.pipeline.projection, specs)
        with devices.device_scope(self.device):
            return self.pipeline.initialize(specs)

    def _step(
        self, state: State, given: Weights, weights: Leaves, gradients: Leaves
    ) -> tuple[State, Leaves]:
        packed = (self._by_name(given, flat) for flat in (weights, gradients))
        state, new_weights = call_traced(self._run, state, *packed)
        if self.weight_names is not None:
            return state, [new_weights[name] for name in self.weight_names]
        return state, tf.nest.flatten(new_weights)

    def _by_name(self, structure: Structure, flat: Leaves) -> Structure:
        """The leaves by the weights' names, or nested as they are where there are no names."""
        if self.weight_names is None:
            return tf.nest.pack_sequence_as(structure, flat)
        check_weight_names(self.weight_names, len(flat))
        return collections.OrderedDict(zip(self.weight_names, flat))

    def _run(self, state: State, weights: Weights, gradients: Gradients) -> Stepped:
        with devices.device_scope(self.device):
            if not self.pipeline.jit_compile:
                return self._update_all(state, weights, gradients)
            return self._compiled(state, weights, gradients)

    def _update_all(self, state: State, weights: Weights, gradients: Gradients) -> Stepped:
        wide, direction = (
            tf.nest.map_structure(leaves.widen, structure) for structure in (weights, gradients)
        )
        state, steps = self.pipeline.next(state, wide, direction)
        # A weight without a gradient is handed back as it came, untouched by decay or projection.
        updated = [
            old if step is None else self._projected(path, w - step, leaves.spec_of(old))
            for (path, w), step, old in zip(
                leaves.named_leaves(wide),
                tf.nest.flatten(steps),
                tf.nest.flatten(weights),
                strict=True,
            )
        ]
        return state, tf.nest.pack_sequence_as(weights, updated)

    def _projected(self, path: str, w: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
        for projection in self.pipeline.projection:
            w = projection(path, w, spec)
        return tf.cast(w, spec.dtype)

    def get_hparams(self, state: State) -> Hparams:
        """See base class; a hyper-parameter of a part is called `Part.name`: `Adam.beta_1`, say."""
        return self.pipeline.get_hparams(state)

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """See base class."""
        return self.pipeline.set_hparams(state, hparams)


def _check_result(
    name: str, changed: Gradients, given: Gradients, new_state: State, old_state: State
) -> None:
    leaves.check_like(changed, given, f"gradients` returned by `{name}", "those it was given")
    leaves.check_like(new_state, old_state, f"state` returned by `{name}", "the state it was given")


def build_optimizer(
    learning_rate: Rate,
    *,
    regularizers: Sequence[GradientTransform | tf.keras.regularizers.Regularizer] = (),
    transforms: Sequence[GradientTransform] = (),
    weight_decay: Rate = 0.0,
    exclude_from_weight_decay: selection.Where = None,
    projection: Value = None,
    weight_names: Sequence[str] | None = None,
    device: str | devices.DevicePolicy | None = None,
    jit_compile: bool = False,
) -> PipelineOptimizer:
    """Builds an optimizer from regularizers, gradient transforms, rates and a projection.

    One step, with `g` the gradients and `w` the weights before it:

        g <- r(w, g)     for each regularizer r, in order
        g <- t(w, g)     for each transform t, in order
        w <- p(w - (learning_rate g + weight_decay w))     with p the projection

    Weight decay is not multiplied by the learning rate, as in declearn; Keras' AdamW multiplies.

    A pipeline may be a transform of another one, which takes `learning_rate g + weight_decay w` of the
    inner one for its gradients. So this is AdamW:
    `build_optimizer(0.1, transforms=[build_optimizer(1.0, transforms=[Adam()], weight_decay=0.01)])`.

    Weights and gradients are structures of floating tensors, nested in any way, of any mix of
    dtypes; float16 and bfloat16 are computed in float32. A weight whose gradient is `None` stays
    as it is, and so do its slots. `tf.IndexedSlices` are made dense, repeated rows added up.

    The state is an `OrderedDict` of `learning_rate` and `weight_decay` (where they are numbers;
    no decay if it is exactly 0), `step` (int64), and the states of the regularizers and transforms
    under `parts`, by class. It holds everything: saved and loaded, training goes on as if it had not
    stopped. The numbers in it, those of the parts included, are the hparams: set them between
    rounds and nothing is traced again. A schedule is evaluated at the number of steps taken
    before: the first step uses its first value.

    Args:
      learning_rate: A number of at least 0, a Keras schedule, or a scalar tensor of the TFF
        computation in which the optimizer is built, as with
        `tff.learning.algorithms.build_weighted_fed_avg_with_optimizer_schedule`.
      regularizers: `tff_optim.regularizers.FedProx`, Keras regularizers, and any
        `GradientTransform` that is to come first.
      transforms: Instances of `GradientTransform`, and other pipelines: what this function returns.
      weight_decay: A number of at least 0, a Keras schedule, or a scalar tensor of that computation.
      exclude_from_weight_decay: Which weights do not decay: a regular expression (of RE2's) that is
        searched for in their paths or names, a whole number for those of at most that rank (1 for biases
        and the weights of norms), or a function of path and `tf.TensorSpec`. It must select some
        weights, and not all.
      projection: A Keras constraint, a function from a tensor to a tensor, a
        `tff_optim.projections.Projection`, which also selects tensors, or a list of these, used
        in order on each tensor of weights after the step.
      weight_names: Names of the weights in the order of `tf.nest.flatten`, all different: in
        `tff.learning`, where models are flat lists,
        `[v.name for v in model.trainable_variables]`. Selections then look at these, and slots of
        the state are called so. None for the paths in the structure: `dense/kernel`, or `0`.
      device: A device's name, a `DevicePolicy`, or `None` for the policy in force. TFF's worker
        has no GPU code: a GPU is used only where the optimizer runs in the Python process.
      jit_compile: Whether to fuse the step with XLA where it runs in the Python process: faster
        from about a million parameters on, after a compilation of about a second for each shape
        of the weights. TFF's worker has no XLA compiler and runs the same step unfused. Results
        change by rounding only, but every part must be of operations that XLA knows. Not needed
        where the caller's own training loop is compiled as a whole.

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
    pipeline = Pipeline(
        learning_rate=learning_rate,
        regularizers=as_parts("regularizers", regularizers),
        transforms=as_parts("transforms", transforms),
        weight_decay=weight_decay,
        exclude_from_weight_decay=exclude_from_weight_decay,
        projection=projections.as_projections(projection),
        weight_names=None if weight_names is None else tuple(weight_names),
        device=devices.select_device(device),
        jit_compile=jit_compile,
    )
    return PipelineOptimizer(pipeline)
