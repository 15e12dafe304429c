"""What optimizers are made of: leaves, numbers, entries of configurations, tracing, messages."""
