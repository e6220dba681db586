"""Evaluates a model on prompts that it was not trained on, also during training."""
