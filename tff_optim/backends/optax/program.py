"""An optax transformation as plain TensorFlow operations.

jax traces `init` and `update` for weights of given shapes and dtypes, and `jax2tf` converts the result
to operations of every TensorFlow runtime, without XLA, which TFF's worker lacks.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

import attrs
import jax
import numpy as np
import optax
import tensorflow as tf
from jax.experimental import enable_x64

from tff_optim.backends.common import SLOTS
from tff_optim.backends.optax.tracing import (
    Layout,
    StateChangedError,
    Traced,
    Tree,
    flatten_with_path,
    spec_of,
    trace,
)
from tff_optim.core import tracing
from tff_optim.core.numbers import STEP
from tff_optim.core.types import GraphFunction, Leaf, Leaves, Number, State

# Makes a transformation from hparams by name.
Factory = Callable[[Mapping[str, Number]], optax.GradientTransformation]

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


@attrs.frozen(eq=False)
class _Step:
    """An `update` that jax has traced for the weights that have a gradient.

    Attributes:
      traced: Function of hparams, slots, weights and gradients that returns slots and weights.
      slots: The paths of its slots.
      handed_on: The paths of slots that it returns unchanged.
    """

    traced: Traced
    slots: tuple[str, ...]
    handed_on: frozenset[str]


@attrs.frozen(eq=False)
class Program:
    """A transformation for weights of one layout.

    Attributes:
      factory: Makes the transformation from its hparams.
      layout: How optax sees the weights.
      hparams: The numbers that may change between steps, with their first values.
      init: `init` of the transformation, a function of hparams and weights.
      slots: Shapes and dtypes of optax' state by path, without the `injected` numbers.
      injected: Paths by name of the numbers that `optax.inject_hyperparams` keeps in that state and no
        step changes.
      from_weights: Paths of the slots whose first values depend on the weights.
      eager_run: `run` as a graph, since jax2tf converts the operations anew in each call.
    """

    factory: Factory
    layout: Layout
    hparams: Mapping[str, float]
    init: Traced
    slots: Mapping[str, tf.TensorSpec]
    injected: Mapping[str, str]
    from_weights: tuple[str, ...]
    _steps: dict[tuple[int, ...], _Step]
    eager_run: GraphFunction = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "eager_run", tracing.function(self.run, autograph=False))

    def initial_injected(self) -> dict[str, Number]:
        """The injected hparams before the first step, as NumPy scalars."""
        if not self.injected:
            return {}
        zeros = [np.zeros(s.shape, s.dtype.as_numpy_dtype) for s in self.layout.specs]
        with enable_x64(self.layout.is_wide):
            state = self.factory(self.hparams).init(self.layout.pack(zeros))
        values = flatten_with_path(state)
        return {name: np.asarray(values[path])[()] for name, path in self.injected.items()}

    def initial_slots(self) -> "collections.OrderedDict[str, tf.Tensor]":
        """The slots before the first step; zeros for slots that depend on the weights."""
        found = self._initialize([tf.zeros(s.shape, s.dtype) for s in self.layout.specs])
        return collections.OrderedDict(
            (path, tf.zeros(spec.shape, spec.dtype) if path in self.from_weights else found[path])
            for path, spec in self.slots.items()
        )

    def _initialize(self, weights: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        hparams = [tf.constant(value, self._hparam_dtype) for value in self.hparams.values()]
        values = self.init([*hparams, *weights])
        return dict(zip(flatten_with_path(self.init.outputs), values, strict=True))

    @property
    def _hparam_dtype(self) -> tf.DType:
        return tf.float64 if self.layout.is_wide else tf.float32

    def run(self, state: State, weights: Leaves, gradients: Leaves) -> tuple[State, Leaves]:
        """Takes one step; a weight without a gradient and its slots do not change.

        Args:
          state: The hparams by name, `step` if slots depend on the weights, and the slots.
          weights: Tensors.
          gradients: Tensors and None.
        """
        slots, new_state = state[SLOTS], collections.OrderedDict(state)
        if self.from_weights:
            fresh, is_first = self._initialize(weights), tf.equal(state[STEP], 0)
            made = {
                path: tf.where(is_first, fresh[path], slots[path]) for path in self.from_weights
            }
            slots, new_state[STEP] = {**slots, **made}, state[STEP] + 1
        given = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        step = self._step(given)
        inputs = {**slots, **{path: state[name] for name, path in self.injected.items()}}
        outputs = step.traced(
            [
                *(tf.cast(state[name], self._hparam_dtype) for name in self.hparams),
                *(inputs[path] for path in step.slots),
                *(weights[i] for i in given),
                *(gradients[i] for i in given),
            ]
        )
        new_slots = inputs | dict(zip(step.slots, outputs))
        new_state[SLOTS] = collections.OrderedDict((path, new_slots[path]) for path in self.slots)
        new_weights = dict(enumerate(weights)) | dict(zip(given, outputs[len(step.slots) :]))
        return new_state, [*new_weights.values()]

    def _step(self, given: tuple[int, ...]) -> _Step:
        if given not in self._steps:
            init = _trace_init(self.factory, self.hparams, self.layout, given)
            of_all = _slot_specs(self.init)
            for path, spec in _slot_specs(init).items():
                if of_all.get(path) != spec:
                    raise ValueError(
                        "`gradients` must not be None where a slot is made of several weights, as "
                        f"{path!r} is; found None. Give zeros."
                    )
            self._steps[given] = _trace_step(self.factory, self.hparams, self.layout, given, init)
        return self._steps[given]


def build_program(factory: Factory, candidates: Mapping[str, float], layout: Layout) -> Program:
    """Traces a transformation for weights of one layout.

    A candidate becomes an hparam if the transformation can be made without knowing its value, and the
    initial state does not depend on it. A step need not read it, since that may depend on the weights,
    by a mask for example, and TFF's client work asks with one scalar weight.

    Args:
      factory: Makes the transformation from some of the `candidates`; the others keep their values.
      candidates: Numbers by name.
      layout: How optax sees the weights.

    Raises:
      ValueError: If the transformation cannot be made into a program, with the reason.
    """
    program = _with_hparams(factory, _traceable(factory, candidates, layout), layout)
    fixed = set().union(*program.init.sources)
    names = [name for i, name in enumerate(program.hparams) if i not in fixed]
    if names == list(program.hparams):
        return program
    return _with_hparams(factory, {name: candidates[name] for name in names}, layout)


def _traceable(
    factory: Factory, candidates: Mapping[str, float], layout: Layout
) -> Mapping[str, float]:
    """The candidates that need not be known when the transformation is traced."""

    def can(hparams: Mapping[str, float]) -> bool:
        try:
            _with_hparams(factory, hparams, layout)
        except ValueError:
            return False
        return True

    if not candidates or can(candidates):
        return candidates
    _with_hparams(factory, {}, layout)  # raises if the hparams are not the reason
    alone = {name: value for name, value in candidates.items() if can({name: value})}
    return alone if can(alone) else {}


def _with_hparams(factory: Factory, hparams: Mapping[str, float], layout: Layout) -> Program:
    everything = tuple(range(len(layout.specs)))
    init = _trace_init(factory, hparams, layout, everything)
    step = _trace_step(factory, hparams, layout, everything, init)
    slots = _slot_specs(init)
    injected = {}
    if isinstance(init.outputs, _INJECTED):
        paths = {path.removeprefix("hyperparams/"): path for path in step.handed_on}
        injected = {
            name: path
            for name, path in sorted(paths.items())
            if path.startswith("hyperparams/")
            and name not in (STEP, SLOTS)
            and slots[path].dtype.is_floating
            and slots[path].shape.rank == 0
            and name not in hparams
        }
    sources = dict(zip(slots, init.sources, strict=True))
    return Program(
        factory=factory,
        layout=layout,
        hparams=hparams,
        init=init,
        slots={path: spec for path, spec in slots.items() if path not in injected.values()},
        injected=injected,
        from_weights=tuple(
            path for path in slots if any(source >= len(hparams) for source in sources[path])
        ),
        steps={everything: step},
    )


def _slot_specs(init: Traced) -> dict[str, tf.TensorSpec]:
    return {path: spec_of(shaped) for path, shaped in flatten_with_path(init.outputs).items()}


def _trace_init(
    factory: Factory, hparams: Mapping[str, float], layout: Layout, given: Sequence[int]
) -> Traced:
    def init(*inputs: Leaf) -> Tree:
        weights: list[Leaf] = [None] * len(layout.specs)
        for position, weight in zip(given, inputs[len(hparams) :]):
            weights[position] = weight
        return factory(dict(zip(hparams, inputs))).init(layout.pack(weights))

    inputs = [*hparams.values(), *(layout.specs[i] for i in given)]
    return trace(init, inputs, layout.is_wide, "init")


def _trace_step(
    factory: Factory,
    hparams: Mapping[str, float],
    layout: Layout,
    given: Sequence[int],
    init: Traced,
) -> _Step:
    slots = _slot_specs(init)
    structure = jax.tree_util.tree_structure(init.outputs)

    def step(*inputs: Leaf) -> list[Leaf]:
        values = iter(inputs)
        transformation = factory({name: next(values) for name in hparams})
        state = jax.tree_util.tree_unflatten(structure, [next(values) for _ in slots])
        weights: list[Leaf] = [None] * len(layout.specs)
        gradients: list[Leaf] = [None] * len(layout.specs)
        for column in (weights, gradients):
            for position in given:
                column[position] = next(values)
        packed = layout.pack(weights)
        updates, new_state = transformation.update(layout.pack(gradients), state, packed)
        new_weights = layout.unpack(optax.apply_updates(packed, updates))
        new_slots = flatten_with_path(new_state)
        _check_slots({path: spec_of(slot) for path, slot in new_slots.items()}, slots)
        return [*new_slots.values(), *(new_weights[i] for i in given)]

    of_given = [layout.specs[i] for i in given]
    inputs = [*hparams.values(), *slots.values(), *of_given, *of_given]
    traced = trace(step, inputs, layout.is_wide, "update")
    for position, spec in zip(given, traced.outputs[len(slots) :]):
        if spec_of(spec) != layout.specs[position]:
            raise ValueError(
                "`transformation_or_factory` must keep the shapes of the weights; found "
                f"{spec_of(spec)} after a step for {layout.specs[position]}."
            )
    unchanged = zip(slots, traced.jaxpr.jaxpr.invars[len(hparams) :], traced.jaxpr.jaxpr.outvars)
    return _Step(traced, tuple(slots), frozenset(p for p, old, new in unchanged if old is new))


def _check_slots(new: Mapping[str, tf.TensorSpec], old: Mapping[str, tf.TensorSpec]) -> None:
    changed = [path for path in [*old, *new] if new.get(path) != old.get(path)]
    if changed:
        path = changed[0]

        def describe(spec: tf.TensorSpec | None) -> str:
            return "nothing" if spec is None else f"{spec.dtype.name}{spec.shape}"

        raise StateChangedError(
            "`transformation_or_factory` must keep the shapes and dtypes of its state from step to "
            f"step; found {describe(old.get(path))} at {path!r} before a step and "
            f"{describe(new.get(path))} after it."
        )
