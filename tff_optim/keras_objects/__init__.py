"""Schedules, regularizers, constraints and optimizers of Keras as values."""
