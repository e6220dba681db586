"""Comparison with trl, whose AlignPropTrainer this package replaces."""
