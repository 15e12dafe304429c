"""What one client runs."""
