"""Rounds as TensorFlow functions of the Python process, with the state in variables on a device."""
