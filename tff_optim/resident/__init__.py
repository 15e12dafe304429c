"""A learning process whose server state stays where it is computed."""

from tff_optim.resident.process import ResidentProcess

__all__ = ["ResidentProcess"]
