"""Writes the results of a run: pictures, curves, records, a model card."""
