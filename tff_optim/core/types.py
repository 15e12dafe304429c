"""Names for what travels through an optimizer.

TensorFlow ships no type hints, and a structure may be nested in any way: a type checker cannot look
into these, so the names are for the reader.
"""

import collections
from collections.abc import Callable
from typing import Any, TypeAlias

Structure: TypeAlias = Any
"""Something nested as `tf.nest` takes it: one leaf, or tuples, lists and mappings of them."""

Function: TypeAlias = Callable[..., Any]
"""A function, whatever it takes and returns."""

Weights: TypeAlias = Structure
"""A structure of tensors; where a caller gives them, of variables or arrays too."""

Gradients: TypeAlias = Structure
"""A structure like the weights; a leaf may be None, or a `tf.IndexedSlices` before it is read."""

Specs: TypeAlias = Structure
"""A structure of `tf.TensorSpec`s like the weights."""

State: TypeAlias = Any
"""The state of an optimizer, a mapping of tensors by name, or that of a gradient transform."""

Hparams: TypeAlias = collections.OrderedDict[str, Any]
"""Hyper-parameters that are numbers, by name: Python or NumPy numbers, or scalar tensors."""

Number: TypeAlias = Any
"""A Python or NumPy number, or a scalar tensor."""

Rate: TypeAlias = Any
"""A `Number`, or a schedule of Keras that gives one at each step."""

Json: TypeAlias = Any
"""None, a bool, a number, a text, or a list or dictionary of these."""
