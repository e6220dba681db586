"""The effect of fine-tuning with a reward on the pictures of the bundled model."""
