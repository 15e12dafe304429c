"""Names for the values that travel between a server, its clients and a rule.

TensorFlow and TFF have no type hints, so a type checker takes their classes for `Any`. The names still
tell readers what a value is. Arbitrarily nested values are all called `Structure`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import tensorflow as tf
import tensorflow_federated as tff

# Tensors in tuples, lists, mappings and attrs classes, nested in any way; a tensor alone, too.
Structure: TypeAlias = Any

# Flat tensors, in the order of `tf.nest.flatten`.
Tensors: TypeAlias = Sequence[tf.Tensor]
Weights: TypeAlias = Tensors
# A gradient is None if the loss does not depend on the weight.
Gradients: TypeAlias = Sequence[tf.Tensor | None]
Specs: TypeAlias = Sequence[tf.TensorSpec]

# A rule's state on the server, the part that a client sends, and the reduction of the parts.
State: TypeAlias = Mapping[str, Structure]
Part: TypeAlias = Structure
Reduced: TypeAlias = Structure
Measurements: TypeAlias = Mapping[str, Structure]

# Of a model and its optimizer.
ModelFn: TypeAlias = (
    tff.learning.models.FunctionalModel | Callable[[], tff.learning.models.VariableModel]
)
MetricsAggregator: TypeAlias = Callable[..., tff.Computation]
ModelWeights: TypeAlias = tff.learning.models.ModelWeights
Optimizer: TypeAlias = tff.learning.optimizers.Optimizer
OptimizerState: TypeAlias = Structure
Hyperparameters: TypeAlias = Structure
Batch: TypeAlias = Structure
Predictions: TypeAlias = Structure
Labels: TypeAlias = Structure
Metrics: TypeAlias = Structure
