"""What only makes the bundled models: nothing else in the package imports it."""
