"""Training: the public config and trainer, one update of the weights, checkpoints and resume."""
