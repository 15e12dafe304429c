"""Clients in workers of TFF, which hold nothing between two rounds."""
