"""Optimizers of other libraries as optimizers of TFF: one folder for each library."""
