"""Loading pipelines: from a folder, the Hub or a single file."""
