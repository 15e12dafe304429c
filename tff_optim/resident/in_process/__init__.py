"""Processes whose states live in the Python process."""
