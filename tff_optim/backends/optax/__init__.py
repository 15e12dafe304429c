"""Gradient transformations of optax as optimizers of TFF."""
