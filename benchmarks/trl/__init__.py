"""Beside trl, whose AlignPropTrainer this package replaces."""
