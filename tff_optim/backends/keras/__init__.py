"""Keras optimizers: the only folder that reads their private names."""
