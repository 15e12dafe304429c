"""Where the clients of a round are trained: in the Python process, or in workers of TFF."""
