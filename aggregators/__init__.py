"""Adaptive aggregation for TFF: clients weighed by what their models are worth."""

from aggregators._requirements import check_tff

check_tff()  # before the imports below, which would fail less readably

from aggregators import scores, weighting
from aggregators.adaptive_mean import AdaptiveMean, AdaptiveMeanFactory, federated_adaptive_mean
from aggregators.client_work import build_score_weighted_client_work, build_scored_client_work
from aggregators.loss_rules import FedNovaFactory, LossGatedMeanFactory, QFedAvgFactory
from aggregators.one_pass import ScoredUpdate
from aggregators.printing import federated_print
from aggregators.processes import (
    build_adaptive_fed_avg,
    build_fed_att,
    build_fed_kl,
    build_fed_med,
    build_fed_nova,
    build_q_fed_avg,
    compose_fed_avg,
)
from aggregators.reduction import (
    Reduction,
    federated_reduce,
    federated_reduction,
    reduction_from_merge,
    zip_reductions,
)
from aggregators.weighting import Weighting

__all__ = [
    "AdaptiveMean",
    "AdaptiveMeanFactory",
    "FedNovaFactory",
    "LossGatedMeanFactory",
    "QFedAvgFactory",
    "Reduction",
    "ScoredUpdate",
    "Weighting",
    "build_adaptive_fed_avg",
    "build_fed_att",
    "build_fed_kl",
    "build_fed_med",
    "build_fed_nova",
    "build_q_fed_avg",
    "build_score_weighted_client_work",
    "build_scored_client_work",
    "compose_fed_avg",
    "federated_adaptive_mean",
    "federated_print",
    "federated_reduce",
    "federated_reduction",
    "reduction_from_merge",
    "scores",
    "weighting",
    "zip_reductions",
]
