"""Adaptive aggregation for TFF: clients weighed by what their models are worth."""

from aggregators._requirements import check_tff

check_tff()  # before the imports below, which would fail less readably

__all__: list[str] = []
