"""States on a device of the Python process, and references to them."""
