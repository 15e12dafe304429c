"""Rules and their parts."""
