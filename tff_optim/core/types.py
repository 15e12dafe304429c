"""Names for what travels through an optimizer, a process and a run.

TensorFlow and TFF ship no type hints, and a structure may be nested in any way: a type checker cannot
look into these, so the names are for the reader.
"""

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

# Any object of Python: to check, to compare or to print.
Value: TypeAlias = Any
# Arguments or attributes by name.
Named: TypeAlias = dict[str, Value]
# Any function.
Function: TypeAlias = Callable[..., Any]
# What `tf.function` makes of one, and what it makes of that for arguments of some types.
GraphFunction: TypeAlias = Any
# What attrs, or a function, makes of a field of a class: its annotation says what the field holds.
Declared: TypeAlias = Any

# None, a bool, a number, a text, or a list or dictionary of these.
Json: TypeAlias = Any
# A mapping as a file or a message holds it.
Record: TypeAlias = dict[str, Json]

# A Python or NumPy number, or a scalar tensor.
Number: TypeAlias = Any
# A `Number`, or a schedule of Keras that gives one at each step.
Rate: TypeAlias = Any
# The numbers of an optimizer that may change between steps, by name.
Hparams: TypeAlias = collections.OrderedDict[str, Number]

# Something nested as `tf.nest` takes it: a leaf, or tuples, lists and mappings of them.
Structure: TypeAlias = Any
# A structure of `tf.TensorSpec`s.
Specs: TypeAlias = Structure
# A structure of tensors; where a caller gives them, of variables or arrays too.
Weights: TypeAlias = Structure
# A structure of tensors and None; before they are read, of `tf.IndexedSlices` too.
Gradients: TypeAlias = Structure
# A mapping of an optimizer's tensors by name; whatever a transform has; the state of a process.
State: TypeAlias = Structure
# What a transform returns.
Transformed: TypeAlias = tuple[State, Gradients]
# What a step returns.
Stepped: TypeAlias = tuple[State, Weights]
# What a process or an evaluation measures: a structure of numbers and arrays.
Metrics: TypeAlias = Structure

# A leaf of a structure: a tensor, a variable, an array or a number.
Leaf: TypeAlias = Any
# Leaves in the order of `tf.nest.flatten`.
Leaves: TypeAlias = list[Leaf]
# Tensors in that order.
Tensors: TypeAlias = Sequence[tf.Tensor]
# Arrays in that order.
Arrays: TypeAlias = Sequence[np.ndarray]

# The data of a client: a `tf.data.Dataset`, a list of batches, or a structure of these.
ClientDataset: TypeAlias = Any
# The data of the clients of a round.
Cohort: TypeAlias = Sequence[ClientDataset]
# What names a client.
ClientId: TypeAlias = Hashable

# What TFF compiles and runs: `initialize`, `next`, a part of these.
Computation: TypeAlias = tff.Computation
# What trains a model by rounds: TFF's own processes, and those of this package.
Process: TypeAlias = tff.templates.IterativeProcess
# A message of protocol buffers: a computation, a value or a request of TFF's.
Proto: TypeAlias = Any
# A node of a serialized graph, and such nodes by name.
Node: TypeAlias = tf.compat.v1.NodeDef
Nodes: TypeAlias = Mapping[str, Node]
# An operation of a graph.
Operation: TypeAlias = tf.Operation
