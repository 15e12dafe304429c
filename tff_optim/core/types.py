"""Names for what travels through an optimizer.

TensorFlow ships no type hints, and a structure may be nested in any way: a type checker cannot look
into these, so the names are for the reader.
"""

import collections
from collections.abc import Callable
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., Any]
Json: TypeAlias = Any  # None, a bool, a number, a text, or a list or dictionary of these
Number: TypeAlias = Any  # a Python or NumPy number, or a scalar tensor
Rate: TypeAlias = Any  # a `Number`, or a schedule of Keras that gives one at each step
Hparams: TypeAlias = collections.OrderedDict[str, Number]

Structure: TypeAlias = (
    Any  # nested as `tf.nest` takes it: a leaf, or tuples, lists, mappings of them
)
Specs: TypeAlias = Structure  # of `tf.TensorSpec`s
Weights: TypeAlias = Structure  # of tensors; where a caller gives them, of variables or arrays too
Gradients: TypeAlias = Structure  # of tensors, None, and `tf.IndexedSlices` before they are read
State: TypeAlias = (
    Structure  # a mapping of an optimizer's tensors by name; whatever a transform has
)
Transformed: TypeAlias = tuple[State, Gradients]
Stepped: TypeAlias = tuple[State, Weights]

# The leaves of weights or gradients, in the order of `tf.nest.flatten`.
Leaves: TypeAlias = list[Any]
