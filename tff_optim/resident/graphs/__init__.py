"""The graphs of computations of TFF: read, changed, and turned into functions of TensorFlow."""
