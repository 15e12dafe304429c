"""The work of one client."""
