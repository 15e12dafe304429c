"""Aggregation rules: functions that return a `Rule`."""

from aggregators.rules.adaptive_mean import adaptive_mean
from aggregators.rules.centered_clipping import centered_clipping
from aggregators.rules.coordinate_median import coordinate_median
from aggregators.rules.fed_att import fed_att
from aggregators.rules.fed_dyn import fed_dyn
from aggregators.rules.fed_nova import fed_nova
from aggregators.rules.geometric_median import geometric_median
from aggregators.rules.jury_mean import jury_mean
from aggregators.rules.kept_optimizer import kept_optimizer
from aggregators.rules.loss_gated import loss_gated
from aggregators.rules.multi_krum import multi_krum
from aggregators.rules.plain_mean import plain_mean
from aggregators.rules.q_fed_avg import q_fed_avg
from aggregators.rules.redescending_mean import redescending_mean
from aggregators.rules.scaffold import scaffold
from aggregators.rules.trimmed_mean import trimmed_mean

__all__ = [
    "adaptive_mean",
    "centered_clipping",
    "coordinate_median",
    "fed_att",
    "fed_dyn",
    "fed_nova",
    "geometric_median",
    "jury_mean",
    "kept_optimizer",
    "loss_gated",
    "multi_krum",
    "plain_mean",
    "q_fed_avg",
    "redescending_mean",
    "scaffold",
    "trimmed_mean",
]
