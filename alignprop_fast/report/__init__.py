"""What a run leaves to look at: pictures, curves, records, a model card."""
