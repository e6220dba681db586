"""Compares each op with its peers: time, memory, and correctness at the timed shape."""
