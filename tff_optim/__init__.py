"""Keras optimizers, and pipelines around them, as pure TFF optimizers."""

from tff_optim._requirements import check_tff

check_tff()  # before the imports below, which would fail less readably

from tff_optim.resident import ResidentProcess

__all__ = ["ResidentProcess"]
