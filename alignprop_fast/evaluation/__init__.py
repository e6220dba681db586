"""Judging a model on prompts it was not trained on, also while it trains."""
