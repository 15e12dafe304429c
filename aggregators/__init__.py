"""Adaptive aggregation for TFF: clients weighed by what their models are worth."""

from aggregators._requirements import check_tff

check_tff()  # before the imports below, which would fail less readably

from aggregators import privacy, rules, scores, weighted_mean, weighting
from aggregators.builders.client_work import build_client_work
from aggregators.builders.fed_avg import build_fed_avg, compose_fed_avg
from aggregators.builders.federated_print import federated_print
from aggregators.builders.federated_rule import FederatedRule, federated_rule, rule_state
from aggregators.builders.processes import (
    build_fed_att,
    build_fed_kl,
    build_fed_med,
    build_fed_nova,
    build_q_fed_avg,
    build_scaffold,
)
from aggregators.builders.rule_factory import RuleFactory
from aggregators.builders.self_weighting import build_self_weighting_client_work
from aggregators.client.example_clipping import ExampleClipping
from aggregators.client.states import ClientStates
from aggregators.core.candidates import Candidates, class_error
from aggregators.core.collected import Collected, collected
from aggregators.core.hyperparameters import hparam
from aggregators.core.needs import Needs
from aggregators.core.reduction import (
    Reduction,
    federated_reduce,
    zip_reductions,
)
from aggregators.core.rule import PerLayer, Rule, RuleResult, named_rule
from aggregators.core.stateful_client import StatefulClient
from aggregators.core.update import ClientUpdate, MeasuredUpdate
from aggregators.scores import Score
from aggregators.weighting import Weighting

__all__ = [
    "Candidates",
    "ClientStates",
    "ClientUpdate",
    "Collected",
    "ExampleClipping",
    "FederatedRule",
    "MeasuredUpdate",
    "Needs",
    "PerLayer",
    "Reduction",
    "Rule",
    "RuleFactory",
    "RuleResult",
    "Score",
    "StatefulClient",
    "Weighting",
    "build_client_work",
    "build_fed_att",
    "build_fed_avg",
    "build_fed_kl",
    "build_fed_med",
    "build_fed_nova",
    "build_q_fed_avg",
    "build_scaffold",
    "build_self_weighting_client_work",
    "class_error",
    "collected",
    "compose_fed_avg",
    "federated_print",
    "federated_reduce",
    "federated_rule",
    "hparam",
    "named_rule",
    "privacy",
    "rule_state",
    "rules",
    "scores",
    "weighted_mean",
    "weighting",
    "zip_reductions",
]
