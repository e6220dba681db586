"""What only makes models: training of the bundled ones, and pipelines with random weights. No other part imports it."""
