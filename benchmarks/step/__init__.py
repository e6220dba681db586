"""Training steps and their parts: seconds and bytes, measured and planned."""
