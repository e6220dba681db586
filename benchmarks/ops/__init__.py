"""Each op beside its peers: time, memory, and whether it is right at the timed shape."""
