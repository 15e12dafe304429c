"""What rules are used through: factories, steps of a round, client works and whole processes."""
