"""LoRA adapters (Hu et al. 2021) in a pipeline, in files, and merged."""
