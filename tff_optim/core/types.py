"""Names for the values that travel through an optimizer, a process and a run.

TensorFlow and TFF have no type hints, and structures may be nested in any way, so a type checker cannot
check these. The names are for readers.
"""

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

Value: TypeAlias = Any  # any object of Python: to check, to compare or to print
Named: TypeAlias = dict[str, Value]  # arguments or attributes by name
Function: TypeAlias = Callable[..., Any]
GraphFunction: TypeAlias = Any  # what `tf.function` makes, and its concrete functions
Declared: TypeAlias = (
    Any  # what makes a field of an attrs class, whose annotation says what it holds
)

Json: TypeAlias = Any  # None, a bool, a number, a text, or a list or dictionary of these
Record: TypeAlias = dict[str, Json]  # a mapping as a file or a message holds it

Number: TypeAlias = Any  # a Python or NumPy number, or a scalar tensor
Rate: TypeAlias = Any  # a `Number`, or a schedule of Keras that gives one at each step
Hparams: TypeAlias = collections.OrderedDict[str, Number]  # what may change between steps, by name

Structure: TypeAlias = (
    Any  # nested as `tf.nest` takes it: a leaf, or tuples, lists, mappings of them
)
Specs: TypeAlias = Structure  # of `tf.TensorSpec`s
Weights: TypeAlias = Structure  # of tensors; where a caller gives them, of variables or arrays too
Gradients: TypeAlias = Structure  # of tensors, None, and `tf.IndexedSlices` before they are read
State: TypeAlias = Structure  # of an optimizer, a transform or a process; a mapping in an optimizer
Transformed: TypeAlias = tuple[State, Gradients]  # what a transform returns
Stepped: TypeAlias = tuple[State, Weights]  # what a step returns
Metrics: TypeAlias = Structure  # of numbers and arrays that a process or an evaluation measures

Leaf: TypeAlias = Any  # of a structure: a tensor, a variable, an array or a number
Leaves: TypeAlias = list[Leaf]  # in the order of `tf.nest.flatten`
Tensors: TypeAlias = Sequence[tf.Tensor]  # in that order
Arrays: TypeAlias = Sequence[np.ndarray]  # in that order

ClientDataset: TypeAlias = Any  # a `tf.data.Dataset`, a list of batches, or a structure of these
Cohort: TypeAlias = Sequence[ClientDataset]  # the data of the clients of a round
ClientId: TypeAlias = Hashable  # what names a client

Computation: TypeAlias = tff.Computation  # what TFF compiles and runs
Process: TypeAlias = (
    tff.templates.IterativeProcess
)  # TFF's own processes, and those of this package
Proto: TypeAlias = Any  # a message of protocol buffers: a computation, a value, a request of TFF's
Node: TypeAlias = tf.compat.v1.NodeDef  # of a serialized graph
Operation: TypeAlias = tf.Operation  # of a graph
