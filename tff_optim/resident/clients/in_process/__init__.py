"""Clients in TensorFlow of the Python process, some side by side in one function."""
