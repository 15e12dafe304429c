"""Aggregation rules: functions that return a `Rule`."""

from aggregators.rules.adaptive import adaptive_mean
from aggregators.rules.fed_att import fed_att
from aggregators.rules.fed_dyn import fed_dyn
from aggregators.rules.fed_nova import fed_nova
from aggregators.rules.jury import jury_mean
from aggregators.rules.kept_optimizer import kept_optimizer
from aggregators.rules.loss_gated import loss_gated
from aggregators.rules.plain import plain_mean
from aggregators.rules.q_fed_avg import q_fed_avg
from aggregators.rules.redescending import redescending_mean
from aggregators.rules.scaffold import scaffold

__all__ = [
    "adaptive_mean",
    "fed_att",
    "fed_dyn",
    "fed_nova",
    "jury_mean",
    "kept_optimizer",
    "loss_gated",
    "plain_mean",
    "q_fed_avg",
    "redescending_mean",
    "scaffold",
]
