"""Optimizers to JSON and back."""
