"""Functions that jax traces, as plain TensorFlow operations, and the layout of weights for jax."""

import collections
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias

import attrs
import jax
import tensorflow as tf
from jax.experimental import enable_x64, jax2tf

from tff_optim.backends.common import check_weight_names
from tff_optim.core.messages import refusal, shorten, shown
from tff_optim.core.types import Function, Leaf, Structure, Weights

# A structure that jax takes.
Tree: TypeAlias = Structure

_QUOTED = re.compile(r"'(\w+)'")


@attrs.frozen(eq=False)
class Layout:
    """How optax sees the weights.

    Attributes:
      tree: Positions of the weights in the order of `tf.nest.flatten`, nested in dictionaries and lists.
        TFF passes weights in a list on the server and in a tuple on clients, and one tree of masks or
        labels matches both.
      specs: Shapes and dtypes by position.
    """

    tree: Tree
    specs: tuple[tf.TensorSpec, ...]

    def pack(self, values: Sequence[Leaf]) -> Tree:
        """Values by position as optax sees them; jax takes None for an empty tree."""
        return jax.tree_util.tree_map(lambda position: values[position], self.tree)

    def unpack(self, tree: Tree) -> list[Leaf]:
        """Values that optax returns, by position; None where it returns nothing."""
        values: list[Leaf] = [None] * len(self.specs)
        for path, value in flatten_with_path(tree).items():
            values[self._positions[path]] = value
        return values

    @property
    def _positions(self) -> dict[str, int]:
        return flatten_with_path(self.tree)

    @property
    def key(self) -> Hashable:
        """A hashable stand-in, equal for equal layouts."""
        return repr(self.tree), self.specs

    @property
    def is_wide(self) -> bool:
        """Whether a weight has 64 bits, which jax narrows by default."""
        return any(spec.dtype.size > 4 for spec in self.specs)


def arrange(weights: Weights, names: Sequence[str] | None) -> Layout:
    """The layout of `weights`, a structure of tensors or specs; by name if there are names."""
    flat = tf.nest.flatten(weights)
    specs = tuple(tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in flat)
    if names is None:
        return Layout(_containers(tf.nest.pack_sequence_as(weights, range(len(flat)))), specs)
    check_weight_names(names, len(flat))
    return Layout({name: position for position, name in enumerate(names)}, specs)


def _containers(structure: Weights) -> Tree:
    if isinstance(structure, Mapping):
        return {str(key): _containers(value) for key, value in structure.items()}
    if attrs.has(type(structure)):
        names = [field.name for field in attrs.fields(type(structure))]
        return {name: _containers(getattr(structure, name)) for name in names}
    if hasattr(structure, "_asdict"):
        return {name: _containers(value) for name, value in structure._asdict().items()}
    if isinstance(structure, list | tuple):
        return [_containers(value) for value in structure]
    return structure


def flatten_with_path(tree: Tree) -> "collections.OrderedDict[str, Leaf]":
    """Leaves by path: keys, positions and names of fields, joined by slashes."""
    found: collections.OrderedDict[str, Leaf] = collections.OrderedDict()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = "/".join(str(_key(key)) for key in keys)
        if path in found:
            raise ValueError(
                "`transformation_or_factory` must have a state whose paths differ when joined by "
                f"'/'; found {shown(path)} twice."
            )
        found[path] = leaf
    return found


def _key(key: object) -> object:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


# --------------------------------------------------------------------------------- traced functions


class StateChangedError(ValueError):
    """A step would return a state with other shapes or dtypes than its argument."""


@attrs.frozen(eq=False)
class Traced:
    """A function that jax has traced.

    Attributes:
      jaxpr: The traced computation.
      outputs: Shapes and dtypes of its results, nested like them.
      sources: For each leaf of the outputs, the positions of the inputs that it depends on.
      wide: Whether 64-bit numbers are kept.
    """

    jaxpr: jax.core.ClosedJaxpr
    outputs: Tree
    sources: list[set[int]]
    wide: bool

    def __call__(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Computes the leaves of the outputs in TensorFlow."""
        translated = jax2tf.convert(
            jax.core.jaxpr_as_fun(self.jaxpr),
            with_gradient=False,
            native_serialization=False,
            enable_xla=False,
        )
        with enable_x64(self.wide):
            try:
                return list(translated(*inputs))
            except NotImplementedError as error:
                raise refusal(
                    "transformation_or_factory",
                    "be made of operations that jax2tf can write without XLA, which TFF's worker lacks",
                    f"one that it cannot: {error} Write the transformation without it",
                ) from error


def trace(function: Function, inputs: Sequence[Leaf], wide: bool, method: str) -> Traced:
    """Traces a method of a transformation, as a function of flat inputs.

    Inputs are specs, or Python numbers, which take the dtype of the other operand, as usual.
    """
    shaped = [
        jax.ShapeDtypeStruct(tuple(x.shape), x.dtype.as_numpy_dtype)
        if isinstance(x, tf.TensorSpec)
        else x
        for x in inputs
    ]
    try:
        with enable_x64(wide):
            jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(*shaped)
    except StateChangedError:
        raise
    except Exception as error:  # of optax, of jax, or of the user's own transformation
        raise _failure(error, method) from error
    return Traced(jaxpr, outputs, _sources(jaxpr.jaxpr), wide)


def _failure(error: Exception, method: str) -> ValueError:
    """The error to raise for an exception in a method of a transformation."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, TypeError) and "required" in text and "argument" in text:
        names = ", ".join(_QUOTED.findall(text)) or text
        return ValueError(
            "`transformation_or_factory` must need no more than gradients, state and weights, since "
            f"TFF gives an optimizer nothing else; found that its `{method}` needs the extra arguments: "
            f"{names}."
        )
    # TensorFlow got a tracer of jax, so the transformation holds a tensor.
    advice = ""
    if "Tracer" in text and ("Tensor" in text or " of op " in text):
        advice = (
            " If its rate is a tensor of a TFF computation, give the rate by itself: "
            "`build_optax_optimizer(optax.adam, learning_rate=r)`."
        )
    return ValueError(
        f"`transformation_or_factory` must run on these weights; found that its `{method}` fails: "
        f"{type(error).__name__}: {shorten(text)}{advice}"
    )


def _sources(jaxpr: jax.core.Jaxpr) -> list[set[int]]:
    """The positions of the inputs that each output of a jaxpr may depend on."""
    known = {variable: {i} for i, variable in enumerate(jaxpr.invars)}

    def of(atoms: Iterable[jax.core.Atom]) -> set[int]:
        variables = [a for a in atoms if not isinstance(a, jax.core.Literal)]
        return set().union(*(known.get(variable, set()) for variable in variables))

    for equation in jaxpr.eqns:
        sources = of(equation.invars)
        known.update((variable, sources) for variable in equation.outvars)
    return [of([variable]) for variable in jaxpr.outvars]


def spec_of(shaped: Leaf) -> tf.TensorSpec:
    """Shape and dtype of an array that jax traces, as TensorFlow's."""
    return tf.TensorSpec(shaped.shape, tf.as_dtype(shaped.dtype))
