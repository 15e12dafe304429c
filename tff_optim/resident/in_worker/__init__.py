"""Processes whose states live in a worker."""
