"""What fine-tuning with a reward does to the pictures of the bundled model."""
