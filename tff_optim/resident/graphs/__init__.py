"""Graphs of TFF's computations: read, changed, and converted to TensorFlow functions."""
