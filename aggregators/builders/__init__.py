"""Entry points of rules: factories, federated computations, client works and whole processes."""
