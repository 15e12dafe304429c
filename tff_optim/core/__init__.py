"""Building blocks of optimizers: leaves, numbers, entries of configurations, tracing, messages."""
