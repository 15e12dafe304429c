"""Clients in TFF's workers, which keep nothing between rounds."""
