"""FedAtt: attentive aggregation."""

from typing import Literal

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.layers import Layers
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Reduced, State
from aggregators.rules.adaptive_mean import adaptive_mean
from aggregators.scores import l2_distance, spectral_distance
from aggregators.weighting import softmax

_NORMS = {"frobenius": l2_distance, "spectral": spectral_distance}


@named_rule
def fed_att(
    step_size: Number = 1.2,
    *,
    norm: Literal["frobenius", "spectral"] = "frobenius",
    temperature: Number = 1.0,
    layers: Layers = "tensor",
) -> Rule:
    """FedAtt: attentive aggregation, per tensor, where farther clients count more.

    ```
    a[k, l] = softmax over k of |d[k, l]| / temperature
    update[l] = step_size sum_k a[k, l] d[k, l]
    ```

    with `d[k, l]` tensor `l` of client `k`'s update. Numbers of examples do not count. It takes one pass
    and needs the update alone, so TFF's own builders take it too. `step_size` and `temperature` are
    hyperparameters.

    Args:
      step_size: Above 0; 1.2 in the authors' later version, 1.0 in the first.
      norm: `"spectral"` as in the authors' code, whose norm of a matrix is its largest singular
        value, or `"frobenius"` as in the ports of it. The same for vectors.
      temperature: At least 1e-4; 1 in the source.
      layers: As for `adaptive_mean`.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> fed_att(norm="spectral").needs.names
      ('spectral_distance',)

    Source: Ji, Pan, Long, Li, Jiang, Huang, Learning Private Neural Language Modeling with
    Attentive Aggregation, 2019.
    """
    checks.word("norm", norm, *_NORMS)
    step = hparam("step_size", step_size, 0.0, above=True)
    weighting = softmax(temperature, prefer="far", scale=None, times_examples=False)
    mean = adaptive_mean(_NORMS[norm], weighting, layers=layers)

    def server(state: State, reduced: Reduced) -> RuleResult:
        result = mean.server(state, reduced)
        update = [tensor * tf.cast(state["step_size"], tensor.dtype) for tensor in result.update]
        return result._replace(update=update)

    hparams = {"step_size": step, **mean.hparams}
    return attrs.evolve(mean, server=server, hparams=hparams)
