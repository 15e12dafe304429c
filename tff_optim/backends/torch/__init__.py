"""Optimizers of torch as optimizers of TFF, in a process of their own."""
