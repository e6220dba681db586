"""Makes models: trains the bundled ones, and writes pipelines with random weights. No other part imports this one."""
